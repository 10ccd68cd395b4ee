"""What works with what: every base optimizer, direction and loop, tried on a tiny network.

`python tests/support_table.py` prints docs/support.md from the tables below; test_support.py tries
every combination and compares the page.
"""

import contextlib
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch import optim as o
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from egtrain.optim import (
    LAMB,
    LARS,
    MSAM,
    SAM,
    Direction,
    Extragradient,
    Extrapolation,
    GaussianNoise,
    GradientNoise,
    LocalGradient,
    Nesterov,
    OptimisticGradient,
    SmoothOut,
)

RATE, UPDATES, SAMPLES = 0.05, 4, 8

OPTIMIZERS: dict[str, Callable[[Any], o.Optimizer]] = {
    "SGD": lambda p: o.SGD(p, RATE, momentum=0.9),
    "SGD, nesterov": lambda p: o.SGD(p, RATE, momentum=0.9, nesterov=True),
    "Adam": lambda p: o.Adam(p, RATE),
    "AdamW": lambda p: o.AdamW(p, RATE),
    "AdamW, fused": lambda p: o.AdamW(p, RATE, fused=True),
    "NAdam": lambda p: o.NAdam(p, RATE),
    "RAdam": lambda p: o.RAdam(p, RATE),
    "Adamax": lambda p: o.Adamax(p, RATE),
    "Adagrad": lambda p: o.Adagrad(p, RATE),
    "Adadelta": lambda p: o.Adadelta(p, RATE),
    "RMSprop": lambda p: o.RMSprop(p, RATE),
    "Adafactor": lambda p: o.Adafactor(p, RATE),
    "ASGD": lambda p: o.ASGD(p, RATE),
    "Rprop": lambda p: o.Rprop(p, RATE),
    "Muon": lambda p: o.Muon(p, RATE),
    "LARS": lambda p: LARS(p, RATE, momentum=0.9),
    "LAMB": lambda p: LAMB(p, RATE),
}
DIRECTIONS: dict[str, Direction] = {
    "LocalGradient": LocalGradient(ratio=0.5),
    "OptimisticGradient": OptimisticGradient(ratio=0.5),
    "GradientNoise": GradientNoise(ratio=0.5),
    "Extragradient": Extragradient(ratio=0.5),
    "SAM": SAM(radius=0.05),
    "GaussianNoise": GaussianNoise(size=0.05),
    "SmoothOut": SmoothOut(size=0.05),
    "MSAM": MSAM(radius=0.05),
    "Nesterov": Nesterov(),
}


# Runs.


def small_network() -> nn.Module:
    """Return a network of matrices, since Muon trains no others."""
    torch.manual_seed(3)
    layers = [nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)]
    return nn.Sequential(*layers).double()


@functools.cache
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(SAMPLES, 4), (SAMPLES, 3)]
    return [
        (draw[0], draw[1])
        for draw in (
            [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
            for _ in range(UPDATES)
        )
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return (model(inputs.to(weight_type(model))) - targets).square().mean()


def weight_type(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def halves(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(t.chunk(2) for t in batch), strict=True))


class Run:
    """A tiny run whose loop is given by the functions below."""

    def __init__(self, optimizer: str, direction: str, network: nn.Module, **further: Any) -> None:
        self.model = network
        self.direction = DIRECTIONS[direction]
        self.optimizer = OPTIMIZERS[optimizer](network.parameters())
        self.extrapolation = Extrapolation(self.optimizer, self.direction, **further)
        self.no_sync: Callable[[], Any] = getattr(network, "no_sync", contextlib.nullcontext)

    def block(
        self, batch: tuple[Tensor, Tensor], worker: int | None = None, scale: Any = 1
    ) -> None:
        """Take the gradient of a batch at shifted weights."""

        def second_gradient() -> None:
            with self.no_sync():
                torch.autograd.backward(loss_of(self.model, batch))

        with self.extrapolation.shifted(worker, gradient=second_gradient):
            torch.autograd.backward(loss_of(self.model, batch) * scale)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(optimizer: str, direction: str, *, wrap: Any = lambda network: network) -> nn.Module:
    network = small_network()
    run = Run(optimizer, direction, wrap(network))
    for batch in batches():
        run.block(batch)
        run.update()
    return network


def accumulated(optimizer: str, direction: str) -> nn.Module:
    run = Run(optimizer, direction, small_network())
    for batch in batches():
        for half in halves(batch):
            run.block(half, scale=0.5)
        run.update()
    return run.model


def clipped(optimizer: str, direction: str) -> nn.Module:
    run = Run(optimizer, direction, small_network())
    for batch in batches():
        run.block(batch)
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        run.update()
    return run.model


def autocast(optimizer: str, direction: str) -> nn.Module:
    run = Run(optimizer, direction, small_network().float())
    for batch in batches():
        with torch.autocast("cpu", torch.bfloat16):
            run.block(batch)
        run.update()
    return run.model


def scaled(optimizer: str, direction: str) -> nn.Module:
    run = Run(optimizer, direction, small_network())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    for batch in batches():
        run.block(batch, scale=scaler.scale(torch.ones((), dtype=torch.float64)))
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
    return run.model


def compiled(optimizer: str, direction: str) -> nn.Module:
    return plain(optimizer, direction, wrap=functools.partial(torch.compile, backend="eager"))


def closure(optimizer: str, direction: str) -> nn.Module:
    run = Run(optimizer, direction, small_network())

    def gradient(batch: tuple[Tensor, Tensor]) -> Tensor:
        run.optimizer.zero_grad()
        loss = loss_of(run.model, batch)
        torch.autograd.backward(loss)
        return loss

    for batch in batches():
        run.extrapolation.step(functools.partial(gradient, batch))
    return run.model


def two_workers(optimizer: str, direction: str) -> nn.Module:
    run = Run(optimizer, direction, small_network(), workers=2)
    parameters = list(run.model.parameters())
    for batch in batches():
        gradients = []
        for worker, half in enumerate(halves(batch)):
            run.block(half, worker)
            gradients.append([p.grad for p in parameters if p.grad is not None])
            run.optimizer.zero_grad()
        for p, *own in zip(parameters, *gradients, strict=True):
            p.grad = torch.stack(own).mean(dim=0)
        run.update()
    return run.model


def ddp(optimizer: str, direction: str) -> nn.Module:
    network = small_network()
    model = DistributedDataParallel(network)
    run = Run(optimizer, direction, model, model=model)
    for batch in batches():
        run.block(halves(batch)[dist.get_rank()])
        run.update()
    return network


def fsdp2(optimizer: str, direction: str) -> nn.Module:
    network = small_network()
    for layer in (network[0], network[2], network):
        fully_shard(layer)
    run = Run(optimizer, direction, network, workers=1, model=network)
    for batch in batches():
        run.block(halves(batch)[dist.get_rank()])
        run.update()
    return network


# What is expected.


@dataclass(frozen=True)
class Loop:
    """A kind of loop."""

    title: str
    run: Callable[[str, str], nn.Module]
    same_as: Callable[[str, str], nn.Module] | None = None
    """A loop that comes to the same weights, with directions of one gradient."""


FSDP2 = "FSDP2 (`fully_shard`), `workers=1`"
IN_ONE_PROCESS = [
    Loop("one block an update", plain),
    Loop("several blocks an update (accumulation)", accumulated, plain),
    Loop("clipping", clipped),
    Loop("autocast to bfloat16", autocast),
    Loop("`torch.amp.GradScaler`", scaled, plain),
    Loop("`torch.compile`", compiled, plain),
    Loop("`extrapolation.step(closure)`", closure, plain),
    Loop("several workers in one process", two_workers),
]
IN_TWO_PROCESSES = [
    Loop("DistributedDataParallel", ddp, two_workers),
    Loop(FSDP2, fsdp2, plain),
]
LOOPS = IN_ONE_PROCESS + IN_TWO_PROCESSES
ALONG_A_GRADIENT = ("LocalGradient", "OptimisticGradient", "GradientNoise", "Extragradient")


@dataclass(frozen=True)
class Refused:
    """Combinations that are refused, and with which words; None stands for all."""

    message: str
    optimizers: Collection[str] | None = None
    directions: Collection[str] | None = None
    loops: Collection[str] | None = None

    def holds(self, optimizer: str | None, direction: str | None, loop: str | None) -> bool:
        return all(
            names is None or name in names
            for name, names in zip(
                (optimizer, direction, loop),
                (self.optimizers, self.directions, self.loops),
                strict=True,
            )
        )


REFUSED = [
    Refused(
        "how torch.optim.rprop.Rprop scales a gradient is not known: give the direction "
        'precondition="none", or a function',
        optimizers=["Rprop"],
        directions=ALONG_A_GRADIENT,
    ),
    Refused(
        "Nesterov's look-ahead needs torch.optim.SGD as the base optimizer",
        optimizers=[name for name in OPTIMIZERS if not name.startswith("SGD")],
        directions=["Nesterov"],
    ),
    Refused(
        "a shift along the momentum replaces Nesterov's look-ahead: set nesterov=False",
        optimizers=["SGD, nesterov", "Muon"],
        directions=["MSAM", "Nesterov"],
    ),
    Refused(
        "a shift along the momentum replaces NAdam's look-ahead: use torch.optim.Adam",
        optimizers=["NAdam"],
        directions=["MSAM"],
    ),
    Refused(
        "a shift along the momentum needs momentum: set it above 0",
        optimizers=["Adagrad", "Adadelta", "RMSprop", "Adafactor", "ASGD", "Rprop"],
        directions=["MSAM"],
    ),
    Refused(
        "needs each worker's own gradient, but that of sharded parameters is the mean over the "
        "processes: take OptimisticGradient, MSAM or noise",
        directions=["LocalGradient", "GradientNoise"],
        loops=[FSDP2],
    ),
    # Of torch itself, in its optimizers' steps.
    Refused(
        "in-place operations that require placement changes are not supported",
        optimizers=["Adafactor", "Rprop"],
        loops=[FSDP2],
    ),
]
"""The first that holds is the one that is said."""


def message_of(optimizer: str | None, direction: str | None, loop: str | None) -> str | None:
    """Return with which words a combination is refused; None if it works.

    Where one of the names is None, only what is refused with all of its kind is meant.
    """
    for refused in REFUSED:
        if refused.holds(optimizer, direction, loop):
            return refused.message
    return None


# The page.

INTRODUCTION = """\
# What works with what

The tests try each combination of a base optimizer, a direction and a loop below on a tiny network.
✓: it works, and loops that should come to the same weights do. A number: it is refused, with the
message below the tables. The optimizers have their defaults, SGD and LARS `momentum=0.9`.

L-BFGS goes with `extrapolation.step(closure)` and `precondition="none"`. Several loops at once,
such as accumulation and clipping on two processes with a scaled loss, are tried in
[Lightning](lightning.md), in [Hugging Face's Trainer](transformers.md) and with
[Accelerate](accelerate.md). [The library](library.md) shows the loops.
"""


def table(corner: str, rows: Collection[str], columns: Collection[str], cell: Any) -> str:
    lines = [[corner, *columns], ["---", *[":-:"] * len(columns)]]
    lines += [[row, *[cell(row, column) for column in columns]] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """Return the text of docs/support.md."""
    messages = list(dict.fromkeys(refused.message for refused in REFUSED))

    def cell(optimizer: str | None, direction: str, loop: str | None) -> str:
        message = message_of(optimizer, direction, loop)
        return "✓" if message is None else str(messages.index(message) + 1)

    titles = [loop.title for loop in LOOPS]
    columns = [f"`{name}`" for name in DIRECTIONS]
    parts = [
        INTRODUCTION,
        "## Base optimizers and directions",
        table("", OPTIMIZERS, columns, lambda row, column: cell(row, column.strip("`"), None)),
        "## Loops and directions",
        table("", titles, columns, lambda row, column: cell(None, column.strip("`"), row)),
        "## Base optimizers and loops",
        "All go together, but for:\n",
        "".join(
            f"* {', '.join(refused.optimizers)} with {', '.join(refused.loops)}: "
            f"{messages.index(refused.message) + 1}, a message of torch\n"
            for refused in REFUSED
            if refused.optimizers and refused.loops
        ),
        "## Messages",
        "".join(f"{number}. {message}\n" for number, message in enumerate(messages, 1)),
    ]
    return "\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


if __name__ == "__main__":
    print(page(), end="")
