"""The sections `task` and `data`: what is learned, and from what."""

from typing import Annotated, Literal

from pydantic import Field

from egtrain.config.section import Count, NotNegative, Section
from egtrain.data.sets import OF_TASK


class DataConfig(Section):
    """What is trained on."""

    name: str = "cifar10"
    """synthetic (embedded, no download), a public data set such as cifar10, cifar100, wikitext2 or
    multi30k, or your data.

    Your data are npz:FILE (x_train, y_train, x_test, y_test), text:FOLDER (train.txt, valid.txt,
    test.txt) or pairs:FOLDER (train.en, train.de and so on)."""
    dir: str | None = None
    """Folder that holds the data; null: $EGTRAIN_DATA, then the user cache, then a download."""
    offline: bool = False
    """Never download."""
    train_samples: Count | None = None
    """Number of samples to train on (images, windows of text, pairs of sentences); null: all."""
    validation: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Training images held out for validation; texts come with a validation part."""


class ImageSettings(Section):
    """Image classification: cross-entropy and top-1 accuracy; a sample is an image."""

    name: Literal["image"] = "image"
    """image: classify images."""
    augment: bool = True
    """Crop and flip training images at random."""


class LanguageSettings(Section):
    """Language modelling over words: perplexity; a sample is a window in a column of the batch."""

    name: Literal["language"] = "language"
    """language: predict each word of a text from those before it."""
    bptt: Annotated[int, Field(ge=1, le=100_000)] = 30
    """Words in a window, the limit of backpropagation; the hidden state enters the next window."""
    max_vocabulary: Annotated[int, Field(ge=3, le=2**31 - 1)] | None = None
    """Most different words that the training text may have; null: any number."""


class TranslationSettings(Section):
    """Translation of sentences: cross-entropy and BLEU; a sample is a pair of sentences."""

    name: Literal["translation"] = "translation"
    """translation: turn sentences of one language into those of another."""
    source: str = "en"
    """Language to translate from: the ending of its files."""
    target: str = "de"
    """Language to translate into: the ending of its files."""
    subwords: Annotated[int, Field(ge=16, le=1_000_000)] = 8000
    """Size of the subword vocabulary that both languages share, learned from the training text."""
    max_length: Annotated[int, Field(ge=2, le=100_000)] = 128
    """Most subwords that a sentence may have."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that label smoothing spreads over all subwords (Szegedy et al. 2016)."""
    beam: Annotated[int, Field(ge=1, le=1000)] = 4
    """Hypotheses that `egtrain eval` keeps for a sentence; 1 is greedy, as during training."""
    length_penalty: NotNegative = 1.0
    """Exponent of the length by which a hypothesis's log-probability is divided."""


Task = ImageSettings | LanguageSettings | TranslationSettings

DATA: dict[str, tuple[list[str], str]] = {
    task: ([*OF_TASK[task], "synthetic"], form)
    for task, form in (
        ("image", "npz:FILE"),
        ("language", "text:FOLDER"),
        ("translation", "pairs:FOLDER"),
    )
}
"""The data that a task reads: the names, and the form of a user's data."""
