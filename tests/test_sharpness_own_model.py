"""Sharpness of anyone's model: data and losses as they come, any precision, and a refusal where
the products are no Hessian's.
"""

import copy
import math
from collections import UserDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from sharpness_models import fingerprint, hessian, net, samples
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from egtrain.errors import UsageError
from egtrain.sharpness import (
    FrozenLoss,
    average_sharpness,
    density,
    eigenvalues,
    filter_normalised_direction,
    line,
    measure,
    trace,
)
from egtrain.sharpness.flat import flattened
from egtrain.sharpness.metrics import METRICS

X, Y = samples()
CRITERION = nn.CrossEntropyLoss()
NETS = ["tanh", "relu", "convolution", "attention", "lstm", "encoder"]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def of_dict(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["inputs"]), batch["labels"])


def in_two(*further: Any) -> list[Any]:
    return [(X[:30], Y[:30], *further), (X[30:], Y[30:], *further)]


def largest(loss: FrozenLoss) -> float:
    with loss:
        return eigenvalues(loss, steps=loss.size).values[0]


# ---- data and loss functions

LOADER = DataLoader(TensorDataset(X, Y), batch_size=33, shuffle=True)


@pytest.mark.parametrize(
    ("data", "loss_function"),
    [
        ((X, Y), CRITERION),
        (in_two(), CRITERION),
        (tuple(in_two()), CRITERION),
        ([list(batch) for batch in in_two()], CRITERION),
        (LOADER, CRITERION),
        (LOADER, F.cross_entropy),
        (LOADER, partial(F.cross_entropy, reduction="mean")),
        (in_two(), cross_entropy),
        ({"inputs": X, "labels": Y}, of_dict),
        ([{"inputs": x, "labels": y} for x, y in in_two()], of_dict),
        ([UserDict(inputs=x, labels=y) for x, y in in_two()], of_dict),
        (([x, {"more": [y]}] for x, y in in_two()), lambda m, b: cross_entropy(m, b[1]["more"])),
        ([(X[:0], Y[:0]), *in_two()], CRITERION),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_of_every_form_give_the_loss_and_curvature_of_all_samples(
    data: Any, loss_function: Any
) -> None:
    if isinstance(data, Iterator):
        loss_function, data = CRITERION, (batch for batch in in_two())
    model = net("relu")
    with FrozenLoss.of(model, loss_function, data) as loss:
        assert loss.samples == 100
        value, metric = loss.value()
        found = eigenvalues(loss, steps=loss.size)
    assert value == pytest.approx(float(cross_entropy(model, (X, Y)).detach()), rel=1e-12)
    assert math.isnan(metric)
    assert found.values[0] == pytest.approx(
        float(torch.linalg.eigvalsh(hessian(model))[-1]), rel=1e-9
    )


def test_an_iterator_of_counted_batches_is_read_once_and_for_all() -> None:
    """It used to give a loss of zero and eigenvalues of zero after a first pass."""
    model = net("relu")
    pairs = [(batch, len(batch[1])) for batch in in_two()]
    with FrozenLoss(model, cross_entropy, iter(pairs)) as loss:
        for _ in range(2):
            assert loss.value()[0] == pytest.approx(
                float(cross_entropy(model, (X, Y)).detach()), rel=1e-12
            )
        assert eigenvalues(loss).values[0] > 0.1


def test_a_shuffled_loader_is_frozen_and_a_training_around_it_draws_what_it_would() -> None:
    model = net("relu")
    before = torch.get_rng_state()
    with FrozenLoss.of(model, CRITERION, LOADER) as loss:
        assert loss.value() == pytest.approx(loss.value(), nan_ok=True, abs=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("metric", [0.25, torch.tensor([0.25]), np.float32(0.25)])
def test_a_metric_may_be_any_number(metric: Any) -> None:
    with FrozenLoss.of(net("relu"), lambda m, b: (cross_entropy(m, b), metric), in_two()) as loss:
        assert loss.value()[1] == pytest.approx(0.25)


def test_a_batch_keeps_its_class_where_its_tensors_change() -> None:
    class Named(UserDict):  # type: ignore[type-arg]
        @property
        def inputs(self) -> Tensor:
            return self["inputs"]  # type: ignore[no-any-return]

    batch = Named(inputs=X.bfloat16(), labels=Y, kind="text")
    model = net("relu").float()
    loss_of = lambda m, b: F.cross_entropy(m(b.inputs), b["labels"])  # noqa: E731
    with FrozenLoss.of(model, loss_of, [batch]) as loss:
        assert math.isfinite(loss.value()[0])
    assert batch.inputs.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("data", "loss_function", "message"),
    [
        ([], CRITERION, "no samples"),
        (DataLoader([], batch_size=2), CRITERION, "no samples"),  # type: ignore[arg-type]
        ([(X[:0], Y[:0])], CRITERION, "no samples"),
        (TensorDataset(X, Y), CRITERION, r"DataLoader\(data_set"),
        (3, CRITERION, "not int: give a DataLoader"),
        ("data", CRITERION, "not str: give a DataLoader"),
        ([X, Y], CRITERION, r"as a tuple \(inputs, targets\)"),
        ([X, X], CRITERION, r"as a tuple \(inputs, targets\)"),
        ([(X[0], 3)], CRITERION, "bare number.*DataLoader"),
        ([((X, Y), 100)], CRITERION, "counted already.*FrozenLoss"),
        ([(X, Y[:50])], CRITERION, r"lengths \[50, 100\].*give pairs"),
        ([{"text": "a"}], CRITERION, "no tensor.*give pairs"),
        ([{"inputs": X, "labels": Y}], CRITERION, r"needs batches \(inputs, targets\)"),
        ((X, Y), nn.CrossEntropyLoss(reduction="sum"), "reduction='mean'"),
        ((X, Y), partial(F.cross_entropy, reduction="none"), "reduction='mean'"),
        ((X, Y), lambda m, b: cross_entropy(m, b).item(), r"not float.*without \.item\(\)"),
        ((X, Y), lambda m, b: m(b[0]), r"shape \[100, 3\].*mean over"),
        ((X, Y), lambda m, b: (cross_entropy(m, b), m(b[0])), r"metric.*\[100, 3\]"),
    ],
)
def test_data_and_losses_that_cannot_be_taken_are_refused_with_what_to_give(
    data: Any, loss_function: Any, message: str
) -> None:
    with (
        pytest.raises(UsageError, match=message),
        FrozenLoss.of(net("relu"), loss_function, data) as loss,
    ):
        loss.value()


@pytest.mark.parametrize(
    ("batches", "message"), [([(X, Y)], "FrozenLoss.of"), ([((X, Y), -1)], "-1 samples")]
)
def test_batches_without_their_number_are_refused(batches: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FrozenLoss(net("relu"), CRITERION, batches)


def test_the_model_inside_data_parallel_is_measured() -> None:
    model = net("relu")
    expected = largest(FrozenLoss.of(model, CRITERION, (X, Y)))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss = FrozenLoss.of(wrapped, CRITERION, (X, Y), names="0")
        assert loss.names == ["0.weight", "0.bias"]
        assert largest(FrozenLoss.of(wrapped, CRITERION, (X, Y))) == expected
    finally:
        torch.distributed.destroy_process_group()


# ---- which weights

SECOND = slice(35, None)
"""The weights of the second layer of the ReLU net: after 6·5 + 5."""


@pytest.mark.parametrize("names", ["2", ["2.bias", "2.weight"], ["2", "2.bias"], None])
def test_names_or_requires_grad_restrict_to_a_block_of_the_hessian(names: Any) -> None:
    model = net("relu")
    expected = torch.linalg.eigvalsh(hessian(model)[SECOND, SECOND])
    if names is None:
        model[0].requires_grad_(False)  # type: ignore[operator, union-attr]
    with FrozenLoss.of(model, CRITERION, (X, Y), names=names) as loss:
        assert loss.names == ["2.weight", "2.bias"]
        found = eigenvalues(loss, count=3, steps=loss.size)
    torch.testing.assert_close(found.values, expected.flip(0)[:3].tolist(), rtol=1e-9, atol=1e-12)


def test_tied_weights_are_one_variable_under_each_of_their_names() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    model[2].weight = model[0].weight
    alone, both = (FrozenLoss.of(model, CRITERION, (X, Y), names=n) for n in ("0.weight", "2"))
    assert alone.names == ["0.weight"]
    assert both.names == ["0.weight", "2.bias"]
    assert torch.allclose(
        torch.tensor(largest(alone)), torch.linalg.eigvalsh(hessian(model)[:36, :36])[-1].float()
    )
    low = copy.deepcopy(model).bfloat16()
    with FrozenLoss.of(low, CRITERION, (X.bfloat16(), Y)) as loss:
        assert low[0].weight is low[2].weight
        assert low[0].weight.dtype == torch.float32
        assert loss.size == 36 + 6 + 6 + 21
    assert low[0].weight is low[2].weight
    assert low[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("2.wieght", "did you mean '2.weight'"),
        (["hed"], "'hed'.*named_parameters"),
        ([], "names is empty"),
        (["0"], "'0' are frozen"),
    ],
)
def test_names_that_match_nothing_trainable_are_refused(names: Any, message: str) -> None:
    model = net("relu")
    model[0].requires_grad_(False)  # type: ignore[operator, union-attr]
    with pytest.raises(UsageError, match=message):
        FrozenLoss.of(model, CRITERION, (X, Y), names=names)


def test_complex_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="weight is complex"):
        FrozenLoss.of(nn.Linear(6, 3, dtype=torch.complex128), CRITERION, (X, Y))


# ---- eigenvectors, and other people's results


def test_vectors_have_the_shapes_of_the_weights_and_the_residuals_that_are_said() -> None:
    model = net("tanh")
    matrix = hessian(model)
    with FrozenLoss.of(model, CRITERION, in_two()) as loss:
        found = eigenvalues(loss, count=3, steps=12)
        shapes = [p.shape for p in loss.parameters]
    assert not all(found.converged)
    vectors = [flattened(vector) for vector in found.vectors]
    for value, residual, parts, flat in zip(
        found.values, found.residuals, found.vectors, vectors, strict=True
    ):
        assert [part.shape for part in parts] == shapes
        assert float((matrix @ flat - value * flat).norm()) == pytest.approx(
            residual, rel=1e-6, abs=1e-9
        )
    torch.testing.assert_close(
        torch.stack(vectors) @ torch.stack(vectors).T, torch.eye(3, dtype=torch.float64)
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_products_are_those_of_curvlinops() -> None:
    # Not in the extra `test`: a package that it needs for an example asks for torchvision, whose
    # usual build does not go with a torch for the CPU alone.
    curvlinops = pytest.importorskip("curvlinops")
    model = net("tanh").eval()
    theirs = curvlinops.HessianLinearOperator(model, CRITERION, list(model.parameters()), in_two())
    vector = torch.randn(
        theirs.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    with FrozenLoss.of(model, CRITERION, in_two()) as loss:
        ours = loss.flat_product(vector)
    torch.testing.assert_close(ours, (theirs @ vector).detach(), rtol=1e-10, atol=1e-12)


def test_eigenvalues_trace_and_density_are_those_of_scipy() -> None:
    model = net("tanh")
    with FrozenLoss.of(model, CRITERION, in_two()) as loss:
        operator = scipy.sparse.linalg.LinearOperator(
            (loss.size, loss.size),
            matvec=lambda v: loss.flat_product(torch.from_numpy(np.array(v).ravel())).numpy(),
            dtype=np.float64,
        )
        start = np.random.default_rng(0).standard_normal(loss.size)
        top = scipy.sparse.linalg.eigsh(
            operator, k=3, which="LA", v0=start, return_eigenvectors=False
        )
        whole = np.linalg.eigvalsh(operator @ np.eye(loss.size))
        found = eigenvalues(loss, count=3, steps=loss.size)
        estimate = trace(loss, samples=300)
        quadrature = density(loss, vectors=100, steps=12)
    assert found.values == pytest.approx(sorted(top, reverse=True), rel=1e-8)
    assert found.smallest == pytest.approx(whole[0], rel=1e-8)
    assert abs(estimate.mean - whole.sum()) < 3 * estimate.standard_error
    for power in (1, 2):
        moments = (quadrature.weights * quadrature.nodes**power).sum(dim=1)
        error = float(moments.std()) / 10
        assert abs(float(moments.mean()) - (whole**power).mean()) < 3 * error


# ---- what torch itself cannot differentiate twice


class Normalised(nn.Module):
    """The weight normalisation of `nn.Linear(6, 3)` after Tanh, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3).double())
        self.norm = nn.Parameter(torch.ones(3, 1).double())
        self.direction = nn.Parameter(torch.linspace(-1, 2, 18).view(3, 6).double())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs [batch, 3]."""
        norms = self.direction.square().sum(dim=1, keepdim=True).sqrt()
        return F.linear(inputs, self.norm * self.direction / norms, self.bias).tanh()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "normalise", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"]
)
def test_weight_normalisation_has_its_own_curvature(normalise: Callable[..., nn.Module]) -> None:
    """Torch's kernel takes the norm for a constant in the second derivative."""
    own = Normalised()
    model = nn.Sequential(normalise(nn.Linear(6, 3).double()), nn.Tanh())
    for weight, value in zip(model.parameters(), own.parameters(), strict=True):
        weight.data.copy_(value.data)
    before = torch._weight_norm
    with (
        FrozenLoss.of(model, CRITERION, (X, Y)) as loss,
        FrozenLoss.of(own, CRITERION, (X, Y)) as expected,
    ):
        vector = torch.linspace(-1, 1, loss.size).double()
        torch.testing.assert_close(loss.flat_product(vector), expected.flat_product(vector))
    assert torch._weight_norm is before


def test_a_compiled_model_runs_as_it_was_written() -> None:
    model = net("relu")
    expected = largest(FrozenLoss.of(model, CRITERION, (X, Y)))
    compiled = torch.compile(model, backend="aot_eager")
    model[2].compile(backend="aot_eager")  # type: ignore[operator, union-attr]
    compiled(X)
    assert largest(FrozenLoss.of(compiled, CRITERION, (X, Y))) == expected


def test_sparse_gradients_give_the_curvature_of_dense_ones() -> None:
    words = torch.arange(400).view(100, 4) % 7
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embed = nn.Embedding(7, 5, sparse=sparse)
        model = nn.Sequential(embed, nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)).double()
        found.append(largest(FrozenLoss.of(model, CRITERION, (words, Y))))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_an_outer_inference_mode_changes_nothing() -> None:
    model = net("relu")
    expected = largest(FrozenLoss.of(model, CRITERION, (X, Y)))
    with torch.inference_mode():
        assert largest(FrozenLoss.of(model, CRITERION, (X, Y))) == expected
        assert torch.is_inference_mode_enabled()


# ---- low and mixed precision


def lowered(model: nn.Module, which: str) -> nn.Module:
    """Return the model with all of its numbers, or one weight among float32, in a short type."""
    if which == "one weight":
        model.float()
        name, weight = next(iter(model.named_parameters()))
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(weight.detach().bfloat16()))
        return model
    return model.to(getattr(torch, which))


@pytest.mark.parametrize("which", ["bfloat16", "float16", "one weight"])
@pytest.mark.parametrize("name", NETS)
def test_short_numbers_are_computed_with_as_if_they_were_long(name: str, which: str) -> None:
    """In bfloat16 itself λ_max is wrong by 2 % and called converged, and a line is flat."""
    model = lowered(net(name), which)
    inputs = X.float() if which == "one weight" else X.to(next(model.parameters()).dtype)
    exact = copy.deepcopy(model).double()
    before = state_of(model)
    with FrozenLoss.of(model, CRITERION, [(inputs[:30], Y[:30]), (inputs[30:], Y[30:])]) as loss:
        found = eigenvalues(loss, steps=30)
        curve = line(loss, filter_normalised_direction(loss.parameters, 0, 0), points=5, span=1e-3)
        estimate = trace(loss, samples=3)
    with FrozenLoss.of(exact, CRITERION, (inputs.double(), Y)) as loss:
        reference = eigenvalues(loss, steps=30)
        expected = line(
            loss, filter_normalised_direction(loss.parameters, 0, 0), points=5, span=1e-3
        )
        assert estimate.mean == pytest.approx(trace(loss, samples=3).mean, rel=1e-4)
    assert found.values == pytest.approx(reference.values, rel=1e-5)
    assert found.vectors[0][0].dtype == torch.float32
    assert len(set(curve.losses.tolist())) == 5
    torch.testing.assert_close(curve.losses, expected.losses, rtol=1e-6, atol=1e-6)
    assert state_of(model) == before


def state_of(model: nn.Module) -> list[Any]:
    """Return what a model holds: which tensors, with which bits."""
    return [
        (name, id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor.tolist())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]


def test_a_short_model_comes_back_after_an_error_with_its_gradients_and_hooks() -> None:
    model = net("lstm").bfloat16()
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    heard: list[None] = []
    weight.register_post_accumulate_grad_hook(lambda _: heard.append(None))
    before = state_of(model)
    loss = FrozenLoss.of(model, CRITERION, (X.bfloat16(), Y))

    def interrupted() -> None:
        with loss:
            loss.gradient()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state_of(model) == before
    assert loss.parameters[0] is weight
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not heard
    CRITERION(model(X.bfloat16()).float(), Y).backward()
    assert heard


def test_another_type_to_compute_in_may_be_asked_for() -> None:
    model = net("tanh").float()
    exact = torch.linalg.eigvalsh(hessian(copy.deepcopy(model).double()))[-1]
    before = fingerprint(model)
    found = largest(FrozenLoss.of(model, CRITERION, (X, Y), dtype=torch.float64))
    assert found == pytest.approx(float(exact), rel=1e-9)
    assert fingerprint(model) == before
    with pytest.raises(UsageError, match=r"float32 or torch\.float64"):
        FrozenLoss.of(model, CRITERION, (X, Y), dtype=torch.bfloat16)


def test_long_numbers_are_left_as_they_are() -> None:
    model = net("tanh")
    batch = (X, Y)
    with FrozenLoss.of(model, CRITERION, batch) as loss:
        assert all(a is b for a, b in zip(loss.parameters, model.parameters(), strict=True))
        assert loss.dtype == torch.float64
        assert loss._first is batch


def under_autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model, batch)


def with_a_cast(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).half().float(), batch[1])


@pytest.mark.parametrize("loss_function", [under_autocast, with_a_cast])
def test_a_model_that_goes_to_low_precision_inside_is_refused(loss_function: Any) -> None:
    model = net("relu").float()
    with (
        FrozenLoss.of(model, loss_function, (X.float(), Y)) as loss,
        pytest.raises(UsageError, match=r"computes in b?float16 inside.*autocast"),
    ):
        loss.value()


# ---- what is no Hessian


class Remembering(nn.Linear):
    """A layer whose output depends on how often it was called."""

    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs."""
        self.calls += 1
        return super().forward(inputs) * self.calls


@pytest.mark.parametrize(
    ("model", "loss_function"),
    [
        (nn.Linear(6, 3), lambda m, b: F.cross_entropy(F.dropout(m(b[0]), 0.1), b[1])),
        (nn.Linear(6, 3), lambda m, b: cross_entropy(m, (b[0] + torch.randn(6) * 0.1, b[1]))),
        (Remembering(6, 3), cross_entropy),
    ],
    ids=["dropout", "noise", "memory"],
)
@pytest.mark.parametrize("use", [FrozenLoss.value, FrozenLoss.gradient, eigenvalues, trace])
def test_a_loss_that_is_not_the_same_twice_is_refused_by_every_use(
    model: nn.Module, loss_function: Any, use: Callable[[FrozenLoss], object]
) -> None:
    with (
        FrozenLoss.of(model.double(), loss_function, in_two()) as loss,
        pytest.raises(UsageError, match="not the same twice"),
    ):
        use(loss)


class Square(torch.autograd.Function):
    """x², with a backward that can be differentiated."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return 2 * x * gradient


class DetachedSquare(Square):
    """x², with the right gradient, which is constant in x."""

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return 2 * x.detach() * gradient


class DetachedProduct(torch.autograd.Function):
    """a·b, with the right gradients, of which that of a is constant in b."""

    @staticmethod
    def forward(context: Any, a: Tensor, b: Tensor) -> Tensor:
        context.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = context.saved_tensors
        return gradient * b.detach(), gradient * a


class Same(torch.autograd.Function):
    """x."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


class OnlyFloat32(DetachedProduct):
    """The product, as a kernel that takes nothing but float32."""

    @staticmethod
    def forward(context: Any, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype != torch.float32:
            raise TypeError(f"no kernel for {a.dtype}")
        return DetachedProduct.forward(context, a, b)


def after(operation: Callable[[Tensor], Tensor]) -> Any:
    return lambda model, batch: F.cross_entropy(operation(model(batch[0])), batch[1])


@pytest.mark.parametrize("use", [eigenvalues, density, trace])
def test_a_second_derivative_that_is_not_symmetric_is_refused(
    use: Callable[[FrozenLoss], object],
) -> None:
    kernel = after(lambda z: OnlyFloat32.apply(z, z.roll(1, dims=1)))
    with FrozenLoss.of(net("tanh").float(), kernel, (X.float(), Y)) as loss:
        loss.value()
        with pytest.raises(UsageError, match=r"not symmetric.*\.data"):
            use(loss)


def test_what_is_detached_before_the_loss_counts_as_constant() -> None:
    model = net("relu")
    constant = model(X).detach()
    expected = largest(FrozenLoss.of(model, after(lambda z: z * constant), (X, Y)))
    found = largest(FrozenLoss.of(model, after(lambda z: z * z.detach()), (X, Y)))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (DetachedSquare.apply, "DetachedSquare"),
        (lambda z: DetachedProduct.apply(z, z.roll(1, dims=1)), "DetachedProduct"),
    ],
)
def test_a_backward_that_detaches_is_refused_by_its_name(
    operation: Any, name: str, dtype: torch.dtype
) -> None:
    """Of the first, uᵀHv is vᵀHu, as what is left of the Hessian is symmetric."""
    model = net("relu").to(dtype)
    before = fingerprint(model)
    with (
        FrozenLoss.of(model, after(operation), (X.to(dtype), Y)) as loss,
        pytest.raises(UsageError, match=f"not that of the loss.*backward of {name} be diff"),
    ):
        eigenvalues(loss)
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_operation_of_ones_own_with_two_derivatives_is_measured(dtype: torch.dtype) -> None:
    """Even where units are exactly at their kinks, so that differences depend on the side."""
    model = net("relu").to(dtype)
    nn.init.zeros_(model[0].bias)  # type: ignore[arg-type]
    batch = torch.cat([torch.zeros(5, 6), X[5:]]).to(dtype), Y
    before = fingerprint(model)
    own = largest(FrozenLoss.of(model, after(Square.apply), batch))
    assert own == pytest.approx(largest(FrozenLoss.of(model, after(Tensor.square), batch)))
    assert fingerprint(model) == before


class AlwaysTraining(nn.BatchNorm1d):
    """Does not hear of evaluation mode."""

    def train(self, mode: bool = True) -> "AlwaysTraining":
        """Stay in training mode."""
        super().train(True)
        return self


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5, track_running_stats=False), AlwaysTraining(5)])
def test_statistics_of_each_batch_are_refused_unless_there_is_one(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Linear(5, 3)).double()
    with (
        FrozenLoss.of(model, CRITERION, in_two()) as loss,
        pytest.raises(UsageError, match="1 normalises by the statistics of each batch"),
    ):
        loss.value()
    with FrozenLoss.of(model, CRITERION, (X, Y)) as loss:
        assert eigenvalues(loss, steps=30).converged == [True]


def test_the_checks_are_made_once_and_are_not_counted() -> None:
    calls: list[int] = []

    def counting(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[1]))
        return cross_entropy(model, batch)

    with FrozenLoss.of(net("relu"), counting, in_two()) as loss:
        trace(loss, samples=2)
        loss.value()
        assert (loss.products, loss.evaluations) == (2, 1)
        assert calls == [30] * 2 + [30] * 4 + [30, 70] * 3
        loss.products = 0
        before = len(calls)
        trace(loss, samples=2)
        assert len(calls) == before + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_function", [CRITERION, after(lambda z: Same.apply(z))])
def test_rounding_alone_is_not_taken_for_a_fault(loss_function: Any, dtype: torch.dtype) -> None:
    """Of a net that has learned everything, curvature is little but rounding."""
    torch.manual_seed(0)
    hidden = nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    model = nn.Sequential(*hidden, nn.Linear(64, 3)).to(dtype)
    batch = X.to(dtype), Y
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    learned = model[4].weight.detach().clone()
    for factor in (1, 2, 3, 5, 8, 15, 30):
        with torch.no_grad():
            model[4].weight.copy_(factor * learned)  # type: ignore[operator, union-attr]
        with FrozenLoss.of(model, loss_function, batch) as loss:
            assert loss.value()[0] < 1e-3
            eigenvalues(loss, steps=2)


def test_nor_is_the_rounding_of_large_terms_that_cancel() -> None:
    def cancelling(model: nn.Module, batch: Any) -> Tensor:
        z = model(batch[0])
        return (1e3 * z).square().mean() - 1e6 * z.square().mean() + z.square().mean()

    with FrozenLoss.of(net("relu").float(), cancelling, (X.float(), Y)) as loss:
        eigenvalues(loss, steps=2)


# ---- a table


def test_measure_gives_the_numbers_of_the_functions_as_a_table() -> None:
    model = net("relu")
    before = fingerprint(model)
    table = measure(model, lambda m, b: (cross_entropy(m, b), 0.5), LOADER)
    assert fingerprint(model) == before
    with FrozenLoss.of(model, CRITERION, (X, Y)) as loss:
        top, estimate = eigenvalues(loss), trace(loss)
        value = loss.value()[0]
    assert list(table) == ["loss", "eigenvalues", "trace"]
    assert table["loss"].values == {"loss": pytest.approx(value), "metric": 0.5}
    assert table["eigenvalues"].values["largest"] == pytest.approx(top.values)
    assert table["trace"].values["mean"] == pytest.approx(estimate.mean)
    assert (table["trace"].products, table["eigenvalues"].products) == (30, 20)
    rows = {(metric, row.quantity): row for metric, row in table.rows()}
    assert rows["trace", "trace"].error == pytest.approx(estimate.standard_error)
    lines = str(table).splitlines()
    assert lines[0].split() == ["metric", "quantity", "at", "value", "error"]
    assert lines[-1].split()[:3] == ["trace", "trace", f"{estimate.mean:.3f}"]
    assert len(lines) == 1 + len(table.rows())


def test_measure_takes_every_metric_of_one_model_and_names() -> None:
    metrics = [name for name in METRICS if name != "between"]
    table = measure(net("relu"), CRITERION, (X, Y), metrics, names="2")
    assert list(table) == ["loss", *metrics]
    assert "metric" not in table["loss"].values
    with FrozenLoss.of(net("relu"), CRITERION, (X, Y), names="2") as loss:
        rise, _ = average_sharpness(loss, 0.05)
    assert table["average"].values["mean"][0] == pytest.approx(rise)
    assert np.shape(table["line"].curves["losses"]) == (3, 21)
    assert table["density"].products == 0, "it shares the basis of the eigenvalues"


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["trase"], "unknown metric 'trase'; did you mean 'trace'"),
        ("between", "between two models.*leave it out"),
    ],
)
def test_metrics_that_cannot_be_measured_are_refused(metrics: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure(net("relu"), CRITERION, (X, Y), metrics)


@pytest.mark.parametrize(
    ("criterion", "targets", "reason"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 9.0])), [0, 1, 2, 1], "have weights"),
        (partial(F.cross_entropy, weight=torch.ones(3)), [0, 1, 2, 1], "have weights"),
        (nn.CrossEntropyLoss(), [0, 1, -100, 1], "some targets are -100"),
        (partial(F.cross_entropy, ignore_index=2), [0, 1, 2, 1], "some targets are 2"),
    ],
)
def test_batches_in_which_samples_do_not_count_alike_are_refused(
    criterion: Any, targets: list[int], reason: str
) -> None:
    model, inputs, labels = nn.Linear(5, 3), torch.randn(4, 5), torch.tensor(targets)
    halves = [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])]
    with pytest.raises(UsageError, match=reason):
        FrozenLoss.of(model, criterion, halves)
    with FrozenLoss.of(model, criterion, (inputs, labels)) as whole:
        expected, _ = whole.value()
    assert expected == pytest.approx(criterion(model(inputs), labels).item())
    if "targets" in reason:
        counts = [sum(t not in (-100, 2) for t in half) for half in (targets[:2], targets[2:])]
        with FrozenLoss(model, criterion, zip(halves, counts, strict=True)) as loss:
            assert loss.value()[0] == pytest.approx(expected)


def partial_of_partial(loss: nn.Module) -> Any:
    inner = partial(loss)
    inner.name = "inner"  # type: ignore[attr-defined] # functools merges those without attributes
    outer = partial(inner)
    assert outer.func is inner
    return outer


@pytest.mark.parametrize("wrap", [partial, partial_of_partial])
@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "reduction='sum'"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 9.0])), "have weights"),
        (nn.CrossEntropyLoss(ignore_index=2), "some targets are 2"),
    ],
    ids=["reduction", "weight", "ignore_index"],
)
def test_settings_are_found_in_a_partial_of_a_module_too(
    criterion: nn.Module, reason: str, wrap: Callable[[nn.Module], Any]
) -> None:
    model, inputs, labels = nn.Linear(5, 3), torch.randn(4, 5), torch.tensor([0, 1, 2, 1])
    halves = [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])]
    for loss_function in (criterion, wrap(criterion)):
        with pytest.raises(UsageError, match=reason):
            FrozenLoss.of(model, loss_function, halves)


def test_targets_of_several_lengths_are_refused() -> None:
    class Tagger(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).transpose(1, 2)

    batches = [(torch.randn(2, n, 5), torch.zeros(2, n, dtype=torch.long)) for n in (3, 4)]
    with pytest.raises(UsageError, match="several lengths"):
        FrozenLoss.of(Tagger(5, 3), nn.CrossEntropyLoss(), batches)
