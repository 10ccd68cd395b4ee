"""Residual networks for larger images (He et al. 2016, arXiv 1512.03385, table 1)."""

import torch.nn.functional as F
from torch import Tensor, nn

from egtrain.models.resnet import conv3x3, mean_over_pixels

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Blocks of the four stages, by depth."""


class ImagenetResNet(nn.Module):
    """A 7×7 stem with max-pooling and four stages; images are 32 times larger than its last maps.

    With width 64 and 1,000 classes, depth 18 has 11,689,512 parameters, 34 has 21,797,672 and 50
    has 25,557,032. Depth 50 has bottleneck blocks, which halve the size in their 3×3 convolution
    (the form v1.5 of common implementations; in the paper it is the first 1×1).

    Args:
        depth: 18, 34 or 50.
        width: filters of the first stage; the later ones have two, four and eight times as many.
        classes: number of outputs.

    Raises:
        ValueError: another depth.
    """

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"a ResNet for larger images has depth 18, 34 or 50, not {depth}")
        block = Bottleneck if depth >= 50 else TwoConvolutions
        self.stem = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(BLOCKS[depth]):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                stages.append(block(channels, width * 2**stage, stride))
                channels = width * 2**stage * block.expansion
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images [batch, 3, height, width] to logits [batch, classes]."""
        x = F.relu(self.stem_norm(self.stem(images)), inplace=True)
        x = self.blocks(F.max_pool2d(x, 3, stride=2, padding=1))
        logits: Tensor = self.head(mean_over_pixels(x))
        return logits


class TwoConvolutions(nn.Module):
    """Two 3×3 convolutions with BatchNorm and a shortcut around them."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, height, width] to [batch, width, height/stride, width/stride]."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """A 1×1, a 3×3 and a widening 1×1 convolution with BatchNorm, and a shortcut around them."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, height, width] to [batch, 4·width, height/stride, width/stride]."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x), inplace=True)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return the identity, or a 1×1 convolution with BatchNorm where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
    )
