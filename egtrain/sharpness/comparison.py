"""`egtrain plot-sharpness` from its options to its files: what is done around the measuring."""

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from egtrain.build import threads_of_a_rank
from egtrain.errors import EgtrainError, InterruptedRun, UsageError
from egtrain.figures import ENDINGS, save_figure
from egtrain.logs.runlog import finite
from egtrain.ranks import distributed, signals
from egtrain.run_directory import RunLock
from egtrain.sharpness.display import MeasureDisplay
from egtrain.sharpness.measuring import measure_all
from egtrain.sharpness.picture import PICTURES, draw_pictures
from egtrain.sharpness.plan import (
    Work,
    along_training,
    plan,
    same_network,
    settings_of,
    without_paths,
)
from egtrain.sharpness.records import MeasuredRun, RecordStore
from egtrain.sharpness.results import CAVEATS, NAME, Comparison, as_json, write_results
from egtrain.sharpness.subjects import Subject, describe_network, find_subjects, load_subjects
from egtrain.sharpness.table import print_runs
from egtrain.sharpness.tensorboard import scalars_of, write_tensorboard
from egtrain.tables import print_line


def plot(
    paths: Sequence[Path],
    *,
    metrics: Sequence[str] | None,
    thorough: bool,
    samples: int,
    labels: Sequence[str],
    checkpoints: str,
    output: Path,
    data_dir: Path | None,
    offline: bool,
    device: str,
    json_wanted: bool,
) -> None:
    """Measure runs, write the results and pictures into `output`, and print a table.

    Raises:
        UsageError: an option is wrong, or the runs cannot be compared.
        DataError: a checkpoint or the data are missing or damaged.
        InterruptedRun: a signal came after something was stored; the same command goes on from
            there.
        KeyboardInterrupt: a signal came before.
    """
    settings = settings_of(metrics, thorough, len(paths))
    if checkpoints == "all" and not along_training(settings):
        raise UsageError(
            "--checkpoints all draws eigenvalues and trace over the steps: add one of them to "
            "--metrics"
        )
    subjects = find_subjects(paths, labels, checkpoints)
    store = RecordStore(output / "measured")
    works: list[list[Work]] = []
    try:
        with (
            signals.StopSignal() as stop,
            distributed.joined_ranks(device) as ranks,
            ExitStack() as closing,
        ):
            if ranks.count > 1:
                torch.set_num_threads(threads_of_a_rank())  # torchrun leaves them one
            distributed.only_first_rank(ranks, lambda: closing.enter_context(RunLock(output)))
            models, task, sample, precisions = distributed.first_rank_first(
                ranks,
                lambda: load_subjects(subjects, samples, data_dir, offline, str(ranks.device)),
            )
            if metrics is None and not same_network(models):
                settings = without_paths(settings)
            works += plan(subjects, settings, sample, models)
            stream = sys.stderr if json_wanted else None
            show = closing.enter_context(MeasureDisplay(stream, silent=ranks.rank > 0))
            runs = measure_all(works, models, task, sample, precisions, store, ranks, show, stop)
            described = {"metrics": settings, "thorough": thorough, "checkpoints": checkpoints}
            network = describe_network([subject.config for subject in subjects])
            comparison = Comparison(described, sample.description, runs, network)
            closing.close()
            if ranks.rank == 0:
                pictures = write(comparison, subjects, output)
                print_comparison(comparison, pictures, output, json_wanted)
    except signals.StoppedEarly:
        jobs = [job for run in works for work in run for job in work.jobs]
        stored = sum(store.get(job.key) is not None for job in jobs)
        if not stored:
            raise KeyboardInterrupt from None
        raise InterruptedRun(
            f"interrupted; {stored} of {len(jobs)} measurements are stored in {output}, and the "
            "same command goes on"
        ) from None


def write(comparison: Comparison, subjects: Sequence[Subject], output: Path) -> list[str]:
    """Write tables and pictures into `output`, and scalars and pictures into each run's TensorBoard
    folder; return the names of the pictures.

    Raises:
        EgtrainError: a file in `output` could not be written.
    """
    write_results(comparison, output)
    figures = draw_pictures(comparison)
    for name in PICTURES:
        if name in figures:
            save_figure(figures[name], output / name)
            continue
        for ending in ENDINGS:  # of an earlier comparison
            (output / f"{name}.{ending}").unlink(missing_ok=True)
    images = {name: (output / f"{name}.png").read_bytes() for name in figures}
    runs_in: dict[Path, list[MeasuredRun]] = {}
    for subject, run in zip(subjects, comparison.runs, strict=True):
        if subject.config.log.tensorboard:
            runs_in.setdefault(subject.directory, []).append(run)
    for directory, runs in runs_in.items():
        folder = directory / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensorboard(folder, scalars_of(runs), images)
        except (OSError, EgtrainError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).partition(";")[0]
            print(f"warning: nothing was written to {folder} ({reason})", file=sys.stderr)
    return list(figures)


def print_comparison(
    comparison: Comparison, pictures: Sequence[str], output: Path, json_wanted: bool
) -> None:
    """Print the table with its warnings and caveats, or the results as JSON."""
    if json_wanted:
        print(json.dumps(finite(as_json(comparison)), allow_nan=False))
        for warning in comparison.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return
    console = Console(highlight=False)
    print_runs(comparison.runs, console)
    for text in [*(f"warning: {warning}" for warning in comparison.warnings), *CAVEATS]:
        print_line(text, console)
    files = [
        *(f"{name}.png" for name in pictures),
        *(f"{NAME}.{e}" for e in ("json", "csv", "npz")),
    ]
    also = " (pictures also as .svg and .pdf)" if pictures else ""
    print_line(f"see {', '.join(files[:-1])} and {files[-1]} in {output}{also}", console)
