"""How each known base optimizer scales a gradient: the formulas of `precondition="base"`.

Each takes a gradient g to the step at rate 1 that the optimizer makes of it, once its momentum, if
it has any, is that of g too; SGD's kind of momentum, a sum of gradients, and weight decay are left
out. The state is that of the last update.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
)

from egtrain.optim import sharded
from egtrain.optim.lamb import LAMB
from egtrain.optim.lars import LARS
from egtrain.optim.real_views import real_view
from egtrain.optim.second_moments import factors, second_moment_roots


@dataclass(frozen=True)
class Lot:
    """Parameters of one group, on one device, with their gradients and their optimizer's state.

    Complex ones are [..., 2]: torch's optimizers scale real and imaginary parts by themselves.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[dict[str, Any]]
    group: dict[str, Any]
    of_layers: bool
    """Whether factors of whole layers are wanted; without, the result is right up to these."""

    def state(self, name: str) -> list[Tensor]:
        """Return what the optimizer keeps under this name for each parameter."""
        return [real_view(state[name]) for state in self.states]

    def steps(self) -> Tensor:
        """Return the number of updates of each parameter, float64 [parameters]."""
        return torch.stack([state["step"] for state in self.states]).double()


def sgd(lot: Lot) -> list[Tensor]:
    """The gradient g itself."""
    return lot.gradients


def asgd(lot: Lot) -> list[Tensor]:
    """g/(1 + λ·γ·t)^α: the rate falls with the number t of updates."""
    fall = 1 + lot.group["lambd"] * float(lot.group["lr"]) * lot.steps()
    return list(torch._foreach_mul(lot.gradients, factors(fall ** -lot.group["alpha"])))


def lars(lot: Lot) -> list[Tensor]:
    """λ·g with the trust ratio λ."""
    return with_trust_ratios(lot.gradients, lot)


def lamb(lot: Lot) -> list[Tensor]:
    """λ·g/(√v̂ + ε) with the trust ratio λ."""
    return with_trust_ratios(adam(lot), lot)


def with_trust_ratios(gradients: list[Tensor], lot: Lot) -> list[Tensor]:
    """Return the gradients times the trust ratios of their layers, where these are wanted."""
    if not lot.of_layers:
        return gradients
    # Slow where shapes differ, but the ratios stay on the device.
    return list(torch._foreach_mul(gradients, lot.state("trust_ratio")))


def adam(lot: Lot) -> list[Tensor]:
    """g/(√v̂ + ε); under amsgrad v is the largest so far."""
    moments = lot.state("max_exp_avg_sq" if lot.group.get("amsgrad") else "exp_avg_sq")
    roots = second_moment_roots(
        moments, lot.steps(), beta2=lot.group["betas"][1], eps=lot.group["eps"]
    )
    return list(torch._foreach_div(lot.gradients, roots))


def radam(lot: Lot) -> list[Tensor]:
    """r·√(1 − β₂^t)·g/(√v + ε) with the rectification r; g while that is not defined.

    Liu et al., arXiv 1908.03265; ε is where torch has it.
    """
    beta2, t = lot.group["betas"][1], lot.steps()
    correction = 1 - beta2**t
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / correction
    rectified = length > 5
    squared = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    roots = list(torch._foreach_sqrt(lot.state("exp_avg_sq")))
    torch._foreach_add_(roots, lot.group["eps"])
    torch._foreach_mul_(roots, factors(torch.where(rectified, (squared * correction).rsqrt(), 0.0)))
    torch._foreach_add_(roots, factors((~rectified).double()))
    return list(torch._foreach_div(lot.gradients, roots))


def adamax(lot: Lot) -> list[Tensor]:
    """g/u with the decayed largest gradient u, which has ε in it."""
    return list(torch._foreach_div(lot.gradients, lot.state("exp_inf")))


def adagrad(lot: Lot) -> list[Tensor]:
    """g/((1 + (t − 1)·decay)·(√sum + ε)); 0 before the first update, where the sum is empty."""
    t = lot.steps()
    roots = list(torch._foreach_sqrt(lot.state("sum")))
    torch._foreach_add_(roots, lot.group["eps"])
    fall = 1 + (t - 1) * lot.group["lr_decay"]
    torch._foreach_mul_(roots, factors(torch.where(t > 0, fall, 1.0)))
    torch._foreach_add_(roots, factors(torch.where(t > 0, 0.0, math.inf)))
    return list(torch._foreach_div(lot.gradients, roots))


def adadelta(lot: Lot) -> list[Tensor]:
    """√(d + ε)/√(v + ε)·g with the averages d and v of squared steps and gradients."""
    steps, roots = (
        list(torch._foreach_add(lot.state(name), lot.group["eps"]))
        for name in ("acc_delta", "square_avg")
    )
    torch._foreach_sqrt_(steps)
    torch._foreach_sqrt_(roots)
    torch._foreach_div_(steps, roots)
    torch._foreach_mul_(steps, lot.gradients)
    return steps


def rmsprop(lot: Lot) -> list[Tensor]:
    """g/(√v + ε) with the average v of squared gradients, less the square of theirs if centered."""
    moments = lot.state("square_avg")
    if lot.group["centered"]:
        means = lot.state("grad_avg")
        moments = list(torch._foreach_addcmul(moments, means, means, -1))
    roots = list(torch._foreach_sqrt(moments))
    torch._foreach_add_(roots, lot.group["eps"])
    return list(torch._foreach_div(lot.gradients, roots))


def adafactor(lot: Lot) -> list[Tensor]:
    """a·u/max(1, rms(u)/d), u = g/√v with the factored second moment v (arXiv 1804.04235).

    a = max(ε₂, rms(x))·min(γ, 1/√t)/γ is the step's length relative to the rate.
    """
    least, least_rms = lot.group["eps"]
    scaled = []
    for g, state in zip(lot.gradients, lot.states, strict=True):
        if g.ndim > 1:
            rows = state["row_var"]
            eps = torch.finfo(g.dtype).eps if least is None else least
            moment = rows @ state["col_var"] / rows.mean(dim=-2, keepdim=True).clamp(min=eps)
        else:
            moment = state["variance"]
        eps = torch.finfo(moment.dtype).eps if least is None else least
        scaled.append(g * moment.clamp(min=eps * eps).rsqrt())
    if not lot.of_layers:
        return scaled
    rate, lengths = float(lot.group["lr"]), []
    norms = zip(torch._foreach_norm(lot.parameters), torch._foreach_norm(scaled), strict=True)
    for (x_norm, norm), g, state in zip(norms, scaled, lot.states, strict=True):
        # The number of updates is on the CPU.
        relative = min(1.0, 1 / (rate * math.sqrt(float(state["step"])))) if rate > 0 else 1.0
        root = math.sqrt(g.numel())
        clipped = (norm / (root * lot.group["d"])).clamp(min=1.0)
        lengths.append((x_norm / root).clamp(min=least_rms) * relative / clipped)
    return list(torch._foreach_mul(scaled, lengths))


def muon(lot: Lot) -> list[Tensor]:
    """√min(m, n)·c·g/‖g‖: the raw gradient, as long as an update of an m × n matrix.

    That is c times a semi-orthogonal matrix; c is how torch adjusts the rate to the shape. The
    Newton-Schulz iteration with torch's default coefficients stops short of it, and such updates
    are 0.8 to 1 times as long.
    """
    if not lot.of_layers:
        return lot.gradients
    norms = sharded.norms(lot.gradients)
    torch._foreach_clamp_min_(norms, lot.group["eps"])
    lengths = []
    for g in lot.gradients:
        rows, columns = g.shape
        adjusted = math.sqrt(max(1, rows / columns))
        if lot.group["adjust_lr_fn"] == "match_rms_adamw":
            adjusted = 0.2 * math.sqrt(max(rows, columns))
        lengths.append(math.sqrt(min(rows, columns)) * adjusted)
    # In this order no factor overflows in half precision.
    scaled = list(torch._foreach_div(lot.gradients, norms))
    torch._foreach_mul_(scaled, lengths)
    return scaled


@dataclass(frozen=True)
class BaseScale:
    """How an optimizer scales gradients."""

    scaled: Callable[[Lot], list[Tensor]]
    """Returns the scaled gradients of parameters that have a state."""
    at_first: Literal["zero", "gradient", "no state"] = "zero"
    """What a gradient becomes while its parameter has no state; `no state`: none is needed."""


SCALES: dict[type[torch.optim.Optimizer], BaseScale] = {
    SGD: BaseScale(sgd, "no state"),
    ASGD: BaseScale(asgd, "gradient"),
    LARS: BaseScale(lars, "gradient"),
    LAMB: BaseScale(lamb),
    Adam: BaseScale(adam),
    AdamW: BaseScale(adam),
    NAdam: BaseScale(adam),
    RAdam: BaseScale(radam, "gradient"),
    Adamax: BaseScale(adamax),
    Adagrad: BaseScale(adagrad),
    Adadelta: BaseScale(adadelta),
    RMSprop: BaseScale(rmsprop),
    Adafactor: BaseScale(adafactor),
    Muon: BaseScale(muon, "no state"),
}
"""The known optimizers. A class that is derived from one of them may make another step, so it is
not known. Nor are torch's Rprop and LBFGS, whose steps are no scaled gradients, and SparseAdam,
whose gradients are sparse."""


def scale_of(optimizer: torch.optim.Optimizer) -> BaseScale:
    """Return how an optimizer scales gradients.

    Raises:
        ValueError: that is not known.
    """
    scale = SCALES.get(type(optimizer))
    if scale is None:
        kind = type(optimizer)
        raise ValueError(
            f"how {kind.__module__}.{kind.__qualname__} scales a gradient is not known: give the "
            'direction precondition="none", or a function of (optimizer, parameters, gradients) '
            "that returns the scaled gradients"
        )
    return scale
