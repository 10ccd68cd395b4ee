"""`egtrain eval`: parse, hand over, print."""

import json
import sys
from functools import partial
from typing import Annotated, Literal

from egtrain.cli.importing import ending_at_interrupt
from egtrain.cli.options import (
    AsJson,
    ChangedTask,
    CheckpointName,
    Device,
    MovedDataDir,
    Offline,
    RunPath,
    RunTaskPath,
    task_file,
    what_option,
)
from egtrain.formatting import counted

EXAMPLES = 3
"""Translations to show."""


def evaluate_run(
    run: RunPath,
    checkpoint: CheckpointName = "last",
    split: Annotated[
        Literal["test", "validation"], what_option(help="What to evaluate on.")
    ] = "test",
    beam: Annotated[
        int | None,
        what_option(
            min=1,
            metavar="N",
            help="Hypotheses kept in translating; 1 is greedy. Default: as configured.",
        ),
    ] = None,
    task: RunTaskPath = None,
    allow_changes: ChangedTask = False,
    data_dir: MovedDataDir = None,
    offline: Offline = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's checkpoint on held-out data.

    Translations are made with beam search and written to the run's directory, and so is what
    decode() of a task file returns.

    Example: egtrain eval runs/quickstart-20260101-120000 --json
    """
    with ending_at_interrupt():
        from egtrain.disk import write_atomically
        from egtrain.logs.runlog import finite
        from egtrain.progress import Progress
        from egtrain.ranks.distributed import pick_device
        from egtrain.saved_run import load_run
        from egtrain.tasks import LOSS, metrics_text

    file = task_file(task)
    saved = load_run(
        run,
        checkpoint=checkpoint,
        data_dir=data_dir,
        offline=offline,
        device=str(pick_device(device or "auto")),
        task=file,
        allow_changes=allow_changes,
    )
    told: dict[str, object] = {}
    translations = None
    with Progress(sys.stderr) as progress:
        metrics = saved.evaluate(split, partial(progress.report, f"evaluating on {split}"))
        if beam or saved.config.task.name == "translation":
            translations = saved.translate(
                split, beam, partial(progress.report, f"translating {split}")
            )
        decoded = saved.decode(split, partial(progress.report, f"decoding {split}"))
    if decoded is not None:
        lines = run / f"decoded-{split}.txt"
        write_atomically(lines, "".join(f"{line}\n" for line in decoded).encode())
        told = {"decoded": str(lines)}
    if translations:
        hypotheses = run / f"hypotheses-{split}-beam{translations.beam}.txt"
        write_atomically(
            hypotheses, "".join(f"{line}\n" for line in translations.hypotheses).encode()
        )
        metrics["bleu"] = translations.bleu
        told = {
            "beam": translations.beam,
            "signature": translations.signature,
            "hypotheses": str(hypotheses),
        }
    precision = saved.config.precision
    if as_json:
        found = {"run": str(run), "step": saved.step, "split": split, "precision": precision}
        print(json.dumps(finite({**found, **metrics, **told})))
        return
    limit = saved.task.best_possible if split == "test" else None
    text = metrics_text(metrics, [saved.task.metric, LOSS], limit)
    print(f"{split}: {text} after {counted(saved.step, 'step')}, in {precision}")
    if decoded is not None:
        print(f"the decoded samples are in {lines}")
    if translations:
        how = f"beam {translations.beam}, {translations.signature}"
        print(f"{how}; the hypotheses are in {hypotheses}")
        for number in range(min(EXAMPLES, len(translations.sources))):
            print(f"\nsource:     {translations.sources[number]}")
            print(f"reference:  {translations.references[number]}")
            print(f"hypothesis: {translations.hypotheses[number]}")
