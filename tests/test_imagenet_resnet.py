"""The ResNets for larger images have the published sizes and shapes."""

import pytest
import torch

from egtrain.build import build_model
from egtrain.config.files import load_config
from egtrain.models.imagenet_resnet import ImagenetResNet


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_parameter_counts_are_the_published_ones(depth: int, count: int) -> None:
    with torch.device("meta"):
        model = ImagenetResNet(depth, 64, 1000)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("depth", [18, 50])
def test_an_image_is_halved_five_times(depth: int) -> None:
    model = ImagenetResNet(depth, 4, 10)
    shapes = []
    model.blocks.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape)))
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 10)
    assert shapes == [(2, 4 * 8 * (4 if depth == 50 else 1), 2, 3)]


def test_the_gradient_reaches_every_parameter_and_stays_channels_last() -> None:
    config = load_config("resnet-eg", ["model.name=imagenet-resnet", "model.width=2"])
    model = build_model(config, 10, torch.device("cpu"))
    model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert p.grad.abs().sum() > 0, name
        if p.ndim == 4 and min(p.shape[:2]) > 1 and p.shape[2] > 1:
            assert p.grad.is_contiguous(memory_format=torch.channels_last), name


def test_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="18, 34 or 50, not 20"):
        ImagenetResNet(20, 64, 10)
