"""Checks that a loss is a function of the weights alone, and that its products are a Hessian's.

They run once, on the first batch. What they refuse gives numbers that look like any others.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from egtrain.errors import UsageError
from egtrain.sharpness.flat import flattened, gaussian_vector
from egtrain.sharpness.restoring import copy_into
from egtrain.sharpness.weights import computing_type

CHECK = "sharpness check"
SAME_VALUE = 1e3
"""Two values of a loss are the same if they differ by fewer units of relative rounding."""
ROUNDING_SHARE = 30.0
"""An asymmetry is rounding if it is within so many times the rounding found in the products."""
SMALLER = (1.0, 0.5, 0.1)
"""Factors of the weights at which a check is made, until it is passed."""
ASIDE = 1e-4
"""How far from the weights differences are taken: a unit that is off exactly has no derivative."""
SHIFTS = (1e-8, 1e-9)
"""Relative steps of finite differences in float64; two, as a kink may lie within the larger one."""
SAME_CURVATURE = 1e-3
"""Largest relative difference between a product and the finite difference of gradients."""


def require_same(first: Tensor, second: Tensor) -> None:
    """Raise UsageError if two values of a loss, which should be the same, are not."""
    largest = max(abs(float(first)), abs(float(second)))
    apart = abs(float(first) - float(second))
    if apart > SAME_VALUE * torch.finfo(first.dtype).eps * largest:
        raise UsageError(
            f"the loss is not the same twice: on one batch it is {float(first):.6g} and then "
            f"{float(second):.6g}; turn off what draws random numbers in evaluation mode, such as "
            "torch.nn.functional.dropout without training=self.training, or what the model "
            "remembers from call to call"
        )


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise UsageError if a layer of a model, after a pass, normalises by each batch's statistics.

    The mean over batches then depends on how the samples were put into batches.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise UsageError(
                f"{name or 'the model'} normalises by the statistics of each batch, so the loss "
                "depends on how the samples are split into batches: give all samples as one batch, "
                "or let it use running statistics (track_running_stats=True, in evaluation mode)"
            )


def nodes_of(loss: Tensor) -> Iterator[Any]:
    """Yield the operations of a graph."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [further for further, _ in node.next_functions]


def refuse_low_precision(loss: Tensor) -> None:
    """Raise UsageError if an operation of the graph has a result of low precision."""
    for node in nodes_of(loss):
        for made in node._input_metadata:
            if made.dtype.is_floating_point and computing_type(made.dtype, None) != made.dtype:
                kind = str(made.dtype).removeprefix("torch.")
                raise UsageError(
                    f"the model computes in {kind} inside ({node.name()}), and its curvature would "
                    "be mostly rounding: leave out autocast and casts in its forward, or let them "
                    "follow the type of the weights"
                )


def refuse_once_differentiable(loss: Tensor) -> None:
    """Raise UsageError if the loss uses an operation that is marked as once differentiable.

    `torch.autograd.grad` does not raise, but treats the gradient of such an operation as constant.
    """
    decorator: Any = torch.autograd.function.once_differentiable
    marked = decorator(lambda: None).__code__  # shared by all decorated functions
    for operation in own_operations(loss):
        if getattr(operation.backward, "__code__", None) is marked:
            raise no_second_derivatives(f"{operation.__name__} is marked as once differentiable")


def own_operations(loss: Tensor) -> list[Any]:
    """Return the classes of the operations in a graph that are not torch's own."""
    found = (getattr(node, "_forward_cls", None) for node in nodes_of(loss))
    return [operation for operation in found if operation is not None]


def no_second_derivatives(reason: str) -> UsageError:
    """Return the error of a model that can be differentiated only once."""
    return UsageError(
        f"this model has no second derivatives ({reason}): replace that operation by one that has "
        "them, or leave out the metrics of the Hessian"
    )


def require_symmetric(
    product: Callable[[Tensor], Tensor],
    size: int,
    dtype: torch.dtype,
    shrunk: Callable[[float], AbstractContextManager[None]],
) -> None:
    """Raise UsageError if uᵀHv and vᵀHu differ for random u and v by more than rounding.

    How much rounding there is, shows in H(u + v) − Hu − Hv: a product is linear, Hessian or not.
    Where a net has learned everything, it does not show, but there is none of it at smaller
    weights, and a fault of an operation shows at all.

    Args:
        product: maps a flat vector [size] to its product.
        size: of the vectors.
        dtype: that the products are computed in.
        shrunk: multiplies the weights in its block.
    """
    u, v = (gaussian_vector(size, 0, CHECK, number).to(dtype) for number in (0, 1))
    for factor in SMALLER:
        with shrunk(factor):
            of_u, of_v, of_sum = (product(vector).double() for vector in (u, v, u + v))
        apart = abs(float(u.double() @ of_v - v.double() @ of_u))
        norms = [float(of_u.norm()), float(of_v.norm())]
        rounding = float((of_sum - of_u - of_v).norm())
        if not apart > math.sqrt(torch.finfo(dtype).eps) * sum(norms) + ROUNDING_SHARE * rounding:
            return
        found = f"{apart:.2g}, where Hu and Hv have the norms {norms[0]:.2g} and {norms[1]:.2g}"
    raise UsageError(
        "its second derivative is not symmetric, so it is no Hessian: for random u and v, uᵀHv and "
        f"vᵀHu differ by {found}; look for an operation with a backward of its own that uses "
        "detach, no_grad or .data"
    )


def require_derivative_of_gradient(
    gradient: Callable[[], Sequence[Tensor]],
    product: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    weights: Sequence[Tensor],
    operations: Sequence[Any],
) -> None:
    """Raise UsageError if products differ from finite differences of the gradient, in float64.

    An operation with a backward of its own, which detaches in it, loses a part of the Hessian, and
    the rest may be symmetric. As above, smaller weights may help.

    Args:
        gradient: returns the gradient at the current weights.
        product: maps a direction to the Hessian's product.
        weights: float64; they are moved.
        operations: the classes of the operations to blame.
    """
    aside, direction = (_gaussian(weights, purpose) for purpose in (CHECK, f"{CHECK} direction"))
    before = [w.detach().clone() for w in weights]
    for factor in SMALLER:
        start = [factor * w + ASIDE * a for w, a in zip(before, aside, strict=True)]
        copy_into(weights, start)
        exact, slope = flattened(product(direction)), float(flattened(gradient()).norm())
        errors = []
        for shift in SHIFTS:
            ends = []
            for step in (shift, -shift):
                copy_into(weights, [w + step * d for w, d in zip(start, direction, strict=True)])
                ends.append(flattened(gradient()))
            errors.append(float(((ends[0] - ends[1]) / (2 * shift) - exact).norm()))
        noise = 1e3 * torch.finfo(torch.float64).eps * slope / min(SHIFTS)
        if not min(errors) > SAME_CURVATURE * float(exact.norm()) + noise:
            return
    names = ", ".join(dict.fromkeys(operation.__name__ for operation in operations))
    raise UsageError(
        f"its second derivative is not that of the loss: it differs by {min(errors):.2g} from the "
        f"differences of gradients, of the norm {float(exact.norm()):.2g}; let the backward of "
        f"{names} be differentiable, without detach, no_grad or .data, and detach nothing before "
        "the loss"
    )


def _gaussian(like: Sequence[Tensor], purpose: str) -> list[Tensor]:
    """Return N(0, 1) numbers in the shapes of tensors, of their types and on their devices."""
    return [
        gaussian_vector(t.numel(), 0, purpose, n).view(t.shape).to(t) for n, t in enumerate(like)
    ]
