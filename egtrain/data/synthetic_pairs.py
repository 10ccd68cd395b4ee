"""A small bilingual grammar: sentences without a download, each with one right translation."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product

import numpy as np

Side = tuple[list[str], list[str]]
"""Sentences of the source language and their translations."""

_DATA_SEED = 7

DETERMINERS = {"lo": "d", "ka": "m", "ziv": "v"}
"""Source determiners, and the stems of their translations, which take the noun's ending."""
ENDINGS = {"m": ("o", "oi"), "f": ("a", "ae"), "n": ("u", "ua")}
"""Singular and plural endings of target determiners, nouns and adjectives, by gender."""
VERB_ENDINGS = {
    ("now", False): "it",
    ("now", True): "unt",
    ("then", False): "avit",
    ("then", True): "avunt",
}
"""Endings of target verbs, by tense and by whether the subject is plural."""
NOT, THAT, BECAUSE = "nek", "shu", "oltar"
TARGET_NOT, TARGET_THAT, TARGET_BECAUSE = "nul", "qu", "perk"
LINK = "is"
"""Joins the two nouns of a compound in the target; the source leaves a space."""


@dataclass(frozen=True)
class Noun:
    """A noun of the lexicon."""

    source: str
    target: str
    gender: str


@dataclass(frozen=True)
class SyntheticPairs:
    """The splits of one parallel text; no source sentence is in two of them."""

    train: Side
    validation: Side
    test: Side


def make_synthetic_pairs(train: int = 8000, held_out: int = 500) -> SyntheticPairs:
    """Draw the sentences, the same on every call, in about a second.

    The target language puts adjectives after their nouns, a subordinate clause's verb at its end
    and the negation before the verb. It joins compounds into one word, and its determiners,
    adjectives, relative pronouns and verbs agree with nouns that may be several words away. So a
    word-by-word translation is mostly wrong.
    """
    draw = _Draw(np.random.PCG64(_DATA_SEED))
    pairs: dict[str, str] = {}
    while len(pairs) < train + 2 * held_out:
        source, target = _sentence(draw)
        pairs.setdefault(source, target)
    sources, targets = list(pairs), list(pairs.values())
    cuts = (0, train, train + held_out, train + 2 * held_out)
    return SyntheticPairs(
        *((sources[low:high], targets[low:high]) for low, high in pairwise(cuts)),
    )


class _Draw:
    """Choices from PCG64's raw bits, which never change, unlike NumPy's distributions."""

    def __init__(self, bits: np.random.PCG64) -> None:
        self._bits = bits

    def below(self, count: int) -> int:
        return int(self._bits.random_raw() % count)

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent


@cache
def nouns() -> tuple[Noun, ...]:
    """Return the nouns of the lexicon; a source noun does not show its gender."""
    sources = [
        first + second + "n"
        for first in ("ba", "de", "fi", "go", "hu", "ja")
        for second in ("ro", "la", "mi", "te")
    ]
    targets = [
        first + second
        for first in ("kor", "lem", "pas", "tur", "vin", "sol")
        for second in ("ad", "ent", "ib", "ug")
    ]
    return tuple(
        Noun(source, target, "mfn"[number * 7 % 3 if number % 2 else number * 5 % 3])
        for number, (source, target) in enumerate(zip(sources, targets, strict=True))
    )


@cache
def adjectives() -> tuple[tuple[str, str], ...]:
    """Return the adjectives: source word and target stem."""
    sources = [f"{a}{b}sh" for a, b in product(("pi", "ro", "ta"), ("ke", "lu", "wa", "no"))]
    targets = [f"{a}{b}" for a, b in product(("bel", "grand", "nov"), ("", "iss", "erm", "ul"))]
    return tuple(zip(sources, targets, strict=True))


@cache
def verbs() -> tuple[tuple[str, str], ...]:
    """Return the verbs: source word and target stem."""
    sources = [f"{a}{b}" for a, b in product(("mak", "sev", "yol", "dup"), ("a", "i", "u"))]
    targets = [f"{a}{b}" for a, b in product(("am", "cant", "port", "vid"), ("", "er", "in"))]
    return tuple(zip(sources, targets, strict=True))


def _sentence(draw: _Draw) -> tuple[str, str]:
    source, target = _clause(draw, subordinate=False)
    if draw.chance(35):
        more_source, more_target = _clause(draw, subordinate=True)
        source, target = [*source, BECAUSE, *more_source], [*target, TARGET_BECAUSE, *more_target]
    return " ".join(source) + ".", " ".join(target) + "."


def _clause(draw: _Draw, subordinate: bool) -> tuple[list[str], list[str]]:
    source, target, many, _ = _noun_phrase(draw, relative=20)
    verb_source, verb_target = _verb(draw, many)
    object_source, object_target, _, _ = _noun_phrase(draw, relative=0)
    rest = [*object_target, *verb_target] if subordinate else [*verb_target, *object_target]
    return [*source, *verb_source, *object_source], [*target, *rest]


def _noun_phrase(draw: _Draw, relative: int) -> tuple[list[str], list[str], bool, str]:
    """Return source, target, whether it is plural, and ending; `relative` is a percentage."""
    determiner = list(DETERMINERS)[draw.below(len(DETERMINERS))]
    noun = nouns()[draw.below(len(nouns()))]
    many = draw.chance(40)
    ending = ENDINGS[noun.gender][many]
    source, target = [determiner], [DETERMINERS[determiner] + ending]
    head = noun.target + ending
    described = draw.chance(50)
    if described:
        adjective_source, adjective_target = adjectives()[draw.below(len(adjectives()))]
        source.append(adjective_source)
    if draw.chance(25):
        modifier = nouns()[draw.below(len(nouns()))]
        source.append(modifier.source)
        head = modifier.target + LINK + head
    source.append(noun.source + "s" * many)
    target.append(head)
    if described:
        target.append(adjective_target + ending)
    if draw.chance(relative):
        verb_source, verb_target = _verb(draw, many)
        object_source, object_target, _, _ = _noun_phrase(draw, relative=0)
        source += [THAT, *verb_source, *object_source]
        target += [TARGET_THAT + ending, *object_target, *verb_target]
    return source, target, many, ending


def _verb(draw: _Draw, many: bool) -> tuple[list[str], list[str]]:
    source, target = verbs()[draw.below(len(verbs()))]
    time = "then" if draw.chance(40) else "now"
    source_words, target_words = (
        [source + "d" * (time == "then")],
        [target + VERB_ENDINGS[time, many]],
    )
    if draw.chance(20):
        return [*source_words, NOT], [TARGET_NOT, *target_words]
    return source_words, target_words
