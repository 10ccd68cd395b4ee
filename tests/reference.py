"""One training step of every variant, slowly: K separate models and METHOD's formulas, no code of
egtrain.

Each worker has its model, whose weights are set before every pass; nothing is shifted,
restored, flattened or shared. Lists have one tensor a trainable parameter, in the model's order.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Zeta:
    """A choice of ζ, in the words of METHOD's table."""

    name: str = "none"
    ratio: float | None = None
    rate: float | None = None
    size: float | None = None
    """s; for `sam` and `msam` the radius r."""
    scaling: str = "none"
    samples: str = "same"
    norm_and_bias: bool = False
    precondition: str = "base"
    decay: float = 0.0
    """Decay of an average per step."""
    until: int = 10**9
    """Steps with extrapolation, from the start."""
    every: int = 1
    """Steps from one extrapolation to the next."""

    def acts_in(self, step: int) -> bool:
        """Return whether there is extrapolation in the update after `step` completed ones."""
        return self.name != "none" and step < self.until and step % self.every == 0


@dataclass(frozen=True)
class Base:
    """PyTorch's SGD (or LARS, LAMB, Adam, AdamW), and clipping of the mean gradient."""

    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-2
    clip_norm: float | None = None
    name: str = "sgd"
    trust_coefficient: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-3
    adapt_norm_and_bias: bool = False
    decay_norm_and_bias: bool = False


@dataclass
class Step:
    """What a step reports, by worker."""

    losses: list[float]
    squared_norms: list[float]
    squared_norm_of_mean: float
    relative_size: float
    """‖ζ‖/‖x‖ of worker 0."""
    alignment: float
    """Cosine between the gradient of worker 0 and its previous one; 0 before there is one."""
    clip_factor: float


class Reference:
    """K workers, step by step.

    Args:
        model: the initial weights and BatchNorm statistics.
        loss: (model, samples) -> loss.
        batch, extra_batch: (worker, step) -> samples.
        generator: (worker, step) -> the generator that the noise is drawn from.
        dropout_seed: (worker, step) -> the seed of the dropout masks.
    """

    def __init__(
        self,
        model: nn.Module,
        workers: int,
        zeta: Zeta,
        base: Base,
        *,
        loss: Callable[[nn.Module, Any], Tensor],
        batch: Callable[[int, int], Any],
        extra_batch: Callable[[int, int], Any],
        generator: Callable[[int, int], torch.Generator],
        dropout_seed: Callable[[int, int], int],
    ) -> None:
        self.zeta, self.base, self.loss = zeta, base, loss
        self.batch, self.extra_batch = batch, extra_batch
        self.generator, self.dropout_seed = generator, dropout_seed
        self.models = [copy.deepcopy(model) for _ in range(workers)]
        self.weights = [p.detach().clone() for p in trainable(model)]
        self.velocity: list[Tensor] | None = None
        """The momentum buffer; for Adam and LAMB the first moment."""
        self.second_moment: list[Tensor] | None = None
        self.trust_ratios: list[float] | None = None
        self.past_own = [[torch.zeros_like(x) for x in self.weights] for _ in range(workers)]
        self.past_mean = [torch.zeros_like(x) for x in self.weights]
        self.past_factor = 1.0
        self.average_own = [[torch.zeros_like(x) for x in self.weights] for _ in range(workers)]
        self.average_update = [torch.zeros_like(x) for x in self.weights]
        self.steps = 0
        self.gradients_taken = 0

    def step(self, learning_rate: float) -> Step:
        """Make one update."""
        gradients, losses, relative_size = [], [], 0.0
        for worker, model in enumerate(self.models):
            zeta = self.zeta_of(worker, learning_rate)
            if worker == 0:
                relative_size = math.sqrt(squared_norm(zeta) / squared_norm(self.weights))
            shifted = [x - z for x, z in zip(self.weights, zeta, strict=True)]
            loss, gradient = self.gradient(model, shifted, self.batch(worker, self.steps), worker)
            losses.append(loss)
            gradients.append(gradient)

        mean = [
            sum(parts[1:], parts[0]) / len(self.models) for parts in zip(*gradients, strict=True)
        ]
        norm_of_mean = math.sqrt(squared_norm(mean))
        factor = 1.0
        if self.base.clip_norm is not None:
            factor = min(1.0, self.base.clip_norm / (norm_of_mean + 1e-6))
        clipped = [factor * m for m in mean]
        before, d = self.weights, self.zeta.decay
        self.update(clipped, learning_rate)
        self.average_update = [
            d * m + (1 - d) * (x - y)
            for m, x, y in zip(self.average_update, self.weights, before, strict=True)
        ]
        self.average_own = [
            [d * a + (1 - d) * g for a, g in zip(average, gradient, strict=True)]
            for average, gradient in zip(self.average_own, gradients, strict=True)
        ]

        dot = sum(float((a * b).sum()) for a, b in zip(gradients[0], self.past_own[0], strict=True))
        norms = math.sqrt(squared_norm(gradients[0]) * squared_norm(self.past_own[0]))
        report = Step(
            losses,
            [squared_norm(g) for g in gradients],
            norm_of_mean**2,
            relative_size,
            dot / norms if norms > 0 else 0.0,
            factor,
        )
        self.past_own, self.past_mean, self.past_factor = gradients, clipped, factor
        self.steps += 1
        return report

    def update(self, gradient: list[Tensor], learning_rate: float) -> None:
        """Make the update of the base optimizer."""
        if self.base.name == "sgd":
            self.update_sgd(gradient, learning_rate)
        elif self.base.name == "lars":
            self.update_lars(gradient, learning_rate)
        else:
            self.update_adam(gradient, learning_rate)

    def update_lars(self, gradient: list[Tensor], learning_rate: float) -> None:
        """Make the update of LARS."""
        base = self.base
        velocity = self.velocity or [torch.zeros_like(x) for x in self.weights]
        self.velocity, self.trust_ratios, weights = [], [], []
        for w, g, v in zip(self.weights, gradient, velocity, strict=True):
            beta = base.weight_decay if w.ndim > 1 or base.decay_norm_and_bias else 0.0
            ratio = 1.0
            if (w.ndim > 1 or base.adapt_norm_and_bias) and length(w) > 0 and length(g) > 0:
                ratio = base.trust_coefficient * length(w) / (length(g) + beta * length(w))
            v = base.momentum * v + learning_rate * ratio * (g + beta * w)
            weights.append(w - v)
            self.velocity.append(v)
            self.trust_ratios.append(ratio)
        self.weights = weights

    def update_adam(self, gradient: list[Tensor], learning_rate: float) -> None:
        """Make the update of LAMB, Adam or AdamW."""
        base, t = self.base, self.steps + 1
        b1, b2 = base.beta1, base.beta2
        m = self.velocity or [torch.zeros_like(x) for x in self.weights]
        v = self.second_moment or [torch.zeros_like(x) for x in self.weights]
        if base.name == "adam":
            gradient = [
                g + base.weight_decay * x for g, x in zip(gradient, self.weights, strict=True)
            ]
        self.velocity = [b1 * a + (1 - b1) * g for a, g in zip(m, gradient, strict=True)]
        self.second_moment = [b2 * a + (1 - b2) * g * g for a, g in zip(v, gradient, strict=True)]
        ratios, weights = [], []
        for w, m_w, v_w in zip(self.weights, self.velocity, self.second_moment, strict=True):
            r = (m_w / (1 - b1**t)) / (torch.sqrt(v_w / (1 - b2**t)) + base.eps)
            ratio = 1.0
            if base.name == "adamw" or (
                base.name == "lamb" and (w.ndim > 1 or base.decay_norm_and_bias)
            ):
                r = r + base.weight_decay * w
            if (
                base.name == "lamb"
                and (w.ndim > 1 or base.adapt_norm_and_bias)
                and length(w) > 0
                and length(r) > 0
            ):
                ratio = length(w) / length(r)
            weights.append(w - learning_rate * ratio * r)
            ratios.append(ratio)
        self.weights = weights
        self.trust_ratios = ratios if base.name == "lamb" else None

    def preconditioned(self, gradient: list[Tensor]) -> list[Tensor]:
        """Return the gradient as the base optimizer scales it."""
        if self.zeta.precondition == "none":
            return gradient
        if self.base.name in ("adam", "adamw", "lamb"):
            if self.second_moment is None:
                return [torch.zeros_like(g) for g in gradient]
            unbiased = [v / (1 - self.base.beta2**self.steps) for v in self.second_moment]
            gradient = [
                g / (torch.sqrt(v) + self.base.eps) for g, v in zip(gradient, unbiased, strict=True)
            ]
        if self.trust_ratios is not None and self.zeta.size is None:
            gradient = [ratio * g for ratio, g in zip(self.trust_ratios, gradient, strict=True)]
        return gradient

    def update_sgd(self, gradient: list[Tensor], learning_rate: float) -> None:
        """Make the update of torch.optim.SGD."""
        u = self.base.momentum
        direction = [
            g + self.base.weight_decay * x for g, x in zip(gradient, self.weights, strict=True)
        ]
        if u != 0:
            velocity = self.velocity or [torch.zeros_like(x) for x in self.weights]
            self.velocity = [u * v + d for v, d in zip(velocity, direction, strict=True)]
            if self.base.nesterov:
                direction = [d + u * v for d, v in zip(direction, self.velocity, strict=True)]
            else:
                direction = self.velocity
        self.weights = [x - learning_rate * d for x, d in zip(self.weights, direction, strict=True)]

    def gradient(
        self, model: nn.Module, weights: list[Tensor], samples: Any, worker: int
    ) -> tuple[float, list[Tensor]]:
        """Return the worker's loss and gradient at `weights`; the model's BatchNorm statistics
        move.
        """
        parameters = trainable(model)
        for p, x in zip(parameters, weights, strict=True):
            p.data = x.clone()
        torch.manual_seed(self.dropout_seed(worker, self.steps))
        loss = self.loss(model, samples)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        self.gradients_taken += 1
        return loss.item(), [
            torch.zeros_like(x) if g is None else g.detach()
            for g, x in zip(gradients, weights, strict=True)
        ]

    def fresh_gradient(self, worker: int, samples: Any) -> list[Tensor]:
        """Return the worker's gradient at the unshifted weights, taken on a temporary copy."""
        return self.gradient(copy.deepcopy(self.models[worker]), self.weights, samples, worker)[1]

    def zeta_of(self, worker: int, learning_rate: float) -> list[Tensor]:
        """Return ζ^k_t."""
        zeta = self.zeta
        own = [self.past_factor * g for g in self.past_own[worker]]
        if not zeta.acts_in(self.steps):
            return [torch.zeros_like(x) for x in self.weights]
        if zeta.name in ("gaussian", "smoothout"):
            return self.noise(self.generator(worker, self.steps))
        if zeta.name == "sam":
            assert zeta.size is not None
            gradient = self.fresh_gradient(worker, self.batch(worker, self.steps))
            norm = math.sqrt(squared_norm(gradient))
            return [-zeta.size * g / norm if norm > 0 else torch.zeros_like(g) for g in gradient]
        if zeta.name == "msam":
            assert zeta.size is not None
            velocity = self.velocity or [torch.zeros_like(x) for x in self.weights]
            norm = math.sqrt(squared_norm(velocity))
            return [zeta.size * v / norm if norm > 0 else v for v in velocity]
        if zeta.name == "nesterov":
            velocity = self.velocity or [torch.zeros_like(x) for x in self.weights]
            return [learning_rate * self.base.momentum * v for v in velocity]
        if zeta.name == "average of updates":
            return [-zeta.ratio * learning_rate * m for m in self.average_update]
        if zeta.name == "average of gradients":
            unbiased = zeta.ratio / (1 - zeta.decay ** max(1, self.steps))
            return [unbiased * learning_rate * a for a in self.average_own[worker]]
        if zeta.name == "local":
            direction = own
        elif zeta.name == "optimistic":
            direction = self.past_mean
        elif zeta.name == "gradient-noise":
            direction = [g - m for g, m in zip(own, self.past_mean, strict=True)]
        else:
            assert zeta.name == "extragradient"
            source = self.extra_batch if zeta.samples == "new" else self.batch
            direction = self.fresh_gradient(worker, source(worker, self.steps))
        direction = self.preconditioned(direction)
        if zeta.size is not None:
            return [self.scaled(z, x) for z, x in zip(direction, self.weights, strict=True)]
        length = zeta.ratio * learning_rate if zeta.ratio is not None else zeta.rate
        return [length * g for g in direction]

    def noise(self, generator: torch.Generator) -> list[Tensor]:
        """Return the shift of `gaussian` or `smoothout`."""
        zeta = []
        for x in self.weights:
            if x.ndim < 2 and not self.zeta.norm_and_bias:
                zeta.append(torch.zeros_like(x))
            elif self.zeta.name == "gaussian":
                n = torch.zeros_like(x).normal_(0, 1, generator=generator)
                zeta.append(self.scaled(n, x))
            else:
                n = torch.zeros_like(x).uniform_(-1, 1, generator=generator)
                zeta.append(self.scaled(n, x))
        return zeta

    def scaled(self, z: Tensor, x: Tensor) -> Tensor:
        """Return s·‖x_l‖·z_l/(‖z_l‖ + ε) for each layer or filter l, or s·z."""
        size = self.zeta.size
        if self.zeta.scaling == "none":
            return size * z
        if self.zeta.scaling == "filter" and x.ndim >= 2:
            return torch.stack(
                [size * length(f) * n / (length(n) + 1e-6) for n, f in zip(z, x, strict=True)]
            )
        return size * length(x) * z / (length(z) + 1e-6)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that take part."""
    return [p for p in model.parameters() if p.requires_grad]


def length(x: Tensor) -> float:
    """Return the Euclidean norm."""
    return math.sqrt(float((x * x).sum()))


def squared_norm(tensors: list[Tensor]) -> float:
    """Return the squared norm of the whole vector."""
    return sum(float((x * x).sum()) for x in tensors)
