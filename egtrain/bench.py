"""What each variant costs: steps of all of them, interleaved in one process with plain ones."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from egtrain.build import load_data
from egtrain.config.extrapolations import SECTIONS
from egtrain.config.files import load_config
from egtrain.config.schema import Config
from egtrain.cost import seconds_taken, take_steps, warmed_up, with_peak_bytes
from egtrain.errors import UsageError, did_you_mean
from egtrain.ranks.distributed import pick_device
from egtrain.run import Run
from egtrain.task_file import TaskFile
from egtrain.workers import Ranks


def _variants() -> dict[str, list[str]]:
    """Return every choice of ζ with its settings, and some that act only every fourth step."""
    variants: dict[str, list[str]] = {}
    for name, section in SECTIONS.items():
        keys = section.model_fields
        settings = [f"extrapolation.{key}=0.05" for key in keys if keys[key].is_required()]
        if "after_warmup" in keys:
            settings.append("extrapolation.after_warmup=false")
        variants[name] = [f"extrapolation.name={name}", *settings]
        if "every" in keys:
            variants[f"{name} every 4"] = [*variants[name], "extrapolation.every=4"]
    return variants


VARIANTS = _variants()
"""The choices of ζ, with their settings."""


@dataclass(frozen=True)
class Cost:
    """What a step of a variant takes."""

    ratio: float
    """Median of its step time over that of `none` in the same round."""
    low: float
    """Lower end of the median's 95 % bootstrap interval."""
    high: float
    gradients_per_step: float
    """Per-sample gradients over the samples of the batch."""
    peak_bytes: int
    """Peak memory of tensors, as counted by CUDA's allocator or, on the CPU, by the profiler."""
    communicated_bytes: int
    """What the step's one collective carries when there are several ranks."""


@dataclass(frozen=True)
class Comparison:
    """What `compare_costs` returns."""

    step_seconds: float
    """Median time of a step without extrapolation."""
    variants: dict[str, Cost]
    left_out: dict[str, str]
    """Variants that the preset's base optimizer does not allow, and why."""


def compare_costs(
    preset: str,
    overrides: Sequence[str] = (),
    *,
    workers: int = 1,
    rounds: int = 20,
    wanted: Sequence[str] | None = None,
    task: TaskFile | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Comparison:
    """Time a step of each variant of a preset in every round, in an order that turns.

    Args:
        preset: gives the model, data, base optimizer and batch, but not the extrapolation.
        overrides: settings such as `worker_batch_size=64`.
        workers: K. Each gradient has its shift, so the ratios hardly depend on K.
        rounds: repetitions; each gives one ratio.
        wanted: names from `VARIANTS`; None for all that are defined. `none` is always measured.
        task: a task file, whose model, data and loss replace the preset's.
        progress: called after each timed variant with (done, total).

    Raises:
        UsageError: an unknown variant, or one that is wanted but not defined over the preset's base
            optimizer.
    """
    for name in wanted or ():
        if name not in VARIANTS:
            hint = did_you_mean(name, list(VARIANTS))
            raise UsageError(
                f"unknown variant '{name}'{hint or '; known are ' + ', '.join(VARIANTS)}"
            )
    configs: dict[str, Config] = {}
    left_out: dict[str, str] = {}
    for name in VARIANTS if wanted is None else dict.fromkeys(["none", *wanted]):
        try:
            configs[name] = config_of(preset, name, [*overrides, f"workers={workers}"], task)
        except UsageError as error:
            if wanted is not None or name == "none":
                raise
            left_out[name] = str(error)

    ranks = Ranks(device=pick_device(configs["none"].device))
    data = load_data(configs["none"])
    warmed_up(configs["none"], ranks, data)  # one-time allocations belong to no variant
    runs: dict[str, Run] = {}
    peaks: dict[str, int] = {}
    for name, config in configs.items():
        runs[name], peaks[name] = with_peak_bytes(partial(warmed_up, config, ranks, data), ranks)

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        # Another variant begins each round, so that none is always timed first.
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            # Whole cycles, because some variants take a second gradient only every few steps.
            cycle = runs[name].extrapolated_steps.step
            seconds[name].append(
                seconds_taken(partial(take_steps, runs[name], cycle), ranks) / cycle
            )
            progress(sum(map(len, seconds.values())), rounds * len(names))

    return Comparison(
        step_seconds=statistics.median(seconds["none"]),
        variants={
            name: Cost(
                *median_interval(
                    [t / plain for t, plain in zip(seconds[name], seconds["none"], strict=True)]
                ),
                gradients_per_step=run.gradient_evaluations / (run.step * run.task.batch_size),
                peak_bytes=peaks[name],
                communicated_bytes=run.workers.collective_bytes,
            )
            for name, run in runs.items()
        },
        left_out=left_out,
    )


def config_of(
    preset: str, variant: str, overrides: Sequence[str], task: TaskFile | None = None
) -> Config:
    """Return the preset's configuration with another choice of ζ, acting in every step."""
    settings = [*VARIANTS[variant], "post_local.period=null"]
    if (
        "sgd" in SECTIONS[variant.split()[0]].momentum_of
        and load_config(preset, list(overrides), task).optimizer.name == "sgd"
    ):
        # Its base is heavy-ball momentum, which takes as long as Nesterov's.
        settings.append("optimizer.nesterov=false")
    return load_config(preset, [*settings, "steps=1000000", *overrides], task)


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return statistics.median(values), float(low), float(high)
