"""K logical workers on R ranks: who carries whom, their BatchNorm statistics, and the mean of their
gradients.

The number of workers is the algorithm, the number of ranks only how it is run: nothing here is
keyed by rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from egtrain.errors import UsageError

STATISTICS = ("loss", "metric", "squared_norm", "relative_size", "alignment", "stop")
"""What each worker reports in a step, beside its gradient."""


@dataclass(frozen=True)
class Ranks:
    """A process among those of the run."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Workers:
    """The workers that this rank carries, one after the other, with the model's storage laid flat.

    Parameters, gradients and floating-point buffers become views of one flat tensor each, so that
    the gradients travel in one collective and a worker's buffers change in one copy.

    Args:
        model: on its device; its floating-point buffers (BatchNorm statistics) are each worker's
            own. Buffers of other types are shared and must not change, so BatchNorm has to do
            without its counter of batches.
        count: K, the number of logical workers.
        ranks: this process among those of the run.
        deterministic: sum gradients in worker order, whatever the number of ranks; needs K
            gradients of memory.

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
        self.mine = range(ranks.rank * share, (ranks.rank + 1) * share)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.parameters = lay_flat(parameters)
        self.gradients = torch.zeros_like(self.parameters)
        for p, gradient in zip(parameters, views_of(self.gradients, parameters), strict=True):
            p.grad = gradient
        self._buffers = lay_flat([b for b in model.buffers() if b.is_floating_point()]).to(
            ranks.device
        )
        self._own_buffers = self._buffers.repeat(share, 1)
        self._own_parameters: Tensor | None = None
        self._before = torch.empty_like(self.parameters)
        self._previous = torch.zeros_like(self.parameters)
        self._healthy = torch.ones((), dtype=torch.bool, device=ranks.device)
        size = self.parameters.numel()
        self._total = torch.zeros(
            size + count * len(STATISTICS), dtype=self.parameters.dtype, device=ranks.device
        )
        self._sum = self._total[:size]
        self._table = self._total[size:].view(count, len(STATISTICS))
        # Summing in worker order across ranks takes every worker's gradient at once.
        self._in_order = deterministic and ranks.count > 1
        self._kept = self.parameters.new_zeros(share, size) if self._in_order else None

    @property
    def collective_bytes(self) -> int:
        """Bytes that a rank gives into the one collective of a step: the gradient and what the
        workers report.
        """
        return self._total.numel() * self._total.element_size()

    def begin_step(self) -> None:
        """Forget the last step's gradients and note the weights that this step starts from."""
        self._total.zero_()
        self._before.copy_(self.parameters)

    def enter(self, worker: int) -> None:
        """Give the model the worker's buffers and a gradient of zero."""
        self.gradients.zero_()
        self.restore_buffers(worker)

    def restore_buffers(self, worker: int) -> None:
        """Give the model the worker's buffers as they were when its step began."""
        self._buffers.copy_(self._own_buffers[worker - self.mine.start])

    def relative_shift(self) -> Tensor:
        """Return ‖ζ‖/‖x‖ while the weights are shifted (a scalar tensor)."""
        shift = self.parameters - self._before
        return torch.div(torch.linalg.vector_norm(shift), torch.linalg.vector_norm(self._before))

    def note(self, worker: int, loss: Tensor, metric: Tensor, relative_size: Tensor | None) -> None:
        """Take the worker's buffers and statistics out of the model, when its gradient is there."""
        row = worker - self.mine.start
        self._own_buffers[row].copy_(self._buffers)
        norm = torch.linalg.vector_norm(self.gradients)
        self._table[worker, 0] = loss
        self._table[worker, 1] = metric
        self._table[worker, 2] = norm * norm
        if relative_size is not None:
            self._table[worker, 3] = relative_size
        if worker == 0:
            previous = torch.linalg.vector_norm(self._previous)
            cosine = torch.dot(self.gradients, self._previous) / (norm * previous)
            self._table[worker, 4] = torch.where(previous > 0, cosine, 0.0)
            self._previous.copy_(self.gradients)

    def add_gradient(self, worker: int) -> None:
        """Add the worker's gradient to the sum of the step."""
        if self._kept is None:
            self._sum.add_(self.gradients)
        else:
            self._kept[worker - self.mine.start].copy_(self.gradients)

    def average_gradients(self, stop: bool) -> Tensor:
        """Put the mean gradient into the parameters' `.grad` and return what the workers reported.

        Returns:
            A flat tensor on the device: the table [workers, len(STATISTICS)] and, last, the squared
            norm of the mean gradient. `stop` becomes the sum of what the ranks said.
        """
        self._table[self.mine.start, 5].fill_(
            float(stop)
        )  # assigning a number would wait for a GPU
        if self._kept is not None:
            for gradient in self.gather(self._kept):
                self._sum.add_(gradient)
            dist.all_reduce(self._table)
        elif self.ranks.count > 1:
            dist.all_reduce(self._total)
        torch.div(self._sum, self.count, out=self.gradients)
        norm = torch.linalg.vector_norm(self.gradients)
        self._healthy &= torch.isfinite(self._table[:, 0]).all() & torch.isfinite(norm)
        return torch.cat([self._table.flatten(), (norm * norm)[None]])

    def begin_local_phase(self) -> None:
        """Give each worker weights of its own, equal to the model's."""
        self._own_parameters = self.parameters.repeat(len(self.mine), 1)

    def enter_own_weights(self, worker: int) -> None:
        """Give the model the worker's own weights."""
        assert self._own_parameters is not None
        self.parameters.copy_(self._own_parameters[worker - self.mine.start])

    def keep_own_weights(self, worker: int) -> None:
        """Take the worker's updated weights out of the model, unless its loss or gradient was not
        finite.
        """
        assert self._own_parameters is not None
        row = self._own_parameters[worker - self.mine.start]
        healthy = self._healthy & torch.isfinite(self._table[worker, 0:3:2]).all()
        torch.where(healthy, self.parameters, row, out=row)

    def report_only(self, stop: bool) -> Tensor:
        """Return what `average_gradients` does of a step in which each worker made its own update.

        The gradients stay where they are, so the last entry, the squared norm of their mean, is
        zero.
        """
        self._table[self.mine.start, 5].fill_(float(stop))
        if self.ranks.count > 1:
            dist.all_reduce(self._table)
        self._healthy &= torch.isfinite(self._table[:, 0:3:2]).all()
        return torch.cat([self._table.flatten(), self._table.new_zeros(1)])

    def average_own_weights(self) -> None:
        """Let every worker go on from the mean of all workers' weights."""
        assert self._own_parameters is not None
        self._own_parameters.copy_(self._mean_over_workers(self._own_parameters))

    def clip(self, maximum: float) -> Tensor:
        """Scale the mean gradient to a norm of at most `maximum`; return the factor (a scalar
        tensor).
        """
        factor = torch.clamp(maximum / (torch.linalg.vector_norm(self.gradients) + 1e-6), max=1.0)
        self.gradients.mul_(factor)
        return factor

    def undo_unless_finite(self) -> None:
        """Put the weights back if this or an earlier step met a loss or gradient that was not
        finite.

        It is decided on the device: the host learns of it when it reads the step's statistics.
        """
        torch.where(self._healthy, self.parameters, self._before, out=self.parameters)

    def average_for_evaluation(self) -> None:
        """Give the model the mean of the workers' buffers and, in a local phase, weights; the next
        step undoes it.
        """
        if self._buffers.numel():
            self._buffers.copy_(self.gather(self._own_buffers).mean(dim=0))
        if self._own_parameters is not None:
            self.parameters.copy_(self._mean_over_workers(self._own_parameters))

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

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows [K/R, ...] of all ranks as [K, ...], in worker order, on every rank."""
        if self.ranks.count == 1:
            return rows
        gathered = rows.new_empty(self.count, *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(self.ranks.count)), rows.contiguous())
        return gathered

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return every worker's buffers [K, ...], its own weights in a local phase, and worker 0's
        previous gradient.

        It is a collective.
        """
        own = self._own_parameters
        return {
            "buffers": self.gather(self._own_buffers).clone(),
            "parameters": None if own is None else self.gather(own).clone(),
            "previous": self._previous.clone(),
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
        mine = slice(self.mine.start, self.mine.stop)
        self._own_buffers.copy_(state["buffers"][mine])
        own = state["parameters"]
        self._own_parameters = None if own is None else own[mine].to(self.parameters).clone()
        self._previous.copy_(state["previous"])


def sum_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of the ranks' tensors, the same on each of them; a collective where there are
    several.
    """
    if ranks.count == 1:
        return tensor
    total = tensor.to(ranks.device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def divisors(number: int) -> list[int]:
    """Return the numbers that divide a positive one, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def lay_flat(tensors: Sequence[Tensor]) -> Tensor:
    """Move dense tensors of one type into one flat tensor, of which they become views of the same
    shape and strides.
    """
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
