"""Pairs of sentences in two languages, as text and as subwords: Multi30k, a user's own files, or
embedded.
"""

import hashlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egtrain.data.fetch import Archive, data_folders, find_or_download, locate
from egtrain.data.lines import found_folder, lines_of, read_text
from egtrain.data.synthetic_pairs import make_synthetic_pairs
from egtrain.errors import DataError, UsageError

PAD, UNK, BOS, EOS = range(4)
"""Subwords that are none: filling, unknown, beginning and end of a sentence."""
_ORDER_SEED = 20_160_000
"""Fixed: which pairs a smaller training set keeps must not depend on the run."""


class Subwords:
    """Byte-pair subwords that two languages share (Sennrich et al. 2016, arXiv 1508.07909), by
    SentencePiece.

    Args:
        model: what SentencePiece has learned, serialised.
    """

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model = model
        self._processor: Any = SentencePieceProcessor(model_proto=model)
        self.size: int = self._processor.vocab_size()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return the subwords of each sentence, without beginning and end."""
        ids: list[list[int]] = self._processor.encode(list(sentences), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the sentence of subwords."""
        text: str = self._processor.decode([i for i in ids if i > EOS or i == UNK])
        return text


@dataclass(frozen=True)
class Sentences:
    """One split; subwords are int64, without a beginning and with `EOS`."""

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


@dataclass(frozen=True)
class PairFile:
    """A file of Multi30k."""

    name: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class PairLayout:
    """One way in which Multi30k lies on disk."""

    folder: str
    files: tuple[PairFile, ...]


@dataclass(frozen=True)
class Multi30k:
    """Multi30k, task 1, raw text (Elliott et al. 2016, arXiv 1605.00459)."""

    title: str
    layouts: tuple[PairLayout, ...]
    archives: tuple[Archive, ...]
    digests: dict[str, str]
    """SHA-256 of each file, unpacked."""


_SPLITS = ("train", "val", "test_2016_flickr")
_FILES = {
    # Name: bytes and SHA-256 unpacked, bytes and SHA-256 of the .gz in the authors' repository.
    "train.en": (
        (1_801_238, "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
        (568_929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
    ),
    "train.de": (
        (2_110_398, "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
        (637_044, "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
    ),
    "val.en": (
        (63_297, "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
        (21_650, "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
    ),
    "val.de": (
        (75_981, "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
        (24_681, "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"),
    ),
    "test_2016_flickr.en": (
        (62_076, "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182"),
        (21_077, "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"),
    ),
    "test_2016_flickr.de": (
        (70_649, "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16"),
        (22_890, "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"),
    ),
}
MULTI30K = Multi30k(
    title="Multi30k",
    layouts=(
        PairLayout(
            "multi30k", tuple(PairFile(name, plain[0]) for name, (plain, _) in _FILES.items())
        ),
        PairLayout(
            "multi30k",
            tuple(PairFile(f"{name}.gz", packed[0]) for name, (_, packed) in _FILES.items()),
        ),
    ),
    archives=tuple(
        Archive(
            name=f"{name}.gz",
            sha256=packed[1],
            size=packed[0],
            addresses=tuple(
                f"https://{host}/{name}.gz"
                for host in (
                    "raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw",
                    "cdn.jsdelivr.net/gh/multi30k/dataset@master/data/task1/raw",
                )
            ),
        )
        for name, (_, packed) in _FILES.items()
    ),
    digests={name: plain[1] for name, (plain, _) in _FILES.items()},
)
LANGUAGES = ("en", "de")


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
    """Load `multi30k`, `synthetic` or `pairs:FOLDER`, and cut the sentences into subwords.

    FOLDER holds train.LANGUAGE, valid.LANGUAGE (or val.) and test.LANGUAGE for both languages, a
    sentence a line.

    Args:
        name: which text.
        data_dir: where to look first; a relative FOLDER that does not exist is looked for in the
            same places.
        offline: never download.
        source: language to translate from.
        target: language to translate into.
        subwords: size of the vocabulary that is learned from the whole training text; less where
            the text is too small.
        max_length: most subwords of a sentence.
        train_samples: train on only so many pairs, the first of one fixed permutation; None: all.

    Raises:
        DataError: files are missing, damaged, empty or not UTF-8, of different lengths, or a
            sentence is too long.
        UsageError: a language or a number of pairs that there is not.
    """
    if source == target:
        raise UsageError(
            f"task.source and task.target are both '{source}': set them to two languages"
        )
    if name == "synthetic":
        drawn = make_synthetic_pairs()
        texts = [drawn.train, drawn.validation, drawn.test]
        places = [
            (f"the embedded {part}, source", f"the embedded {part}, target")
            for part in ("train", "valid", "test")
        ]
    else:
        files = _files_of(name, source, target, data_dir, offline)
        texts = [_aligned(*pair) for pair in files]
        places = [(str(one), str(other)) for one, other in files]
    learned = Subwords(_learned(texts[0], subwords))
    splits = []
    for number, (text, place) in enumerate(zip(texts, places, strict=True)):
        ids = (learned.encode(text[0]), learned.encode(text[1]))
        _check_lengths(ids, place, max_length)
        kept = _kept(len(text[0]), train_samples if number == 0 else None)
        splits.append(
            Sentences(
                tuple(text[0][i] for i in kept),
                tuple(text[1][i] for i in kept),
                tuple(torch.tensor([*ids[0][i], EOS]) for i in kept),
                tuple(torch.tensor([*ids[1][i], EOS]) for i in kept),
            )
        )
    train, validation, test = splits
    return PairData(train, validation, test, learned, _digest(splits))


def locate_pairs(name: str, *, data_dir: Path | None, offline: bool) -> str:
    """Say in a few words where `load_pairs` would take the text from; reads nothing and downloads
    nothing.
    """
    if name == "synthetic":
        return "made when needed"
    if name == "multi30k":
        return locate(MULTI30K, data_dir, offline)
    folder = found_folder(name.removeprefix("pairs:"), data_folders(data_dir))
    return f"found: {folder}" if folder else f"missing: {name.removeprefix('pairs:')}"


def _files_of(
    name: str, source: str, target: str, data_dir: Path | None, offline: bool
) -> list[tuple[Path, Path]]:
    """Return the files of both languages of training, validation and test."""
    if name == "multi30k":
        for language in (source, target):
            if language not in LANGUAGES:
                raise UsageError(
                    f"Multi30k is read in {' and '.join(LANGUAGES)}, not '{language}': set "
                    "task.source and task.target"
                )
        folder, layout = find_or_download(MULTI30K, data_dir, offline)
        ending = ".gz" if layout.files[0].name.endswith(".gz") else ""
        files = [
            (folder / f"{split}.{source}{ending}", folder / f"{split}.{target}{ending}")
            for split in _SPLITS
        ]
        for file in (file for pair in files for file in pair):
            _require_official(file)
        return files
    wanted, folders = name.removeprefix("pairs:"), data_folders(data_dir)
    own = found_folder(wanted, folders)
    if own is None:
        raise DataError(
            f"there is no folder {wanted}, here or in {', '.join(map(str, folders))}; name one "
            f"with train.{source}, "
            f"train.{target} and so on, such as --data pairs:FOLDER"
        )
    return [
        (_own_file(own, names, source), _own_file(own, names, target))
        for names in (("train",), ("valid", "val"), ("test", "test_2016_flickr"))
    ]


def _own_file(folder: Path, names: Sequence[str], language: str) -> Path:
    candidates = [folder / f"{name}.{language}{ending}" for name in names for ending in ("", ".gz")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise DataError(
            f"{candidates[0]}: the file is missing; put it there, a sentence a line, or set "
            "task.source and "
            "task.target to what the files' names end with"
        )
    return found


def _require_official(path: Path) -> None:
    expected = MULTI30K.digests[path.name.removesuffix(".gz")]
    if hashlib.sha256(read_text(path)).hexdigest() != expected:
        raise DataError(
            f"{path}: not the official file (sha256 {expected}); some mirrors have another test "
            "split: delete the "
            "folder to have Multi30k downloaded, or read your own files with --data pairs:FOLDER"
        )


def _aligned(source: Path, target: Path) -> tuple[list[str], list[str]]:
    sides = (lines_of(read_text(source), source), lines_of(read_text(target), target))
    if len(sides[0]) != len(sides[1]):
        raise DataError(
            f"{target}:{min(map(len, sides)) + 1}: {len(sides[1]):,} lines, and {source} has "
            f"{len(sides[0]):,}; each "
            "line must be the translation of the other file's"
        )
    for side, path in zip(sides, (source, target), strict=True):
        for number, line in enumerate(side, start=1):
            if not line.strip():
                raise DataError(f"{path}:{number}: the line is empty; remove it from both files")
    return sides


def _check_lengths(
    ids: Sequence[Sequence[Sequence[int]]], places: tuple[str, str], limit: int
) -> None:
    for side, place in zip(ids, places, strict=True):
        for number, sentence in enumerate(side, start=1):
            if len(sentence) + 1 > limit:
                raise DataError(
                    f"{place}:{number}: a sentence of {len(sentence) + 1} subwords, and "
                    f"task.max_length is {limit}; "
                    "raise it, or remove the line from both files"
                )


def _kept(pairs: int, count: int | None) -> list[int]:
    """Return which of so many pairs are trained on."""
    if count is None:
        return list(range(pairs))
    if not 1 <= count <= pairs:
        raise UsageError(
            f"data.train_samples: {count} is not possible, as there are {pairs:,} training pairs; "
            "lower it"
        )
    # Raw bits never change between NumPy versions.
    order = np.argsort(np.random.PCG64(_ORDER_SEED).random_raw(pairs), kind="stable")
    kept: list[int] = sorted(order[:count].tolist())
    return kept


def _learned(text: tuple[list[str], list[str]], size: int) -> bytes:
    """Return SentencePiece's model of a text, from the user cache where it has been learned
    before.
    """
    import sentencepiece

    sentences = [*text[0], *text[1]]
    key = hashlib.sha256(f"{sentencepiece.__version__} {size}\n".encode())
    for sentence in sentences:
        key.update(sentence.encode() + b"\n")
    kept = data_folders(None)[-1] / "subwords" / f"{key.hexdigest()}.model"
    try:
        model = kept.read_bytes()
        Subwords(model)
        return model
    except (OSError, RuntimeError):
        pass  # not there, or damaged
    model = _train(sentences, size)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(model)
        Path(file.name).replace(
            kept
        )  # several processes may do so at once, each with the same model
    except OSError:
        pass  # it only costs the time to learn it again
    return model


def _train(sentences: list[str], size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    learned = io.BytesIO()
    trainer: Any = SentencePieceTrainer
    try:
        trainer.train(
            sentence_iterator=iter(sentences),
            model_writer=learned,
            vocab_size=size,
            model_type="bpe",
            character_coverage=1.0,
            hard_vocab_limit=False,
            num_threads=1,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            minloglevel=2,
            max_sentence_length=1_000_000,
        )
    except RuntimeError:
        # Each character is a subword, as are the four special ones.
        characters = len(set().union(*sentences))
        raise UsageError(
            f"task.subwords: {size} is too small, as the training text has {characters:,} "
            "different characters; "
            f"use at least {characters + 4}"
        ) from None
    return learned.getvalue()


def _digest(splits: Sequence[Sentences]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for side in (split.source, split.target):
            digest.update(f"{len(side)}\n".encode())
            digest.update(torch.cat(side).numpy().data)
    return digest.hexdigest()
