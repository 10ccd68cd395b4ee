"""`egtrain export`: parse, hand over, print."""

import json
from pathlib import Path
from typing import Annotated

from egtrain.cli.importing import ending_at_interrupt
from egtrain.cli.options import AsJson, CheckpointName, RunPath, output_option
from egtrain.errors import UsageError
from egtrain.formatting import counted


def export(
    run: RunPath,
    output: Annotated[
        Path, output_option(metavar="FILE", help="The file: NAME.safetensors or NAME.pt.")
    ],
    checkpoint: CheckpointName = "last",
    force: Annotated[bool, output_option("--force", help="Replace a file that exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the weights of a run to a file that plain PyTorch loads.

    It holds a state_dict, with averaged BatchNorm statistics. In safetensors it also holds the
    settings, the step and the metrics.

    Example: egtrain export runs/quickstart-20260101-120000 --output weights.pt
    """
    endings = (".safetensors", ".pt")
    if output.suffix not in endings:
        raise UsageError(f"--output must end with {' or '.join(endings)}, not {output.name!r}")
    if output.is_dir() or (output.exists() and not force):
        raise UsageError(
            f"{output} exists already: choose another --output"
            + ("" if output.is_dir() else ", or add --force to replace it")
        )
    with ending_at_interrupt():
        from egtrain.export import weights_of
        from egtrain.weight_files import sha256_of, write_weights

    weights = weights_of(run, checkpoint)
    write_weights(output, weights.tensors, weights.metadata)
    size = output.stat().st_size
    if as_json:
        told = {"output": str(output), "run": str(run), "step": weights.step}
        told |= {"tensors": len(weights.tensors), "bytes": size, "sha256": sha256_of(output)}
        print(json.dumps({**told, "metrics": weights.metrics}))
        return
    print(
        f"{output}: the weights of {run} after {counted(weights.step, 'step')}, "
        f"{counted(len(weights.tensors), 'tensor')}, {size / 1e6:.3g} MB"
    )
