"""`egtrain eval`: parse, hand over, print."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from egtrain.cli.importing import ending_at_interrupt


class SplitName(StrEnum):
    """The splits that can be evaluated."""

    test = "test"
    validation = "validation"


def evaluate_run(
    run: Annotated[Path, typer.Argument(help="A run directory, as `train` makes it.")],
    checkpoint: Annotated[str, typer.Option(help="last, best (needs a validation split) or a file.")] = "last",
    split: Annotated[SplitName, typer.Option(help="What to evaluate on.")] = SplitName.test,
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds the data, if they have moved.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never download data.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Evaluate a run's checkpoint on held-out data.

    Example: egtrain eval runs/quickstart-20260101-120000 --json
    """
    with ending_at_interrupt():
        from egtrain.launch import pick_device
        from egtrain.runlog import finite
        from egtrain.saved_run import load_run

    saved = load_run(run, checkpoint=checkpoint, data_dir=data_dir, offline=offline, device=str(pick_device(device)))
    metrics = saved.evaluate(split.value)
    if as_json:
        print(json.dumps(finite({"run": str(run), "step": saved.step, "split": split.value, **metrics})))
        return
    accuracy = f"accuracy {metrics['accuracy']:.2%}, " if "accuracy" in metrics else ""
    print(f"{split.value}: {accuracy}loss {metrics['loss']:.4f} after {saved.step:,} steps")
