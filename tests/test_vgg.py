from pathlib import Path

import pytest
import torch
from helpers import config_of, outcome, run_here
from torch import nn

from egtrain.errors import InterruptedRun
from egtrain.models.vgg import VGG


def test_vgg_11_is_the_published_network_with_one_linear_layer() -> None:
    model = VGG(11, 64, 10)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 256, 512, 512, 512, 512]
    assert all(layer.kernel_size == (3, 3) and layer.bias is None for layer in convolutions)
    # 9 weights a pair of channels, scale and shift a channel, and the classifier for ten classes
    pairs = 3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 3 * 512 * 512
    channels = 64 + 128 + 2 * 256 + 4 * 512
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == 9 * pairs + 2 * channels + 512 * 10 + 10 == 9_228_362


@pytest.mark.parametrize("depth", [0, 8, 13, 20])
def test_another_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^VGG has depth 11, not {depth}$"):
        VGG(depth, 4, 10)


@pytest.mark.parametrize("height", [8, 16, 28, 32, 40])
def test_images_of_any_size_become_logits_and_everything_learns(height: int) -> None:
    torch.manual_seed(0)
    model = VGG(11, 4, 7)
    logits = model(torch.randn(4, 3, height, height))
    assert logits.shape == (4, 7)
    logits.logsumexp(dim=1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_five_poolings_leave_one_pixel_of_a_cifar_image() -> None:
    model = VGG(11, 2, 10)
    assert model.features(torch.randn(2, 3, 32, 32)).shape == (2, 16, 1, 1)
    assert sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) == 5


def test_convolutions_start_with_he_weights() -> None:
    torch.manual_seed(0)
    model = VGG(11, 64, 10)
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(
                (2 / (9 * module.in_channels)) ** 0.5, rel=0.1
            )


def test_images_of_a_batch_do_not_mix_in_evaluation() -> None:
    torch.manual_seed(0)
    model = VGG(11, 4, 10).eval()
    images = torch.randn(4, 3, 32, 32)
    together = model(images)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), together)


def test_gradients_under_bf16_autocast_are_near_those_in_fp32() -> None:
    torch.manual_seed(0)
    model, images = VGG(11, 8, 10), torch.randn(8, 3, 32, 32)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(images).logsumexp(dim=1).mean()
        loss.backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert gradients[1].dtype == torch.float32
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_workers_train_it_and_resume_it(precision: str, images: Path, tmp_path: Path) -> None:
    model = [
        "model.name=vgg",
        "model.depth=11",
        "model.width=2",
        "steps=3",
        f"precision={precision}",
    ]
    config = config_of(images, *model)
    undisturbed = outcome(run_here(tmp_path / "whole", config))
    assert all(line["loss"] < 10 for line in undisturbed["metrics"])
    with pytest.raises(InterruptedRun):
        run_here(tmp_path / "parts", config, stop_after=2)
    assert outcome(run_here(tmp_path / "parts", config, resume=True)) == undisturbed
