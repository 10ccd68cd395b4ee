"""Text for language modelling as streams of word indices: WikiText-2, a user's own files, or
embedded.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from egtrain.data.fetch import Archive, data_folders, find_or_download, locate
from egtrain.data.lines import found_folder, lines_of, read_text
from egtrain.data.synthetic_text import make_synthetic_text
from egtrain.errors import DataError

UNK, EOS = 0, 1
SPECIAL = ("<unk>", "<eos>")
"""The first two words of every vocabulary: any word that the training text lacks, and the end of a
line."""


@dataclass(frozen=True)
class TextData:
    """A text on the CPU, as indices into its vocabulary, int64 [words]; every line ends with
    `<eos>`.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]
    """The word of each index."""
    floor: float | None
    """Lowest expected perplexity of the test text, where it is known."""
    digest: str
    """SHA-256 over the streams and the vocabulary: equal digests mean equal data."""


@dataclass(frozen=True)
class TextFile:
    """A file of WikiText-2."""

    name: str
    size: int
    """Bytes."""
    sha1: str


@dataclass(frozen=True)
class TextLayout:
    """Training, validation and test file of a text, in this order."""

    folder: str
    files: tuple[TextFile, TextFile, TextFile]


@dataclass(frozen=True)
class WikiText:
    """WikiText-2, words as tokens (Merity et al. 2016, arXiv 1609.07843)."""

    title: str
    layouts: tuple[TextLayout, ...]
    archives: tuple[Archive, ...]


def _layout(*names: str) -> TextLayout:
    sizes = (10_797_148, 1_121_681, 1_256_449)
    # As GluonNLP lists them.
    digests = (
        "863f29c46ef9d167fff4940ec821195882fe29d1",
        "0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422",
        "c7b8ce0aa086fb34dab808c5c49224211eb2b172",
    )
    train, validation, test = (TextFile(*file) for file in zip(names, sizes, digests, strict=True))
    return TextLayout("wikitext-2", (train, validation, test))


WIKITEXT2 = WikiText(
    title="WikiText-2",
    layouts=(
        _layout("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        _layout("train.txt", "valid.txt", "test.txt"),
    ),
    archives=(
        Archive(
            name="wikitext-2-v1.zip",
            # As the Hugging Face datasets library lists it.
            sha256="92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
            size=4_475_746,
            addresses=(
                # The official address; it has not answered for years.
                "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip",
                # The first author's.
                "https://wikitext.smerity.com/wikitext-2-v1.zip",
            ),
        ),
    ),
)


def load_text(
    name: str,
    *,
    data_dir: Path | None,
    offline: bool,
    max_vocabulary: int | None,
    train_tokens: int | None,
) -> TextData:
    """Load `wikitext2`, `synthetic` or `text:FOLDER`, which holds train.txt, valid.txt and
    test.txt.

    A word is what stands between spaces; an empty line is a line without words. The vocabulary is
    that of the whole training file: `<unk>`, `<eos>`, then words by falling count, equal ones in
    the order of their first appearance.

    Args:
        name: which text.
        data_dir: where to look first; a relative FOLDER that does not exist is looked for in the
            same places.
        offline: never download.
        max_vocabulary: most words that the vocabulary may have; None: any number.
        train_tokens: train on only so many words from the beginning; None: all.

    Raises:
        DataError: files are missing, damaged, empty or not UTF-8, or the vocabulary is larger than
            allowed.
    """
    if name == "synthetic":
        drawn = make_synthetic_text()
        _check_vocabulary(drawn.vocabulary, max_vocabulary, "the embedded text", 0)
        streams = [torch.from_numpy(words) for words in (drawn.train, drawn.validation, drawn.test)]
        return _data(streams, drawn.vocabulary, drawn.floor, train_tokens)
    if name == "wikitext2":
        folder, layout = find_or_download(WIKITEXT2, data_dir, offline)
        paths = [folder / file.name for file in layout.files]
        contents = [_official(folder / file.name, file) for file in layout.files]
    else:
        folder = _own_folder(name, data_dir)
        paths = [folder / file for file in ("train.txt", "valid.txt", "test.txt")]
        contents = [read_text(path) for path in paths]
    texts = [_sentences(content, path) for content, path in zip(contents, paths, strict=True)]
    vocabulary = _vocabulary(texts[0], max_vocabulary, paths[0])
    index = {word: number for number, word in enumerate(vocabulary)}
    streams = [
        torch.tensor(
            [number for words in text for number in (*(index.get(w, UNK) for w in words), EOS)]
        )
        for text in texts
    ]
    return _data(streams, vocabulary, None, train_tokens)


def locate_text(name: str, *, data_dir: Path | None, offline: bool) -> str:
    """Say in a few words where `load_text` would take the text from; reads nothing and downloads
    nothing.
    """
    if name == "synthetic":
        return "made when needed"
    if name == "wikitext2":
        return locate(WIKITEXT2, data_dir, offline)
    folder = found_folder(name.removeprefix("text:"), data_folders(data_dir))
    return f"found: {folder}" if folder else f"missing: {name.removeprefix('text:')}"


def _own_folder(name: str, data_dir: Path | None) -> Path:
    wanted, folders = name.removeprefix("text:"), data_folders(data_dir)
    folder = found_folder(wanted, folders)
    if folder is None:
        raise DataError(
            f"there is no folder {wanted}, here or in {', '.join(map(str, folders))}; name one "
            "with train.txt, "
            "valid.txt and test.txt, such as --data text:FOLDER"
        )
    return folder


def _official(path: Path, file: TextFile) -> bytes:
    content = read_text(path)
    if hashlib.sha1(content, usedforsecurity=False).hexdigest() != file.sha1:
        raise DataError(
            f"{path}: not the official file (its SHA-1 is not {file.sha1}); read a text of your "
            "own with --data "
            "text:FOLDER, or name a folder without this file with --data-dir, to have WikiText-2 "
            "downloaded"
        )
    return content


def _sentences(content: bytes, path: Path) -> list[list[str]]:
    return [line.split() for line in lines_of(content, path)]


def _vocabulary(text: list[list[str]], limit: int | None, path: Path) -> tuple[str, ...]:
    counts = Counter(word for words in text for word in words)
    found = dict.fromkeys([*SPECIAL, *sorted(counts, key=lambda word: -counts[word])])
    if limit is not None and len(found) > limit:
        seen = set(SPECIAL)
        for number, words in enumerate(text, start=1):
            seen.update(words)
            if len(seen) > limit:
                _check_vocabulary(list(found), limit, str(path), number)
    return tuple(found)


def _check_vocabulary(vocabulary: Sequence[str], limit: int | None, source: str, line: int) -> None:
    if limit is not None and len(vocabulary) > limit:
        raise DataError(
            f"{source}{f':{line}' * bool(line)}: the vocabulary of {len(vocabulary):,} words is "
            "larger than "
            f"task.max_vocabulary = {limit:,}; raise it, or replace rare words by <unk>"
        )


def _data(
    streams: list[Tensor],
    vocabulary: tuple[str, ...],
    floor: float | None,
    train_tokens: int | None,
) -> TextData:
    if train_tokens is not None:
        if len(streams[0]) <= train_tokens:
            raise DataError(
                f"data.train_samples asks for {train_tokens + 1:,} words, and the training text "
                "has "
                f"{len(streams[0]):,}; lower it"
            )
        # One more, which the last of them is followed by.
        streams[0] = streams[0][: train_tokens + 1]
    digest = hashlib.sha256("\n".join(vocabulary).encode())
    for stream in streams:
        digest.update(f"{len(stream)}\n".encode())
        digest.update(stream.numpy().data)
    train, validation, test = streams
    return TextData(train, validation, test, vocabulary, floor, digest.hexdigest())
