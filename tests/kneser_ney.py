"""An interpolated Kneser-Ney trigram model (Chen & Goodman 1999): what a language model has to
beat.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence


class KneserNeyTrigram:
    """p(w | u v) = max(c(uvw) − D₃, 0)/c(uv) + D₃·N(uv·)/c(uv) · p(w | v), and so on down to the
    uniform distribution.

    Lower orders count the different words before an n-gram instead of its occurrences. One discount
    an order, D = n₁/(n₁ + 2·n₂) from the numbers of n-grams that are counted once and twice (Ney,
    Essen & Kneser 1994).

    Args:
        words: the training text, as indices below `vocabulary`.
        vocabulary: number of words; those that the text lacks have their share of the uniform
            distribution.
        first: the word before the text.
    """

    def __init__(self, words: Sequence[int], vocabulary: int, first: int) -> None:
        self.vocabulary = vocabulary
        text = [first, first, *words]
        trigrams = Counter(zip(text, text[1:], text[2:], strict=False))
        bigrams = Counter((v, w) for _, v, w in trigrams)
        unigrams = Counter(w for _, w in bigrams)
        self.counts = (trigrams, bigrams, unigrams)
        self.discounts = [self._discount(counts) for counts in self.counts]
        self.totals: list[dict[tuple[int, ...], int]] = [defaultdict(int) for _ in range(3)]
        self.kinds: list[dict[tuple[int, ...], int]] = [defaultdict(int) for _ in range(3)]
        for order, counts in enumerate((trigrams, bigrams)):
            for gram, count in counts.items():
                self.totals[order][gram[:-1]] += count
                self.kinds[order][gram[:-1]] += 1
        self.totals[2][()] = sum(unigrams.values())
        self.kinds[2][()] = len(unigrams)

    @staticmethod
    def _discount(counts: Counter) -> float:
        once = sum(count == 1 for count in counts.values())
        twice = sum(count == 2 for count in counts.values())
        return once / (once + 2 * twice) if once else 0.5

    def probability(self, word: int, before: tuple[int, int]) -> float:
        """Return the probability of a word after two others."""
        keys = ((*before, word), (before[1], word), word)
        contexts: tuple[tuple[int, ...], ...] = (before, before[1:], ())
        probability = 1 / self.vocabulary
        for order in (2, 1, 0):
            total = self.totals[order].get(contexts[order], 0)
            if not total:
                continue
            discount, count = self.discounts[order], self.counts[order].get(keys[order], 0)  # type: ignore[call-overload]
            reserved = discount * self.kinds[order][contexts[order]] / total
            probability = max(count - discount, 0) / total + reserved * probability
        return probability

    def perplexity(self, words: Sequence[int], first: int) -> float:
        """Return exp of the mean −log p of a text, its first word after `first` twice."""
        text = [first, first, *words]
        nats = sum(
            -math.log(self.probability(w, (u, v)))
            for u, v, w in zip(text, text[1:], text[2:], strict=False)
        )
        return math.exp(nats / len(words))
