"""Words from a hidden Markov source: a text without a download, with a known best perplexity."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Words = NDArray[np.int64]

STATES = 10
SUCCESSORS = 2
"""States that can follow each state."""
WORDS_OF_STATE = 4
"""Words that a state can emit; each belongs to two states, so that it does not reveal the state."""
WORDS = STATES * WORDS_OF_STATE // 2
"""Words, without `<unk>` and `<eos>`."""
SENTENCE_END = 0.08
"""Probability that `<eos>` is emitted, whatever the state."""
_DATA_SEED = 4


@dataclass(frozen=True)
class Source:
    """A hidden Markov source: it emits a word in its state, then goes to the next state."""

    first: Floats
    """Probability of each state at the beginning [states]."""
    transition: Floats
    """Probability of the next state [from, to]."""
    emission: Floats
    """Probability of each word [states, words]."""


@dataclass(frozen=True)
class SyntheticText:
    """The splits of a text from one source, as indices of words, and the truth about them."""

    train: Words
    validation: Words
    test: Words
    vocabulary: tuple[str, ...]
    source: Source
    floor: float
    """Perplexity of the test text for a model that knows the source, the best to be expected."""


def make_synthetic_text(train: int = 240_000, held_out: int = 10_000) -> SyntheticText:
    """Draw the texts, the same on every call, in about two seconds."""
    bits = np.random.PCG64(_DATA_SEED)
    source = _drawn_source(bits)
    first, second, third = (
        _drawn_text(bits, source, length) for length in (train, held_out, held_out)
    )
    names = [consonant + vowel + "r" for consonant in "bdfgk" for vowel in "aeiou"]
    vocabulary = ("<unk>", "<eos>", *names[:WORDS])
    return SyntheticText(
        first, second, third, vocabulary, source, floor=float(np.exp(entropy_of(source, third)))
    )


def entropy_of(source: Source, words: Words) -> float:
    """Return −log p(words) in nats per word, by the forward algorithm (Rabiner 1989)."""
    nats = 0.0
    belief = source.first
    for word in words.tolist():
        joint = belief * source.emission[:, word]
        probability = joint.sum()
        nats -= np.log(probability)
        belief = (joint / probability) @ source.transition
    return float(nats / len(words))


def _uniform(bits: np.random.PCG64, count: int) -> Floats:
    # From PCG64's raw bits, which never change, unlike NumPy's distributions.
    return (bits.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _weights(bits: np.random.PCG64, chosen: NDArray[np.intp], among: int) -> Floats:
    """Return probabilities [among], random and not small for the chosen ones, zero for others."""
    weights = np.zeros(among)
    weights[chosen] = 0.3 + _uniform(bits, len(chosen)) ** 2
    scaled: Floats = weights / weights.sum()
    return scaled


def _drawn_source(bits: np.random.PCG64) -> Source:
    following = [
        np.argsort(_uniform(bits, STATES), kind="stable")[:SUCCESSORS] for _ in range(STATES)
    ]
    transition = np.stack([_weights(bits, chosen, STATES) for chosen in following])
    order = np.argsort(_uniform(bits, WORDS), kind="stable")
    spoken = [
        order[(state * WORDS // STATES + np.arange(WORDS_OF_STATE)) % WORDS]
        for state in range(STATES)
    ]
    said = np.stack([_weights(bits, chosen, WORDS) for chosen in spoken])
    ends = np.full((STATES, 1), SENTENCE_END)
    emission = np.concatenate([np.zeros((STATES, 1)), ends, (1 - SENTENCE_END) * said], axis=1)
    return Source(np.full(STATES, 1 / STATES), transition, emission)


def _drawn_text(bits: np.random.PCG64, source: Source, length: int) -> Words:
    places, choices = _uniform(bits, length + 1), _uniform(bits, length)
    # Without the last entry, so that rounding cannot exceed it.
    next_state = source.transition.cumsum(axis=1)[:, :-1]
    next_word = source.emission.cumsum(axis=1)[:, :-1]
    words = np.empty(length, np.int64)
    state = int(np.searchsorted(source.first.cumsum()[:-1], places[0], side="right"))
    for place in range(length):
        words[place] = np.searchsorted(next_word[state], choices[place], side="right")
        state = int(np.searchsorted(next_state[state], places[place + 1], side="right"))
    return words
