"""K logical workers on R ranks: which rank carries which, BatchNorm statistics, mean gradients.

The number of workers defines the algorithm; the number of ranks only says how it is run. So
nothing here is keyed by rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from egtrain.errors import UsageError
from egtrain.statistics import Reported


@dataclass(frozen=True)
class Ranks:
    """A process of the run, by its rank."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Workers:
    """The workers that this rank carries, one after the other, on flat model storage.

    Parameters, gradients and floating-point buffers become views of one flat tensor each, so that
    the gradients travel in one collective and a worker's buffers change in one copy.

    Args:
        model: on its device; each worker has a copy of the floating-point buffers (BatchNorm
            statistics). Other buffers are shared and must not change, so BatchNorm loses its
            counter of batches, which nothing reads and which costs a kernel per layer.
        count: K, the number of logical workers.
        ranks: this process among those of the run.
        deterministic: sum in worker order on any number of ranks; needs memory for K gradients.

    Raises:
        UsageError: the ranks do not divide the workers.
    """

    def __init__(
        self, model: nn.Module, count: int, ranks: Ranks, deterministic: bool = False
    ) -> None:
        if count % ranks.count:
            possible = ", ".join(map(str, divisors(count)))
            raise UsageError(
                f"{count} workers cannot be shared by {ranks.count} ranks: run on {possible} ranks"
            )
        self.count = count
        self.ranks = ranks
        share = count // ranks.count
        self.carried = carried_by(ranks, count)
        """The workers of this rank."""
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.num_batches_tracked = None
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.parameters = lay_flat(parameters)
        self.gradients = torch.zeros_like(self.parameters)
        for p, gradient in zip(parameters, views_of(self.gradients, parameters), strict=True):
            p.grad = gradient
        self._buffers = lay_flat([b for b in model.buffers() if b.is_floating_point()]).to(
            ranks.device
        )
        # A row for each carried worker: its buffers and, in a local phase, its weights.
        self._worker_buffers = self._buffers.repeat(share, 1)
        self._worker_parameters: Tensor | None = None
        self._parameters_before = torch.empty_like(self.parameters)
        self.unshifted: dict[Tensor, Tensor] = dict(
            zip(parameters, views_of(self._parameters_before, parameters), strict=True)
        )
        """The weights of each parameter at the start of the step."""
        self._previous_gradient = torch.zeros_like(self.parameters)
        """Worker 0's."""
        self.gradient_norm = torch.zeros((), device=ranks.device)
        """That of the last mean gradient, not clipped (a scalar)."""
        self._all_finite = torch.ones((), dtype=torch.bool, device=ranks.device)
        size = self.parameters.numel()
        self._collective = torch.zeros(
            size + count * len(Reported._fields),
            dtype=self.parameters.dtype,
            device=ranks.device,
        )
        """What the ranks sum in a step: the gradients, and what each worker reports."""
        self._gradient_sum = self._collective[:size]
        self._reported_flat = self._collective[size:]
        self._reported = Reported(*self._reported_flat.view(-1, count))
        # Summing in worker order across ranks takes every worker's gradient at once.
        self._in_order = deterministic and ranks.count > 1
        self._worker_gradients = self.parameters.new_zeros(share, size) if self._in_order else None

    @property
    def collective_bytes(self) -> int:
        """Bytes that a rank puts into the one collective of a step."""
        return self._collective.numel() * self._collective.element_size()

    def begin_step(self) -> None:
        """Forget the last step's gradients, and note the weights at the start of this step."""
        self._collective.zero_()
        self._parameters_before.copy_(self.parameters)

    def enter(self, worker: int) -> None:
        """Give the model the worker's buffers and a gradient of zero."""
        self.gradients.zero_()
        self.restore_buffers(worker)

    def restore_buffers(self, worker: int) -> None:
        """Give the model the worker's buffers as they were at the start of the step."""
        self._buffers.copy_(self._worker_buffers[self._row(worker)])

    def relative_shift(self) -> Tensor:
        """Return ‖ζ‖/‖x‖ while the weights are shifted (a scalar tensor)."""
        shift = self.parameters - self._parameters_before
        return torch.div(
            torch.linalg.vector_norm(shift), torch.linalg.vector_norm(self._parameters_before)
        )

    def report(
        self, worker: int, loss: Tensor, metric: Tensor, relative_shift: Tensor | None
    ) -> None:
        """Take the worker's buffers and statistics from the model, once its gradient is there."""
        self._worker_buffers[self._row(worker)].copy_(self._buffers)
        norm = torch.linalg.vector_norm(self.gradients)
        self._reported.loss[worker] = loss
        self._reported.metric[worker] = metric
        self._reported.squared_gradient_norm[worker] = norm * norm
        if relative_shift is not None:
            self._reported.relative_shift[worker] = relative_shift
        if worker == 0:
            previous = torch.linalg.vector_norm(self._previous_gradient)
            cosine = torch.dot(self.gradients, self._previous_gradient) / (norm * previous)
            self._reported.gradient_alignment[worker] = torch.where(previous > 0, cosine, 0.0)
            self._previous_gradient.copy_(self.gradients)

    def add_gradient(self, worker: int) -> None:
        """Add the worker's gradient to the sum of the step."""
        if self._worker_gradients is None:
            self._gradient_sum.add_(self.gradients)
        else:
            self._worker_gradients[self._row(worker)].copy_(self.gradients)

    def average_gradients(self, stop: bool) -> Tensor:
        """Put the mean gradient into the parameters' `.grad` and return what the workers reported.

        Args:
            stop: whether this rank was asked to stop.

        Returns:
            A flat tensor on the device, for `read_reported`.
        """
        self._report_stop(stop)
        if self._worker_gradients is not None:
            for gradient in self.gather(self._worker_gradients):
                self._gradient_sum.add_(gradient)
            dist.all_reduce(self._reported_flat)
        elif self.ranks.count > 1:
            dist.all_reduce(self._collective)
        torch.div(self._gradient_sum, self.count, out=self.gradients)
        self.gradient_norm = norm = torch.linalg.vector_norm(self.gradients)
        self._all_finite &= torch.isfinite(self._reported.loss).all() & torch.isfinite(norm)
        return torch.cat([self._reported_flat, (norm * norm)[None]])

    def begin_local_phase(self) -> None:
        """Give each worker a copy of the model's weights."""
        self._worker_parameters = self.parameters.repeat(len(self.carried), 1)

    def enter_local_weights(self, worker: int) -> None:
        """Give the model the worker's weights."""
        assert self._worker_parameters is not None
        self.parameters.copy_(self._worker_parameters[self._row(worker)])

    def keep_local_weights(self, worker: int) -> None:
        """Take the worker's updated weights, unless its loss or gradient was not finite."""
        assert self._worker_parameters is not None
        row = self._worker_parameters[self._row(worker)]
        finite = self._all_finite & self._finite_updates()[worker]
        torch.where(finite, self.parameters, row, out=row)

    def report_only(self, stop: bool) -> Tensor:
        """Return what `average_gradients` returns, for a step in which each worker made an update.

        No gradients are exchanged: the squared norm of their mean is reported as zero.
        """
        self._report_stop(stop)
        if self.ranks.count > 1:
            dist.all_reduce(self._reported_flat)
        self._all_finite &= self._finite_updates().all()
        return torch.cat([self._reported_flat, self._reported_flat.new_zeros(1)])

    def average_local_weights(self) -> None:
        """Give every worker the mean of all workers' weights."""
        assert self._worker_parameters is not None
        self._worker_parameters.copy_(self._mean_over_workers(self._worker_parameters))

    def clip(self, maximum: float) -> None:
        """Scale the mean gradient to a norm of at most `maximum`."""
        factor = torch.clamp(maximum / (torch.linalg.vector_norm(self.gradients) + 1e-6), max=1.0)
        self.gradients.mul_(factor)

    def undo_unless_finite(self) -> None:
        """Put the weights back if a loss or gradient of this or an earlier step was not finite.

        The device decides; the host learns of it when it reads the step's statistics.
        """
        torch.where(self._all_finite, self.parameters, self._parameters_before, out=self.parameters)

    def average_for_evaluation(self) -> None:
        """Give the model the mean of buffers and local weights, until the next step."""
        if self._buffers.numel():
            self._buffers.copy_(self.gather(self._worker_buffers).mean(dim=0))
        if self._worker_parameters is not None:
            self.parameters.copy_(self._mean_over_workers(self._worker_parameters))

    def _mean_over_workers(self, rows: Tensor) -> Tensor:
        """Return the mean of the rows [K/R, n] of all ranks."""
        if self._in_order:
            rows = self.gather(rows)
        total = torch.zeros_like(rows[0])
        for row in rows:
            total.add_(row)
        if self.ranks.count > 1 and not self._in_order:
            dist.all_reduce(total)
        return total.div_(self.count)

    def _row(self, worker: int) -> int:
        """Return the row of a carried worker."""
        return worker - self.carried.start

    def _report_stop(self, stop: bool) -> None:
        # Assigning a number would wait for a GPU.
        self._reported.stop[self.carried.start].fill_(float(stop))

    def _finite_updates(self) -> Tensor:
        """Return for each worker whether its loss and gradient were finite [workers]."""
        return torch.isfinite(self._reported.loss) & torch.isfinite(
            self._reported.squared_gradient_norm
        )

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows [K/R, ...] of all ranks as [K, ...], in worker order, on every rank."""
        if self.ranks.count == 1:
            return rows
        gathered = rows.new_empty(self.count, *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(self.ranks.count)), rows.contiguous())
        return gathered

    def gather_on_first(self, rows: Tensor) -> Tensor:
        """Return the ranks' rows [K/R, ...] as [K, ...] on the first rank; a collective."""
        if self.ranks.count == 1:
            return rows
        first = self.ranks.rank == 0
        gathered = rows.new_empty(self.count if first else 0, *rows.shape[1:])
        parts = list(gathered.chunk(self.ranks.count)) if first else None
        dist.gather(rows.contiguous(), parts)
        return gathered

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return what a checkpoint holds, complete on the first rank only; a collective."""
        weights = self._worker_parameters
        return {
            "buffers": self.gather_on_first(self._worker_buffers).clone(),
            "parameters": None if weights is None else self.gather_on_first(weights).clone(),
            "previous": self._previous_gradient.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on any number of ranks.

        Raises:
            ValueError: the state belongs to another number of workers.
        """
        if len(state["buffers"]) != self.count:
            raise ValueError(
                f"it is of {len(state['buffers'])} workers, and the run has {self.count}"
            )
        self._worker_buffers.copy_(self.rows_of_carried(state["buffers"]))
        weights = state["parameters"]
        self._worker_parameters = (
            None if weights is None else self.rows_of_carried(weights).to(self.parameters).clone()
        )
        self._previous_gradient.copy_(state["previous"])

    def rows_of_carried(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of those of all workers [K, ...]."""
        return rows[self.carried.start : self.carried.stop]


def carried_by(ranks: Ranks, count: int) -> range:
    """Return the workers that a rank carries of `count`, which the ranks divide."""
    share = count // ranks.count
    return range(ranks.rank * share, (ranks.rank + 1) * share)


def sum_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of the ranks' tensors, on each of them; a collective."""
    if ranks.count == 1:
        return tensor
    total = tensor.to(ranks.device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def lay_flat(tensors: Sequence[Tensor]) -> Tensor:
    """Turn dense tensors of one type into views of one flat tensor; keep shapes and strides."""
    if not tensors:
        return torch.empty(0)
    flat = torch.empty(
        sum(t.numel() for t in tensors), dtype=tensors[0].dtype, device=tensors[0].device
    )
    for tensor, view in zip(tensors, views_of(flat, tensors), strict=True):
        view.copy_(tensor.detach())
        tensor.data = view
    return flat


def views_of(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return consecutive pieces of a flat tensor with the shapes and strides of `like`."""
    views, offset = [], 0
    for tensor in like:
        views.append(flat.as_strided(tensor.shape, tensor.stride(), offset))
        offset += tensor.numel()
    return views
