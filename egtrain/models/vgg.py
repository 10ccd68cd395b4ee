"""VGG with BatchNorm for small images (Simonyan & Zisserman 2015, arXiv 1409.1556)."""

from typing import ClassVar

from torch import Tensor, nn

from egtrain.models.resnet import conv3x3, mean_over_pixels


class VGG(nn.Module):
    """Five stages of 3×3 convolutions with 1, 2, 4, 8 and 8 times `width` filters.

    Each stage ends with max-pooling. As usual for CIFAR there is BatchNorm after each convolution,
    and one linear layer at the end instead of the published three. VGG-11 with width 64 has
    9,228,362 parameters for 10 classes.

    Args:
        depth: 11, the number of weight layers as published, with three linear layers.
        width: filters of the first stage.
        classes: number of outputs.

    Raises:
        ValueError: another depth.
    """

    stages: ClassVar[dict[int, tuple[int, ...]]] = {11: (1, 1, 2, 2, 2)}
    """Convolutions of each stage, by depth."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        if depth not in self.stages:
            raise ValueError(f"VGG has depth {', '.join(map(str, self.stages))}, not {depth}")
        layers: list[nn.Module] = []
        channels = 3
        for convolutions, multiple in zip(self.stages[depth], (1, 2, 4, 8, 8), strict=True):
            for _ in range(convolutions):
                outputs = width * multiple
                layers += [
                    conv3x3(channels, outputs),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                ]
                channels = outputs
            # Rounding up allows images smaller than 32x32; the pooling of larger ones is unchanged.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images [batch, 3, height, width] to logits [batch, classes]."""
        logits: Tensor = self.head(mean_over_pixels(self.features(images)))
        return logits
