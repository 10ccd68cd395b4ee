"""The sections `task` and `data`: what is learned, and from what."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr

from egtrain.config.section import Count, NotNegative, Section
from egtrain.data.sets import OF_TASK
from egtrain.errors import UsageError
from egtrain.task_file import TaskFile


class DataConfig(Section):
    """What is trained on."""

    name: str = "cifar10"
    """synthetic (embedded, no download), a public data set such as cifar10, cifar100, wikitext2 or
    multi30k, or your data.

    Your data are npz:FILE (x_train, y_train, x_test, y_test), folder:DIR (train/CLASS/*.jpg and
    test/CLASS/*.jpg), text:FOLDER (train.txt, valid.txt, test.txt) or pairs:FOLDER (train.en,
    train.de and so on)."""
    dir: str | None = None
    """Folder that holds the data; null: $EGTRAIN_DATA, then the user cache, then a download."""
    offline: bool = False
    """Never download."""
    train_samples: Count | None = None
    """Number of samples to train on (images, windows of text, pairs of sentences); null: all."""
    validation: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Training samples held out for validation; texts come with a validation part."""
    image_size: Annotated[int, Field(ge=8, le=10_000)] | None = None
    """Pixels to which the middle square of each image of folder:DIR is scaled; null: all of them
    have one size."""
    loaders: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that fetch the samples of a task file for each rank; 0: the rank fetches them."""


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


class UserSettings(Section):
    """A task file of one's own: model(), dataset(split) and loss(model, batch); a sample is one of
    its data set. Its functions' keyword parameters are keys too.
    """

    model_config = ConfigDict(extra="allow")

    name: Literal["user"] = "user"
    """user: what --task FILE says."""
    file: str = ""
    """Path of the task file; it runs only where a command names it with --task."""
    sha256: str = ""
    """SHA-256 of the task file."""

    _code: TaskFile | None = PrivateAttr(None)

    @property
    def code(self) -> TaskFile:
        """The task file, where the command line names it.

        Raises:
            UsageError: it does not.
        """
        if self._code is None:
            raise UsageError(
                f"the task is in {self.file or 'a task file'}, which runs only where it is named: "
                f"add --task {self.file or 'FILE'}"
            )
        return self._code

    @property
    def settings(self) -> dict[str, Any]:
        """The task file's own settings."""
        return dict(self.model_extra or {})

    def with_code(self, code: TaskFile) -> "UserSettings":
        """Return the same settings, which may run the task file."""
        permitted = self.model_copy()
        permitted._code = code
        return permitted


Task = ImageSettings | LanguageSettings | TranslationSettings | UserSettings

USER = UserSettings.model_fields["name"].default
"""The name of the task, model and data of a task file."""

DATA: dict[str, tuple[list[str], tuple[str, ...]]] = {
    task: ([*OF_TASK[task], "synthetic"], forms)
    for task, forms in (
        ("image", ("npz:FILE", "folder:DIR")),
        ("language", ("text:FOLDER",)),
        ("translation", ("pairs:FOLDER",)),
    )
} | {USER: ([USER], ())}
"""The data that a task reads: the names, and the forms of a user's data."""
