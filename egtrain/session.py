"""One run from its directory to its summary: what `egtrain train` does around the loop."""

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from egtrain.build import build_run, native_precision
from egtrain.checkpoint import CheckpointStore
from egtrain.config.files import config_file_of
from egtrain.config.schema import Config, config_to_yaml, flat_values
from egtrain.errors import DataError, InterruptedRun, UsageError
from egtrain.formatting import counted, learning_rate_text
from egtrain.header import facts_from_data, header_lines, named, next_lines, run_facts
from egtrain.logs.environment import git_commit, hardware, versions
from egtrain.logs.runlog import RunLog, finite, write_summary
from egtrain.logs.training_display import TrainingDisplay
from egtrain.plan import with_fitting_warmup
from egtrain.ranks import distributed, signals, torchrun
from egtrain.run import Run
from egtrain.run_directory import CHECKPOINTS, FAILURE, PLAN, SUMMARY, RunDirectory, note_failure
from egtrain.task_file import TaskFileError
from egtrain.tasks import LOSS, Metric, Split, metrics_text
from egtrain.train import train
from egtrain.workers import Ranks


def train_in(directory: RunDirectory, config: Config, *, as_json: bool = False) -> None:
    """Train in a run directory, from its newest checkpoint if it has one.

    Raises:
        EgtrainError: the run did not finish; the class has the exit code.
    """
    try:
        # Before the ranks meet, so that no signal during the start-up is lost.
        with signals.StopSignal() as stop:
            _train_until(stop, directory, config, as_json)
    except signals.StoppedEarly:
        raise InterruptedRun(
            f"interrupted before the training; go on with --resume {named(directory.path, config)}"
        ) from None


def _train_until(
    stop: signals.StopSignal, run_directory: RunDirectory, config: Config, as_json: bool
) -> None:
    with distributed.joined_ranks(config.device) as ranks, ExitStack() as closing:
        made_before = torchrun.directory_made_before()
        if made_before is not None:
            run_directory = RunDirectory(
                made_before, goes_on_from=config_file_of(made_before).read_bytes()
            )
        going_on = run_directory.goes_on
        config = config.model_copy(
            update={"precision": native_precision(config.precision, ranks.device)}
        )
        first = ranks.rank == 0

        def begin() -> None:
            closing.enter_context(run_directory)
            run_directory.write_config(config_to_yaml(config))
            if not run_directory.held_by_launcher:
                torchrun.remember_directory(run_directory.path)

        distributed.only_first_rank(ranks, begin)
        directory = Path(distributed.agreed(str(run_directory.path), ranks))
        try:
            begun = CheckpointStore(directory / CHECKPOINTS, warn=lambda message: None).steps()
            run = build_run(config, ranks, anew=not begun)
            given, config = config, with_fitting_warmup(config, run.task.steps_per_epoch)
            if first:
                run_directory.write_config(config_to_yaml(config))
            store = CheckpointStore(
                directory / CHECKPOINTS,
                keep=config.checkpoint.keep,
                higher_is_better=run.task.metric.higher_is_better,
                warn=None if first else lambda message: None,
            )
            newest = distributed.first_rank_first(ranks, store.load_newest) if going_on else None
            require_same_step(None if newest is None else newest[0], directory, ranks)
            if newest is not None:
                require_step_in_plan(newest[0], run.steps, directory)
                load_into(run, newest[1], directory)
                if first and (change := change_of_plan(run, newest[1])) is not None:
                    print(change, file=sys.stderr)
        except (UsageError, DataError, TaskFileError):
            if first:
                run_directory.withdraw()
            raise
        if newest is not None and run.step == run.steps and (directory / SUMMARY).is_file():
            if first:
                print(f"{directory} is complete: there is nothing left to train", file=sys.stderr)
                summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
                print_result(summary, run.task.metric, directory, as_json)
            return
        if first:
            threads, stream = torch.get_num_threads(), sys.stderr if as_json else sys.stdout
            device = ranks.device.type
            facts = run_facts(config, directory, device=device, ranks=ranks.count, threads=threads)
            facts |= facts_from_data(config, given, run.model, run.task, run.notes)
            print("\n".join(header_lines(facts)), file=stream, flush=True)
        recorders: list[Recorder] = []
        distributed.only_first_rank(
            ranks,
            lambda: recorders.append(
                Recorder(directory, config, run, ranks, store, closing, as_json)
            ),
        )
        stop.training = True
        try:
            final = train(run, recorders[0] if first else NoRecorder(ranks), stop)
        except InterruptedRun as error:
            text = f"{error}; go on with --resume {named(directory, config)}"
            raise InterruptedRun(text) from None
        except Exception as error:
            if first:
                note_failure(directory, error)
            raise
        if first:
            summary = recorders[0].finish(run, final)
            closing.close()
            print_result(summary, run.task.metric, directory, as_json)
            if not as_json:
                print("\n".join(next_lines(config, directory)))


def require_same_step(step: int | None, directory: Path, ranks: Ranks) -> None:
    """Raise UsageError on a rank whose newest checkpoint is not rank 0's; a collective."""
    first = distributed.agreed(str(step), ranks)
    if first != str(step):
        raise UsageError(
            f"the newest checkpoint in {directory} is of step {step} here and of step {first} on "
            "rank 0: put the run into a folder that all nodes share"
        )


def require_step_in_plan(step: int, steps: int, directory: Path) -> None:
    """Raise UsageError if a run has already made more steps than its plan has."""
    if step > steps:
        raise UsageError(
            f"{directory} has made {step:,} steps, and the settings end it at step {steps:,}: "
            f"leave out --epochs and --steps, or give --steps {step} or more"
        )


def change_of_plan(run: Run, state: dict[str, Any]) -> str | None:
    """Return how steps and rates differ from the checkpoint's plan; None if they do not."""
    planned, rate = state["steps"], state["last_learning_rate"]
    if (planned, rate) == (run.steps, run.last_learning_rate):
        return None
    changes = []
    if planned != run.steps:
        changes.append(f"{counted(run.steps, 'step')} instead of {planned:,}")
    if run.step < run.steps:
        changes.append(
            f"learning rate {learning_rate_text(rate)} at step {run.step:,}, "
            f"{learning_rate_text(run.schedule(run.step))} at step {run.step + 1:,}"
        )
    return f"the plan has changed: {'; '.join(changes)}" if changes else None


def load_into(run: Run, state: dict[str, Any], directory: Path) -> None:
    """Restore a run from a checkpoint's state.

    Raises:
        UsageError: the checkpoint belongs to another model, optimizer or number of workers.
    """
    try:
        run.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the checkpoint in {directory} does not fit the settings ({reason}): undo the "
            "changes, or start a new run"
        ) from error


class NoRecorder:
    """An observer that records nothing, for all ranks but the first."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def trained(self, run: Run, step: int, metrics: dict[str, float]) -> None:
        """Ignore the metrics."""

    def evaluating(self, split: Split, done: int, total: int) -> None:
        """Ignore the progress."""

    def evaluated(self, run: Run, split: Split, metrics: dict[str, float]) -> None:
        """Ignore the metrics."""

    def save(self, run: Run, state: dict[str, Any], validation: dict[str, float] | None) -> None:
        """Ignore the state; fail if the first rank could not write it."""
        distributed.only_first_rank(self._ranks, lambda: None)


class Recorder:
    """Writes a run's metrics, checkpoints and summary, and shows its progress; on rank 0."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        run: Run,
        ranks: Ranks,
        store: CheckpointStore,
        closing: ExitStack,
        as_json: bool,
    ) -> None:
        self._directory = directory
        self._config = config
        self._ranks = ranks
        self._store = store
        self._started = time.monotonic()
        self._display = closing.enter_context(
            TrainingDisplay(
                directory.resolve().name,
                epochs=run.steps / run.task.steps_per_epoch,
                steps=run.steps,
                start_step=run.step,
                metrics=(LOSS, run.task.training_metric, run.task.metric),
                stream=sys.stderr if as_json else None,
            )
        )
        self._log = closing.enter_context(
            RunLog(
                directory,
                batch_size=run.task.batch_size,
                tensorboard=config.log.tensorboard,
                resume_step=run.step,
                every=config.log.every,
                display=self._display,
            )
        )
        self._log.text("config", f"```yaml\n{config_to_yaml(config)}```")
        plan = {"steps": run.steps, "metric": run.task.metric.facts()}
        write_summary(directory / PLAN, plan)
        (directory / FAILURE).unlink(missing_ok=True)

    def trained(self, run: Run, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an update."""
        self._log.train_step(step, self._epoch(run, step), metrics)

    def evaluating(self, split: Split, done: int, total: int) -> None:
        """Show the progress of an evaluation."""
        self._display.evaluating(split, done, total)

    def evaluated(self, run: Run, split: Split, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation."""
        self._log.evaluation(run.step, self._epoch(run, run.step), split, metrics)

    def save(self, run: Run, state: dict[str, Any], validation: dict[str, float] | None) -> None:
        """Write a checkpoint, after everything logged before it."""
        self._log.flush()
        metric = None if validation is None else validation[run.task.metric.name]
        final = run.step == run.steps
        distributed.only_first_rank(
            self._ranks, lambda: self._store.save(state, run.step, metric=metric, final=final)
        )
        self._log.restart_clock()

    def finish(self, run: Run, final: dict[Split, dict[str, float]]) -> dict[str, Any]:
        """Write and return the summary."""
        ranks = self._ranks
        best, metric = self._store.best(), run.task.metric
        summary = {
            "name": self._directory.resolve().name,
            "preset": self._config.preset,
            "metric": metric.facts(),
            "final": final,
            "best_possible": None
            if run.task.best_possible is None
            else {"test": {metric.name: run.task.best_possible}},
            "best": None
            if best is None
            else {"step": best[0], "validation": {metric.name: best[1]}},
            "steps": run.step,
            "epochs": self._epoch(run, run.step),
            "samples": run.step * run.task.batch_size,
            "gradient_evaluations": run.gradient_evaluations,
            "synchronisations": run.synchronisations(run.step),
            "batch_size": run.task.batch_size,
            "workers": self._config.workers,
            "ranks": ranks.count,
            "seed": run.seed,
            "wall": {"seconds": round(time.monotonic() - self._started, 2)},
            "git_commit": git_commit(),
            "versions": versions(),
            "hardware": {
                **hardware(),
                "device": str(ranks.device),
                "threads": torch.get_num_threads(),
            },
        }
        scores = {f"{split}/{name}": v for split in final for name, v in final[split].items()}
        in_effect = {
            "batch_size": run.task.batch_size,
            "learning_rate": self._config.optimizer.scaled_lr(run.task.batch_size),
        }
        self._log.hyperparameters({**flat_values(self._config), **in_effect}, scores)
        write_summary(self._directory / SUMMARY, summary)
        return summary

    @staticmethod
    def _epoch(run: Run, step: int) -> float:
        return round(step / run.task.steps_per_epoch, 4)


def print_result(summary: dict[str, Any], metric: Metric, directory: Path, as_json: bool) -> None:
    """Print the final metrics, for people or as JSON."""
    if as_json:
        print(json.dumps(finite({"directory": str(directory), **summary})))
        return
    for split, metrics in summary["final"].items():
        limit = (summary["best_possible"] or {}).get(split, {}).get(metric.name)
        print(f"{split}: {metrics_text(metrics, [metric, LOSS], limit)}")
    print(
        f"{summary['gradient_evaluations']:,} gradient evaluations in "
        f"{counted(summary['steps'], 'step')}; "
        f"see {directory}"
    )
