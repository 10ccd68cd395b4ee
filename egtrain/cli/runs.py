"""`egtrain runs`: parse, hand over, print."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from egtrain.cli.options import AsJson, output_option, runs_root, what_option
from egtrain.errors import UsageError


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DIR",
            help="Folders to search for runs; default: $EGTRAIN_RUNS, or else runs.",
            show_default=False,
        ),
    ] = None,
    each: Annotated[
        bool, what_option("--each", help="Show each run, instead of the mean over seeds.")
    ] = False,
    sort: Annotated[
        str,
        output_option(
            metavar="COLUMN",
            help="name, preset, batch, rate, steps, state, seeds, test, validation, time, or a "
            "setting such as optimizer.momentum; default: the last one started at the end.",
            show_default=False,
        ),
    ] = "started",
    as_json: AsJson = False,
    as_csv: Annotated[bool, output_option("--csv", help="Print a table for programs.")] = False,
) -> None:
    """Show the runs in a folder as a table, those that differ only in the seed as one line.

    Example: egtrain runs runs/first --sort test
    """
    # Imported here, so that --help does not wait for it.
    from egtrain.runs import report
    from egtrain.runs.finding import run_folders
    from egtrain.runs.grouping import grouped
    from egtrain.runs.reading import read_run
    from egtrain.runs.sorting import in_order

    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other: give one")
    searched = folders or [runs_root()]
    problems: list[str] = []
    found = []
    if folders or searched[0].exists():
        found = [
            run
            for folder in run_folders(searched, problems)
            if (run := read_run(folder)) is not None
        ]
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    lines = in_order(grouped(found, each=each), sort)
    if not lines:
        where = ", ".join(map(str, searched))
        print(
            f"no runs in {where}: `egtrain train` makes some, or name another folder",
            file=sys.stderr,
        )
    if as_json:
        print(json.dumps(report.as_json(lines), allow_nan=False))
    elif as_csv:
        report.write_csv(lines, sys.stdout)
    elif lines:
        from rich.console import Console

        report.print_lines(lines, Console(highlight=False))
