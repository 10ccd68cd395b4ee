"""Residual networks for small images (He et al. 2016, arXiv 1512.03385, section 4.2)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["identity", "projection"]


class ResNet(nn.Module):
    """A 3×3 stem and three stages of n blocks with 1, 2 and 4 times `width` filters.

    ResNet-20 with width 16 and identity shortcuts has 269,722 parameters for 10 classes, as
    published.

    Args:
        depth: 6n + 2 (8, 14, 20, 32, 44, 56, 110 …).
        width: filters of the first stage.
        classes: number of outputs.
        shortcut: how a block's input is added to an output of another shape. `identity` (the
            paper's option A, used there on CIFAR-10) subsamples and pads with zero channels,
            without parameters; `projection` (option B) is a 1×1 convolution with BatchNorm.

    Raises:
        ValueError: depth is not 6n + 2.
    """

    def __init__(
        self, depth: int, width: int, classes: int, shortcut: Shortcut = "identity"
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"a ResNet for small images has depth 6n + 2 (8, 14, 20, 32, …), not {depth}"
            )
        blocks = (depth - 2) // 6
        self.stem = conv3x3(3, width)
        self.stem_norm = nn.BatchNorm2d(width)
        stages = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(channels, width * 2**stage, stride, shortcut))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # With variance 2 / fan-in.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        # The last layer keeps PyTorch's default: with a std of 0.01 (arXiv 1706.02677, section 5.1)
        # short runs with some seeds stalled at the start; see docs/results.md.

    def forward(self, images: Tensor) -> Tensor:
        """Map images [batch, 3, height, width] to logits [batch, classes]."""
        x = F.relu(self.stem_norm(self.stem(images)), inplace=True)
        x = self.blocks(x)
        logits: Tensor = self.head(mean_over_pixels(x))
        return logits


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            if shortcut == "identity":
                self.shortcut = ZeroPaddedShortcut(stride, outputs - inputs)
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                    nn.BatchNorm2d(outputs),
                )

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, height, width] to [batch, outputs, height/stride, width/stride]."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ZeroPaddedShortcut(nn.Module):
    """Subsampled pixels and additional zero channels: a change of shape without parameters."""

    def __init__(self, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, height, width] to a smaller image with more channels."""
        # Pooling over single pixels is slicing with a gradient that stays channels-last.
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.extra_channels))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a padded 3×3 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def mean_over_pixels(x: Tensor) -> Tensor:
    """Return the mean [batch, channels] of features [batch, channels, height, width].

    Unlike that of `Tensor.mean`, its gradient stays channels-last, so the layers below need no
    change of layout.
    """
    return F.avg_pool2d(x, x.shape[2:]).flatten(1)
