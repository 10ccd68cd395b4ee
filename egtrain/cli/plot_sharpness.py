"""`egtrain plot-sharpness`: parse, hand over, print."""

from pathlib import Path
from typing import Annotated

import typer

from egtrain.cli.importing import ending_at_interrupt
from egtrain.cli.options import (
    AsJson,
    ChangedTask,
    MovedDataDir,
    Offline,
    RunTaskPath,
    output_option,
    place_option,
    task_file,
    what_option,
)
from egtrain.sharpness.metrics import METRICS


def plot_sharpness(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run directories, or checkpoint files in them."),
    ],
    metrics: Annotated[
        str | None,
        what_option(
            metavar="NAME,NAME",
            help=f"{', '.join(METRICS)}; default: all.",
            show_default=False,
        ),
    ] = None,
    thorough: Annotated[
        bool, what_option("--thorough", help="For publication: ten times the work or more.")
    ] = False,
    samples: Annotated[
        int, what_option(min=1, metavar="N", help="Training samples that the loss is taken over.")
    ] = 1024,
    label: Annotated[
        list[str] | None,
        output_option(
            metavar="RUN=TEXT", help="What the picture calls a run; default: its directory."
        ),
    ] = None,
    checkpoints: Annotated[
        str,
        what_option(
            metavar="last|best|all",
            help="Which weights; with all, λ_max and trace are drawn over the steps too.",
        ),
    ] = "last",
    output: Annotated[
        Path,
        output_option(
            metavar="DIR",
            help="Folder of the results; what it already holds is not measured again.",
        ),
    ] = Path("sharpness"),
    task: RunTaskPath = None,
    allow_changes: ChangedTask = False,
    data_dir: MovedDataDir = None,
    offline: Offline = False,
    device: Annotated[
        str, place_option(metavar="auto|cpu|cuda", help="Where to compute.")
    ] = "auto",
    nproc: Annotated[
        int, place_option(min=1, metavar="N", help="Processes that share the samples, a GPU each.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Measure how sharp the minima of trained runs are, and draw them in one picture.

    Example: egtrain plot-sharpness runs/sgd runs/eg --metrics eigenvalues,trace
    """
    with ending_at_interrupt():
        from egtrain.ranks.launch import launch
        from egtrain.ranks.torchrun import started_by_torchrun
        from egtrain.sharpness.comparison import plot

    if nproc > 1 and not started_by_torchrun():
        # Every process runs the same command; torchrun tells it that it is one of several.
        # Not the command line as it is: torchrun would take --nproc as one of its options.
        arguments = [
            "plot-sharpness",
            *map(str, runs),
            "--samples",
            str(samples),
            "--checkpoints",
            checkpoints,
        ]
        arguments += ["--output", str(output), "--device", device]
        arguments += [] if metrics is None else ["--metrics", metrics]
        arguments += [] if task is None else ["--task", str(task)]
        arguments += [] if data_dir is None else ["--data-dir", str(data_dir)]
        arguments += [part for text in label or [] for part in ("--label", text)]
        arguments += [
            name
            for name, wanted in (
                ("--thorough", thorough),
                ("--offline", offline),
                ("--json", as_json),
                ("--allow-changes", allow_changes),
            )
            if wanted
        ]
        raise typer.Exit(launch(nproc, arguments))
    names = None if metrics is None else [name.strip() for name in metrics.split(",")]
    plot(
        runs,
        metrics=None if names is None else [name for name in names if name],
        thorough=thorough,
        samples=samples,
        labels=label or [],
        checkpoints=checkpoints,
        output=output,
        data_dir=data_dir,
        offline=offline,
        device=device,
        json_wanted=as_json,
        task=task_file(task),
        allow_changes=allow_changes,
    )
