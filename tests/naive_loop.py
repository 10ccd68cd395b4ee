"""A naive loop of several workers, and the small net and data of the tests that compare with it.

It is plain torch: the weights are copied, x − ζ is written out, and nothing of `egtrain` is used.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from egtrain.optim import (
    MSAM,
    SAM,
    Direction,
    Extragradient,
    GradientNoise,
    LocalGradient,
    OptimisticGradient,
    Point,
    State,
)

Vectors = list[Tensor]
"""One tensor a parameter."""
Trajectory = list[Tensor]
"""The weights after each update, in one vector."""


def network() -> nn.Module:
    """Return a small net in float64, always with the same weights."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss_of(model: nn.Module, worker: int, update: int, block: int) -> Tensor:
    """Return the loss of one block's samples."""
    generator = torch.Generator().manual_seed(10_000 * worker + 100 * update + block)
    inputs, targets = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    loss: Tensor = 0.7 * (model(inputs) - targets[:, :2]).square().sum(dim=1).mean()
    return loss


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def heavy_ball(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@dataclass
class At:
    """What ζ of one block may depend on."""

    worker: int
    step: int
    x: Vectors
    rates: list[float]
    own: Vectors
    mean: Vectors
    momentum: Vectors
    average_update: Vectors
    second: Callable[[], Vectors]


def normed(vectors: Vectors, length: float) -> Vectors:
    norm = math.sqrt(sum(v.square().sum().item() for v in vectors))
    return [length * v / norm if norm > 0 else 0 * v for v in vectors]


def noise(x: Tensor, worker: int, step: int) -> Tensor:
    return 0.05 * torch.cos(torch.arange(x.numel()) + 7.0 * worker + 3.0 * step).to(x).view_as(x)


def along(rates: list[float], vectors: Vectors) -> Vectors:
    return [0.5 * rate * v for rate, v in zip(rates, vectors, strict=True)]


FORMULAS: dict[str, Callable[[At], Vectors]] = {
    "none": lambda at: [0 * x for x in at.x],
    "local": lambda at: along(at.rates, at.own),
    "optimistic": lambda at: along(at.rates, at.mean),
    "gradient-noise": lambda at: along(
        at.rates, [a - b for a, b in zip(at.own, at.mean, strict=True)]
    ),
    "extragradient": lambda at: along(at.rates, at.second()),
    "sam": lambda at: normed(at.second(), -0.05),
    "msam": lambda at: normed(at.momentum, 0.05),
    "noise": lambda at: [noise(x, at.worker, at.step) for x in at.x],
    "average of updates": lambda at: [-1.5 * m for m in at.average_update],
}


def norm_clipped(limit: float) -> Callable[[Vectors], Vectors]:
    """Return the formula of clipping by the norm."""

    def clip(gradients: Vectors) -> Vectors:
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        return [min(1.0, limit / (norm + 1e-6)) * g for g in gradients]

    return clip


def train_naively(
    name: str,
    blocks: Sequence[int],
    *,
    workers: int = 1,
    model: Callable[[], nn.Module] = network,
    loss: Callable[[nn.Module, int, int, int], Tensor] = loss_of,
    base: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    clip: Callable[[Vectors], Vectors] = lambda gradients: gradients,
    skipped: Collection[int] = (),
    forgetting: bool = False,
    share: float = 1.0,
) -> Trajectory:
    """Return the weights after each update.

    Args:
        name: the choice of ζ.
        blocks: the number of blocks of each update.
        workers: their number.
        model: makes the net.
        loss: the loss of a block, from the net, the worker, the update and the block.
        base: makes the optimizer.
        clip: what is done to the mean gradient.
        skipped: updates that are left out after their blocks.
        forgetting: whether workers forget their past gradients at an update that is left out.
        share: the part of a worker's gradient that it remembers.
    """
    net = model()
    optimizer = base(net)
    parameters = list(net.parameters())
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    sign = {
        p: -1.0 if group.get("maximize") else 1.0
        for group in optimizer.param_groups
        for p in group["params"]
    }
    zero = [torch.zeros_like(p) for p in parameters]
    own, mean, average = dict.fromkeys(range(workers), zero), zero, zero
    step, found = 0, []

    def write(weights: Vectors) -> None:
        with torch.no_grad():
            for p, w in zip(parameters, weights, strict=True):
                p.copy_(w)

    def gradient(k: int, t: int, b: int) -> Vectors:
        found = torch.autograd.grad(loss(net, k, t, b), parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else sign[p] * g
            for p, g in zip(parameters, found, strict=True)
        ]

    for t, count in enumerate(blocks):
        x = [p.detach().clone() for p in parameters]
        made = {}
        for k in range(workers):
            made[k] = zero
            for b in range(count):
                at = At(
                    worker=k,
                    step=step,
                    x=x,
                    rates=[rate[p] for p in parameters],
                    own=own[k],
                    mean=mean,
                    momentum=[
                        v if (v := optimizer.state[p].get("momentum_buffer")) is not None else 0 * p
                        for p in parameters
                    ],
                    average_update=average,
                    second=lambda k=k, t=t, b=b: gradient(k, t, b),
                )
                zeta = FORMULAS[name](at)
                write([w - z for w, z in zip(x, zeta, strict=True)])
                made[k] = [a + g for a, g in zip(made[k], gradient(k, t, b), strict=True)]
                write(x)
        if t in skipped:
            own = dict.fromkeys(own, zero) if forgetting else own
            found.append(flat(net))
            continue
        total = [sum(gs) / workers for gs in zip(*made.values(), strict=True)]
        mean = clip(total)
        norms = [torch.cat([g.flatten() for g in gs]).norm().item() for gs in (mean, total)]
        factor = share * norms[0] / norms[1]
        own = {k: [factor * g for g in gs] for k, gs in made.items()} if workers > 1 else {0: mean}
        for p, g in zip(parameters, mean, strict=True):
            p.grad = sign[p] * g
        optimizer.step()
        average = [
            0.7 * m + 0.3 * (p.detach() - w) for m, p, w in zip(average, parameters, x, strict=True)
        ]
        step += 1
        found.append(flat(net))
    return found


def assert_same(found: Trajectory, expected: Trajectory, tolerance: float = 1e-12) -> None:
    assert len(found) == len(expected) > 0
    for update, (weights, others) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            weights,
            others,
            rtol=0,
            atol=tolerance,
            msg=lambda text, update=update: f"after update {update}: {text}",
        )


# The same choices by `egtrain.optim`.


class OwnNoise(Direction):
    """The noise of the formula above, of the worker and the step."""

    def zeta(self, at: Point) -> list[Tensor]:
        return [noise(x, at.worker, at.step) for x in at.parameters]


class AverageUpdate(Direction):
    """Along an average of the updates."""

    def shared_state(self, parameters: list[Tensor]) -> State:
        return {"average": [torch.zeros_like(x) for x in parameters]}

    def observe_update(self, state: State, before: list[Tensor], after: list[Tensor]) -> None:
        torch._foreach_lerp_(state["average"], torch._foreach_sub(after, before), 0.3)

    def zeta(self, at: Point) -> list[Tensor]:
        return [-1.5 * m for m in at.shared["average"]]


DIRECTIONS: dict[str, Direction] = {
    "local": LocalGradient(ratio=0.5, precondition="none"),
    "optimistic": OptimisticGradient(ratio=0.5, precondition="none"),
    "gradient-noise": GradientNoise(ratio=0.5, precondition="none"),
    "extragradient": Extragradient(ratio=0.5, precondition="none"),
    "sam": SAM(radius=0.05),
    "msam": MSAM(radius=0.05),
    "noise": OwnNoise(),
    "average of updates": AverageUpdate(),
}


def base_of(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a base optimizer that the direction is defined for."""
    return heavy_ball if name == "msam" else sgd
