"""The embedded grammar: always the same, and every sentence has exactly one right translation."""

import hashlib
import re

from sacrebleu.metrics.bleu import BLEU

from egtrain.data.synthetic_pairs import (
    BECAUSE,
    DETERMINERS,
    ENDINGS,
    NOT,
    TARGET_BECAUSE,
    TARGET_NOT,
    TARGET_THAT,
    THAT,
    adjectives,
    make_synthetic_pairs,
    nouns,
    verbs,
)

PAIRS = make_synthetic_pairs()
ALL_ENDINGS = [ending for pair in ENDINGS.values() for ending in pair]


def test_the_sentences_are_the_same_on_every_call_and_machine() -> None:
    text = "\n".join(
        line
        for part in (PAIRS.train, PAIRS.validation, PAIRS.test)
        for side in part
        for line in side
    )
    assert make_synthetic_pairs() == PAIRS
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "ae576a8223c356d2"


def test_no_source_sentence_is_in_two_parts_or_has_two_translations() -> None:
    sources = [line for part in (PAIRS.train, PAIRS.validation, PAIRS.test) for line in part[0]]
    assert len(sources) == len(set(sources)) == 9000


def test_every_word_of_the_test_part_is_seen_in_training() -> None:
    """Compounds aside, which are new as often as not: their two halves are not."""
    known = {word for line in PAIRS.train[0] for word in line.rstrip(".").split()}
    assert {word for line in PAIRS.test[0] for word in line.rstrip(".").split()} <= known


def test_nothing_in_the_lexicon_can_be_taken_for_something_else() -> None:
    sources = [noun.source for noun in nouns()] + [word for word, _ in (*adjectives(), *verbs())]
    assert len(sources) == len(set(sources)) == 48
    targets = [noun.target for noun in nouns()] + [word for _, word in (*adjectives(), *verbs())]
    assert len(targets) == len(set(targets))
    assert not {NOT, THAT, BECAUSE, *DETERMINERS} & set(sources)


def test_determiners_nouns_and_adjectives_agree() -> None:
    """Read off the translation alone: a determiner's ending is that of the noun and of an adjective
    behind it.
    """
    endings = "|".join(sorted(ALL_ENDINGS, key=len, reverse=True))
    stems = "|".join(sorted((stem for _, stem in adjectives()), key=len, reverse=True))
    determiner = re.compile(rf"(?:{'|'.join(DETERMINERS.values())})({endings})$")
    adjective = re.compile(rf"(?:{stems})({endings})$")
    seen = 0
    for line in PAIRS.test[1]:
        words = line.rstrip(".").split()
        for word, noun, behind in zip(words, words[1:], [*words[2:], ""], strict=False):
            if found := determiner.match(word):
                assert noun.endswith(found[1]), line
                if described := adjective.match(behind):
                    assert described[1] == found[1], line
                    seen += 1
    assert seen > 300


def test_a_word_for_word_translation_is_mostly_wrong() -> None:
    words = {NOT: TARGET_NOT, THAT: TARGET_THAT + "o", BECAUSE: TARGET_BECAUSE}
    words |= {source: target + "o" for source, target in DETERMINERS.items()}
    words |= {source: target + "o" for source, target in adjectives()}
    for noun in nouns():
        one, many = ENDINGS[noun.gender]
        words |= {noun.source: noun.target + one, noun.source + "s": noun.target + many}
    for source, target in verbs():
        words |= {source: target + "it", source + "d": target + "avit"}
    translated = [
        " ".join(words[word] for word in line.rstrip(".").split()) + "." for line in PAIRS.test[0]
    ]
    assert BLEU().corpus_score(translated, [PAIRS.test[1]]).score < 15
    assert BLEU().corpus_score(PAIRS.test[1], [PAIRS.test[1]]).score > 99.99
