"""What a sweep runs: its cells, and the one rule that scales them.

Nothing here imports torch before the data are read, so that a wrong option is reported at once.
"""

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egtrain.config.extrapolations import length_key
from egtrain.config.files import load_config
from egtrain.config.schema import Config, config_to_yaml, flat_settings
from egtrain.config.tasks import USER, UserSettings
from egtrain.config.yaml_text import write_value
from egtrain.errors import UsageError
from egtrain.sweep.request import Preset, Request, batch_setting

if TYPE_CHECKING:
    from egtrain.tasks import Metric

FORMAT = 1
"""Version of sweep.json and results.json."""
EVALUATIONS = 20
"""The least number of evaluations per run, if it has as many epochs, for curves and targets."""
LOWEST_FACTOR, HIGHEST_FACTOR = 2.0**-6, 2.0**6
"""How far a search of the learning rate goes from the scaled rate."""
SEARCH_RULE = (
    "The learning rate is searched from the scaled one outwards in factors of two, for each preset "
    "and batch size by itself and with all seeds at every rate, until worse rates lie on both "
    f"sides of the best one, at most from 1/{1 / LOWEST_FACTOR:g} to {HIGHEST_FACTOR:g} times it."
)
UNEQUAL = 0.01
"""Runs whose numbers of samples differ by less than this share count as equally long."""


@dataclass(frozen=True)
class Facts:
    """What depends on the task and its data besides the configuration."""

    samples: int
    """N, without those held out for validation."""
    steps_per_epoch: int
    steps: int
    """Of the whole run."""
    second_gradients: range
    """The steps that take two gradients."""
    metric: "Metric"
    has_validation: bool
    """Whether there is a validation split."""
    data: str = ""
    """A digest of the data."""


@dataclass(frozen=True)
class Cell:
    """One run of the sweep."""

    preset: str
    source: str
    batch_size: int
    seed: int
    rate_factor: float
    length_factor: float
    name: str
    settings: tuple[str, ...]
    """KEY=VALUE; the run depends on these and the preset only."""
    config: Config
    steps: int
    steps_per_epoch: int
    second_gradients: range
    """The steps that take two gradients."""

    @property
    def gradient_evaluations(self) -> int:
        """Per-sample gradients, as planned; the run's summary has what was counted."""
        return self.gradients_until(self.steps)

    def gradients_until(self, step: int) -> int:
        """Return the per-sample gradients of the first `step` updates."""
        second = self.second_gradients
        return (
            step + len(range(second.start, min(second.stop, step), second.step))
        ) * self.batch_size

    def arguments(self, directory: Path) -> list[str]:
        """Return the arguments of `egtrain` that make the run in a directory."""
        settings = [part for setting in self.settings for part in ("--set", setting)]
        task = self.config.task
        if isinstance(task, UserSettings):
            # With its content, lest it changes during the sweep.
            settings = ["--task", task.file, "--set", f"task.sha256={task.sha256}", *settings]
        return ["train", "--preset", self.source, *settings, "--output", str(directory)]

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved configuration."""
        return hashlib.sha256(config_to_yaml(self.config).encode()).hexdigest()

    @property
    def learning_rate(self) -> float:
        """The peak."""
        return self.config.optimizer.scaled_lr(self.batch_size)

    @cached_property
    def length(self) -> tuple[str, float] | None:
        """How far the extrapolation goes, by its key; None without extrapolation."""
        key = length_key(self.config.extrapolation)
        if key is None:
            return None
        value = getattr(self.config.extrapolation, key)
        return key, 1 / self.config.workers if value == "1/K" else float(value)


@dataclass(frozen=True)
class Plan:
    """All cells of a sweep, in the order in which they run."""

    cells: tuple[Cell, ...]
    metric: "Metric"
    watched_split: str
    """The split evaluated during training."""
    has_grid: bool
    searches_rates: bool
    """Whether results may add learning rates to the grid."""
    rule: str
    """How rates and lengths follow the batch size, in words."""
    notes: tuple[str, ...]
    """What a reader of the results has to know."""
    identity: dict[str, Any] = field(repr=False)
    """What identifies the sweep, whatever batch sizes, seeds and grid points it has."""

    @property
    def presets(self) -> tuple[str, ...]:
        """Names, in the user's order."""
        return tuple(dict.fromkeys(cell.preset for cell in self.cells))

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """From the smallest to the largest."""
        return tuple(sorted({cell.batch_size for cell in self.cells}))

    def as_json(self, directory: Path) -> dict[str, Any]:
        """Return what sweep.json holds: the identity, and each cell's command."""
        commands = {
            cell.name: shlex.join(["egtrain", *cell.arguments(directory / cell.name)])
            for cell in self.cells
        }
        return {
            "format": FORMAT,
            "rule": self.rule,
            "identity": self.identity,
            "commands": commands,
        }


def make_plan(
    request: Request, presets: Sequence[Preset], facts_of: Callable[[Config], Facts]
) -> Plan:
    """Return the plan of a request; see `checked_presets` and `facts_from_data`.

    Raises:
        UsageError: a batch is larger than the data, the validation split takes all of them, or a
            warm-up does not fit a run.
        DataError: the data are missing or damaged.
    """
    shared = presets[0].config
    validation = request.validation
    if validation is None and request.has_grid:
        smallest = batch_setting(request, presets[0], min(request.batch_sizes))
        without = facts_of(shared.model_copy(update=smallest))
        if not without.has_validation:
            validation = max(1, without.samples // 10)
    cells = [
        make_cell(request, preset, batch_size, number, rate, length, validation, facts_of)
        for number in range(request.seeds)
        for batch_size in sorted(request.batch_sizes)
        for preset in presets
        for rate in request.rate_factors
        for length in (request.length_factors if preset.length_key else (1.0,))
    ]
    first = facts_of(cells[0].config)
    equal_steps = shared.steps is not None
    return Plan(
        cells=tuple(cells),
        metric=first.metric,
        watched_split="validation" if first.has_validation else "test",
        has_grid=request.has_grid,
        searches_rates=request.search_rates,
        rule=_rule(request, presets, equal_steps),
        notes=_notes(cells, first, request, equal_steps),
        identity={
            "presets": {preset.name: flat_settings(preset.config) for preset in presets},
            "lr_scaling": {preset.name: preset.scaling for preset in presets},
            "grow": request.grow,
            "validation": cells[0].config.data.validation,
            "data": first.data,
            "device": cells[0].config.device,
            "precision": {cell.preset: cell.config.precision for cell in cells},
            "cells": {cell.name: cell.digest for cell in cells},
        },
    )


def facts_from_data(offline: bool = False) -> Callable[[Config], Facts]:
    """Return a function from a configuration to its facts, which loads the data once."""
    import torch

    from egtrain.build import build_direction, build_task, load_data
    from egtrain.plan import build_plan
    from egtrain.ranks.distributed import pick_device
    from egtrain.workers import Ranks

    loaded: dict[str, Any] = {}

    def facts_of(config: Config) -> Facts:
        key = f"{config.task.model_dump_json()} {config.data.model_dump_json()}"
        if key not in loaded:
            loaded[key] = load_data(config, offline)
        try:
            # A task file is tried out, and may need the device; other data stay off it here.
            device = pick_device(config.device) if config.task.name == USER else "cpu"
            task = build_task(config, loaded[key], Ranks(device=torch.device(device)))
        except UsageError as error:
            raise UsageError(f"at batch size {config.batch_size}, {error}") from None
        plan, direction = build_plan(config, task.steps_per_epoch), build_direction(config)
        if not plan.warmup_fits:
            falls = plan.first_fall
            raise UsageError(
                f"at batch size {config.batch_size}, the warm-up takes {plan.warmup_steps} steps "
                f"of {plan.steps}, and "
                f"the learning rate {'ends' if falls == plan.steps else 'falls'} at {falls}: lower "
                "schedule.warmup_epochs with --set"
            )
        twice = direction is not None and direction.gradients == 2
        return Facts(
            samples=task.samples,
            steps_per_epoch=plan.steps_per_epoch,
            steps=plan.steps,
            second_gradients=plan.extrapolated_steps if twice else range(0),
            metric=task.metric,
            has_validation=task.evaluation_size("validation") > 0,
            data=loaded[key].digest,
        )

    return facts_of


def _scaled(
    request: Request, preset: Preset, batch_size: int, rate_factor: float, length_factor: float
) -> dict[str, Any]:
    """Return the settings that follow the batch size: the one rule of the sweep."""
    base = preset.config
    values: dict[str, Any] = {
        **batch_setting(request, preset, batch_size),
        "optimizer.lr": base.optimizer.lr * rate_factor,
        "optimizer.base_batch_size": preset.base_batch_size,
        "optimizer.lr_scaling": preset.scaling,
        "schedule.warmup_from": base.schedule.warmup_from * rate_factor,
    }
    if preset.length_key and length_factor != 1:
        length = getattr(base.extrapolation, preset.length_key)
        if length == "1/K":
            length = 1 / values.get("workers", base.workers)
        values[f"extrapolation.{preset.length_key}"] = length_factor * length
    return values


def make_cell(
    request: Request,
    preset: Preset,
    batch_size: int,
    number: int,
    rate_factor: float,
    length_factor: float,
    validation: int | None,
    facts_of: Callable[[Config], Facts],
) -> Cell:
    """Return the cell of a preset, batch size, number of its seed, and point of the grid.

    `validation` training samples are held out; None: as the preset says.

    Raises:
        UsageError: its batch or warm-up does not fit.
    """
    base = preset.config
    values = _scaled(request, preset, batch_size, rate_factor, length_factor)
    values["seed"] = base.seed + number
    if validation is not None:
        values["data.validation"] = validation
    if base.precision == "auto" and request.native_precision is not None:
        values["precision"] = request.native_precision
    if base.device == "cpu" and base.threads is None:
        values["threads"] = 1  # a constant: the number of threads changes the order of sums
    config = load_config(preset.source, _all_settings(request, base, values), request.task)
    facts = facts_of(config)
    evaluate_every = facts.steps / facts.steps_per_epoch / EVALUATIONS
    if base.steps is not None:
        # Like the length of the run, the same number of warm-up steps for every batch size.
        smallest = batch_setting(request, preset, min(request.batch_sizes))
        longer = facts_of(config.model_copy(update=smallest)).steps_per_epoch
        values["schedule.warmup_epochs"] = base.schedule.warmup_epochs * (
            longer / facts.steps_per_epoch
        )
    else:
        evaluate_every = min(max(1, int(evaluate_every)), base.evaluate_every)
    if not request.sets("evaluate_every"):
        values["evaluate_every"] = evaluate_every
    settings = _all_settings(request, base, values)
    config = load_config(preset.source, settings, request.task)
    if base.steps is not None:
        facts = facts_of(config)
    name = f"{preset.name}-b{batch_size}"
    if len(request.rate_factors) > 1:
        name += f"-lr{rate_factor:.12g}"
    if len(request.length_factors) > 1 and preset.length_key:
        name += f"-r{length_factor:.12g}"
    return Cell(
        preset=preset.name,
        source=preset.source,
        batch_size=batch_size,
        seed=base.seed + number,
        rate_factor=rate_factor,
        length_factor=length_factor,
        name=f"{name}-s{base.seed + number}",
        settings=tuple(settings),
        config=config,
        steps=facts.steps,
        steps_per_epoch=facts.steps_per_epoch,
        second_gradients=facts.second_gradients,
    )


def _all_settings(request: Request, base: Config, values: Mapping[str, Any]) -> list[str]:
    """Return the user's settings, and those of the sweep's that change something."""
    plain = base.model_dump()
    changing = []
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if (plain[section] if section else plain)[name] != value:
            changing.append(f"{key}={write_value(value)}")
    init = base.init
    if init.file is not None:
        # With its content, lest it changes during the sweep.
        changing += [f"init.{key}={write_value(getattr(init, key))}" for key in ("file", "sha256")]
    return [*request.settings, *changing]


def _rule(request: Request, presets: Sequence[Preset], equal_steps: bool) -> str:
    growth = (
        "B = K·b grows by the number of workers K, and a worker keeps its batch b"
        if request.grow == "workers"
        else "B = K·b grows by a worker's batch b, and the number of workers K stays"
    )
    words = {
        "linear": "in proportion to B",
        "sqrt": "with the square root of B",
        "none": "not at all",
    }
    rates = "; ".join(
        f"{', '.join(p.name for p in presets if p.scaling == scaling)}: {word}"
        for scaling, word in words.items()
        if any(p.scaling == scaling for p in presets)
    )
    bases = ", ".join(
        dict.fromkeys(f"{p.config.optimizer.lr:g} at {p.base_batch_size}" for p in presets)
    )
    sentences = [
        growth,
        f"The learning rate grows from {bases} ({rates})",
        f"Warm-up takes the same number of {'steps' if equal_steps else 'epochs'} and starts from "
        "the same rate at every B, or from the peak where that is lower",
    ]
    if any(preset.length_key for preset in presets):
        sentences.append(
            "Of an extrapolation, a ratio is one of the learning rate, and 1/K falls as K grows; a "
            "rate, size or radius stays"
        )
    if len(request.rate_factors) > 1:
        sentences.append(
            "A factor of --lr-grid multiplies the learning rate and the start of its warm-up alike"
        )
    return ". ".join(sentences) + "."


def _notes(
    cells: Sequence[Cell], facts: Facts, request: Request, equal_steps: bool
) -> tuple[str, ...]:
    notes = []
    held_out = cells[0].config.data.validation
    if held_out:
        notes.append(
            f"{held_out:,} samples of the training data are held out for validation; the runs "
            f"train on {facts.samples:,}, also those that the table quotes."
        )
    if request.search_rates:
        notes.append(SEARCH_RULE)
    if request.has_grid:
        notes.append(
            "For each preset and batch size, the point of the grid with the best mean validation "
            "result over all seeds is selected; the table quotes the test result of those runs."
        )
    left_out = {
        cell.batch_size: facts.samples - cell.steps_per_epoch * cell.batch_size for cell in cells
    }
    at = ", ".join(
        f"{left:,} at {batch_size:,}"
        for batch_size, left in sorted(left_out.items())
        if left >= UNEQUAL * facts.samples
    )
    if equal_steps:
        notes.append(
            "Every run makes the same number of updates, so a larger batch sees more samples: "
            "this compares results at equal steps and unequal cost."
        )
    elif at:
        notes.append(
            f"Samples that do not fill a batch are left out of each epoch: {at}, of "
            f"{facts.samples:,} samples. Those runs take fewer gradients; a batch size that "
            "divides the samples takes as many as the others."
        )
    return tuple(notes)
