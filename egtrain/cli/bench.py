"""`egtrain bench`: parse, hand over, print."""

import json
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

from egtrain.cli.importing import ending_at_interrupt
from egtrain.cli.options import (
    AsJson,
    DataDir,
    DataName,
    Device,
    Offline,
    Settings,
    TaskPath,
    batch_option,
    complete_preset,
    length_option,
    overrides_of,
    task_file,
    what_option,
)
from egtrain.errors import UsageError

if TYPE_CHECKING:
    from egtrain.bench import Comparison


def bench(
    preset: Annotated[
        str,
        what_option(
            autocompletion=complete_preset,
            metavar="NAME|FILE",
            help="The preset whose model, data, base optimizer and batch are used.",
        ),
    ],
    variants: Annotated[
        str | None,
        what_option(
            metavar="NAME,...", help="Variants of extrapolation, such as local,sam; default: all."
        ),
    ] = None,
    rounds: Annotated[
        int, length_option(min=2, metavar="N", help="How often every variant is timed.")
    ] = 20,
    workers: Annotated[
        int, batch_option(min=1, metavar="K", help="Number K of logical workers.")
    ] = 1,
    task: TaskPath = None,
    settings: Settings = None,
    data: DataName = None,
    data_dir: DataDir = None,
    offline: Offline = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure what each variant of extrapolation costs on this machine, beside plain training.

    Steps of all variants alternate in one process. Step times are multiples of a plain step's, with
    their 95 % intervals.

    Example: egtrain bench --preset resnet-eg --variants local,sam --rounds 50
    """
    wanted = None if variants is None else [name.strip() for name in variants.split(",")]
    if wanted is not None and "" in wanted:
        raise UsageError("--variants takes names with commas between them, such as local,sam")
    file = task_file(task, data)
    overrides = overrides_of(data, data_dir, offline, device, {})
    overrides += settings or []
    from egtrain.config.files import load_config

    # A wrong setting is reported before torch is imported.
    load_config(preset, overrides, file)
    with ending_at_interrupt():
        from egtrain.bench import compare_costs
        from egtrain.progress import Progress

    with Progress(sys.stderr) as progress:
        comparison = compare_costs(
            preset,
            overrides,
            workers=workers,
            rounds=rounds,
            wanted=wanted,
            task=file,
            progress=partial(progress.report, "timing the variants"),
        )
    if as_json:
        print(json.dumps({"preset": preset, **asdict(comparison)}))
    else:
        print_costs(preset, comparison)


def print_costs(preset: str, comparison: "Comparison") -> None:
    """Print the costs for people."""
    from rich.console import Console

    from egtrain.tables import Column, print_line, print_table

    console = Console(highlight=False)
    print_line(f"{preset}: a plain step takes {comparison.step_seconds * 1000:.4g} ms", console)
    costs = comparison.variants.values()
    print_table(
        [
            Column("variant", list(comparison.variants), left=True),
            Column("times a plain step", [f"{cost.ratio:.3f}" for cost in costs]),
            Column("95 % interval", [f"{cost.low:.3f}-{cost.high:.3f}" for cost in costs]),
            Column("gradients a step", [f"{cost.gradients_per_step:g}" for cost in costs]),
            Column("peak MiB", [f"{cost.peak_bytes / 2**20:,.1f}" for cost in costs], leave_out=1),
            Column(
                "sent MiB",
                [f"{cost.communicated_bytes / 2**20:,.2f}" for cost in costs],
                leave_out=2,
            ),
        ],
        console,
    )
    for name, reason in comparison.left_out.items():
        print_line(f"{name} is left out: {reason}", console)
