"""A run small enough to be repeated a hundred times: a net with everything awkward in it, on the
real engine.
"""

from collections.abc import Callable
from typing import Any

import torch
from reference import Base
from torch import Tensor, nn

from egtrain.optim import LAMB, LARS, Direction, Extrapolation
from egtrain.run import Run
from egtrain.tasks import Metric, Split
from egtrain.train import train
from egtrain.workers import Ranks, Workers

Batch = tuple[Tensor, Tensor]
RATES = [0.05, 0.1, 0.2, 0.2, 0.2, 0.1, 0.02, 0.02]
"""Warm-up, peak and decay."""


class TinyNet(nn.Module):
    """Images [batch, 2, 4, 4] to [batch, 3]: BatchNorm, dropout, a scalar, an unused and a frozen
    parameter.
    """

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(dropout)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.tensor([0.5, -0.5, 1.0]), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.head = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs."""
        hidden = self.dropout(torch.tanh(self.norm(self.conv(images))))
        outputs: Tensor = self.head(hidden.flatten(1)) * self.gain + self.frozen
        return outputs


class TinyTask:
    """Regression onto random targets; every batch is a function of (worker, step)."""

    metric = training_metric = Metric("error", "", higher_is_better=False)
    best_possible: float | None = None
    sums: tuple[str, ...] = ("loss", "error")
    samples = 64
    steps_per_epoch = 4

    def __init__(self, workers: int, dtype: torch.dtype, same_for_all: bool = False) -> None:
        self.worker_batch_size = 4
        self.batch_size = workers * self.worker_batch_size
        self.dtype = dtype
        self.same_for_all = same_for_all

    def batch(self, worker: int, step: int) -> Batch:
        """Return images and targets."""
        return self._draw(1000 * step + (0 if self.same_for_all else worker))

    def extra_batch(self, worker: int, step: int) -> Batch:
        """Return other images and targets."""
        return self._draw(500_000 + 1000 * step + worker)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return half the squared error and the largest error."""
        difference = model(batch[0]) - batch[1]
        return 0.5 * difference.square().sum(dim=1).mean(), difference.detach().abs().max()

    def evaluation_size(self, split: Split) -> int:
        """Return the number of samples."""
        return 4 if split == "test" else 0

    def evaluation_batches(self, split: Split) -> int:
        """Return the number of batches."""
        return 1 if split == "test" else 0

    def evaluate_batch(self, model: nn.Module, split: Split, index: int) -> Tensor:
        """Return the sums."""
        loss, error = self.loss(model, self._draw(999_999))
        return torch.stack([4 * loss, 4 * error]).double()

    def metrics_of(self, sums: list[float], split: Split) -> dict[str, float]:
        """Return the means."""
        return {"loss": sums[0] / 4, "error": sums[1] / 4}

    def _draw(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(4, 2, 4, 4, generator=generator, dtype=torch.float64)
        targets = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        return images.to(self.dtype), targets.to(self.dtype)


def tiny_net(dtype: torch.dtype = torch.float64, dropout: float = 0.3) -> TinyNet:
    """Return the net with the same initial weights in every precision."""
    torch.manual_seed(7)
    return TinyNet(dropout).double().to(dtype)


def base_optimizer(
    base: Base, parameters: list[nn.Parameter] | list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Return the optimizer that the reference describes."""
    decay, betas = base.weight_decay, (base.beta1, base.beta2)
    exclusions = {
        "adapt_norm_and_bias": base.adapt_norm_and_bias,
        "decay_norm_and_bias": base.decay_norm_and_bias,
    }
    match base.name:
        case "sgd":
            return torch.optim.SGD(
                parameters,
                1.0,
                base.momentum,
                nesterov=base.nesterov,
                weight_decay=decay,
                foreach=True,
            )
        case "lars":
            return LARS(parameters, 1.0, base.momentum, decay, base.trust_coefficient, **exclusions)
        case "lamb":
            return LAMB(parameters, 1.0, betas, base.eps, decay, **exclusions)
    adam: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return adam[base.name](parameters, 1.0, betas, base.eps, decay, foreach=True)


def tiny_run(
    direction: Direction | None,
    base: Base,
    *,
    workers: int = 4,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.3,
    same_for_all: bool = False,
    new_samples: bool = False,
    steps: int = len(RATES),
    until: int | None = None,
    every: int = 1,
    seed: int = 3,
    ranks: Ranks | None = None,
) -> Run:
    """Return a run at step 0."""
    model = tiny_net(dtype, dropout)
    optimizer = base_optimizer(base, list(model.parameters()))
    engine = Workers(model, workers, ranks or Ranks(), deterministic=ranks is not None)
    return Run(
        task=TinyTask(workers, dtype, same_for_all),
        model=model,
        forward=model,
        optimizer=optimizer,
        extrapolation=Extrapolation(optimizer, direction, engine.carried, seed, engine.unshifted)
        if direction is not None
        else None,
        post_local=None,
        schedule=lambda step: RATES[step],
        workers=engine,
        steps=steps,
        extrapolated_steps=range(0, steps if until is None else until, every),
        new_samples=new_samples,
        clip_norm=base.clip_norm,
        precision="fp32",
        seed=seed,
        evaluate_every=100,
        checkpoint_every=100,
        unread_steps=0,
    )


class Watcher:
    """An observer that calls a function after each update."""

    def __init__(self, after_update: Callable[[int, dict[str, float]], None]) -> None:
        self.after_update = after_update

    def trained(self, run: Run, step: int, metrics: dict[str, float]) -> None:
        """Pass the metrics on."""
        self.after_update(step, metrics)

    def evaluating(self, split: Split, done: int, total: int) -> None:
        """Ignore the progress."""

    def evaluated(self, run: Run, split: Split, metrics: dict[str, float]) -> None:
        """Ignore evaluations."""

    def save(self, run: Run, state: dict[str, Any], validation: dict[str, float] | None) -> None:
        """Ignore checkpoints."""


def train_watched(
    run: Run, after_update: Callable[[int, dict[str, float]], None] = lambda *_: None
) -> None:
    """Train to the end with the real loop, on one process."""
    train(run, Watcher(after_update), lambda: False)


def trajectory(run: Run) -> list[dict[str, Tensor]]:
    """Train to the end and return, after each update, the weights, momentum, statistics and
    metrics.
    """
    snapshots = []

    def note(step: int, metrics: dict[str, float]) -> None:
        states = [
            value for s in run.optimizer.state.values() for value in s.values() if value is not None
        ]
        snapshots.append(
            {
                "weights": run.workers.parameters.detach().clone(),
                "optimizer": torch.cat([s.detach().double().flatten() for s in states])
                if states
                else torch.zeros(0),
                "statistics": run.workers.state_dict()["buffers"],
                "loss": torch.tensor(metrics["loss"], dtype=torch.float64),
                "gradient_norm": torch.tensor(metrics["gradient_norm"], dtype=torch.float64),
            }
        )

    train_watched(run, note)
    return snapshots
