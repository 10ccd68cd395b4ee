"""Beam search with any model of the next subword (Sutskever et al. 2014, arXiv 1409.3215)."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class Decodable(Protocol):
    """A model that beam search can use; a state has one row per hypothesis."""

    def begin(self, source: Tensor) -> Any:
        """Return the state before the first subwords; it has a method `select(rows)`."""

    def step(self, subwords: Tensor, state: Any) -> Tensor:
        """Add a subword to each row [rows]; return the next logits [rows, vocabulary]."""


def beam_search(
    model: Decodable,
    source: Tensor,
    *,
    beam: int,
    limits: Tensor,
    length_penalty: float,
    begin: int,
    end: int,
) -> list[list[int]]:
    """Return the most likely translation found for each sentence, without `begin` and `end`.

    The score of a hypothesis is log p / length^penalty; its end counts as a subword. A finished
    hypothesis keeps its place in the beam. The search for a sentence ends when no place is left, or
    when no unfinished hypothesis can still beat the best finished one. With `beam` 1 it always
    takes the most likely subword.

    Args:
        model: in evaluation mode.
        source: sentences [sentences, length].
        beam: number of hypotheses kept for each sentence.
        limits: the largest number of subwords in each translation [sentences], at least 1; the end
            counts, and is the last one.
        length_penalty: at least 0; 0 prefers short translations.
        begin: the subword that starts every translation.
        end: the subword that ends it.
    """
    sentences, device = len(source), source.device
    state = model.begin(source)
    best: list[list[int]] = [[] for _ in range(sentences)]
    best_score = torch.full((sentences,), -math.inf, device=device)
    # The unfinished sentences: their numbers, hypotheses, and counts of finished hypotheses.
    which = torch.arange(sentences, device=device)
    scores = torch.zeros(sentences, 1, device=device)
    words = torch.full((sentences, 1, 1), begin, device=device)
    ended_before = torch.zeros(sentences, dtype=torch.long, device=device)
    length = 0
    while len(which):
        length += 1
        count, width = scores.shape
        logits = model.step(words[:, :, -1].flatten(), state).float()
        vocabulary = logits.shape[-1]
        continued = scores[:, :, None] + logits.log_softmax(dim=-1).view(count, width, vocabulary)
        last = limits[which] <= length
        if bool(last.any()):
            other = torch.arange(vocabulary, device=device) != end
            continued.masked_fill_(last[:, None, None] & other, -math.inf)
        scores, chosen = continued.flatten(1).topk(min(beam, width * vocabulary))
        parents, subwords = chosen // vocabulary, chosen % vocabulary
        places = torch.arange(scores.shape[1], device=device) < (beam - ended_before)[:, None]
        valid = places & (scores > -math.inf)
        ended = valid & (subwords == end)
        live = valid & ~ended
        words = torch.cat(
            [words.gather(1, parents[:, :, None].expand(-1, -1, length)), subwords[:, :, None]],
            dim=2,
        )

        ended_score, ended_row = torch.where(ended, scores / length**length_penalty, -math.inf).max(
            dim=1
        )
        better = ended_score > best_score[which]
        best_score[which] = torch.where(better, ended_score, best_score[which])
        for row in better.nonzero().flatten().tolist():
            best[int(which[row])] = words[row, ended_row[row], 1:-1].tolist()

        scores = torch.where(live, scores, -math.inf)
        # Log-probabilities only fall, and are divided by at most the longest length.
        reachable = scores.max(dim=1).values / limits[which].to(scores.dtype) ** length_penalty
        going_on = (live.any(dim=1) & (reachable > best_score[which])).nonzero().flatten()
        state.select((going_on[:, None] * width + parents[going_on]).flatten())
        which, scores, words = which[going_on], scores[going_on], words[going_on]
        ended_before = (ended_before + ended.sum(dim=1))[going_on]
    return best
