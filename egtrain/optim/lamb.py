"""LAMB, for large batches: Adam with each layer's step in proportion to its weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from egtrain.optim.layers import Layers, check_setting, norms, update_layers
from egtrain.optim.real_views import real_view
from egtrain.optim.second_moments import second_moment_roots


class LAMB(torch.optim.Optimizer):
    """Adam with decoupled weight decay and a rate for each layer (arXiv 1904.00962, Algorithm 2).

    Here φ(z) = z:

        m ← β₁·m + (1 − β₁)·g,  v ← β₂·v + (1 − β₂)·g²
        r = m̂/(√v̂ + ε) + weight_decay·w,  m̂ = m/(1 − β₁^t),  v̂ = v/(1 − β₂^t)
        λ = ‖w‖/‖r‖                                 1 where a norm is zero
        w ← w − γ·λ·r

    A layer is a parameter. Those with fewer than two dimensions (biases, normalisation) have λ = 1
    and no decay unless asked for. `state[p]["trust_ratio"]` is the last λ, a scalar tensor.

    Args:
        params: parameters or parameter groups.
        lr: γ.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ in the paper.
        adapt_norm_and_bias: whether parameters with fewer than two dimensions have trust ratios.
        decay_norm_and_bias: whether they decay.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adapt_norm_and_bias: bool = False,
        decay_norm_and_bias: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
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
            all(0 <= beta < 1 for beta in group["betas"]),
            "betas must be at least 0 and below 1",
            group["betas"],
        )
        check_setting(group["eps"] >= 0, "eps must be at least 0", group["eps"])
        check_setting(
            group["weight_decay"] >= 0, "weight_decay must be at least 0", group["weight_decay"]
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; `closure`, if given, computes the gradients and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse, or there is none at all.
        """
        return update_layers(self, closure, self._update)

    def _update(self, layers: Layers, group: dict[str, Any]) -> None:
        w, g = layers.weights, layers.gradients
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in layers.parameters]
        for state, p in zip(states, layers.parameters, strict=True):
            if not state:
                state.update(
                    step=torch.zeros(()),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
            state["step"] += 1
        m, v = ([real_view(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        steps = torch.stack([state["step"] for state in states]).double()

        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        r = list(
            torch._foreach_div(m, second_moment_roots(v, steps, beta2=beta2, eps=group["eps"]))
        )
        torch._foreach_div_(r, [1 - beta1 ** float(state["step"]) for state in states])
        if layers.weight_decay > 0:
            torch._foreach_add_(r, w, alpha=layers.weight_decay)

        if layers.adapted:
            w_norms, r_norms = norms(w), norms(r)
            ratios = torch.where((w_norms > 0) & (r_norms > 0), w_norms / r_norms, 1.0)
            # Slow where shapes differ, but the ratios stay on the device.
            torch._foreach_mul_(r, list(ratios.unbind()))
        else:
            ratios = w[0].new_ones(len(w))
        for state, ratio in zip(states, ratios.unbind(), strict=True):
            state["trust_ratio"] = ratio
        torch._foreach_add_(w, r, alpha=-group["lr"])
