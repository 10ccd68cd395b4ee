"""The baseline that the language model has to beat is a proper model itself."""

import itertools
import math
import random
from pathlib import Path

import pytest
from kneser_ney import KneserNeyTrigram

SIZE = 30
TEXT = [word for word in range(SIZE - 2) for _ in range(60 // (word + 1))]
random.Random(1).shuffle(TEXT)


def test_probabilities_add_up_to_one_after_any_two_words() -> None:
    model = KneserNeyTrigram(TEXT, vocabulary=SIZE, first=0)
    for before in itertools.product(range(0, SIZE, 3), repeat=2):
        assert math.isclose(
            sum(model.probability(word, before) for word in range(SIZE)), 1, rel_tol=1e-12
        )
    assert all(0 < discount <= 1 for discount in model.discounts)


def test_a_word_that_follows_many_others_is_likelier_in_a_new_place_than_a_frequent_one() -> None:
    """The point of Kneser-Ney: `1` is frequent, but only ever after `0`."""
    model = KneserNeyTrigram([0, 1] * 20 + [2, 3, 2, 4, 2, 5, 2], vocabulary=7, first=6)
    assert model.probability(2, (6, 6)) > model.probability(1, (6, 6))


def test_the_perplexity_of_a_text_is_that_of_its_probabilities() -> None:
    model = KneserNeyTrigram(TEXT, vocabulary=SIZE, first=0)
    nats = -math.log(model.probability(2, (0, 0))) - math.log(model.probability(SIZE - 1, (0, 2)))
    assert math.isclose(model.perplexity([2, SIZE - 1], 0), math.exp(nats / 2), rel_tol=1e-12)


@pytest.mark.data
def test_the_perplexity_on_the_small_wikitext(shared_data: Path) -> None:
    """What docs/results.md compares the LSTM with."""
    from egtrain.data.text import EOS, load_text

    data = load_text(
        "text:wikitext2-small",
        data_dir=shared_data,
        offline=True,
        max_vocabulary=None,
        train_tokens=None,
    )
    model = KneserNeyTrigram(data.train.tolist(), len(data.vocabulary), EOS)
    assert round(model.perplexity(data.validation.tolist(), EOS), 1) == 238.8
    assert round(model.perplexity(data.test.tolist(), EOS), 1) == 267.9
