"""Beam search finds what exhaustive search finds, and is greedy with one hypothesis."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from egtrain.models.decoding import beam_search

BEGIN, END, WORDS = 0, 1, 4


@dataclass
class Histories:
    """What the toy model remembers: all that was said [rows, length], and of which sentence."""

    words: Tensor
    sentence: Tensor

    def select(self, rows: Tensor) -> None:
        self.words, self.sentence = self.words[rows], self.sentence[rows]


class Toy:
    """Logits that are any function of the sentence and of everything that was said."""

    def __init__(self, seed: int, spread: float = 1.5) -> None:
        self.seed = seed
        self.spread = spread
        self.rows: list[int] = []

    def begin(self, source: Tensor) -> Histories:
        return Histories(torch.empty(len(source), 0, dtype=torch.long), source[:, 0])

    def step(self, subwords: Tensor, state: Histories) -> Tensor:
        state.words = torch.cat([state.words, subwords[:, None]], dim=1)
        self.rows.append(len(subwords))
        return torch.stack(
            [
                self.logits(int(s), w.tolist())
                for s, w in zip(state.sentence, state.words, strict=True)
            ]
        )

    def logits(self, sentence: int, said: list[int]) -> Tensor:
        number = self.seed * 1_000_003 + sentence
        for word in said:
            number = number * 31 + word + 1
        return (
            self.spread
            * torch.randn(WORDS, generator=torch.Generator().manual_seed(number % 2**62)).double()
        )


def log_probability(model: Toy, sentence: int, words: list[int]) -> float:
    said, total = [BEGIN], 0.0
    for word in [*words, END]:
        total += float(model.logits(sentence, said).log_softmax(0)[word])
        said.append(word)
    return total


def best_of_all(model: Toy, sentence: int, limit: int, penalty: float) -> list[int]:
    """Return the best of all translations of at most `limit` words, the end counted."""
    others = [word for word in range(WORDS) if word != END]
    every = [
        list(words) for length in range(limit) for words in itertools.product(others, repeat=length)
    ]
    return max(
        every,
        key=lambda words: log_probability(model, sentence, words) / (len(words) + 1) ** penalty,
    )


def search(
    model: Toy, sentences: list[int], beam: int, limits: list[int], penalty: float = 1.0
) -> list[list[int]]:
    source = torch.tensor(sentences)[:, None]
    return beam_search(
        model,
        source,
        beam=beam,
        limits=torch.tensor(limits),
        length_penalty=penalty,
        begin=BEGIN,
        end=END,
    )


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_of_all_translations(seed: int, penalty: float) -> None:
    model = Toy(seed)
    limits = [1, 2, 3, 5]
    found = search(model, [0, 1, 2, 3], beam=400, limits=limits, penalty=penalty)
    assert found == [
        best_of_all(model, sentence, limit, penalty) for sentence, limit in enumerate(limits)
    ]


def naive_beam_search(
    model: Toy, sentence: int, beam: int, limit: int, penalty: float
) -> list[int]:
    """One sentence and one continuation at a time; finished hypotheses keep their places."""
    live, finished = [(0.0, [BEGIN])], []
    for length in range(1, limit + 1):
        following = []
        for total, said in live:
            log = model.logits(sentence, said).log_softmax(0).tolist()
            following += [
                (total + log[w], [*said, w]) for w in range(WORDS) if length < limit or w == END
            ]
        best = sorted(following, reverse=True)[: beam - len(finished)]
        finished += [
            (total / length**penalty, said[1:-1]) for total, said in best if said[-1] == END
        ]
        live = [(total, said) for total, said in best if said[-1] != END]
    return max(finished)[1]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_a_narrow_beam_keeps_as_many_hypotheses_as_it_says(beam: int, penalty: float) -> None:
    model = Toy(6)
    found = search(model, list(range(60)), beam, [6] * 60, penalty)
    assert found == [naive_beam_search(model, sentence, beam, 6, penalty) for sentence in range(60)]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_one_hypothesis_is_greedy(penalty: float) -> None:
    model = Toy(9)
    for sentence in range(20):
        said: list[int] = []
        while len(said) < 6:
            word = int(model.logits(sentence, [BEGIN, *said]).argmax())
            if word == END:
                break
            said.append(word)
        assert search(model, [sentence], beam=1, limits=[7], penalty=penalty) == [said]


def test_a_translation_does_not_depend_on_those_beside_it() -> None:
    model = Toy(2)
    together = search(model, list(range(12)), beam=3, limits=[4 + s % 4 for s in range(12)])
    assert together == [search(model, [s], beam=3, limits=[4 + s % 4])[0] for s in range(12)]


def score(model: Toy, sentence: int, words: list[int]) -> float:
    return log_probability(model, sentence, words) / (len(words) + 1)


def test_more_hypotheses_are_better_in_the_mean() -> None:
    model = Toy(4)
    means = []
    for beam in (1, 2, 4, 64):
        found = search(model, list(range(60)), beam, [6] * 60)
        means.append(sum(score(model, s, words) for s, words in enumerate(found)) / 60)
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.05


def test_the_search_ends_as_soon_as_nothing_can_be_better() -> None:
    """The first subword almost surely ends the sentence; all longer hypotheses are worse."""

    class Sure(Toy):
        def logits(self, sentence: int, said: list[int]) -> Tensor:
            return torch.tensor(
                [0.0, 40.0 if len(said) == 1 else -5.0, 0.0, 0.0], dtype=torch.float64
            )

    model = Sure(0)
    assert search(model, [0, 1, 2], beam=3, limits=[50] * 3) == [[], [], []]
    assert model.rows == [3]


def test_a_limit_ends_every_translation() -> None:
    class Endless(Toy):
        def logits(self, sentence: int, said: list[int]) -> Tensor:
            return torch.tensor([0.0, -math.inf, 1.0, 0.0], dtype=torch.float64).clamp(min=-80)

    assert search(Endless(0), [0, 1], beam=2, limits=[3, 5]) == [[2, 2], [2, 2, 2, 2]]
