"""The weights of a run as a plain file; neither its model nor a user's code is needed for it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from egtrain import __version__
from egtrain.checkpoint import CheckpointStore
from egtrain.config.files import config_file_of, load_run_config
from egtrain.errors import UsageError
from egtrain.run_directory import CHECKPOINTS, METRICS


@dataclass(frozen=True)
class RunWeights:
    """The weights of a run at a step, and where they come from."""

    tensors: Mapping[str, Tensor]
    """By name, with the mean of the workers' BatchNorm statistics."""
    step: int
    """Completed updates."""
    metrics: Mapping[str, Mapping[str, float]]
    """Of these weights on held-out data, by split, as far as they were measured."""
    metadata: Mapping[str, str]
    """What a safetensors file says of them."""


def weights_of(run: Path, checkpoint: str = "last") -> RunWeights:
    """Return the weights in a run's checkpoint.

    Args:
        run: the run directory.
        checkpoint: `last`, `best` (where there was a validation split), a step's number or a file.

    Raises:
        UsageError: the directory holds no run, the checkpoint is not the run's, or there is none of
            that step or no best one.
        DataError: the checkpoint is missing or damaged.
    """
    config = load_run_config(run)
    store = CheckpointStore(run / CHECKPOINTS)
    if Path(checkpoint).is_file() and (
        Path(checkpoint).resolve().parent != store.directory.resolve()
    ):
        raise UsageError(
            f"{checkpoint} is not among the checkpoints of {run}: name the run that it belongs to"
        )
    step, state = store.load(checkpoint)
    metrics = metrics_at(run, step)
    metadata = {
        "format": "pt",  # what other libraries expect of weights for torch
        "egtrain": __version__,
        "preset": config.preset,
        "config": config_file_of(run).read_text(encoding="utf-8"),
        "step": json.dumps(step),
        "metrics": json.dumps(metrics),
    }
    if state["data"]["outputs"]:
        metadata["outputs"] = json.dumps(state["data"]["outputs"])
    return RunWeights(state["model"], step, metrics, metadata)


def metrics_at(run: Path, step: int) -> dict[str, dict[str, float]]:
    """Return what was measured on held-out data after a step, by split."""
    found: dict[str, dict[str, float]] = {}
    try:
        lines = (run / METRICS).read_bytes().splitlines()
    except OSError:
        return found
    for text in lines:
        try:
            line = json.loads(text)
            split, at = line["split"], line["step"]
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill
        if at == step and split != "train":
            told = {"step", "epoch", "split", "wall"}
            found[split] = {name: value for name, value in line.items() if name not in told}
    return found
