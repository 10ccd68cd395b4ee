"""A finished or interrupted run, read back: its configuration, model and task."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from egtrain.build import TASKS, build_model, build_task, load_data, native_precision, outputs_of
from egtrain.checkpoint import CheckpointStore
from egtrain.config.files import config_file_of, load_config
from egtrain.config.schema import Config
from egtrain.config.tasks import TranslationSettings
from egtrain.config.yaml_text import write_value
from egtrain.errors import DataError, UsageError
from egtrain.evaluate import evaluate
from egtrain.models.loading import load_weights
from egtrain.tasks import Split, Task
from egtrain.tasks.translation import TranslationTask
from egtrain.workers import Ranks


@dataclass(frozen=True)
class SavedRun:
    """What `load_run` returns."""

    config: Config
    model: nn.Module
    """In evaluation mode, with the mean of the workers' BatchNorm statistics."""
    task: Task
    step: int
    """Completed updates."""

    def evaluate(self, split: Split = "test") -> dict[str, float]:
        """Return the mean loss and the task's metric over a split.

        Raises:
            UsageError: the run holds out no such split.
        """
        if not self.task.evaluation_size(split):
            raise UsageError(
                f"this run held out no {split} samples: evaluate the test split instead"
            )
        device = next(self.model.parameters()).device
        return evaluate(self.task, self.model, split, Ranks(device=device), self.config.precision)

    def translate(self, split: Split = "test", beam: int | None = None) -> "Translations":
        """Return the translations of a split by beam search.

        Args:
            split: `test` or `validation`.
            beam: hypotheses kept for a sentence, 1 for greedy; None: the configuration's.

        Raises:
            UsageError: the run does not translate.
        """
        settings = self.config.task
        if not isinstance(self.task, TranslationTask) or not isinstance(
            settings, TranslationSettings
        ):
            raise UsageError("beam search is for runs that translate: leave --beam out")
        beam = settings.beam if beam is None else beam
        hypotheses = self.task.translate(
            self.model, split, beam=beam, length_penalty=settings.length_penalty
        )
        bleu, signature = self.task.score(hypotheses, split)
        sentences = self.task.sentences(split)
        return Translations(
            beam, sentences.source_text, sentences.target_text, tuple(hypotheses), bleu, signature
        )


@dataclass(frozen=True)
class Translations:
    """A split in another language, sentence by sentence."""

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
) -> SavedRun:
    """Return the model, task and configuration of a run directory.

    Args:
        path: the run directory.
        checkpoint: `last`, `best` (where there was a validation split) or a file.
        data_dir: where the data lie now, if not where they were.
        offline: never download the data.
        device: where the model and the data go.

    Raises:
        UsageError: the directory holds no run, or the checkpoint does not fit its configuration.
        DataError: the checkpoint or the data are missing or damaged.
    """
    directory = Path(path)
    file = config_file_of(directory)
    overrides = (
        [] if data_dir is None else [f"data.dir={write_value(str(Path(data_dir).absolute()))}"]
    )
    config = load_config(file, overrides)
    store = CheckpointStore(
        directory / "checkpoints", higher_is_better=TASKS[config.task.name].metric.higher_is_better
    )
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
    data = load_data(config, offline)
    if state.get("data") != data.digest:
        raise DataError(
            f"the data are not those that {directory} was trained on: name the folder that has "
            "those, with --data-dir"
        )
    model = build_model(config, outputs_of(data), place)
    load_weights(model, state["model"])
    config = config.model_copy(update={"precision": native_precision(config.precision, place)})
    return SavedRun(config, model.eval(), build_task(config, data, place), step)
