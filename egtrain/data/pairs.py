"""Pairs of sentences in two languages, as text and as subwords: public, the user's, or embedded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from egtrain.data.arrays import fixed_order
from egtrain.data.download import find_or_download
from egtrain.data.finding import PairSet, note_of_part, require_own
from egtrain.data.lines import lines_of, read_lines
from egtrain.data.sets import PAIRS
from egtrain.data.subwords import EOS, Subwords, learn_subwords
from egtrain.data.synthetic_pairs import make_synthetic_pairs
from egtrain.errors import DataError, UsageError

_ORDER_SEED = 20_160_000
"""Fixed: smaller training sets must be the same in all runs."""


@dataclass(frozen=True)
class Sentences:
    """One split; subwords are int64, without `BOS` and with `EOS`."""

    source_text: tuple[str, ...]
    target_text: tuple[str, ...]
    source: tuple[Tensor, ...]
    target: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.source_text)


@dataclass(frozen=True)
class PairData:
    """A parallel text on the CPU."""

    train: Sentences
    validation: Sentences
    test: Sentences
    subwords: Subwords
    digest: str
    """SHA-256 over all subwords: equal digests mean equal data."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the data, shown before training."""


class Side(NamedTuple):
    """A file's sentences."""

    sentences: list[str]
    place: str
    """The file's name in messages."""


Part = tuple[Side, Side]
"""Source and target of one split."""


def load_pairs(
    name: str,
    *,
    data_dir: Path | None,
    offline: bool,
    source: str,
    target: str,
    subwords: int,
    max_length: int,
    train_samples: int | None,
) -> PairData:
    """Load a public text, `synthetic` or `pairs:FOLDER`, and split the sentences into subwords.

    FOLDER has train.LANGUAGE, valid.LANGUAGE (or val.) and test.LANGUAGE for both languages, with
    one sentence per line.

    Args:
        name: which text.
        data_dir: where to look first; a relative FOLDER that does not exist is searched there too.
        offline: never download.
        source: language to translate from.
        target: language to translate into.
        subwords: size of the vocabulary, learned from the whole training text; it is smaller if the
            text is too small.
        max_length: the largest number of subwords in a sentence.
        train_samples: number of training pairs, the first of one fixed permutation; None: all.

    Raises:
        DataError: files are missing, damaged, empty, not UTF-8 or of different lengths, or a
            sentence is too long.
        UsageError: the text lacks a language, or has fewer pairs than `train_samples`.
        MissingExtra: the packages for translation are not installed.
    """
    if source == target:
        raise UsageError(
            f"task.source and task.target are both '{source}': set them to two languages"
        )
    if name == "synthetic":
        drawn = make_synthetic_pairs()
        parts = [
            (
                Side(text[0], f"the embedded {part}, source"),
                Side(text[1], f"the embedded {part}, target"),
            )
            for part, text in (
                ("training", drawn.train),
                ("validation", drawn.validation),
                ("test", drawn.test),
            )
        ]
    elif name in PAIRS:
        parts = _public(PAIRS[name], source, target, data_dir, offline)
    else:
        form = f"a folder that holds train.{source}, train.{target} and so on"
        parts = _own(
            require_own(name, data_dir, f"{form}, as in --data pairs:FOLDER"), source, target
        )
    learned = learn_subwords([*parts[0][0].sentences, *parts[0][1].sentences], subwords)
    pairs = len(parts[0][0].sentences)
    kept = _kept(pairs, train_samples)
    train, validation, test = (
        _cut(part, learned, max_length, kept if number == 0 else None)
        for number, part in enumerate(parts)
    )
    return PairData(
        train,
        validation,
        test,
        learned,
        _digest((train, validation, test)),
        note_of_part(name, len(kept), pairs, "pairs"),
    )


def _public(
    data_set: PairSet, source: str, target: str, data_dir: Path | None, offline: bool
) -> list[Part]:
    """Return both languages' sentences of training, validation and test."""
    for language in (source, target):
        if language not in data_set.languages:
            raise UsageError(
                f"{data_set.title} is read in {' and '.join(data_set.languages)}, not "
                f"'{language}': set task.source and task.target"
            )
    found = find_or_download(data_set, data_dir, offline)

    def side(name: str) -> Side:
        return Side(lines_of(found.read(name), found.folder / name), str(found.folder / name))

    return [_part(side(f"{part}.{source}"), side(f"{part}.{target}")) for part in data_set.parts]


def _own(folder: Path, source: str, target: str) -> list[Part]:
    def side(names: Sequence[str], language: str) -> Side:
        path = _own_file(folder, names, language)
        return Side(read_lines(path), str(path))

    parts = (("train",), ("valid", "val"), ("test", "test_2016_flickr"))
    return [_part(side(names, source), side(names, target)) for names in parts]


def _own_file(folder: Path, names: Sequence[str], language: str) -> Path:
    candidates = [folder / f"{name}.{language}{ending}" for name in names for ending in ("", ".gz")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise DataError(
            f"{candidates[0]}: the file is missing; put it there, one sentence per line, or set "
            "task.source and task.target to the endings of the files' names"
        )
    return found


def _part(source: Side, target: Side) -> Part:
    """Return two sides, after checking that they have the same lines and none is empty."""
    lengths = len(source.sentences), len(target.sentences)
    if lengths[0] != lengths[1]:
        raise DataError(
            f"{target.place}:{min(lengths) + 1}: the file has {lengths[1]:,} lines, but "
            f"{source.place} has {lengths[0]:,}; each line must translate the same line there"
        )
    for side in (source, target):
        for number, line in enumerate(side.sentences, start=1):
            if not line.strip():
                raise DataError(
                    f"{side.place}:{number}: the line is empty; remove it from both files"
                )
    return source, target


def _kept(pairs: int, count: int | None) -> list[int]:
    """Return the numbers of the pairs to train on."""
    if count is None:
        return list(range(pairs))
    if not 1 <= count <= pairs:
        raise UsageError(
            f"data.train_samples: {count} is not possible, as there are {pairs:,} training pairs; "
            "lower it, or set it to null for all"
        )
    kept: list[int] = sorted(fixed_order(pairs, _ORDER_SEED)[:count].tolist())
    return kept


def _cut(part: Part, subwords: Subwords, max_length: int, kept: list[int] | None) -> Sentences:
    """Split the sentences, all or the kept ones, into subwords; all must be short enough."""
    texts, ids = [], []
    for side in part:
        cut = subwords.encode(side.sentences)
        for number, sentence in enumerate(cut, start=1):
            if len(sentence) + 1 > max_length:
                raise DataError(
                    f"{side.place}:{number}: the sentence has {len(sentence) + 1} subwords, but "
                    f"task.max_length is {max_length}; raise it, or remove the line from both files"
                )
        chosen = range(len(cut)) if kept is None else kept
        texts.append(tuple(side.sentences[i] for i in chosen))
        ids.append(tuple(torch.tensor([*cut[i], EOS]) for i in chosen))
    return Sentences(texts[0], texts[1], ids[0], ids[1])


def _digest(splits: Sequence[Sentences]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for side in (split.source, split.target):
            digest.update(f"{len(side)}\n".encode())
            digest.update(torch.cat(side).numpy().data)
    return digest.hexdigest()
