"""MSAM: along the normalised momentum of the base optimizer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from egtrain.optim.base_state import require_momentum
from egtrain.optim.direction import Direction, Point
from egtrain.optim.scaling import require_sizes


@dataclass(frozen=True, kw_only=True)
class MSAM(Direction):
    """MSAM: ζ_t = radius·v_t/‖v_t‖, the norm over the whole vector (arXiv 2401.12033).

    As in the paper's Algorithm 1, the gradient is taken at x_t − ζ_t, which lies ahead of x_t along
    the momentum. All workers share the shift. It is zero before the first update, where v_t is
    zero. v_t is the base optimizer's buffer: `momentum_buffer` of SGD and LARS (which contains
    LARS's rates), or `exp_avg` of Adam and LAMB, not preconditioned, as in the authors' variant of
    AdamW. A parameter that had no gradient in the last update is not shifted. Our choices: one norm
    over all parameter groups, and weight decay at x_t. The base must not look ahead as well: no
    `nesterov`, no NAdam.
    """

    radius: float

    def __post_init__(self) -> None:
        require_sizes(radius=self.radius)

    def check_base(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError unless the base has momentum without look-ahead."""
        require_momentum(optimizer)

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the momentum."""
        momentum = [
            v if updated else torch.zeros_like(v)
            for v, updated in zip(at.base.momentum(), at.base.updated, strict=True)
        ]
        norm = torch.nn.utils.get_total_norm(momentum)
        factor = torch.where(norm > 0, self.radius / norm, torch.zeros_like(norm))
        return list(torch._foreach_mul(momentum, factor))
