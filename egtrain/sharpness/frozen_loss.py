"""The mean loss over a frozen sample as a function of the weights, with two derivatives."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from egtrain.errors import DivergedError, UsageError
from egtrain.optim.randomness import generator_for
from egtrain.sharpness.restoring import (
    buffers_kept,
    copy_into,
    evaluation_mode,
    twice_differentiable_kernels,
    weights_kept,
)
from egtrain.workers import Ranks, sum_over_ranks

LossFunction = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""Maps (model, batch) to the mean loss, with its graph, and the mean metric."""

NO_SECOND_DERIVATIVE = ("derivative for", "double backward")
"""Parts of torch's messages for an operation that cannot be differentiated twice."""


class FrozenLoss:
    """A model's mean loss over a frozen sample, as a function f(w) of its trainable weights.

    Inside `with` the model is in evaluation mode, in full precision, and uses kernels that can be
    differentiated twice. Afterwards, even after an error, the model and torch's settings are
    exactly as before. The loss is the mean over samples, summed in float64, so it depends neither
    on the size of the batches nor on the number of ranks.

    Args:
        model: its weights with `requires_grad` are the variables.
        loss_function: maps (model, batch) to the mean loss of the batch, with its graph, and its
            mean metric.
        batches: pairs (batch, number of samples), the same on each rank; the ranks take turns.
        ranks: the processes that share the work; with several, each call is a collective.

    Raises:
        UsageError: there are no samples, or nothing is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        batches: Sequence[tuple[Any, int]],
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)
        self.samples = sum(size for _, size in batches)
        if not self.size:
            raise UsageError(
                "the model has no trainable weights: set requires_grad on those to measure over"
            )
        if not self.samples:
            raise UsageError("there are no samples to measure the loss on: give at least one batch")
        self.products = 0
        self.gradients = 0
        self.evaluations = 0
        self.on_product: Callable[[], None] | None = None
        """Called after each Hessian-vector product."""
        self._loss_function = loss_function
        self._ranks = ranks or Ranks()
        self._mine = list(batches)[self._ranks.rank :: self._ranks.count]
        self._inside: ExitStack | None = None

    def __enter__(self) -> "FrozenLoss":
        with ExitStack() as stack:
            stack.enter_context(weights_kept(self.parameters))
            stack.enter_context(buffers_kept(self.model))
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(twice_differentiable_kernels(self.model))
            self._inside = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stack, self._inside = self._inside, None
        if stack is not None:
            stack.__exit__(kind, error, trace)

    def value(self) -> tuple[float, float]:
        """Return the mean loss and the mean metric at the current weights."""
        self._require_inside()
        self.evaluations += 1
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self._no_autocast():
            for batch, size in self._mine:
                loss, metric = self._loss_function(self.model, batch)
                sums += size * torch.stack([loss.double().cpu(), metric.double().cpu()])
        loss_sum, metric_sum = sum_over_ranks(sums, self._ranks).tolist()
        return loss_sum / self.samples, metric_sum / self.samples

    def gradient(self) -> list[Tensor]:
        """Return ∇f at the current weights, one tensor per parameter."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[float, list[Tensor]]:
        """Return the mean loss and its gradient, from one pass."""
        self._require_inside()
        self.gradients += 1
        total = [torch.zeros_like(p, dtype=torch.float64) for p in self.parameters]
        loss_sum = torch.zeros((), dtype=torch.float64, device=total[0].device)
        with torch.enable_grad(), self._no_autocast():
            for batch, size in self._mine:
                loss = self._loss_with_graph(batch)
                self._add(
                    total, torch.autograd.grad(loss, self.parameters, materialize_grads=True), size
                )
                loss_sum += loss.detach().double() * size / self.samples
        summed = self._summed([*total, loss_sum])
        return float(summed[-1]), self._in_their_types(summed[:-1])

    def hessian_product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """Return ∇²f·v for a direction v of one tensor per parameter, by differentiating twice.

        Raises:
            UsageError: an operation of the model has no second derivative.
        """
        self._require_inside()
        total = [torch.zeros_like(p, dtype=torch.float64) for p in self.parameters]
        with torch.enable_grad(), self._no_autocast():
            for batch, size in self._mine:
                self._add(total, self._product_of_batch(batch, direction), size)
        product = self._in_their_types(self._summed(total))
        self.products += 1
        if self.on_product is not None:
            self.on_product()
        return product

    @contextmanager
    def at(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Put other weights into the model inside the block; then restore the old, bit for bit."""
        self._require_inside()
        with weights_kept(self.parameters):
            copy_into(self.parameters, weights)
            yield

    def flat_product(self, vector: Tensor) -> Tensor:
        """Return ∇²f·v for a flat vector [size], in v's type and on its device."""
        return flattened(self.hessian_product(self.pieces(vector))).to(vector)

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """Return a flat vector [size] as one tensor per parameter, of its type and device."""
        parts = vector.split_with_sizes([p.numel() for p in self.parameters])
        return [part.view(p.shape).to(p) for part, p in zip(parts, self.parameters, strict=True)]

    def _loss_with_graph(self, batch: Any) -> Tensor:
        loss, _ = self._loss_function(self.model, batch)
        if not loss.requires_grad:
            raise UsageError(
                "the loss does not depend on the trainable weights: return it with its graph"
            )
        return loss

    def _product_of_batch(self, batch: Any, direction: Sequence[Tensor]) -> Sequence[Tensor]:
        loss = self._loss_with_graph(batch)
        if self.products == 0:
            refuse_once_differentiable(loss)
        try:
            gradients = torch.autograd.grad(
                loss, self.parameters, create_graph=True, materialize_grads=True
            )
            # If the loss is linear in a weight, its gradient is a constant without a graph.
            varying = [(g, v) for g, v in zip(gradients, direction, strict=True) if g.requires_grad]
            if not varying:
                return [torch.zeros_like(p) for p in self.parameters]
            outputs, vectors = zip(*varying, strict=True)
            return torch.autograd.grad(outputs, self.parameters, vectors, materialize_grads=True)
        except RuntimeError as error:
            if not any(part in str(error) for part in NO_SECOND_DERIVATIVE):
                raise
            raise no_second_derivatives(str(error).splitlines()[0].rstrip(".")) from error

    def _add(self, total: list[Tensor], gradients: Sequence[Tensor], size: int) -> None:
        for summed, gradient in zip(total, gradients, strict=True):
            summed.add_(gradient.detach(), alpha=size / self.samples)

    def _summed(self, total: list[Tensor]) -> list[Tensor]:
        """Return the sums over the ranks, by one collective."""
        if self._ranks.count == 1:
            return total
        everything = sum_over_ranks(flattened(total), self._ranks)
        parts = everything.split_with_sizes([t.numel() for t in total])
        return [part.view(t.shape) for part, t in zip(parts, total, strict=True)]

    def _in_their_types(self, total: Sequence[Tensor]) -> list[Tensor]:
        return [t.to(p.dtype) for t, p in zip(total, self.parameters, strict=True)]

    def _no_autocast(self) -> torch.autocast:
        return torch.autocast(self.parameters[0].device.type, enabled=False)

    def _require_inside(self) -> None:
        if self._inside is None:
            raise RuntimeError(
                "a FrozenLoss works only inside its block: with FrozenLoss(...) as loss: ..."
            )


def no_second_derivatives(reason: str) -> UsageError:
    """Return the error of a model that can be differentiated only once."""
    return UsageError(
        f"this model has no second derivatives ({reason}): replace that operation by one that has "
        "them, or leave out the metrics of the Hessian"
    )


def refuse_once_differentiable(loss: Tensor) -> None:
    """Raise UsageError if the loss uses an operation that is marked as once differentiable.

    `torch.autograd.grad` does not raise, but treats the gradient of such an operation as constant.
    """
    decorator: Any = torch.autograd.function.once_differentiable
    marked = decorator(lambda: None).__code__  # shared by all decorated functions
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        operation = getattr(node, "_forward_cls", None)  # users' operations have one
        if operation is not None and getattr(operation.backward, "__code__", None) is marked:
            raise no_second_derivatives(f"{operation.__name__} is marked as once differentiable")
        waiting += [further for further, _ in node.next_functions]


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one flat vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def gaussian_vector(size: int, seed: int, purpose: str, *index: int) -> Tensor:
    """Return N(0, 1) numbers [size], float64, drawn on the CPU: the same for every device."""
    return torch.randn(size, generator=generator_for(seed, purpose, *index), dtype=torch.float64)


def mean_and_standard_error(samples: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent samples and its standard error; nan for a single sample."""
    values = torch.tensor(samples, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def require_finite(value: float) -> float:
    """Return a number computed from the loss, if it is finite.

    Raises:
        DivergedError: it is infinite or not a number.
    """
    if not math.isfinite(value):
        raise DivergedError(
            "the loss or its curvature is not a finite number at these weights: measure an "
            "earlier checkpoint"
        )
    return value
