"""The user's request for a sweep, and the checks that it is one comparison.

Nothing here imports torch at once, so that a wrong option is reported quickly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from egtrain.config.extrapolations import length_key
from egtrain.config.files import load_config
from egtrain.config.schema import Config
from egtrain.errors import UsageError
from egtrain.task_file import TaskFile

Scaling = Literal["linear", "sqrt", "none"]
Growth = Literal["workers", "worker-batch"]

FIRST_FACTORS = (0.5, 1.0, 2.0)
"""The learning-rate grid with which a search begins."""


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    presets: tuple[str, ...]
    """Names of presets or paths of .yaml files."""
    batch_sizes: tuple[int, ...]
    seeds: int
    settings: tuple[str, ...] = ()
    """KEY=VALUE, for every cell."""
    rate_factors: tuple[float, ...] = (1.0,)
    """The learning-rate grid, as factors of the scaled rate; of a search, the first ones."""
    search_rates: bool = False
    """Go on beyond the grid's ends until the best learning rate lies inside."""
    length_factors: tuple[float, ...] = (1.0,)
    """The grid of extrapolation lengths, as factors of the preset's."""
    grow: Growth = "workers"
    scaling: Scaling | None = None
    """None: as each preset says."""
    validation: int | None = None
    """None: a tenth of the training samples with a grid, else what the preset says."""
    task: TaskFile | None = None
    """The task file of all presets."""
    native_precision: str | None = None
    """What `auto` means on the device; a sweep continued elsewhere keeps it."""

    def __post_init__(self) -> None:
        for option, values in (
            ("--preset", self.presets),
            ("--batch-sizes", self.batch_sizes),
            ("--lr-grid", self.rate_factors),
            ("--ratio-grid", self.length_factors),
        ):
            if not values:
                raise UsageError(f"{option} has no values: give at least one")
            if len(set(values)) < len(values):
                repeated = next(value for value in values if values.count(value) > 1)
                shown = f"{repeated:g}" if isinstance(repeated, float) else repeated
                raise UsageError(f"{option} names {shown} twice: leave out one of them")
        if min(self.batch_sizes) < 1:
            raise UsageError(f"--batch-sizes must be at least 1, not {min(self.batch_sizes)}")
        if self.seeds < 1:
            raise UsageError(f"--seeds must be at least 1, not {self.seeds}")
        if not all(math.isfinite(factor) and factor > 0 for factor in self.rate_factors):
            raise UsageError(
                "--lr-grid takes positive factors of the learning rate, such as 0.5,1,2"
            )
        if not all(math.isfinite(factor) and factor >= 0 for factor in self.length_factors):
            raise UsageError(
                "--ratio-grid takes factors of the extrapolation's length, such as 0.5,1,2"
            )
        if self.sets("optimizer.lr_scaling"):
            raise UsageError(
                "--set optimizer.lr_scaling has no effect on a sweep: use --lr-scaling"
            )
        if self.has_grid and self.validation == 0:
            raise UsageError("a grid is selected on a validation split: leave out --validation 0")

    @property
    def has_grid(self) -> bool:
        """Whether there is a grid to select from."""
        return len(self.rate_factors) * len(self.length_factors) > 1

    def sets(self, key: str) -> bool:
        """Return whether the user set a key for all cells."""
        return any(setting.partition("=")[0].strip() == key for setting in self.settings)


@dataclass(frozen=True)
class Preset:
    """A preset with the settings that all cells share."""

    source: str
    """As the user named it."""
    config: Config
    scaling: Scaling
    """How the learning rate grows with the batch size."""

    @property
    def name(self) -> str:
        """Its name in tables and pictures."""
        return self.config.preset

    @property
    def base_batch_size(self) -> int:
        """The batch size for which its learning rate was chosen."""
        return self.config.optimizer.base_batch_size or self.config.batch_size

    @property
    def length_key(self) -> str | None:
        """The key for the extrapolation's length; None without extrapolation."""
        return length_key(self.config.extrapolation)


def checked_presets(request: Request) -> list[Preset]:
    """Return the presets of a request, after checking that they make one comparison.

    Raises:
        UsageError: a preset or setting is unknown, the task or data differ from the first's, or
            a batch size does not divide.
    """
    presets: list[Preset] = []
    for source in request.presets:
        config = load_config(source, list(request.settings), request.task)
        if config.init.file is not None:
            from egtrain.build import with_known_weights

            config = with_known_weights(config)
        # With a rate for the preset's batch, `none` means that it is used unscaled.
        as_it_is = (
            config.optimizer.base_batch_size is None and config.optimizer.lr_scaling == "none"
        )
        scaling = request.scaling or ("linear" if as_it_is else config.optimizer.lr_scaling)
        preset = Preset(source, config, scaling)
        _require_comparable(preset, presets)
        for batch_size in request.batch_sizes:
            batch_setting(request, preset, batch_size)
        presets.append(preset)
    if len(request.length_factors) > 1 and not any(preset.length_key for preset in presets):
        raise UsageError("--ratio-grid has nothing to scale: none of the presets extrapolates")
    return presets


def _require_comparable(preset: Preset, others: Sequence[Preset]) -> None:
    if preset.name in [other.name for other in others]:
        raise UsageError(
            f"two presets are called {preset.name}: set `preset` in one of the files to another "
            "name"
        )
    if not others:
        return
    first = others[0]
    for key in ("task", "data", "device"):
        if getattr(preset.config, key) != getattr(first.config, key):
            raise UsageError(
                f"{preset.name} has another {key} than {first.name}, and the presets of a sweep "
                "must share it: leave out one of them, or set it for both"
            )
    if (preset.config.steps is None) != (first.config.steps is None):
        raise UsageError(
            f"one of {first.name} and {preset.name} counts steps, the other epochs: give --epochs"
        )


def settled_on_device(request: Request) -> tuple[Request, list[Preset]]:
    """Return the request and its presets with device and precision fixed; it needs torch.

    Raises:
        UsageError: as `checked_presets`.
    """
    import torch

    from egtrain.build import native_precision

    wanted = checked_presets(request)[0].config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
        request = replace(request, settings=(*request.settings, f"device={wanted}"))
    request = replace(request, native_precision=native_precision("auto", torch.device(wanted)))
    return request, checked_presets(request)


def batch_setting(request: Request, preset: Preset, batch_size: int) -> dict[str, Any]:
    """Return the setting that makes the batch size `batch_size`.

    Raises:
        UsageError: the number that stays fixed does not divide it.
    """
    config = preset.config
    if request.grow == "workers":
        fixed, what, key = config.worker_batch_size, "a worker's batch of {}", "workers"
    else:
        fixed, what, key = config.workers, "the {} workers", "worker_batch_size"
    if batch_size % fixed:
        low = max(batch_size // fixed, 1) * fixed
        raise UsageError(
            f"--batch-sizes: {batch_size} is not a multiple of {what.format(fixed)} in "
            f"{preset.name}: use {low} or {low + fixed}"
        )
    return {key: batch_size // fixed}
