from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from egtrain.models.resnet import ResNet, Shortcut
from egtrain.models.vgg import VGG


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet_20_is_the_published_network() -> None:
    """The paper rounds to 0.27 million; this is its network's exact count for ten classes."""
    assert size(ResNet(20, 16, 10)) == 269_722


def test_projection_adds_two_convolutions_with_their_norms() -> None:
    # 1x1 from 16 to 32 and from 32 to 64 channels, and scale and shift of as many outputs
    assert (
        size(ResNet(20, 16, 10, "projection"))
        == 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64)
        == 272_474
    )


@pytest.mark.parametrize(("depth", "millions"), [(32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_the_deeper_networks_have_the_published_sizes(depth: int, millions: float) -> None:
    assert size(ResNet(depth, 16, 10)) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_depth_counts_the_weighted_layers(depth: int) -> None:
    layers = [
        module
        for module in ResNet(depth, 4, 10).modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    assert len(layers) == depth


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_convolutions_start_with_a_variance_of_two_over_their_fan_in(shortcut: Shortcut) -> None:
    """He et al. 2015, arXiv 1502.01852, eq. 10; fan-out would differ where channels double."""
    torch.manual_seed(0)
    for name, module in ResNet(8, 32, 10, shortcut).named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1), name


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 9, 19, 21, 51])
def test_another_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth 6n \+ 2 \(8, 14, 20, 32, …\), not {depth}$"):
        ResNet(depth, 4, 10)


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("height", [8, 15, 32])
def test_images_of_any_size_become_logits_and_everything_learns(
    shortcut: Shortcut, height: int
) -> None:
    torch.manual_seed(0)
    model = ResNet(8, 4, 7, shortcut)
    logits = model(torch.randn(3, 3, height, height))
    assert logits.shape == (3, 7)
    logits.logsumexp(dim=1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_shape_shrinks_by_four_and_the_channels_grow_by_four() -> None:
    model = ResNet(14, 4, 10)
    assert model.blocks(torch.randn(2, 4, 32, 32)).shape == (2, 16, 8, 8)


def test_the_identity_shortcut_takes_every_second_pixel_and_adds_zero_channels() -> None:
    model = ResNet(8, 4, 10)
    shortcut = model.blocks[1].shortcut
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(shortcut(x)[:, :4], x[:, :, ::2, ::2])
    assert torch.equal(shortcut(x)[:, 4:], torch.zeros(2, 4, 4, 4))


class ActivationGradients(TorchDispatchMode):
    """Collects the operands of every ReLU's backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.threshold_backward.default:
            self.operands += args[:2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("model", "activations"),
    [(ResNet(8, 8, 10), 7), (ResNet(8, 8, 10, "projection"), 7), (VGG(11, 8, 10), 8)],
    ids=["identity", "projection", "vgg"],
)
def test_gradients_stay_channels_last_on_their_whole_way_back(
    model: nn.Module, activations: int
) -> None:
    """A gradient in another layout than its activation's takes ReLU ten times as long."""
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    logits = model(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last))
    with ActivationGradients() as seen:
        logits.logsumexp(dim=1).sum().backward()
    assert len(seen.operands) == 2 * activations
    for operand in seen.operands:
        assert operand.is_contiguous(memory_format=torch.channels_last)


def test_images_of_a_batch_do_not_mix_in_evaluation() -> None:
    torch.manual_seed(0)
    model = ResNet(8, 4, 10).eval()
    images = torch.randn(4, 3, 16, 16)
    together = model(images)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), together)
