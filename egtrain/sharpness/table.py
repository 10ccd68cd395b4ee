"""The table of a comparison on the terminal: a column for each run."""

from collections.abc import Sequence

from rich.console import Console

from egtrain.formatting import count, value_text
from egtrain.sharpness.metrics import metric_of
from egtrain.sharpness.records import LEVEL, MeasuredRun
from egtrain.tables import GAP, Column, print_table
from egtrain.tasks import LOSS


def print_runs(runs: Sequence[MeasuredRun], console: Console) -> None:
    """Print what was measured of the runs.

    Where not all of them fit beside each other, the others stand in further tables.
    """
    for number, table in enumerate(tables_of(runs, console.width if console.is_terminal else None)):
        if number:
            console.print()
        print_table(table, console)


def tables_of(runs: Sequence[MeasuredRun], width: int | None) -> list[list[Column]]:
    """Return the columns of each table for a terminal of so many characters; None for any."""
    found = [_rows(run) for run in runs]
    names = list(dict.fromkeys(name for rows in found for name in rows))
    first = Column("", names, left=True)
    tables: list[list[Column]] = []
    left = 0
    for run, rows in zip(runs, found, strict=True):
        column = Column(run.label, [rows.get(name, "") for name in names])
        needed = len(GAP) + column.narrowest
        if not tables or (width is not None and needed > left):
            tables.append([first])
            left = 0 if width is None else width - first.narrowest
        tables[-1].append(column)
        left -= needed
    return tables


def _rows(run: MeasuredRun) -> dict[str, str]:
    """Return the texts of a run by the name of the row."""
    rows = {"batch size": count(run.batch_size), "step": count(run.checkpoints[-1].step)}
    for split, values in run.level.items():
        for metric in (LOSS, run.metric, run.training_metric):
            if metric.name in values:
                rows[f"{split} {metric.label}"] = value_text(values[metric.name], metric.unit)
    for name, record in {**run.records, **run.from_first}.items():
        if name != LEVEL:
            rows |= metric_of(name).rows(record)
    return rows
