"""`egtrain plot-sharpness` from its options to its files: everything but the measuring itself."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from egtrain.build import threads_of_a_rank
from egtrain.errors import InterruptedRun, UsageError
from egtrain.figures import ENDINGS, save_figure
from egtrain.progress import Progress
from egtrain.ranks import distributed, signals
from egtrain.run_directory import RunLock
from egtrain.sharpness.measuring import Job, along_training, jobs_of, measure_all, settings_of
from egtrain.sharpness.picture import PICTURES, draw_pictures
from egtrain.sharpness.records import RecordStore
from egtrain.sharpness.report import print_comparison
from egtrain.sharpness.results import write_results, write_tensorboard
from egtrain.sharpness.runs import Comparison, find_runs
from egtrain.sharpness.sample import load
from egtrain.task_file import TaskFile


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
    task: TaskFile | None = None,
    allow_changes: bool = False,
) -> None:
    """Measure runs, write the results and pictures into `output`, and print a table.

    `task` and `allow_changes` are as for `load_run`.

    Raises:
        UsageError: an option is wrong, or the runs cannot be compared.
        DataError: a checkpoint or the data are missing or damaged.
        InterruptedRun: a signal came after a measurement was stored; the same command goes on.
        KeyboardInterrupt: a signal came before that.
    """
    runs = find_runs(paths, labels, checkpoints)
    settings = settings_of(metrics, thorough, runs)
    if checkpoints == "all" and not along_training(settings):
        raise UsageError(
            "--checkpoints all draws eigenvalues or trace over the steps: add one of them to "
            "--metrics"
        )
    jobs: list[Job] = []
    try:
        with (
            signals.StopSignal() as stop,
            distributed.joined_ranks(device) as ranks,
            ExitStack() as closing,
        ):
            if ranks.count > 1:
                torch.set_num_threads(threads_of_a_rank())  # torchrun leaves them one
            distributed.only_first_rank(ranks, lambda: closing.enter_context(RunLock(output)))
            saved, sample = distributed.first_rank_first(
                ranks,
                lambda: load(
                    runs, samples, data_dir, offline, str(ranks.device), task, allow_changes
                ),
            )
            jobs += jobs_of(runs, settings, sample)
            stream = sys.stderr if json_wanted else None
            with Progress(stream, silent=ranks.rank > 0) as progress:
                store = RecordStore(output / "measured")
                measure_all(jobs, runs, saved, sample.batches, store, ranks, progress, stop)
            if ranks.rank == 0:
                described = {"metrics": settings, "thorough": thorough, "checkpoints": checkpoints}
                comparison = Comparison(described, sample.description, runs)
                pictures = write(comparison, output)
                print_comparison(comparison, pictures, output, json_wanted)
    except signals.StoppedEarly:
        stored = sum(job.record is not None for job in jobs)
        if not stored:
            raise KeyboardInterrupt from None
        raise InterruptedRun(
            f"interrupted; {stored} of {len(jobs)} measurements are stored in {output}, and the "
            "same command goes on"
        ) from None


def write(comparison: Comparison, output: Path) -> list[str]:
    """Write the results into `output` and for TensorBoard; return the names of the pictures.

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
    write_tensorboard(comparison.runs, images)
    return list(figures)
