"""Directions drawn at random: independent noise in each worker and step."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from egtrain.optim.extrapolation import Need, Point
from egtrain.optim.lengths import Scaling, require_one_of, require_sizes, scaled_to_weights

Distribution = Literal["gaussian", "uniform"]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """ζ^k_t = size·n with independent n ~ N(0, 1) or n ~ U(−1, 1).

    With scaling `filter` (the default) this is SmoothOut's rule, size·‖w_f‖·n_f/(‖n_f‖ + 1e-6)
    (Wen et al. 2018, arXiv 1805.07898).
    """

    size: float
    distribution: Distribution = "gaussian"
    scaling: Scaling = "filter"
    norm_and_bias: bool = False
    """Whether parameters with fewer than two dimensions (biases, normalisation) are shifted too."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        require_sizes(size=self.size)
        require_one_of(Distribution, distribution=self.distribution)
        require_one_of(Scaling, scaling=self.scaling)

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ, drawn for the worker and the step."""
        generator = at.generator()
        taking_part = [x for x in at.parameters if x.ndim > 1 or self.norm_and_bias]
        noise = [torch.empty_like(x) for x in taking_part]
        # In the order of memory: torch draws several times slower into a tensor that is not
        # contiguous.
        for n in (n.as_strided((n.numel(),), (1,)) for n in noise):
            if self.distribution == "gaussian":
                n.normal_(generator=generator)
            else:
                n.uniform_(-1, 1, generator=generator)
        shifts = iter(
            scaled_to_weights(noise, taking_part, self.size, self.scaling) if noise else ()
        )
        return [
            next(shifts) if x.ndim > 1 or self.norm_and_bias else torch.zeros_like(x)
            for x in at.parameters
        ]
