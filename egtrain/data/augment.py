"""Augmentation of whole mini-batches of images, and the step from bytes to network input."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def random_crop_flip(images: Tensor, generator: torch.Generator, padding: int) -> Tensor:
    """Shift each image by up to `padding` pixels each way over a black border; mirror half of them.

    `images` is uint8 `[batch, height, width, channels]`; the result is a new tensor of the same
    shape, type and device. All choices come from `generator`, first the shifts and then the flips;
    it may be on another device than the images. This is the augmentation of He et al. 2016 (arXiv
    1512.03385) for ResNets on CIFAR.
    """
    batch, height, width, channels = images.shape
    shifts = torch.randint(
        0, 2 * padding + 1, (2, batch), generator=generator, device=generator.device
    )
    mirror = torch.randint(0, 2, (batch,), generator=generator, device=generator.device)
    top, left = shifts.to(images.device, non_blocking=True)
    mirror = mirror.to(images.device, non_blocking=True)

    # One canvas holds both versions of each image, so crop and flip are one gather of whole rows.
    canvas = images.new_zeros(batch, 2, height + 2 * padding, width + 2 * padding, channels)
    inside = canvas[:, :, padding : padding + height, padding : padding + width]
    inside[:, 0] = images
    inside[:, 1] = images.flip(2)
    image_stride, version_stride, row_stride, pixel_stride, _ = canvas.stride()
    windows = canvas.as_strided(
        (batch, 2, 2 * padding + 1, 2 * padding + 1, height, width * channels),
        (image_stride, version_stride, row_stride, pixel_stride, row_stride, 1),
    )
    picked = windows[torch.arange(batch, device=images.device), mirror, top, left]
    return picked.view(batch, height, width, channels)


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], channels_last: bool
) -> Tensor:
    """Turn bytes into standardised network input: `(pixel / 255 - mean) / std`, channel by channel.

    `images` is uint8 `[batch, height, width, channels]`, the result float32 `[batch, channels,
    height, width]`. With `channels_last` it keeps the images' memory order; otherwise it is copied
    to channels first.
    """
    batch, height, width, channels = images.shape
    offset, scale = _per_row(tuple(mean), tuple(std), width, images.device)
    # In rows of width * channels: three channels alone are too few for a CPU's vector instructions.
    rows = images.reshape(batch * height, width * channels).to(torch.float32)
    scaled = rows.sub_(offset).mul_(scale).view(batch, height, width, channels).permute(0, 3, 1, 2)
    return scaled.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@lru_cache(maxsize=16)
def _per_row(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    # Cached: a copy from the host in each step would stall a GPU, and no CUDA graph can hold it.
    offset = torch.tensor(mean, dtype=torch.float64).mul(255)
    scale = torch.tensor(std, dtype=torch.float64).mul(255).reciprocal()
    return (
        offset.to(device, torch.float32).repeat(width),
        scale.to(device, torch.float32).repeat(width),
    )
