"""What the random directions share: which weights are shifted, and how far."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from egtrain.optim.direction import Direction, Point
from egtrain.optim.scaling import Scaling, require_one_of, require_sizes, scaled_to_weights
from egtrain.optim.sharded import noise_like


@dataclass(frozen=True, kw_only=True)
class Noise(Direction):
    """Noise scaled to the weights; the default is SmoothOut's size·‖w_f‖·n_f/(‖n_f‖ + 1e-6)."""

    size: float
    scaling: Scaling = "filter"
    norm_and_bias: bool = False
    """Whether parameters with fewer than two dimensions (biases, normalisation) are shifted too."""

    def __post_init__(self) -> None:
        require_sizes(size=self.size)
        require_one_of(Scaling, scaling=self.scaling)

    def scaled(self, draw: Callable[[Tensor], object], at: Point) -> list[Tensor]:
        """Return ζ, made of noise that `draw` writes into a vector for each tensor."""
        taking_part = [x for x in at.parameters if x.ndim > 1 or self.norm_and_bias]
        noise = [noise_like(x, draw) for x in taking_part]
        shifts = iter(
            scaled_to_weights(noise, taking_part, self.size, self.scaling) if noise else ()
        )
        return [
            next(shifts) if x.ndim > 1 or self.norm_and_bias else torch.zeros_like(x)
            for x in at.parameters
        ]
