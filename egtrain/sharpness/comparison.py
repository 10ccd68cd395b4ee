"""`egtrain plot-sharpness` from its options to its files: what is done around the measuring."""

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from egtrain import distributed
from egtrain.build import threads_of_a_rank
from egtrain.errors import EgtrainError, InterruptedRun, UsageError
from egtrain.figures import ENDINGS, save_figure
from egtrain.progress import FRACTIONS
from egtrain.run_directory import RunLock
from egtrain.runlog import finite
from egtrain.sharpness.measure import (
    ALONG_TRAINING,
    MeasureDisplay,
    Work,
    compare,
    measure_all,
    plan,
    same_network,
    settings_of,
)
from egtrain.sharpness.picture import minimum_figure, paths_figure, training_figure
from egtrain.sharpness.results import (
    CAVEATS,
    NAME,
    Comparison,
    MeasuredRun,
    RecordStore,
    as_json,
    scalars_of,
    write_results,
    write_tensorboard,
)
from egtrain.sharpness.subjects import Subject, find_subjects, load_subjects


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
    if checkpoints == "all" and not set(settings) & set(ALONG_TRAINING):
        raise UsageError(
            "--checkpoints all draws eigenvalues and trace over the steps: add one of them to "
            "--metrics"
        )
    subjects = find_subjects(paths, labels, checkpoints)
    store = RecordStore(output / "measured")
    works: list[list[Work]] = []
    try:
        with (
            distributed.StopSignal() as stop,
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
                settings.pop("between", None)
            works += plan(subjects, settings, sample, models)
            stream = sys.stderr if json_wanted else None
            show = closing.enter_context(MeasureDisplay(stream, silent=ranks.rank > 0))
            measured = measure_all(
                works, models, task, sample, precisions, store, ranks, show, stop
            )
            described = {"metrics": settings, "thorough": thorough, "checkpoints": checkpoints}
            comparison = compare(subjects, works, measured, described, sample, task.metric.name)
            closing.close()
            if ranks.rank == 0:
                write(comparison, subjects, output)
                print_comparison(comparison, output, json_wanted)
    except distributed.StoppedEarly:
        jobs = [job for run in works for work in run for job in work.jobs]
        stored = sum(store.get(job.key) is not None for job in jobs)
        if not stored:
            raise KeyboardInterrupt from None
        raise InterruptedRun(
            f"interrupted; {stored} of {len(jobs)} measurements are stored in {output}, and the "
            "same command goes on"
        ) from None


def write(comparison: Comparison, subjects: Sequence[Subject], output: Path) -> None:
    """Write tables and pictures into `output`, and scalars and the picture into each run's
    TensorBoard folder.

    Raises:
        EgtrainError: a file in `output` could not be written.
    """
    write_results(comparison, output)
    figures = {
        NAME: minimum_figure(comparison.runs),
        f"{NAME}-paths": paths_figure(comparison.runs),
        f"{NAME}-training": training_figure(comparison.runs),
    }
    for name, figure in figures.items():
        if figure is not None:
            save_figure(figure, output / name)
            continue
        for ending in ENDINGS:  # of an earlier comparison
            (output / f"{name}.{ending}").unlink(missing_ok=True)
    images = {NAME: (output / f"{NAME}.png").read_bytes()}
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


def print_comparison(comparison: Comparison, output: Path, json_wanted: bool) -> None:
    """Print the table with its warnings and caveats, or the results as JSON."""
    if json_wanted:
        print(json.dumps(finite(as_json(comparison)), allow_nan=False))
        for warning in comparison.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)  # a file has room for every column
    columns = [_column(run) for run in comparison.runs]
    table = Table("", box=None, pad_edge=False)
    for run in comparison.runs:
        table.add_column(Text(run.label), justify="right", overflow="fold")
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(Text(name, no_wrap=True), *[Text(column.get(name, "")) for column in columns])
    console.print(table)
    for text in [*(f"warning: {warning}" for warning in comparison.warnings), *CAVEATS]:
        console.print(Text(text), soft_wrap=True)
    console.print(
        Text(f"see {output / NAME}.png, .svg, .pdf, .json, .csv and .npz"), soft_wrap=True
    )


def _column(run: MeasuredRun) -> dict[str, str]:
    """Return the run's column of the table by row."""
    records = {**run.records, **({} if run.between is None else {"between": run.between})}
    column = {"batch size": f"{run.batch_size:,}", "step": f"{run.checkpoints[-1].step:,}"}
    for split, found in run.level.items():
        for name, value in found.items():
            column[f"{split} {name.replace('_', ' ')}"] = (
                f"{value:.2%}" if name in FRACTIONS else f"{value:.4g}"
            )
    if found := records.get("eigenvalues"):
        mark = "" if found.values["converged"][0] else "~"
        column["λ_max"] = f"{mark}{found.values['largest'][0]:.4g}"
        column["λ_min"] = (
            f"{'' if found.values['smallest_converged'] else '~'}{found.values['smallest']:.3g}"
        )
    if found := records.get("trace"):
        column["trace"] = f"{found.values['mean']:.4g} ± {found.values['standard_error']:.2g}"
    if found := records.get("average"):
        middle = len(found.values["radii"]) // 2
        error = found.values["standard_error"][middle]
        column[f"average ρ={found.values['radii'][middle]:g}"] = (
            f"{found.values['mean'][middle]:.3g} ± {error:.1g}"
        )
    if found := records.get("worst"):
        middle = len(found.values["radii"]) // 2
        column[f"worst ρ={found.values['radii'][middle]:g}"] = (
            f"{found.values['sharpness'][middle]:.3g}"
        )
    if found := records.get("epsilon"):
        column[f"ε-sharpness ε={found.values['sizes'][0]:g}"] = (
            f"{found.values['sharpness'][0]:.3g}"
        )
    if found := records.get("between"):
        column["barrier from the first"] = f"{found.values['barrier']:.3g}"
    return column
