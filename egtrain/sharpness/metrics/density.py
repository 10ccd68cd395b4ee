"""The spectral density of the Hessian, by stochastic Lanczos quadrature."""

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes

from egtrain.sharpness.drawing import colour, line_style
from egtrain.sharpness.metric import (
    PRODUCT_COST,
    SEED,
    Measured,
    ModelAtCheckpoint,
    Panel,
    Parameters,
    Settings,
    SharpnessMetric,
)
from egtrain.sharpness.records import MeasuredRun
from egtrain.sharpness.spectrum import Density, density, density_on

GRID_POINTS = 512
"""Of the curve that is drawn."""


def cost(settings: Settings) -> float:
    """Return the cost without the products that the eigenvalues have taken."""
    parameters = settings["density"]
    shared = settings["eigenvalues"]["steps"] if "eigenvalues" in settings else 0
    return float(PRODUCT_COST * max(parameters["vectors"] * parameters["steps"] - shared, 0))


def measure(model: ModelAtCheckpoint, parameters: Parameters) -> Measured:
    """Return nodes and weights of the quadrature, so that compared runs get one common grid."""
    found = density(
        model.loss,
        vectors=parameters["vectors"],
        steps=parameters["steps"],
        seed=SEED,
        krylov=model.krylov,
    )
    model.krylov = None  # its basis takes as much memory as many models
    return {}, {"nodes": found.nodes.tolist(), "weights": found.weights.tolist()}


def draw(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    """Draw the densities on a common grid with a common smoothing."""
    densities = [
        Density(*(torch.tensor(curves[name], dtype=torch.float64) for name in ("nodes", "weights")))
        for curves in (run.records["density"].curves for run in runs)
    ]
    low = min(float(d.nodes.min()) for d in densities)
    high = max(float(d.nodes.max()) for d in densities)
    sigma = max(high - low, 1e-12) / 100
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, GRID_POINTS, dtype=torch.float64)
    curves = [density_on(d, grid, sigma) for d in densities]
    # Far from every node a sum of Gaussians is zero for all purposes, and a logarithm has no room
    # for that.
    outermost = min(float(d.weights.mean(dim=0)[d.nodes.mean(dim=0).argmax()]) for d in densities)
    top = max(float(c.max()) for c in curves)
    floor = max(outermost / (sigma * math.sqrt(2 * math.pi)) / 10, top * 1e-9)
    for number, curve in enumerate(curves):
        axes.plot(
            grid, curve.clamp(min=floor / 10), color=colour(number), linestyle=line_style(number)
        )
    axes.set_yscale("log")
    axes.set_ylim(floor, top * 3)
    axes.set_title("Spectrum of the Hessian")
    axes.set_xlabel(f"eigenvalue (smoothed, σ = {sigma:.2g})")
    axes.set_ylabel("density")


METRIC = SharpnessMetric(
    default={"vectors": 1, "steps": 50},
    thorough={"vectors": 10, "steps": 90},
    cost=cost,
    measure=measure,
    panels=(Panel(draw),),
)
