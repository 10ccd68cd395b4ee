"""The printed result of a comparison: a column for each run, warnings and caveats; or JSON."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from egtrain.formatting import count, estimate_text, value_text
from egtrain.sharpness.metrics import LEVEL
from egtrain.sharpness.results import CAVEATS, NAME, as_json, warnings_of
from egtrain.sharpness.runs import Comparison, Run
from egtrain.tables import GAP, Column, print_line, print_table
from egtrain.tasks import LOSS


def print_comparison(
    comparison: Comparison, pictures: Sequence[str], output: Path, json_wanted: bool
) -> None:
    """Print the table with its warnings and caveats, or the results as JSON."""
    warnings = [f"warning: {warning}" for warning in warnings_of(comparison)]
    if json_wanted:
        print(json.dumps(as_json(comparison), allow_nan=False))
        print(*warnings, sep="\n", end="\n" if warnings else "", file=sys.stderr)
        return
    console = Console(highlight=False)
    for place, table in enumerate(
        tables_of(comparison.runs, console.width if console.is_terminal else None)
    ):
        if place:
            console.print()
        print_table(table, console)
    for text in [*warnings, *CAVEATS]:
        print_line(text, console)
    files = [*(f"{p}.png" for p in pictures), *(f"{NAME}.{e}" for e in ("json", "csv", "npz"))]
    also = " (pictures also as .svg and .pdf)" if pictures else ""
    print_line(f"see {', '.join(files[:-1])} and {files[-1]} in {output}{also}", console)


def tables_of(runs: Sequence[Run], width: int | None) -> list[list[Column]]:
    """Return the columns of each table; runs that do not fit into `width` go into another."""
    texts = [_texts(run) for run in runs]
    names = list(dict.fromkeys(name for of_run in texts for name in of_run))
    first = Column("", names, left=True)
    tables: list[list[Column]] = []
    left = 0
    for run, of_run in zip(runs, texts, strict=True):
        column = Column(run.label, [of_run.get(name, "") for name in names])
        needed = len(GAP) + column.narrowest
        if not tables or (width is not None and needed > left):
            tables.append([first])
            left = 0 if width is None else width - first.narrowest
        tables[-1].append(column)
        left -= needed
    return tables


def _texts(run: Run) -> dict[str, str]:
    """Return a run's printed values, by the name of the row."""
    texts = {"batch size": count(run.config.batch_size), "step": count(run.checkpoints[-1].step)}
    for split, values in run.records[LEVEL].values.items():
        for metric in (LOSS, *run.metrics):
            if metric.name in values:
                texts[f"{split} {metric.label}"] = value_text(values[metric.name], metric.unit)
    for name in run.records:
        for row in run.checkpoints[-1].rows(name):
            if row.title:
                texts[row.title] = row.text or estimate_text(row.value, row.error or 0.0)
    return texts
