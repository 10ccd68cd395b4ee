"""Measure what of an extrapolation reaches the gradient in bf16: how g(x − ζ) − g(x) compares with
that in fp32.

python docs/measure_shift.py --data-dir DIR --set optimizer.lr=0.8
"""

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor

from egtrain.build import build_run
from egtrain.config.files import load_config
from egtrain.run import Run
from egtrain.sharpness.restoring import weights_kept
from egtrain.train import take_step
from egtrain.workers import Ranks


def gradient(run: Run, worker: int, precision: str, zeta: list[Tensor] | None = None) -> Tensor:
    """Return a worker's gradient of the step that comes next, at x or at x − ζ, without a trace in
    the run.
    """
    parameters = list(run.model.parameters())
    with weights_kept(parameters):
        if zeta is not None:
            with torch.no_grad():
                torch._foreach_sub_(parameters, zeta)
        run.workers.enter(worker)
        torch.clear_autocast_cache()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = run.task.loss(run.model, run.task.batch(worker, run.step))
        loss.backward()
    return run.workers.gradients.clone()


def measure(run: Run, worker: int, ratio: float) -> tuple[float, float, float]:
    """Return the cosine of the two differences, the ratio of their norms, and ‖g(x − ζ) −
    g(x)‖/‖g(x)‖ in fp32.
    """
    assert run.extrapolation is not None
    past = [rows[worker] for rows in run.extrapolation.state_dict()["own"]]
    zeta = [ratio * run.schedule(run.step) * g for g in past]
    at = {p: gradient(run, worker, p) for p in ("fp32", "bf16")}
    wanted, found = (gradient(run, worker, p, zeta) - at[p] for p in ("fp32", "bf16"))
    cosine = torch.nn.functional.cosine_similarity(wanted, found, dim=0).item()
    return cosine, (found.norm() / wanted.norm()).item(), (wanted.norm() / at["fp32"].norm()).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, type=lambda path: str(Path(path).absolute()))
    parser.add_argument("--steps", default="10,25,50")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", help="as in egtrain train"
    )
    arguments = parser.parse_args()
    settings = [f"data.dir={arguments.data_dir}", "precision=fp32", *arguments.settings]
    config = load_config("resnet8-eg", settings)
    run = build_run(config, Ranks())
    run.model.train()
    ratio = 1 / config.workers
    for step in map(int, arguments.steps.split(",")):
        while run.step < step:
            take_step(run, run.schedule(run.step))
        for factor in (1, 4, 16):
            rows = [measure(run, worker, factor * ratio) for worker in range(8)]
            cosine, length, share = (statistics.fmean(column) for column in zip(*rows, strict=True))
            print(
                f"step {step}, ρ = {factor * ratio:g}: g(x − ζ) − g(x) is {share:.1%} of g(x); in "
                "bf16 its cosine is "
                f"{cosine:.3f}, its norm {length:.2f} times that in fp32",
                flush=True,
            )
