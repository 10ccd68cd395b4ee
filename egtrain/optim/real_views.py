"""Complex tensors as pairs of real numbers, which is what torch's optimizers treat them as."""

from torch import Tensor, view_as_complex, view_as_real


def real_view(tensor: Tensor) -> Tensor:
    """Return a view of a complex tensor [...] as a real one [..., 2]; a real one as it is."""
    if not tensor.is_complex():
        return tensor
    return view_as_real(tensor.resolve_conj())


def complex_view(tensor: Tensor, like: Tensor) -> Tensor:
    """Return what `real_view` made of a tensor of the type of `like` in that type again."""
    return view_as_complex(tensor) if like.is_complex() else tensor
