"""What a run consists of, and what a checkpoint holds of it."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from egtrain.models.loading import load_weights
from egtrain.optim.extrapolation import Extrapolation
from egtrain.optim.noise_scale import NoiseScale
from egtrain.optim.post_local import PostLocal
from egtrain.optim.schedules import Schedule
from egtrain.tasks import Task
from egtrain.workers import Workers


@dataclass(frozen=True)
class DataSummary:
    """What a checkpoint keeps of the data: enough to recognise them, and to use a model alone."""

    digest: str = ""
    """SHA-256 of the data."""
    outputs: int = 0
    """The classes, words or subwords that a model chooses from."""
    vocabulary: tuple[str, ...] | None = None
    """The words of a language model, in the order of its outputs."""
    subwords: bytes | None = None
    """SentencePiece's model, where sentences are translated."""


@dataclass
class Run:
    """Everything that a run consists of; `state_dict` returns what changes during it."""

    task: Task
    model: nn.Module
    forward: nn.Module
    """The model, or its compiled form."""
    optimizer: torch.optim.Optimizer
    extrapolation: Extrapolation | None
    post_local: PostLocal | None
    schedule: Schedule
    workers: Workers
    steps: int
    extrapolated_steps: range
    """Steps with extrapolation; none in a local phase."""
    new_samples: bool
    """Whether the second gradient is on other samples."""
    clip_norm: float | None
    precision: str
    seed: int
    evaluate_every: int
    """In steps."""
    checkpoint_every: int
    """In steps."""
    unread_steps: int
    """Steps that may be queued on the device before the host reads the first one's statistics: 1
    keeps a GPU busy."""
    data: DataSummary = DataSummary()
    notes: tuple[str, ...] = ()
    """What to tell the user about the data and the initial weights before training."""
    noise_scale: NoiseScale = field(default_factory=NoiseScale)
    step: int = 0
    """Completed updates."""
    gradient_evaluations: int = 0
    """Per-sample gradients taken so far, by all workers."""

    def __post_init__(self) -> None:
        self._relative_rates = [
            group["lr"] / self.optimizer.defaults["lr"] for group in self.optimizer.param_groups
        ]

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        """Set each parameter group's rate to the schedule's times the group's relative rate."""
        for group, relative in zip(optimizer.param_groups, self._relative_rates, strict=True):
            group["lr"] = learning_rate * relative

    @property
    def last_learning_rate(self) -> float:
        """The schedule's rate at the last completed update."""
        return self.schedule(max(self.step - 1, 0))

    def count_update(self) -> None:
        """Count a completed update, and the gradients that it took."""
        extrapolation = self.extrapolation if self.step in self.extrapolated_steps else None
        gradients = 1 if extrapolation is None else extrapolation.direction.gradients
        self.gradient_evaluations += gradients * self.task.batch_size
        self.step += 1

    def synchronisations(self, step: int) -> int:
        """Return how often the first `step` updates averaged gradients or weights."""
        if self.post_local is None:
            return step
        return min(step, self.post_local.start) + self.post_local.averages(step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds, complete on the first rank only; a collective.

        `model` is ready for evaluation: it has the mean of the workers' BatchNorm statistics, and
        in a local phase that of their weights.
        """
        self.workers.average_for_evaluation()
        state: dict[str, Any] = {
            "step": self.step,
            "steps": self.steps,
            "last_learning_rate": self.last_learning_rate,
            "gradient_evaluations": self.gradient_evaluations,
            "data": asdict(self.data),
            "model": {
                name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()
            },
            "optimizer": self.optimizer.state_dict(),
            "workers": self.workers.state_dict(),
            "noise_scale": self.noise_scale.state_dict(),
            "extrapolation": None,
            "post_local": None,
        }
        if self.extrapolation is not None:
            extrapolation = self.extrapolation.state_dict()
            extrapolation["worker_state"] = {
                name: [self.workers.gather_on_first(rows) for rows in tensors]
                for name, tensors in extrapolation["worker_state"].items()
            }
            del extrapolation["workers"]
            state["extrapolation"] = extrapolation
        if self.post_local is not None and self.post_local.optimizers:
            device = self.workers.ranks.device
            rows = self.post_local.state_dict()
            state["post_local"] = {
                name: self.workers.gather_on_first(values.to(device))
                for name, values in rows.items()
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on any number of ranks; settings stay this run's.

        If the next step is not a local one, the workers go on from the mean of their weights.

        Raises:
            ValueError: the state belongs to other data, another base optimizer, extrapolation or
                number of workers.
        """
        if state["data"]["digest"] != self.data.digest:
            raise ValueError("the data are not those that it was trained on")
        if (state["extrapolation"] is None) != (self.extrapolation is None):
            raise ValueError(
                f"it was trained with{'out' if state['extrapolation'] is None else ''} "
                "extrapolation"
            )
        self.step, self.gradient_evaluations = state["step"], state["gradient_evaluations"]
        load_weights(self.model, state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        local = self.post_local is not None and self.post_local.is_local(self.step)
        self.workers.load_state_dict(
            state["workers"] if local else {**state["workers"], "parameters": None}
        )
        self.noise_scale = NoiseScale(**state["noise_scale"])
        if self.extrapolation is not None:
            extrapolation = dict(state["extrapolation"])
            extrapolation["worker_state"] = {
                name: [self.workers.rows_of_carried(rows) for rows in tensors]
                for name, tensors in extrapolation["worker_state"].items()
            }
            extrapolation["workers"] = list(self.workers.carried)
            self.extrapolation.load_state_dict(extrapolation)
        if self.post_local is not None and local and state["post_local"] is not None:
            self.post_local.load_state_dict(
                {
                    name: self.workers.rows_of_carried(rows)
                    for name, rows in state["post_local"].items()
                }
            )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimizer's state, but not its settings, which PyTorch would restore too.

    The learning rate is restored: it is that of the last step.

    Raises:
        ValueError: the state belongs to another optimizer.
    """
    remembered = {"params", "lr"}
    settings = [
        {name: group[name] for name in group.keys() - remembered}
        for group in optimizer.param_groups
    ]
    for saved, kept in zip(state["param_groups"], settings, strict=True):
        if unknown := saved.keys() - kept.keys() - remembered:
            raise ValueError(
                f"the optimizer is another one: it has no {', '.join(sorted(unknown))}"
            )
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
