"""The mean loss over a frozen sample as a function of the weights, with two derivatives."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from egtrain.errors import UsageError
from egtrain.nested import with_tensors
from egtrain.sharpness.batches import batches_of, checked_pairs
from egtrain.sharpness.checking import (
    no_second_derivatives,
    own_operations,
    refuse_batch_statistics,
    refuse_low_precision,
    refuse_once_differentiable,
    require_derivative_of_gradient,
    require_same,
    require_symmetric,
)
from egtrain.sharpness.flat import flattened, longest_type, splitter
from egtrain.sharpness.loss_function import LossFunction, called, require_mean_over_samples
from egtrain.sharpness.restoring import (
    buffers_kept,
    copy_into,
    evaluation_mode,
    held_in_type,
    twice_differentiable_kernels,
    weights_kept,
)
from egtrain.sharpness.weights import chosen_names, computing_type, plain_model
from egtrain.workers import Ranks, sum_over_ranks

NO_SECOND_DERIVATIVE = ("derivative for", "double backward")
"""Parts of torch's messages for an operation that cannot be differentiated twice."""


class FrozenLoss:
    """A model's mean loss over a frozen sample, as a function f(w) of its trainable weights.

    Inside `with` the model is in evaluation mode, in full precision, and uses kernels that can be
    differentiated twice. Weights, buffers and data of less than 32 bits are held in float32 there.
    Afterwards, even after an error, the model and torch's settings are exactly as before. The loss
    is the mean over samples, summed in float64, so it depends neither on the size of the batches
    nor on the number of ranks.

    The first evaluation and the first product check, on the first batch, that the loss is the same
    twice and that the products are a Hessian's. This takes about four products of that batch, and
    more with operations of one's own; it is not counted.

    Args:
        model: its weights with `requires_grad` are the variables. The model inside a
            `DistributedDataParallel` is measured without it.
        loss_function: maps (model, batch) to the mean loss of the batch, with its graph, or to that
            and its mean metric; or a loss of torch, such as `nn.CrossEntropyLoss()`, for batches
            (inputs, targets).
        batches: pairs (batch, number of samples), the same on each rank; the ranks take turns. They
            are read once.
        ranks: the processes that share the work; with several, each call is a collective.
        names: of weights or modules, to measure over those alone.
        dtype: the type to compute in; by default the model's own, and float32 for shorter ones.

    Raises:
        UsageError: there are no samples, nothing is trainable, or a name matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        batches: Iterable[tuple[Any, int]],
        ranks: Ranks | None = None,
        *,
        names: Sequence[str] | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype not in (None, torch.float32, torch.float64):
            raise UsageError(f"dtype must be torch.float32 or torch.float64, not {dtype}")
        self.model = plain_model(model)
        self.names = chosen_names(self.model, names)
        """Of the weights, in the order of every list of one tensor per parameter."""
        weights = dict(self.model.named_parameters())
        self.parameters: list[Tensor] = [weights[name] for name in self.names]
        """The weights; inside the block, what the model computes with."""
        self.size = sum(p.numel() for p in self.parameters)
        pairs = checked_pairs(batches)
        self.samples = sum(size for _, size in pairs)
        if not pairs:
            raise UsageError("there are no samples to measure the loss on: give at least one batch")
        self.products = 0
        self.gradients = 0
        self.evaluations = 0
        self.on_product: Callable[[], None] | None = None
        """Called after each Hessian-vector product."""
        self._type_of = lambda kept: computing_type(kept, dtype)
        self._loss_and_metric = called(loss_function)
        self._ranks = ranks or Ranks()
        self._batches = len(pairs)
        self._first = _in_type(pairs[0][0], self._type_of)
        self._mine = [
            (_in_type(batch, self._type_of), size)
            for batch, size in pairs[self._ranks.rank :: self._ranks.count]
        ]
        self._checked: set[str] = set()
        self._inside: ExitStack | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss_function: LossFunction,
        data: Any,
        *,
        names: Sequence[str] | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "FrozenLoss":
        """Return the loss of a model over all samples of any data.

        Args:
            model: as for `FrozenLoss`.
            loss_function: as for `FrozenLoss`.
            data: a `DataLoader`, a list or another iterable of batches, or one batch, which is a
                tuple such as (inputs, targets), a mapping or a tensor. It is read once, as it comes
                (shuffled or augmented), and held in memory, on the model's device. The length of a
                batch's tensors is its number of samples.
            names: as for `FrozenLoss`.
            dtype: as for `FrozenLoss`.

        Raises:
            UsageError: as for `FrozenLoss`, or the samples of a batch cannot be counted, or do not
                count alike.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        pairs = batches_of(data, device)
        require_mean_over_samples(loss_function, [batch for batch, _ in pairs])
        return cls(model, loss_function, pairs, names=names, dtype=dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The type of a flat vector: the longest of the weights'."""
        return longest_type(self.parameters)

    def __enter__(self) -> "FrozenLoss":
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stand_in = stack.enter_context(held_in_type(self.model, self._type_of))
            stack.callback(setattr, self, "parameters", self.parameters)
            self.parameters = [stand_in(p) for p in self.parameters]
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
        """Return the mean loss and the mean metric at the current weights; nan without a metric."""
        self._begin()
        self.evaluations += 1
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self._no_autocast():
            for batch, size in self._mine:
                loss, metric = self._loss_and_metric(self.model, batch)
                sums[0] += size * loss.double().cpu()
                sums[1] += size * (torch.nan if metric is None else metric.double().cpu())
        loss_sum, metric_sum = sum_over_ranks(sums, self._ranks).tolist()
        return loss_sum / self.samples, metric_sum / self.samples

    def gradient(self) -> list[Tensor]:
        """Return ∇f at the current weights, one tensor per parameter."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[float, list[Tensor]]:
        """Return the mean loss and its gradient, from one pass."""
        self._begin()
        self.gradients += 1

        def of_batch(batch: Any) -> Tensor:
            loss = self._loss_with_graph(batch)
            gradient = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            return flattened([*gradient, loss.double()])

        total = self._mean(of_batch, self.size + 1)
        return float(total[-1]), self.pieces(total[:-1])

    def hessian_product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """Return ∇²f·v for a direction v of one tensor per parameter, by differentiating twice.

        Raises:
            UsageError: an operation of the model has no second derivative, or the products are not
                those of a Hessian.
        """
        return self.pieces(self._product(direction))

    def flat_product(self, vector: Tensor) -> Tensor:
        """Return ∇²f·v for a flat vector [size], in v's type and on its device."""
        return self._product(self.pieces(vector)).to(self.dtype).to(vector)

    @contextmanager
    def at(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Put other weights into the model inside the block; then restore the old, bit for bit."""
        self._require_inside()
        with weights_kept(self.parameters):
            copy_into(self.parameters, weights)
            yield

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """Return a flat vector [size] as one tensor per parameter, of its type and device."""
        return splitter(self.parameters)(vector)

    def _product(self, direction: Sequence[Tensor]) -> Tensor:
        """Return ∇²f·v as a flat vector."""
        self._begin(product=True)
        product = self._mean(
            lambda batch: flattened(
                _product(self._loss_with_graph(batch), self.parameters, direction)
            ),
            self.size,
        )
        self.products += 1
        if self.on_product is not None:
            self.on_product()
        return product

    def _mean(self, of_batch: Callable[[Any], Tensor], size: int) -> Tensor:
        """Return the mean over samples of flat vectors [size], each of a batch; a collective."""
        with torch.enable_grad(), self._no_autocast():
            if self._batches == 1 and self._ranks.count == 1:
                return of_batch(self._first)
            device = self.parameters[0].device
            total = torch.zeros(size, dtype=torch.float64, device=device)
            for batch, samples in self._mine:
                total.add_(of_batch(batch), alpha=samples / self.samples)
        return sum_over_ranks(total, self._ranks)

    def _loss_with_graph(self, batch: Any) -> Tensor:
        loss, _ = self._loss_and_metric(self.model, batch)
        if not loss.requires_grad:
            raise UsageError(
                "the loss does not depend on the trainable weights: return it with its graph"
            )
        return loss

    def _begin(self, product: bool = False) -> None:
        """Check what every use depends on, and what a product does, once; the same on each rank."""
        self._require_inside()
        checks = {"value": self._check_value, "product": self._check_product}
        for use in checks if product else ["value"]:
            if use not in self._checked:
                with buffers_kept(self.model), torch.enable_grad(), self._no_autocast():
                    checks[use]()
                self._checked.add(use)

    def _check_value(self) -> None:
        first, _ = self._loss_and_metric(self.model, self._first)
        refuse_low_precision(first)
        with torch.no_grad():
            second, _ = self._loss_and_metric(self.model, self._first)
        require_same(first.detach(), second)
        if self._batches > 1:
            refuse_batch_statistics(self.model)

    def _check_product(self) -> None:
        loss = self._loss_with_graph(self._first)
        refuse_once_differentiable(loss)
        if operations := own_operations(loss):
            self._check_own_operations(operations)
        del loss  # with its graph, which takes memory

        def product(vector: Tensor) -> Tensor:
            loss = self._loss_with_graph(self._first)
            return flattened(_product(loss, self.parameters, self.pieces(vector))).cpu()

        def shrunk(factor: float) -> AbstractContextManager[None]:
            return self.at([factor * p.detach() for p in self.parameters])

        require_symmetric(product, self.size, self.dtype, shrunk)

    def _check_own_operations(self, operations: Sequence[Any]) -> None:
        def type_of(kept: torch.dtype) -> torch.dtype:
            return computing_type(kept, torch.float64)

        batch = _in_type(self._first, type_of)
        with held_in_type(self.model, type_of) as stand_in, ExitStack() as stack:
            weights = [stand_in(p) for p in self.parameters]
            stack.enter_context(weights_kept(weights))
            try:
                self._loss_and_metric(self.model, batch)
            except (RuntimeError, TypeError, ValueError):
                return  # an operation that takes no float64: its symmetry is all that can be told
            require_derivative_of_gradient(
                lambda: torch.autograd.grad(
                    self._loss_with_graph(batch), weights, materialize_grads=True
                ),
                lambda direction: _product(self._loss_with_graph(batch), weights, direction),
                weights,
                operations,
            )

    def _no_autocast(self) -> torch.autocast:
        return torch.autocast(self.parameters[0].device.type, enabled=False)

    def _require_inside(self) -> None:
        if self._inside is None:
            raise RuntimeError(
                "a FrozenLoss works only inside its block: with FrozenLoss(...) as loss: ..."
            )


def _product(
    loss: Tensor, weights: Sequence[Tensor], direction: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the product of a loss's Hessian with a direction.

    Raises:
        UsageError: an operation has no second derivative.
    """
    try:
        gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        # If the loss is linear in a weight, its gradient is a constant without a graph.
        varying = [(g, v) for g, v in zip(gradients, direction, strict=True) if g.requires_grad]
        if not varying:
            return [torch.zeros_like(w) for w in weights]
        outputs, vectors = zip(*varying, strict=True)
        return torch.autograd.grad(outputs, weights, vectors, materialize_grads=True)
    except RuntimeError as error:
        if not any(part in str(error) for part in NO_SECOND_DERIVATIVE):
            raise
        raise no_second_derivatives(str(error).splitlines()[0].rstrip(".")) from error


def _in_type(batch: Any, type_of: Callable[[torch.dtype], torch.dtype]) -> Any:
    """Return a batch with its tensors in other types; the batch itself if they are the same."""
    return with_tensors(batch, lambda tensor: tensor.to(type_of(tensor.dtype)))
