"""Text for language modelling as streams of word indices: public, the user's, or embedded."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from egtrain.data.download import find_or_download
from egtrain.data.finding import note_of_part, require_own
from egtrain.data.lines import lines_of, read_lines
from egtrain.data.sets import TEXTS
from egtrain.data.synthetic_text import make_synthetic_text
from egtrain.errors import DataError

UNK, EOS = 0, 1
SPECIAL = ("<unk>", "<eos>")
"""The first words of every vocabulary: any word that the training text lacks; a line's end."""


@dataclass(frozen=True)
class TextData:
    """A text on the CPU: int64 [words] indices into a vocabulary; every line ends with `<eos>`."""

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]
    """The word of each index."""
    floor: float | None
    """Best expected perplexity on the test text, if it is known."""
    digest: str
    """SHA-256 over the streams and the vocabulary: equal digests mean equal data."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the data, shown before training."""


def load_text(
    name: str,
    *,
    data_dir: Path | None,
    offline: bool,
    max_vocabulary: int | None,
    train_tokens: int | None,
) -> TextData:
    """Load a public text, `synthetic` or `text:FOLDER` with train.txt, valid.txt and test.txt.

    Spaces separate words; an empty line is a line without words. The vocabulary is that of the
    whole training file: `<unk>`, `<eos>`, then the words from most to least frequent, with ties in
    the order of their first appearance.

    Args:
        name: which text.
        data_dir: where to look first; a relative FOLDER that does not exist is searched there too.
        offline: never download.
        max_vocabulary: the largest vocabulary allowed; None: any.
        train_tokens: number of words to train on, from the beginning; None: all.

    Raises:
        DataError: files are missing, damaged, empty or not UTF-8, or the vocabulary is larger than
            allowed.
    """
    if name == "synthetic":
        drawn = make_synthetic_text()
        if max_vocabulary is not None and len(drawn.vocabulary) > max_vocabulary:
            raise _too_many_words("the embedded text", len(drawn.vocabulary), max_vocabulary)
        streams = [torch.from_numpy(words) for words in (drawn.train, drawn.validation, drawn.test)]
        return _data(name, streams, drawn.vocabulary, drawn.floor, train_tokens)
    if name in TEXTS:
        found = find_or_download(TEXTS[name], data_dir, offline)
        paths = [found.folder / file.name for file in found.layout.files]
        texts = [lines_of(found.read(path.name), path) for path in paths]
    else:
        folder = require_own(
            name,
            data_dir,
            "a folder that holds train.txt, valid.txt and test.txt, as in --data text:FOLDER",
        )
        paths = [folder / file for file in ("train.txt", "valid.txt", "test.txt")]
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path}: the file is missing; put it there, one sentence per line")
        texts = [read_lines(path) for path in paths]
    words = [[line.split() for line in text] for text in texts]
    vocabulary = _vocabulary(words[0], max_vocabulary, paths[0])
    index = {word: number for number, word in enumerate(vocabulary)}
    streams = [
        torch.tensor(
            [number for line in text for number in (*(index.get(word, UNK) for word in line), EOS)]
        )
        for text in words
    ]
    return _data(name, streams, vocabulary, None, train_tokens)


def _vocabulary(text: list[list[str]], limit: int | None, path: Path) -> tuple[str, ...]:
    counts = Counter(word for line in text for word in line)
    vocabulary = tuple(
        dict.fromkeys([*SPECIAL, *sorted(counts, key=lambda word: -counts[word])]),
    )
    if limit is not None and len(vocabulary) > limit:
        seen = set(SPECIAL)
        for number, line in enumerate(text, start=1):
            seen.update(line)
            if len(seen) > limit:
                raise _too_many_words(f"{path}:{number}", len(vocabulary), limit)
    return vocabulary


def _too_many_words(place: str, words: int, limit: int) -> DataError:
    return DataError(
        f"{place}: the vocabulary of {words:,} words is larger than task.max_vocabulary = "
        f"{limit:,}; raise it, or replace rare words by <unk>"
    )


def _data(
    name: str,
    streams: list[Tensor],
    vocabulary: tuple[str, ...],
    floor: float | None,
    train_tokens: int | None,
) -> TextData:
    whole = len(streams[0])
    if train_tokens is not None:
        if whole <= train_tokens:
            raise DataError(
                f"data.train_samples asks for {train_tokens + 1:,} words, but the training text "
                f"has {whole:,}; lower it, or set it to null for all"
            )
        # One more, to be predicted from the last of them.
        streams[0] = streams[0][: train_tokens + 1]
    digest = hashlib.sha256("\n".join(vocabulary).encode())
    for stream in streams:
        digest.update(f"{len(stream)}\n".encode())
        digest.update(stream.numpy().data)
    train, validation, test = streams
    notes = note_of_part(name, len(train), whole, "words")
    return TextData(train, validation, test, vocabulary, floor, digest.hexdigest(), notes)
