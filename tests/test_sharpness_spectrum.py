"""Eigenvalues, trace and density against matrices that are known, and a model that is afterwards as
it was before.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from helpers import environment, fork_server, free_port
from sharpness_models import (
    Attention,
    batches_of,
    classification,
    fingerprint,
    frozen,
    hessian,
    net,
    quadratic,
    samples,
    symmetric,
)
from torch import Tensor, nn

from egtrain.errors import DivergedError, UsageError
from egtrain.models.resnet import ResNet
from egtrain.ranks.distributed import joined_ranks
from egtrain.sharpness.adaptive import average_sharpness, epsilon_sharpness, worst_sharpness
from egtrain.sharpness.flat import flattened
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.landscape import filter_normalised_direction, line
from egtrain.sharpness.loss_function import LossFunction
from egtrain.sharpness.spectrum import Density, density, density_on, eigenvalues, lanczos, trace

NETS = ["tanh", "relu", "convolution", "attention", "lstm", "encoder"]

SPECTRA = {
    "positive": [0.1 * i for i in range(1, 31)],
    "mixed": [-10.0, -9.9, *[0.01 * i for i in range(26)], 9.95, 10.0],
    "nearly opposite": [-10.0 + 1e-6, -3.0, 0.0, 1.0, 10.0],
    "repeated": [5.0] * 4 + [2.0] * 5 + [-1.0] * 3,
    "zeros": [0.0] * 20 + [1.0, 4.0],
    "negative": [-3.0, -2.0, -1.0],
    "nothing": [0.0] * 6,
    "one": [7.0],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_all_eigenvalues_of_a_quadratic_are_found_with_their_multiplicities(name: str) -> None:
    spectrum = sorted(SPECTRA[name], reverse=True)
    size = len(spectrum)
    with quadratic(symmetric(spectrum)) as loss:
        found = eigenvalues(loss, count=size, steps=size + 10, seed=0)
        assert loss.products == size
    torch.testing.assert_close(found.values, spectrum, rtol=1e-10, atol=1e-10)
    assert found.smallest == pytest.approx(spectrum[-1], abs=1e-10)
    assert all(found.converged)
    assert found.smallest_converged


def test_blocks_that_do_not_meet_are_all_searched() -> None:
    # The start vector lies in the first block, whose eigenvalues are the smaller ones.
    matrix = torch.block_diag(symmetric([1.0, 2.0, 3.0]), symmetric([-7.0, 4.0, 9.0]))
    start = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    found = lanczos(
        lambda v: matrix @ v,
        start,
        6,
        restart=lambda step: torch.randn(6, generator=generator, dtype=torch.float64),
    )
    values, _, weights = found.ritz()
    torch.testing.assert_close(values, torch.tensor([-7.0, 1, 2, 3, 4, 9], dtype=torch.float64))
    # The quadrature is that of the start vector, which knows nothing of the second block.
    torch.testing.assert_close(weights[[0, 4, 5]], torch.zeros(3, dtype=torch.float64))
    basis = torch.stack(found.basis)
    torch.testing.assert_close(
        basis @ basis.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_the_basis_is_orthonormal_where_little_is_left_of_a_product() -> None:
    # Of a product a part of 1e-3 to 1e-9 is new; taking out the rest once leaves its rounding.
    matrix = symmetric([10.0**-k for k in range(10)])
    start = torch.randn(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    basis = torch.stack(lanczos(lambda v: matrix @ v, start, 10, restart=lambda step: start).basis)
    torch.testing.assert_close(
        basis @ basis.T, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_a_residual_is_that_of_its_ritz_vector_and_says_what_has_not_converged() -> None:
    matrix = symmetric([0.01 * i for i in range(200)] + [10.0])
    with quadratic(matrix) as loss:
        found = eigenvalues(loss, count=3, steps=12, seed=0)
    basis = torch.stack(found.krylov.basis)
    values, vectors = torch.linalg.eigh(basis @ matrix @ basis.T)
    for value, residual, number in zip(found.values, found.residuals, [-1, -2, -3], strict=True):
        ritz = basis.T @ vectors[:, number]
        assert value == pytest.approx(float(values[number]), rel=1e-9)
        assert residual == pytest.approx(
            float((matrix @ ritz - value * ritz).norm()), rel=1e-6, abs=1e-9
        )
    assert found.converged == [True, False, False]
    assert [r <= 1e-3 * found.values[0] for r in found.residuals] == found.converged
    assert not found.smallest_converged


@pytest.mark.parametrize("name", NETS)
def test_eigenvalues_and_products_are_those_of_the_whole_hessian(name: str) -> None:
    model = net(name)
    matrix = hessian(model)
    assert len(matrix) < 500
    expected = torch.linalg.eigvalsh(matrix)
    with frozen(model) as loss:
        vector = torch.randn(
            loss.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64
        )
        torch.testing.assert_close(loss.flat_product(vector), matrix @ vector, rtol=1e-8, atol=1e-8)
        found = eigenvalues(loss, count=5, steps=loss.size, seed=0)
        torch.testing.assert_close(
            found.values, expected.flip(0)[:5].tolist(), rtol=1e-8, atol=1e-8
        )
        assert found.smallest == pytest.approx(float(expected[0]), abs=1e-8)
        assert expected[0] < 0 < expected[-1]


def test_value_and_gradient_are_those_of_all_samples_in_evaluation_mode() -> None:
    model = net("tanh")
    exact, accuracy = classification(model.eval(), samples())
    gradients = torch.autograd.grad(exact, list(model.parameters()))
    expected = exact.detach()
    model.train()
    with frozen(model) as loss:
        assert loss.value() == pytest.approx((float(expected), float(accuracy)), rel=1e-12)
        value, found = loss.value_and_gradient()
    assert value == pytest.approx(float(expected), rel=1e-12)
    torch.testing.assert_close(flattened(found), flattened(gradients), rtol=1e-12, atol=1e-14)
    assert all(p.grad is None for p in model.parameters())


def test_trace_of_a_diagonal_matrix_is_exact_and_has_no_error() -> None:
    diagonal = torch.tensor([3.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    with quadratic(torch.diag(diagonal)) as loss:
        found = trace(loss, samples=3, seed=0)
    assert found.samples == pytest.approx([2.5] * 3, rel=1e-12)
    assert (found.mean, found.standard_error) == pytest.approx((2.5, 0.0), abs=1e-12)


def test_two_seeds_estimate_the_same_trace_within_their_errors() -> None:
    spectrum = SPECTRA["mixed"] + SPECTRA["positive"]
    with quadratic(symmetric(spectrum)) as loss:
        first, second = (trace(loss, samples=300, seed=seed) for seed in (0, 1))
        assert loss.products == 600
    assert first.samples != second.samples
    assert len(set(first.samples)) == 300
    assert np.std(first.samples, ddof=1) / math.sqrt(300) == pytest.approx(first.standard_error)
    together = math.hypot(first.standard_error, second.standard_error)
    assert abs(first.mean - second.mean) < 3 * together
    for found in (first, second):
        assert abs(found.mean - sum(spectrum)) < 3 * found.standard_error


@pytest.mark.parametrize("name", SPECTRA)
def test_quadrature_weights_sum_to_one_and_have_the_moments_of_the_start_vector(name: str) -> None:
    matrix = symmetric(SPECTRA[name])
    steps = 12
    with quadratic(matrix) as loss:
        found = density(loss, vectors=2, steps=steps, seed=0)
        first = eigenvalues(loss, count=1, steps=1, seed=0).krylov.basis[0]
    assert found.nodes.shape == found.weights.shape == (2, min(steps, len(matrix)))
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(2, dtype=torch.float64))
    assert (found.weights >= 0).all()
    for power in range(4):
        expected = first @ torch.linalg.matrix_power(matrix, power) @ first
        moment = (found.weights[0] * found.nodes[0] ** power).sum()
        torch.testing.assert_close(moment, expected, rtol=1e-9, atol=1e-9)


def test_density_is_that_of_the_spectrum() -> None:
    spectrum = [0.0] * 120 + [0.02 * i for i in range(60)] + [-2.0] * 20
    sigma, grid = 0.3, torch.linspace(-4, 4, 400, dtype=torch.float64)
    with quadratic(symmetric(spectrum)) as loss:
        found = density_on(density(loss, vectors=20, steps=20, seed=0), grid, sigma)
    exact = density_on(_points(spectrum), grid, sigma)
    step = float(grid[1] - grid[0])
    assert float(found.sum()) * step == pytest.approx(1.0, abs=1e-3)
    assert float((found - exact).abs().sum()) * step < 0.05


def _points(spectrum: list[float]) -> Density:
    nodes = torch.tensor([spectrum], dtype=torch.float64)
    return Density(nodes, torch.full_like(nodes, 1 / len(spectrum)))


@pytest.mark.parametrize(("earlier", "steps"), [(6, 15), (15, 6), (15, 15)])
def test_density_goes_on_from_the_basis_of_the_eigenvalues(earlier: int, steps: int) -> None:
    with quadratic(symmetric(SPECTRA["positive"])) as loss:
        alone = density(loss, vectors=2, steps=steps, seed=3)
        before = loss.products
        krylov = eigenvalues(loss, count=1, steps=earlier, seed=3).krylov
        shared = density(loss, vectors=2, steps=steps, seed=3, krylov=krylov)
        assert loss.products - before == max(earlier, steps) + steps
    torch.testing.assert_close(shared.nodes, alone.nodes, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shared.weights, alone.weights, rtol=1e-8, atol=1e-10)


def everything(loss: FrozenLoss) -> list[float]:
    """Return numbers of each kind that a loss is measured by."""
    value, metric = loss.value()
    found = eigenvalues(loss, count=2, steps=8, seed=0)
    quadrature = density(loss, vectors=1, steps=6, seed=1)
    return [
        value,
        metric,
        *flattened(loss.gradient()).tolist(),
        *found.values,
        found.smallest,
        trace(loss, samples=3, seed=0).mean,
        *quadrature.nodes.flatten().tolist(),
        *line(loss, filter_normalised_direction(loss.parameters, 0, 0), points=3).losses.tolist(),
        average_sharpness(loss, 0.1, samples=2, seed=0)[0],
        worst_sharpness(loss, 0.5, steps=4, seed=0),
        epsilon_sharpness(loss, 1e-3, iterations=3),
    ]


@pytest.mark.parametrize("size", [7, 64])
def test_the_size_of_the_batches_does_not_matter(size: int) -> None:
    model = net("tanh")
    with frozen(model, size) as loss, frozen(model, 100) as whole:
        torch.testing.assert_close(everything(loss), everything(whole), rtol=1e-6, atol=1e-9)


def test_nor_does_the_number_of_ranks(tmp_path: Path) -> None:
    with frozen(net("tanh"), 7) as loss:
        expected = everything(loss)
    port = str(free_port())
    ranks = [
        fork_server().Process(target=measure_on_rank, args=(r, 2, port, str(tmp_path)))
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    assert first == second
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-9)


def measure_on_rank(rank: int, count: int, port: str, folder: str) -> None:
    """Measure as one of several ranks and write what was found."""
    torch.set_num_threads(1)
    os.environ.update(
        environment(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    )
    os.environ.update(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    with joined_ranks("cpu") as ranks, frozen(net("tanh"), 7, ranks) as loss:
        Path(folder, f"{rank}.json").write_text(json.dumps(everything(loss)))


def test_float32_batches_of_any_size_agree_well_within_the_tolerance() -> None:
    torch.manual_seed(0)
    model = ResNet(8, 4, 4).eval()
    images, labels = torch.randn(40, 3, 8, 8), torch.randint(0, 4, (40,))
    tops, losses = [], []
    for size in (7, 16, 40):
        with FrozenLoss(model, classification, batches_of((images, labels), size)) as loss:
            losses.append(loss.value()[0])
            tops.append(eigenvalues(loss, count=1, steps=8, seed=0).values[0])
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-6)
    assert tops == pytest.approx(tops[:1] * 3, rel=1e-5)


def test_largest_eigenvalue_of_a_residual_net_is_that_of_scipy() -> None:
    torch.manual_seed(0)
    model = ResNet(8, 4, 4)
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        classification(model, (images, labels))[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with FrozenLoss(model, classification, batches_of((images, labels), 10)) as loss:
        found = eigenvalues(loss, count=1, steps=20, seed=0)
        expected = scipy_largest(loss)
    assert found.converged == [True]
    assert found.values[0] == pytest.approx(expected, rel=1e-3)


def scipy_largest(loss: FrozenLoss) -> float:
    """Return the largest eigenvalue by SciPy's Lanczos method."""

    def product(vector: Any) -> Any:
        return loss.flat_product(torch.from_numpy(vector.copy()).flatten()).numpy()

    operator = scipy.sparse.linalg.LinearOperator(
        (loss.size, loss.size), matvec=product, dtype=np.float64
    )
    start = np.random.default_rng(0).standard_normal(loss.size)
    (largest,) = scipy.sparse.linalg.eigsh(
        operator, k=1, which="LA", tol=1e-4, v0=start, return_eigenvectors=False
    )
    return float(largest)


@pytest.mark.parametrize("name", NETS)
def test_model_and_settings_are_afterwards_as_they_were(name: str) -> None:
    model = net(name)
    next(model.parameters()).requires_grad_(False)
    next(model.children()).eval()
    before = fingerprint(model)
    with frozen(model) as loss:
        everything(loss)
        assert not any(module.training for module in model.modules())
        with loss.at([p + 1 for p in loss.parameters]):
            assert fingerprint(model) != before
    assert fingerprint(model) == before


@pytest.mark.parametrize("when", ["inside", "elsewhere", "counting"])
def test_they_are_so_after_an_error_too(when: str) -> None:
    model = net("lstm")
    before = fingerprint(model)

    def fail() -> None:
        raise KeyboardInterrupt

    def measure() -> None:
        with frozen(model) as loss:
            if when == "counting":
                loss.on_product = fail
                eigenvalues(loss, count=1, steps=3, seed=0)
            if when == "inside":
                with torch.no_grad():
                    loss.parameters[0].add_(1)
                fail()
            with loss.at([p * 2 for p in loss.parameters]):
                fail()

    with pytest.raises(KeyboardInterrupt):
        measure()
    assert fingerprint(model) == before


def test_buffers_that_a_model_changes_or_replaces_come_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3).double()
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("last", torch.zeros(1), persistent=False)

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            self.last = inputs
            return self.head(inputs)  # type: ignore[no-any-return]

    model = Counting()
    before = fingerprint(model)
    with frozen(model) as loss:
        loss.value()
        assert fingerprint(model) != before
    assert fingerprint(model) == before


def test_weights_elsewhere_return_bit_for_bit_even_if_they_are_not_numbers() -> None:
    model = net("relu")
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
        next(model.parameters())[0, 1] = -0.0
    before = fingerprint(model)
    with frozen(model) as loss:
        with loss.at([torch.full_like(p, 1e300) for p in loss.parameters]):
            loss.value()
        assert torch.isnan(loss.parameters[0][0, 0])
        assert math.copysign(1, loss.parameters[0][0, 1].item()) == -1
    assert fingerprint(model) == before


def test_autocast_and_an_outer_no_grad_change_nothing() -> None:
    model = net("relu").float()
    inputs, labels = samples()
    batches = batches_of((inputs.float(), labels), 30)
    with FrozenLoss(model, classification, batches) as loss:
        expected = loss.value(), eigenvalues(loss, count=1, steps=5, seed=0).values
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        FrozenLoss(model, classification, batches) as loss,
    ):
        assert (loss.value(), eigenvalues(loss, count=1, steps=5, seed=0).values) == expected


def test_products_are_counted_and_announced() -> None:
    heard: list[int] = []
    with frozen(net("relu")) as loss:
        loss.on_product = lambda: heard.append(loss.products)
        eigenvalues(loss, count=1, steps=4, seed=0)
        trace(loss, samples=2, seed=0)
        loss.gradient()
        loss.value()
        assert (loss.products, loss.gradients, loss.evaluations) == (6, 1, 1)
    assert heard == [1, 2, 3, 4, 5, 6]


class OnceOnly(torch.autograd.Function):
    """An operation that a user has written without a second derivative."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return gradient * x.exp()


class Fused(nn.Module):
    """Ends in an operation of torch that has no second derivative on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, inputs: Tensor) -> Tensor:
        """Turn on the fused kernel, whatever was asked for."""
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return self.attention(inputs)  # type: ignore[no-any-return]


class Exponential(nn.Linear):
    """Ends in an operation of a user's own."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs."""
        return OnceOnly.apply(super().forward(inputs))  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("model", [Fused(), Exponential(6, 3)], ids=["of torch", "of a user"])
@pytest.mark.parametrize(
    "loss_function", [classification, lambda m, b: (m(b[0]).mean(), torch.zeros(()))]
)
def test_a_model_without_second_derivatives_is_refused_in_a_sentence(
    model: nn.Module, loss_function: LossFunction
) -> None:
    """Torch itself takes what a user has marked as differentiable once for a constant, without a
    word.
    """
    with FrozenLoss(model.double(), loss_function, [(samples(), 100)]) as loss:
        assert math.isfinite(loss.value()[0])
        loss.gradient()
        with pytest.raises(UsageError, match="no second derivatives") as error:
            eigenvalues(loss, count=1, steps=2, seed=0)
    assert "\n" not in str(error.value)


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature() -> None:
    model = nn.Sequential(nn.Linear(6, 1), nn.ReLU()).double()
    with FrozenLoss(
        model, lambda m, b: (m(b[0]).mean(), torch.zeros(())), batches_of(samples(), 30)
    ) as loss:
        found = eigenvalues(loss, count=1, steps=3, seed=0)
    assert (found.values, found.smallest, found.converged) == ([0.0], 0.0, [True])


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (
            lambda m: FrozenLoss(m.requires_grad_(False), classification, [(samples(), 100)]),
            UsageError,
            "no trainable",
        ),
        (lambda m: FrozenLoss(m, classification, []), UsageError, "no samples"),
        (lambda m: frozen(m).value(), RuntimeError, "only inside its block"),
    ],
    ids=["frozen model", "no samples", "outside"],
)
def test_wrong_use_is_said(
    what: Callable[[nn.Module], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        what(net("relu"))


def test_a_loss_without_its_graph_or_that_is_not_finite_is_said() -> None:
    model = net("relu")
    with (
        FrozenLoss(
            model, lambda m, b: (m(b[0]).mean().detach(), torch.zeros(())), [(samples(), 100)]
        ) as loss,
        pytest.raises(UsageError, match="with its graph"),
    ):
        loss.gradient()
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.inf
    with frozen(model) as loss, pytest.raises(DivergedError, match="not a finite number"):
        eigenvalues(loss, count=1, steps=3, seed=0)
