"""Directions drawn at random: independent noise in each worker and step."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from egtrain.optim.extrapolation import Point, Scaling, require_sizes, scaled_to_weights


@dataclass(frozen=True, kw_only=True)
class Noise:
    """ζ^k_t = size·n with independent n ~ N(0, 1) or n ~ U(−1, 1).

    With scaling `filter` (the default) this is SmoothOut's rule, size·‖w_f‖·n_f/(‖n_f‖ + 1e-6)
    (Wen et al. 2018, arXiv 1805.07898).
    """

    size: float
    distribution: Literal["gaussian", "uniform"] = "gaussian"
    scaling: Scaling = "filter"
    norm_and_bias: bool = False
    """Whether parameters with fewer than two dimensions (biases, normalisation) are shifted too."""

    needs_own: ClassVar[bool] = False
    needs_mean: ClassVar[bool] = False
    needs_fresh: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_sizes(size=self.size)

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ, drawn for the worker and the step."""
        generator = at.generator()
        zeta = []
        for x in at.parameters:
            z = torch.zeros_like(x)
            if x.ndim > 1 or self.norm_and_bias:
                if self.distribution == "gaussian":
                    z.normal_(generator=generator)
                else:
                    z.uniform_(-1, 1, generator=generator)
            zeta.append(z)
        return scaled_to_weights(zeta, at.parameters, self.size, self.scaling)
