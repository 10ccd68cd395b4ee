"""The spectral density of the Hessian, by stochastic Lanczos quadrature."""

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes

from egtrain.sharpness import metric, spectrum
from egtrain.sharpness.drawing import style_of
from egtrain.sharpness.metric import Measured, MeasuredModel, Panel, Parameters, Settings
from egtrain.sharpness.runs import Run

GRID_POINTS = 512
"""Of the drawn curve."""


def cost(p: Parameters, settings: Settings) -> float:
    """Return the cost without the products that the eigenvalues have made already."""
    shared = settings["eigenvalues"]["steps"] if "eigenvalues" in settings else 0
    return float(metric.PRODUCT * max(p["vectors"] * p["steps"] - shared, 0))


def measure(model: MeasuredModel, vectors: int, steps: int) -> Measured:
    """Return nodes and weights of the quadrature, so that compared runs get one common grid."""
    found = spectrum.density(
        model.loss, vectors=vectors, steps=steps, seed=metric.SEED, krylov=model.krylov
    )
    model.krylov = None  # its basis takes as much memory as many models
    return {}, {"nodes": found.nodes.tolist(), "weights": found.weights.tolist()}


def draw(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the densities on a common grid with a common smoothing."""
    curves = [run.records["density"].curves for run in runs]
    densities = [
        spectrum.Density(*(torch.tensor(c[name]).double() for name in ("nodes", "weights")))
        for c in curves
    ]
    low = min(float(d.nodes.min()) for d in densities)
    high = max(float(d.nodes.max()) for d in densities)
    sigma = max(high - low, 1e-12) / 100
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, GRID_POINTS, dtype=torch.float64)
    smooth = [spectrum.density_on(d, grid, sigma) for d in densities]
    # Far from every node the sum of Gaussians is practically zero, which a logarithm cannot show.
    outermost = min(float(d.weights.mean(dim=0)[d.nodes.mean(dim=0).argmax()]) for d in densities)
    top = max(float(curve.max()) for curve in smooth)
    floor = max(outermost / (sigma * math.sqrt(2 * math.pi)) / 10, top * 1e-9)
    for number, curve in enumerate(smooth):
        axes.plot(grid, curve.clamp(min=floor / 10), **style_of(number))
    axes.set_yscale("log")
    axes.set_ylim(floor, top * 3)
    axes.set_title("Spectrum of the Hessian")
    axes.set_xlabel(f"eigenvalue (smoothed, σ = {sigma:.2g})")
    axes.set_ylabel("density")


METRIC = metric.SharpnessMetric(
    default={"vectors": 1, "steps": 50},
    thorough={"vectors": 10, "steps": 90},
    cost=cost,
    measure=measure,
    panels=(Panel(draw),),
)
