"""Blocks after which a model and torch's settings are exactly as before, even after an error."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

WEIGHT_NORM = ("torch", "torch.nn.utils.weight_norm")
"""Modules in which weight normalisation, the new one and the old, finds its kernel."""


@contextmanager
def weights_kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Restore the weights, bit for bit, at the end of the block."""
    kept = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        copy_into(parameters, kept)


@contextmanager
def held_in_type(
    model: nn.Module, type_of: Callable[[torch.dtype], torch.dtype]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let the model compute with copies of its weights and buffers of another type in the block.

    The weights and buffers themselves are untouched, and in the model again at the end.

    Args:
        model: tied weights stay tied.
        type_of: maps the type of a tensor to that of its copy; the same type makes no copy.

    Yields:
        A function that maps each weight to what stands for it in the block.
    """
    copies: dict[Tensor, Tensor] = {}
    replaced: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and type_of(tensor.dtype) != tensor.dtype:
                if tensor not in copies:
                    copy = tensor.detach().to(type_of(tensor.dtype))
                    is_weight = isinstance(tensor, nn.Parameter)
                    copies[tensor] = (
                        nn.Parameter(copy, requires_grad=tensor.requires_grad)
                        if is_weight
                        else copy
                    )
                replaced.append((module, name, tensor))
    try:
        # By the module's own way: recurrent networks keep a list of their weights.
        for module, name, tensor in replaced:
            setattr(module, name, copies[tensor])
        yield lambda tensor: copies.get(tensor, tensor)
    finally:
        for module, name, tensor in replaced:
            setattr(module, name, tensor)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the model's buffers, bit for bit and as the same tensors, at the end of the block."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in kept:
            with torch.no_grad():
                buffer.copy_(values)
            module._buffers[name] = buffer


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; restore each module's mode at the end of the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def twice_differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Use full float32 precision, and kernels that can be differentiated twice, inside the block.

    Fused attention kernels and cuDNN's recurrent networks are therefore turned off, and so is the
    kernel of weight normalisation, whose second derivative takes the norm for a constant. What is
    compiled runs as it was written.
    """
    backends: Any = torch.backends
    precisions = (
        *(backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
        *(backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn),
    )
    with ExitStack() as stack:
        for place in precisions:
            stack.enter_context(_with_attribute(place, "fp32_precision", "ieee"))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_with_attribute(backends.cudnn, "enabled", False))
        for place in WEIGHT_NORM:
            module = import_module(place)
            stack.enter_context(_with_attribute(module, "_weight_norm", _weight_norm))
        if "torch._dynamo" in sys.modules:  # slow to import, and imported by whoever compiles
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Without gradients, nn.MultiheadAttention's fast path would round differently.
        fast = backends.mha.get_fastpath_enabled()
        stack.callback(backends.mha.set_fastpath_enabled, fast)
        backends.mha.set_fastpath_enabled(False)
        yield


def _weight_norm(direction: Tensor, norm: Tensor, dim: int = 0) -> Tensor:
    """Return g·v/‖v‖, from operations that can be differentiated twice."""
    return direction * (norm / torch.norm_except_dim(direction, 2, dim))


@contextmanager
def _with_attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def copy_into(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into the parameters, in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
