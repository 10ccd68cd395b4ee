"""Eigenvalues, trace and density of the Hessian from its products with vectors.

Runs with the same number of weights share the start vectors, so they compare with less noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from egtrain.optim.randomness import generator_for
from egtrain.sharpness.flat import (
    gaussian_vector,
    mean_and_standard_error,
    require_finite,
    splitter,
)
from egtrain.sharpness.frozen_loss import FrozenLoss

TOLERANCE = 1e-3
"""An eigenvalue has converged if its Ritz residual is at most this fraction of the largest."""
START, RESTART, PROBE = "sharpness start", "sharpness restart", "sharpness probe"


@dataclass(frozen=True)
class Krylov:
    """A symmetric H on m orthonormal vectors Q: H·Q = Q·T + β_m·q_{m+1}·e_mᵀ, T tridiagonal."""

    alphas: Tensor
    """The diagonal of T [m], float64."""
    betas: Tensor
    """The subdiagonal of T, then the norm β_m of the remainder [m], float64."""
    basis: tuple[Tensor, ...]
    """The columns of Q."""
    following: Tensor
    """q_{m+1}, from which further steps continue."""

    def ritz(self, steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ascending Ritz values, their residuals and squared first components.

        They are those of the first `steps`, by default all. The squared first components are the
        weights of Gauss quadrature for the start vector; they sum to 1.
        """
        m = len(self.alphas) if steps is None else steps
        values, vectors = self._decomposed(m)
        return values, (self.betas[m - 1] * vectors[-1]).abs(), vectors[0].square()

    def ritz_vector(self, number: int) -> Tensor:
        """Return the unit Ritz vector [n] of the `number`-th Ritz value, ascending, float64."""
        _, vectors = self._decomposed(len(self.alphas))
        total = torch.zeros_like(self.following)
        for factor, q in zip(vectors[:, number].tolist(), self.basis, strict=True):
            total.add_(q, alpha=factor)
        unit: Tensor = total / torch.linalg.vector_norm(total)
        return unit

    def _decomposed(self, steps: int) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of T after some steps, ascending, and its eigenvectors."""
        below = self.betas[: steps - 1]
        values, vectors = torch.linalg.eigh(
            torch.diag(self.alphas[:steps]) + torch.diag(below, 1) + torch.diag(below, -1)
        )
        return values, vectors


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    *,
    restart: Callable[[int], Tensor],
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    krylov: Krylov | None = None,
) -> Krylov:
    """Return the Krylov basis of a symmetric matrix after min(steps, n) steps.

    Reorthogonalisation is full. Once the basis spans an invariant subspace, a random orthogonal
    vector follows, so that repeated eigenvalues and those of other blocks are found too. Each step
    always takes one product.

    Args:
        product: maps a vector [n] of type `dtype` on `device` to the matrix times that vector.
        start: the first vector [n]; it is normalised.
        steps: m.
        restart: returns a random vector [n] for the j-th step.
        dtype: of the basis; the arithmetic is in float64.
        device: of the basis and the arithmetic.
        krylov: the result of fewer steps from the same start, to continue from.

    Raises:
        DivergedError: a product is not finite.
    """
    if krylov is None:
        alphas, betas, basis = [], [], []
        following = _normalised(start.to(device, torch.float64), [])
    else:
        alphas, betas = krylov.alphas.tolist(), krylov.betas.tolist()
        basis, following = list(krylov.basis), krylov.following
    # A remainder below this, relative to the matrix, is rounding.
    rounding = 100 * torch.finfo(dtype).eps
    for step in range(len(alphas), min(steps, len(start))):
        vector = following.to(dtype)
        rest = product(vector).double()
        basis.append(vector)
        alphas.append(require_finite(float(vector.double() @ rest)))
        rest = orthogonal_to(basis, rest)
        beta = float(torch.linalg.vector_norm(rest))
        betas.append(beta)
        if step + 1 == len(start):
            betas[-1] = 0.0
        elif beta <= rounding * max(map(abs, [*alphas, *betas])):
            betas[-1] = 0.0
            following = _normalised(restart(step).to(device, torch.float64), basis)
        else:
            following = rest / beta
    return Krylov(_float64(alphas), _float64(betas), tuple(basis), following)


def orthogonal_to(basis: list[Tensor], vector: Tensor) -> Tensor:
    """Return the part of a float64 vector that is orthogonal to orthonormal vectors."""
    # One pass leaves rounding errors in proportion to the part removed; two passes are enough.
    for _ in range(2):
        for q in basis:
            wide = q.double()
            vector = vector.sub(wide * (wide @ vector))
    return vector


@dataclass(frozen=True)
class Eigenvalues:
    """The algebraically largest eigenvalues of the Hessian, descending, and the smallest."""

    values: list[float]
    """The largest."""
    residuals: list[float]
    """‖H·v − λ·v‖ for the unit Ritz vector of each of the largest, apart from rounding."""
    converged: list[bool]
    """Whether each of the largest has a residual of at most 1e-3 of λ_max."""
    smallest: float
    smallest_residual: float
    smallest_converged: bool
    krylov: Krylov
    """For `density`, which can continue from it; as large as `steps` models."""
    pieces: Callable[[Tensor], list[Tensor]]
    """Splits a flat vector [size] into one tensor per parameter."""

    @cached_property
    def vectors(self) -> list[list[Tensor]]:
        """The unit Ritz vector of each of `values`, one tensor per parameter, on its device.

        Its sign is arbitrary. Computed when first asked for; as large as a model each.
        """
        last = len(self.krylov.alphas) - 1
        return [
            self.pieces(self.krylov.ritz_vector(last - rank)) for rank in range(len(self.values))
        ]


def eigenvalues(loss: FrozenLoss, *, count: int = 1, steps: int = 20, seed: int = 0) -> Eigenvalues:
    """Return the `count` largest eigenvalues of the Hessian and the smallest, by `steps` products.

    There are fewer if the steps or the weights are fewer than `count`.
    """
    krylov = _krylov(loss, 0, steps, seed)
    values, residuals, _ = krylov.ritz()
    good = residuals <= TOLERANCE * values[-1].abs()
    first = slice(0, count)
    return Eigenvalues(
        values=values.flip(0)[first].tolist(),
        residuals=residuals.flip(0)[first].tolist(),
        converged=good.flip(0)[first].tolist(),
        smallest=float(values[0]),
        smallest_residual=float(residuals[0]),
        smallest_converged=bool(good[0]),
        krylov=krylov,
        pieces=splitter(loss.parameters),
    )


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace of the Hessian."""

    mean: float
    standard_error: float
    samples: list[float]


def trace(loss: FrozenLoss, *, samples: int = 30, seed: int = 0) -> Trace:
    """Return the mean of zᵀHz over `samples` vectors z of random signs (Hutchinson's estimator)."""
    values = []
    for number in range(samples):
        signs = (
            torch.randint(0, 2, (loss.size,), generator=generator_for(seed, PROBE, number)).double()
            * 2
            - 1
        )
        signs = signs.to(loss.dtype)
        values.append(require_finite(float(signs.double() @ loss.flat_product(signs).double())))
    return Trace(*mean_and_standard_error(values), values)


@dataclass(frozen=True)
class Density:
    """Quadrature of the spectral density: each random vector's nodes, and weights of sum 1."""

    nodes: Tensor
    """Ritz values [vectors, steps], float64."""
    weights: Tensor
    """[vectors, steps], float64."""


def density(
    loss: FrozenLoss,
    *,
    vectors: int = 1,
    steps: int = 50,
    seed: int = 0,
    krylov: Krylov | None = None,
) -> Density:
    """Return the Hessian's spectral density by stochastic Lanczos quadrature (arXiv 1901.10159).

    There are at most as many steps as weights. `krylov` may be that of `eigenvalues` with the same
    seed: it belongs to the first vector, saves its steps, and does not change the result.
    """
    steps = min(steps, loss.size)
    quadratures = []
    for number in range(vectors):
        nodes, _, weights = _krylov(
            loss, number, steps, seed, krylov if number == 0 else None
        ).ritz(steps)
        quadratures.append((nodes, weights))
    nodes, weights = (torch.stack(parts) for parts in zip(*quadratures, strict=True))
    return Density(nodes, weights)


def density_on(density: Density, grid: Tensor, sigma: float) -> Tensor:
    """Return the mean density at the points of a grid [points], smoothed by N(0, σ²); float64."""
    distance = (grid.double()[:, None, None] - density.nodes) / sigma
    bumps = torch.exp(-0.5 * distance.square()) / (sigma * math.sqrt(2 * math.pi))
    return (bumps * density.weights).sum(dim=2).mean(dim=1)


def _krylov(
    loss: FrozenLoss, number: int, steps: int, seed: int, krylov: Krylov | None = None
) -> Krylov:
    """Return the basis from the random vector `number`, on the CPU and in the weights' type."""
    return lanczos(
        loss.flat_product,
        gaussian_vector(loss.size, seed, START, number),
        steps,
        restart=lambda step: gaussian_vector(loss.size, seed, RESTART, number, step),
        dtype=loss.dtype,
        krylov=krylov,
    )


def _normalised(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """Return the part of a random vector that is orthogonal to the basis, with norm 1."""
    # If the basis spans nearly everything, little is left, so rounding errors are removed again.
    for _ in range(2):
        vector = orthogonal_to(basis, vector)
        vector = vector / torch.linalg.vector_norm(vector)
    return vector


def _float64(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
