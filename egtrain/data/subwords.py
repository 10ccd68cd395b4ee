"""Byte-pair subwords that two languages share, learned by SentencePiece."""

import hashlib
import io
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from egtrain.data.finding import cache_folder
from egtrain.errors import MissingExtra, UsageError

PAD, UNK, BOS, EOS = range(4)
"""Special subwords: padding, unknown, beginning and end of a sentence."""


def require_packages() -> None:
    """Check that the packages for translation are installed.

    Raises:
        MissingExtra: one is not.
    """
    missing = [name for name in ("sacrebleu", "sentencepiece") if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"translation needs {' and '.join(missing)}; install with: pip install 'egtrain[text]'"
        )


class Subwords:
    """Byte-pair subwords that two languages share (Sennrich et al. 2016, arXiv 1508.07909).

    Args:
        model: a serialised SentencePiece model.
    """

    def __init__(self, model: bytes) -> None:
        require_packages()
        from sentencepiece import SentencePieceProcessor

        self.model = model
        self._processor: Any = SentencePieceProcessor(model_proto=model)
        self.size: int = self._processor.vocab_size()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return the subwords of each sentence, without `BOS` and `EOS`."""
        ids: list[list[int]] = self._processor.encode(list(sentences), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the sentence made of these subwords."""
        text: str = self._processor.decode([i for i in ids if i > EOS or i == UNK])
        return text


def learn_subwords(sentences: Sequence[str], size: int) -> Subwords:
    """Return at most `size` subwords learned from a text, now or before (from the user cache).

    Raises:
        UsageError: the text has too many different characters for `size`.
    """
    require_packages()
    import sentencepiece

    key = hashlib.sha256(f"{sentencepiece.__version__} {size}\n".encode())
    for sentence in sentences:
        key.update(sentence.encode() + b"\n")
    kept = cache_folder() / "subwords" / f"{key.hexdigest()}.model"
    try:
        return Subwords(kept.read_bytes())
    except (OSError, RuntimeError):
        pass  # not there, or damaged
    model = _train(sentences, size)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(model)
        # Several processes may do this at once; their models are equal.
        Path(file.name).replace(kept)
    except OSError:
        pass  # it will be learned again
    return Subwords(model)


def _train(sentences: Sequence[str], size: int) -> bytes:
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
            f"different characters; use at least {characters + 4}"
        ) from None
    return learned.getvalue()
