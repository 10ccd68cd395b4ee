"""VGG with BatchNorm for small images (Simonyan & Zisserman 2015, arXiv 1409.1556)."""

from typing import ClassVar

from torch import Tensor, nn

from egtrain.models.resnet import conv3x3, mean_over_pixels


class VGG(nn.Module):
    """Five stages of 3×3 convolutions at 1, 2, 4, 8 and 8 times `width` filters, each with a
    max-pooling behind it.

    It is the usual form for CIFAR: BatchNorm after each convolution, and one linear layer at the
    end instead of the published three. VGG-11 at width 64 has 9,228,362 parameters for 10 classes.

    Args:
        depth: 11, the weighted layers of the published network, which has two linear layers more.
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
            # Rounding up lets images of fewer than 32x32 pixels through; larger ones are pooled as
            # in the paper.
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
