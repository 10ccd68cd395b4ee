"""The embedded text: always the same, and with a floor that is computed and cannot be beaten."""

import hashlib
import itertools
import math

import numpy as np

from egtrain.data.synthetic_text import WORDS, Source, entropy_of, make_synthetic_text

TEXT = make_synthetic_text()


def test_the_text_is_the_same_on_every_call_and_machine() -> None:
    again = make_synthetic_text()
    assert all(
        np.array_equal(getattr(TEXT, part), getattr(again, part))
        for part in ("train", "validation", "test")
    )
    digest = hashlib.sha256(
        b"".join(part.tobytes() for part in (TEXT.train, TEXT.validation, TEXT.test))
    )
    assert digest.hexdigest()[:16] == "bd9645e6807c2707"


def test_every_word_is_known_and_used_and_none_is_unknown() -> None:
    assert len(TEXT.vocabulary) == len(set(TEXT.vocabulary)) == WORDS + 2
    for part in (TEXT.train, TEXT.validation, TEXT.test):
        assert set(part.tolist()) == set(range(1, WORDS + 2))


def test_the_entropy_is_that_of_all_paths_of_states() -> None:
    """The forward algorithm against the sum over every sequence of hidden states."""
    source = Source(
        np.array([0.6, 0.4]),
        np.array([[0.7, 0.3], [0.2, 0.8]]),
        np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]),
    )
    words = np.array([0, 2, 2, 1, 0])
    probability = 0.0
    for path in itertools.product(range(2), repeat=len(words)):
        one = source.first[path[0]]
        for place, state in enumerate(path):
            one *= source.emission[state, words[place]]
            if place + 1 < len(path):
                one *= source.transition[state, path[place + 1]]
        probability += one
    assert math.isclose(
        entropy_of(source, words), -math.log(probability) / len(words), rel_tol=1e-12
    )


def test_words_before_the_last_tell_more_than_the_last_one_alone() -> None:
    """A model without a memory is 30 % above the floor: there is something to learn for a recurrent
    net.
    """
    size = WORDS + 2
    counts = np.full((size, size), 0.1)
    np.add.at(counts, (TEXT.train[:-1], TEXT.train[1:]), 1)
    counts /= counts.sum(axis=1, keepdims=True)
    bigram = math.exp(-np.log(counts[TEXT.test[:-1], TEXT.test[1:]]).mean())
    unigram_counts = np.bincount(TEXT.train, minlength=size) + 0.1
    unigram = math.exp(-np.log((unigram_counts / unigram_counts.sum())[TEXT.test]).mean())
    assert TEXT.floor * 1.3 < bigram < unigram
    assert 8.5 < TEXT.floor < 8.7
