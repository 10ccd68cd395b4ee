"""A finished or interrupted run, loaded again: its configuration, model and task."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from egtrain.build import build_model, build_task, load_data, native_precision
from egtrain.checkpoint import CheckpointStore
from egtrain.config.files import load_run_config
from egtrain.config.schema import Config
from egtrain.config.tasks import TranslationSettings, UserSettings
from egtrain.config.yaml_text import write_value
from egtrain.errors import DataError, UsageError
from egtrain.evaluate import evaluate, evaluating
from egtrain.models.loading import load_weights
from egtrain.run import DataSummary
from egtrain.task_file import TaskFile, load_task_file
from egtrain.tasks import Split, Task
from egtrain.tasks.translation import TranslationTask
from egtrain.tasks.user import UserTask
from egtrain.workers import Ranks


@dataclass(frozen=True)
class SavedRun:
    """What `load_run` returns."""

    config: Config
    model: nn.Module
    """In evaluation mode, with the mean of the workers' BatchNorm statistics."""
    data: DataSummary
    step: int
    """Completed updates."""
    directory: Path
    offline: bool
    """Whether the data may not be downloaded."""

    @cached_property
    def task(self) -> Task:
        """The run's task; its data are read at the first access.

        Raises:
            DataError: the data are missing or damaged, or are not those of the run.
        """
        data = load_data(self.config, self.offline)
        if data.digest != self.data.digest:
            raise DataError(
                f"the data are not those that {self.directory} was trained on: name the folder "
                "that has those, with --data-dir"
            )
        return build_task(self.config, data, Ranks(device=self._device))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def evaluate(
        self,
        split: Split = "test",
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> dict[str, float]:
        """Return the mean loss and the task's metric over a split, in the run's precision.

        `progress` is called with the numbers of batches done and in all.

        Raises:
            DataError: the data are missing or damaged, or are not those of the run.
            UsageError: the run holds out no such split.
        """
        if not self.task.evaluation_size(split):
            raise UsageError(
                f"this run held out no {split} samples: evaluate the test split instead"
            )
        ranks, precision = Ranks(device=self._device), self.config.precision
        return evaluate(self.task, self.model, split, ranks, precision, progress)

    def decode(
        self,
        split: Split = "test",
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> list[str] | None:
        """Return a text for each sample of a split, as the task file decodes it.

        None if there is no task file, or it has no decode(). `progress` is called with the numbers
        of batches done and in all.

        Raises:
            TaskFileError: decode() raised an exception.
            UsageError: it did not return one text for each sample.
        """
        settings = self.config.task
        if not isinstance(settings, UserSettings) or not settings.code.has("decode"):
            return None
        assert isinstance(self.task, UserTask)
        texts: list[str] = []
        batches = self.task.evaluation_batches(split)
        with evaluating(self.model, self._device, self.config.precision):
            for index in range(batches):
                texts += self.task.decode_batch(self.model, split, index)
                progress(index + 1, batches)
        return texts

    def translate(
        self,
        split: Split = "test",
        beam: int | None = None,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> "Translations":
        """Return the translations of a split by beam search, in the run's precision.

        Args:
            split: `test` or `validation`.
            beam: hypotheses kept for a sentence, 1 for greedy; None: the configuration's.
            progress: called with the numbers of sentences done and in all.

        Raises:
            DataError: the data are missing or damaged, or are not those of the run.
            UsageError: the run does not translate.
        """
        settings = self.config.task
        if not isinstance(settings, TranslationSettings):
            raise UsageError("beam search is for runs that translate: leave --beam out")
        assert isinstance(self.task, TranslationTask)
        beam = settings.beam if beam is None else beam
        with evaluating(self.model, self._device, self.config.precision):
            hypotheses = self.task.translate(
                self.model,
                split,
                beam=beam,
                length_penalty=settings.length_penalty,
                progress=progress,
            )
        bleu, signature = self.task.score(hypotheses, split)
        sentences = self.task.sentences(split)
        return Translations(
            beam, sentences.source_text, sentences.target_text, tuple(hypotheses), bleu, signature
        )


@dataclass(frozen=True)
class Translations:
    """The translations of a split, sentence by sentence."""

    beam: int
    sources: tuple[str, ...]
    references: tuple[str, ...]
    hypotheses: tuple[str, ...]
    bleu: float
    """sacreBLEU, 0 to 100."""
    signature: str
    """What sacreBLEU says of its settings."""


def load_run(
    path: str | Path,
    *,
    checkpoint: str = "last",
    data_dir: str | Path | None = None,
    offline: bool = False,
    device: str = "cpu",
    task: TaskFile | str | Path | None = None,
    allow_changes: bool = False,
) -> SavedRun:
    """Return the model and configuration of a run directory; data are read only when needed.

    Args:
        path: the run directory.
        checkpoint: `last`, `best` (where there was a validation split), a step's number or a file.
        data_dir: the folder of the data, if they have moved.
        offline: never download the data.
        device: where the model and the data go.
        task: the run's task file, which runs only where it is named here.
        allow_changes: take a task file that has changed since the run.

    Raises:
        UsageError: the directory holds no run, the checkpoint does not fit its configuration, or
            the task file is not the run's.
        TaskFileError: the code of the task file raised an exception.
        DataError: the checkpoint is missing or damaged.
    """
    directory = Path(path)
    overrides = (
        [] if data_dir is None else [f"data.dir={write_value(str(Path(data_dir).absolute()))}"]
    )
    if isinstance(task, str | Path):
        task = load_task_file(Path(task))
    config = load_run_config(directory, overrides, task, allow_changes)
    store = CheckpointStore(directory / "checkpoints")
    if checkpoint == "last":
        newest = store.load_newest()
        if newest is None:
            raise DataError(
                f"{directory} has no checkpoint yet: train it with --resume {directory}"
            )
        step, state = newest
    else:
        step, state = store.load(checkpoint)
    place = torch.device(device)
    data = DataSummary(**state["data"])
    model = build_model(config, data.outputs, place)
    load_weights(model, state["model"])
    config = config.model_copy(update={"precision": native_precision(config.precision, place)})
    return SavedRun(config, model.eval(), data, step, directory, offline)
