"""LARS, for large batches: SGD with each layer's step in proportion to its weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from egtrain.optim.layers import Layers, check_setting, norms, update_layers
from egtrain.optim.real_views import real_view


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a rate for each layer (arXiv 1708.03888, Algorithm 1).

        λ = trust_coefficient·‖w‖/(‖g‖ + β·‖w‖)     1 where ‖w‖ or ‖g‖ is zero
        v ← m·v + γ·λ·(g + β·w)                     the rate is inside the momentum, as in the paper
        w ← w − v

    A layer is a parameter. Those with fewer than two dimensions (biases, normalisation) have λ = 1
    and β = 0 unless asked for. `state[p]["trust_ratio"]` is the last λ, a scalar tensor.

    Args:
        params: parameters or parameter groups.
        lr: γ.
        momentum: m.
        weight_decay: β.
        trust_coefficient: η in the paper.
        adapt_norm_and_bias: whether parameters with fewer than two dimensions have trust ratios.
        decay_norm_and_bias: whether they decay.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt_norm_and_bias: bool = False,
        decay_norm_and_bias: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt_norm_and_bias": adapt_norm_and_bias,
            "decay_norm_and_bias": decay_norm_and_bias,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, which may have its own settings."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_setting(group["lr"] >= 0, "lr must be at least 0", group["lr"])
        check_setting(
            0 <= group["momentum"] < 1, "momentum must be at least 0 and below 1", group["momentum"]
        )
        check_setting(
            group["weight_decay"] >= 0, "weight_decay must be at least 0", group["weight_decay"]
        )
        check_setting(
            group["trust_coefficient"] > 0,
            "trust_coefficient must be above 0",
            group["trust_coefficient"],
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; `closure`, if given, computes the gradients and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse, or there is none at all.
        """
        return update_layers(self, closure, self._update)

    def _update(self, layers: Layers, group: dict[str, Any]) -> None:
        w, g, decay = layers.weights, layers.gradients, layers.weight_decay
        states = [self.state[p] for p in layers.parameters]
        for state, p in zip(states, layers.parameters, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
        v = [real_view(state["momentum_buffer"]) for state in states]

        if layers.adapted:
            w_norms, g_norms = norms(w), norms(g)
            ratios = group["trust_coefficient"] * w_norms / (g_norms + decay * w_norms)
            ratios = torch.where((w_norms > 0) & (g_norms > 0), ratios, 1.0)
        else:
            ratios = w[0].new_ones(len(w))
        for state, ratio in zip(states, ratios.unbind(), strict=True):
            state["trust_ratio"] = ratio

        if decay > 0:
            g = list(torch._foreach_add(g, w, alpha=decay))
        if layers.adapted:
            # Slow where shapes differ, but the ratios stay on the device.
            g = list(torch._foreach_mul(g, list(ratios.unbind())))
        torch._foreach_mul_(v, group["momentum"])
        torch._foreach_add_(v, g, alpha=group["lr"])
        torch._foreach_sub_(w, v)
