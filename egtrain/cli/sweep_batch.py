"""`egtrain sweep-batch`: parse, hand over, print."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from egtrain.cli.importing import ending_at_interrupt
from egtrain.cli.options import (
    AsJson,
    DataDir,
    DataName,
    Device,
    Offline,
    OutputRoot,
    Settings,
    TaskPath,
    batch_option,
    complete_preset,
    length_option,
    output_option,
    overrides_of,
    place_option,
    runs_root,
    task_file,
    what_option,
)
from egtrain.errors import UsageError

N = TypeVar("N", int, float)


def sweep_batch(
    preset: Annotated[
        list[str],
        what_option(
            autocompletion=complete_preset,
            metavar="NAME|FILE",
            help="A preset or YAML file to compare; once for each. The first is what the others "
            "are compared with.",
        ),
    ],
    batch_sizes: Annotated[
        str, batch_option(metavar="B,B,...", help="Batch sizes, such as 256,1024,4096.")
    ],
    seeds: Annotated[
        int, what_option(metavar="N", help="Runs of each combination, with consecutive seeds.")
    ] = 1,
    task: TaskPath = None,
    settings: Settings = None,
    data: DataName = None,
    data_dir: DataDir = None,
    offline: Offline = False,
    validation: Annotated[
        int | None,
        what_option(
            metavar="N",
            help="Training samples held out to select from a grid; default with a grid: a tenth "
            "of them.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        length_option(
            metavar="N", help="Length of every run in epochs: equal samples, if B divides them."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        length_option(
            metavar="N", help="Length of every run in updates: larger batches see more samples."
        ),
    ] = None,
    grow: Annotated[
        Literal["workers", "worker-batch"],
        batch_option(help="What makes a batch larger: more workers, or more samples for each."),
    ] = "workers",
    lr_scaling: Annotated[
        Literal["linear", "sqrt", "none"] | None,
        batch_option(
            help="How the learning rate follows the batch size; default: as each preset says, else "
            "linear."
        ),
    ] = None,
    lr_grid: Annotated[
        str,
        batch_option(
            metavar="F,F,...|auto",
            help="Factors of the scaled learning rate to select from; auto: 0.5,1,2, and on by "
            "factors of two until worse rates lie on both sides of the best.",
        ),
    ] = "1",
    ratio_grid: Annotated[
        str,
        batch_option(
            metavar="F,F,...",
            help="Factors of a preset's ratio (or rate, size, radius) to select from.",
        ),
    ] = "1",
    device: Device = None,
    jobs: Annotated[
        str,
        place_option(
            metavar="N|auto",
            help="Runs at a time; auto: one for each GPU, or as many as the cores can carry.",
        ),
    ] = "auto",
    retry: Annotated[
        bool, what_option("--retry", help="Run failed and diverged cells again.")
    ] = False,
    output: Annotated[
        Path | None,
        output_option(
            metavar="DIR",
            help="Folder of the sweep; default: ROOT/sweep-PRESETS. An existing one is continued, "
            "and may grow.",
        ),
    ] = None,
    output_root: OutputRoot = None,
    target: Annotated[
        float | None,
        output_option(
            metavar="VALUE",
            help="Count the steps to this value of the metric; default: the best that every run "
            "reaches.",
        ),
    ] = None,
    within: Annotated[
        float,
        output_option(
            metavar="PERCENT", help="How much worse than the smallest batch counts as equally good."
        ),
    ] = 1,
    dry_run: Annotated[
        bool, output_option("--dry-run", help="Print the plan; train and download nothing.")
    ] = False,
    estimate: Annotated[
        bool,
        output_option(
            "--estimate/--no-estimate", help="Time a few steps of each preset for the plan."
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Compare presets at growing batch sizes: train every cell, then make a table and a picture.

    Example: egtrain sweep-batch --preset quickstart --batch-sizes 64,256,1024
    """
    # Imported here, like torch below, so that --help does not wait for it.
    from egtrain.sweep.request import FIRST_FACTORS, Request, checked_presets

    if not within >= 0:
        raise UsageError("--within takes a percentage of at least 0, such as 1")
    if output is not None and output_root is not None:
        raise UsageError("--output names the folder itself: leave out --output-root")
    file = task_file(task, data)
    given = overrides_of(data, data_dir, offline, device, {"epochs": epochs, "steps": steps}) + (
        settings or []
    )
    search_rates = lr_grid.strip() == "auto"
    request = Request(
        presets=tuple(preset),
        batch_sizes=tuple(_numbers("--batch-sizes", batch_sizes, int)),
        seeds=seeds,
        settings=tuple(given),
        rate_factors=FIRST_FACTORS
        if search_rates
        else tuple(_numbers("--lr-grid", lr_grid, float)),
        search_rates=search_rates,
        length_factors=tuple(_numbers("--ratio-grid", ratio_grid, float)),
        grow=grow,
        scaling=lr_scaling,
        validation=validation,
        task=file,
    )
    presets = checked_presets(request)
    default = "sweep-" + "-".join(one.name for one in presets)
    folder_path = output or runs_root(output_root) / default

    # Everything above needs no torch, so a wrong option is reported at once.
    with ending_at_interrupt():
        from rich.console import Console

        from egtrain.figures import ENDINGS, save_figure
        from egtrain.ranks.distributed import require_cuda
        from egtrain.run_directory import RunLock
        from egtrain.sweep import execution, report
        from egtrain.sweep.cells import PLAN, Folder
        from egtrain.sweep.picture import picture_of
        from egtrain.sweep.plan import Plan, facts_from_data, make_plan
        from egtrain.sweep.request import settled_on_device
        from egtrain.sweep.results import read_results
        from egtrain.sweep.search import continued
        from egtrain.tables import print_line

    request, presets = settled_on_device(request)
    folder = Folder(folder_path)
    begun = (folder.path / PLAN).exists()
    if presets[0].config.device == "cuda" and not begun:
        # Before the data are looked for, because a sweep run elsewhere may be finished.
        require_cuda()
    facts_of = facts_from_data(offline=dry_run)
    first = make_plan(request, presets, facts_of)
    count, gpus = execution.devices_for(first, jobs)

    def plan_so_far() -> Plan:
        return continued(first, request, presets, facts_of, folder)

    stream = sys.stderr if as_json else sys.stdout
    console = Console(file=stream, highlight=False)
    if dry_run:
        plan = plan_so_far()
    if dry_run and as_json:
        print(json.dumps(plan.as_json(folder.path / "cells")))
        return
    if dry_run:
        speeds = execution.measured_speeds(plan, gpus, stream) if estimate else None
        report.print_plan(plan, folder, console, count, speeds)
        return
    with RunLock(folder.path):
        folder.claim(first)
        plan = plan_so_far()
        speeds = execution.measured_speeds(plan, gpus, stream) if estimate and not begun else None
        report.print_plan(plan, folder, console, count, speeds)
        execution.run_cells(
            plan, folder, jobs=count, gpus=gpus, retry=retry, stream=stream, go_on=plan_so_far
        )
        plan = plan_so_far()
        results = read_results(plan, folder, target=target, within_percent=within)
        report.write_results(results, folder.path)
        save_figure(picture_of(results), folder.path / "sweep")
        if as_json:
            print(json.dumps(report.as_json(results)))
        else:
            report.print_results(results, console)
            *files, last = "results.csv", "results.json", *(f"sweep.{e}" for e in ENDINGS)
            print_line(
                f"{', '.join(files)} and {last} are in {folder.path}; "
                f"tensorboard --logdir {folder.path / 'cells'}",
                console,
            )
        execution.require_success(plan, folder, results.selected)


def _numbers(option: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """Return the numbers of a list such as `256,1024`.

    Raises:
        UsageError: there are none, or one is not a number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not text.strip():
        raise UsageError(f"{option} has no values: give at least one")
    try:
        return [kind(part) for part in parts]
    except ValueError:
        wanted = "whole numbers, such as 256,1024" if kind is int else "numbers, such as 0.5,1,2"
        if option == "--lr-grid":
            wanted += ", or auto"
        raise UsageError(f"{option} takes {wanted}, not {text!r}") from None
