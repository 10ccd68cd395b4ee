"""What a run consists of: printed by `train` before it begins, and by `--dry-run`."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from egtrain.build import build_direction, locate_data
from egtrain.config.extrapolations import length_key
from egtrain.config.schema import Config
from egtrain.config.tasks import LanguageSettings, UserSettings
from egtrain.config.tasks import Task as TaskSettings
from egtrain.formatting import counted, learning_rate_text
from egtrain.plan import build_plan, build_schedule
from egtrain.tasks import Task

LABEL_WIDTH = 11
OPTIMIZERS = {"sgd": "SGD", "lars": "LARS", "lamb": "LAMB", "adam": "Adam", "adamw": "AdamW"}


def run_facts(
    config: Config, directory: Path, *, device: str, ranks: int, threads: int
) -> dict[str, Any]:
    """Return what is known of a run before its data are read; `device` is `cpu` or `cuda`."""
    extrapolation = config.extrapolation
    key = length_key(extrapolation)
    return {
        "directory": str(directory),
        "model": config.model.text(),
        "init": config.init.file,
        "data": locate_data(config)
        if isinstance(config.task, UserSettings)
        else f"{config.data.name}, {locate_data(config)}",
        "batch_size": config.batch_size,
        "workers": config.workers,
        "worker_batch_size": config.worker_batch_size,
        "optimizer": OPTIMIZERS[config.optimizer.name],
        "peak_rate": config.optimizer.scaled_lr(config.batch_size),
        "extrapolation": extrapolation.name,
        "extrapolation_length": None if key is None else {key: getattr(extrapolation, key)},
        "extrapolation_text": extrapolation_text(config),
        "device": device,
        "precision": config.precision,
        "ranks": ranks,
        "threads": threads,
    }


def facts_from_data(
    config: Config,
    given: Config,
    model: nn.Module,
    task: Task,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what is known of a run once its data are read.

    Args:
        config: with a warm-up that fits the run.
        given: the configuration as the user gave it.
        model: the one to be trained.
        task: with its data.
        notes: what to tell the user about the data and the initial weights.
    """
    plan = build_plan(config, task.steps_per_epoch)
    rate = build_schedule(config, plan)
    phases = {0, plan.warmup_steps, *plan.milestones, plan.steps // 2, plan.steps - 1}
    local_phase = None
    if plan.local_start is not None:
        local_phase = (
            f"from step {plan.local_start:,} on, weights averaged every "
            f"{config.post_local.period} steps"
        )
    notes = list(notes)
    if config.schedule.warmup_epochs != given.schedule.warmup_epochs:
        notes.append(
            f"warm-up shortened from {given.schedule.warmup_epochs:g} to "
            f"{config.schedule.warmup_epochs:.3g} epochs ({counted(plan.warmup_steps, 'step')}), "
            f"since {plan.end_of_peak}"
        )
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "samples": task.samples,
        "samples_text": f"{task.samples:,} {samples_noun(config.task)}",
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": plan.steps,
        "learning_rate": {
            step: round(rate(step), 6) for step in sorted(phases) if 0 <= step < plan.steps
        },
        "local_phase": local_phase,
        "notes": notes,
    }


def header_lines(facts: dict[str, Any]) -> list[str]:
    """Return the known facts for people, a line each."""
    parts = {
        "model": facts["model"],
        "starts from": facts["init"],
        "data": facts["data"],
        "batch": f"{facts['batch_size']:,} = {counted(facts['workers'], 'worker')} x "
        f"{facts['worker_batch_size']}",
        "optimizer": f"{facts['optimizer']}, learning rate "
        f"{learning_rate_text(facts['peak_rate'])} at its peak",
        "shift ζ": facts["extrapolation_text"],
        "runs on": _runs_on(facts),
    }
    if "steps" in facts:
        parts["model"] += f", {facts['parameters']:,} parameters"
        parts["data"] = f"{facts['samples_text']}: {facts['data']}"
        parts["rates"] = _rates_text(facts["learning_rate"])
        parts["local phase"] = facts["local_phase"]
        parts["steps"] = f"{facts['steps']:,}, {facts['steps_per_epoch']:,} an epoch"
    if facts.get("step_seconds") is not None:
        parts["time"] = (
            f"about {_time_text(facts['seconds'])}, {facts['step_seconds']:.2g} s a step"
        )
        parts["memory"] = f"about {facts['memory_mib']:,} MiB"
        parts["memory"] += " a process" * (facts["ranks"] > 1)
        parts["memory"] += " beside the data" * (facts["device"] == "cpu")
    parts["output"] = facts["directory"]
    parts["note"] = "; ".join(facts["notes"]) or None
    return [f"{label:{LABEL_WIDTH}} {text}" for label, text in parts.items() if text is not None]


def named(directory: Path, config: Config) -> str:
    """Return a run directory, with what a command needs to go on with it or to evaluate it."""
    text = shlex.quote(str(directory))
    if isinstance(config.task, UserSettings):
        text += f" --task {shlex.quote(config.task.file)}"  # it runs only where it is named
    return text


def next_lines(config: Config, directory: Path) -> list[str]:
    """Return the commands that one may want after a run."""
    lines = [f"next: egtrain eval {named(directory, config)}"]
    if config.log.tensorboard:
        # The folder above: TensorBoard names a run by its folder within the log directory.
        lines.append(f"      tensorboard --logdir {shlex.quote(str(directory.parent))}")
    return lines


def samples_noun(task: TaskSettings) -> str:
    """Return what a task counts as samples."""
    if isinstance(task, LanguageSettings):
        return f"windows of {task.bptt} words"
    return {
        "image": "training images",
        "translation": "pairs of sentences",
        "user": "training samples",
    }[task.name]


def extrapolation_text(config: Config) -> str:
    """Return the choice of ζ with its size, in words."""
    extrapolation = config.extrapolation
    direction, key = build_direction(config), length_key(extrapolation)
    if direction is None:
        return "none, plain mini-batch gradients"
    if key is None:
        return extrapolation.name
    value, scaling = getattr(extrapolation, key), getattr(extrapolation, "scaling", "none")
    if key == "ratio":
        part = f"1/{config.workers}" if value == "1/K" else f"{value}"
        whole = part == "1/1"  # a single worker's share
        how_far = "the whole learning rate" if whole else f"{part} of the learning rate"
    elif key == "size" and scaling != "none":
        how_far = f"{value} of the norm of each {scaling}'s weights"
    else:
        how_far = f"{key} {value}"
    twice = ", two gradients a step" if direction.gradients == 2 else ""
    return f"{extrapolation.name}, {how_far}{twice}"


def _runs_on(facts: dict[str, Any]) -> str:
    ranks, threads = facts["ranks"], facts["threads"]
    processes = "1 process" if ranks == 1 else f"{ranks} processes"
    if facts["device"] == "cpu":
        each = f", {counted(threads, 'thread')}{' each' if ranks > 1 else ''}"
        return f"CPU in {facts['precision']}, {processes}{each}"
    return f"{'GPU' if ranks == 1 else 'GPUs'} in {facts['precision']}, {processes}"


def _rates_text(rates: dict[int, float]) -> str:
    """Return the rates at the steps where they change, such as `0.1 at step 0, 3.2 at 120`."""
    texts: list[str] = []
    before = None
    for step, rate in rates.items():
        if rate != before:
            texts.append(f"{learning_rate_text(rate)} at {'' if texts else 'step '}{step:,}")
        before = rate
    return ", ".join(texts)


def _time_text(seconds: float) -> str:
    """Return a rough time, such as `40 s`, `25 min` or `3.5 h`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
