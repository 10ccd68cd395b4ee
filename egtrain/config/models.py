"""The section `model`: each network's settings, its task and its name."""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from egtrain.config.section import Section, wrong
from egtrain.formatting import counted


class ResnetModel(Section):
    """The CIFAR ResNet with three stages (He et al. 2016, arXiv 1512.03385)."""

    task: ClassVar[str] = "image"

    name: Literal["resnet"] = "resnet"
    """resnet: a residual network."""
    depth: Annotated[int, Field(ge=8, le=10_000)] = 20
    """Number of weighted layers, 6n + 2: 8, 14, 20, 32, 44, 56, 110."""
    width: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Channels of the first stage; the second has twice and the third four times as many."""
    shortcut: Literal["identity", "projection"] = "identity"
    """Shortcut where the shape changes: identity pads with zeros, projection is a 1x1
    convolution."""

    @field_validator("depth")
    @classmethod
    def _six_n_plus_two(cls, depth: int) -> int:
        if depth % 6 != 2:
            below = max(8, depth - (depth - 2) % 6)
            raise wrong(
                "model.depth",
                f"model.depth must be 6n + 2, such as {below} or {below + 6}, not {depth}",
            )
        return depth

    def text(self) -> str:
        """Return how people call the network."""
        return f"ResNet-{self.depth}"


class ImagenetResnetModel(Section):
    """The ResNet with four stages for larger images (He et al. 2016, arXiv 1512.03385)."""

    task: ClassVar[str] = "image"

    name: Literal["imagenet-resnet"] = "imagenet-resnet"
    """imagenet-resnet: a residual network for images of about 224 pixels."""
    depth: Literal[18, 34, 50] = 50
    """Number of weighted layers."""
    width: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Channels of the first stage; the later ones have two, four and eight times as many."""

    def text(self) -> str:
        """Return how people call the network."""
        return f"ResNet-{self.depth} for larger images"


class VggModel(Section):
    """VGG with BatchNorm for small images (Simonyan & Zisserman 2015, arXiv 1409.1556)."""

    task: ClassVar[str] = "image"

    name: Literal["vgg"] = "vgg"
    """vgg: plain convolutions and max-pooling."""
    depth: Literal[11] = 11
    """Number of weighted layers of the published network."""
    width: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Channels of the first stage; the later ones have two, four, eight and eight times as many."""

    def text(self) -> str:
        """Return how people call the network."""
        return f"VGG-{self.depth} with BatchNorm"


class LstmModel(Section):
    """An LSTM language model with tied embeddings (Zaremba et al. 2014, arXiv 1409.2329; Press &
    Wolf 2017).
    """

    task: ClassVar[str] = "language"

    name: Literal["lstm"] = "lstm"
    """lstm: long short-term memory over words."""
    layers: Annotated[int, Field(ge=1, le=1000)] = 3
    """Number of LSTM layers."""
    width: Annotated[int, Field(ge=1, le=100_000)] = 650
    """Units of each layer, and of the embeddings."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Probability of dropping a unit before, between and after the layers."""

    def text(self) -> str:
        """Return how people call the network."""
        return f"LSTM of {counted(self.layers, 'layer')}"


class TransformerModel(Section):
    """A pre-norm Transformer encoder-decoder (Vaswani et al. 2017, arXiv 1706.03762)."""

    task: ClassVar[str] = "translation"

    name: Literal["transformer"] = "transformer"
    """transformer: attention in an encoder and a decoder."""
    layers: Annotated[int, Field(ge=1, le=1000)] = 3
    """Layers of the encoder, and of the decoder."""
    width: Annotated[int, Field(ge=2, le=100_000)] = 256
    """Units of a token between the layers; a multiple of heads."""
    heads: Annotated[int, Field(ge=1, le=1000)] = 4
    """Heads of each attention."""
    feedforward: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Units inside a feed-forward layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability of dropping a unit of an embedding or of a layer's output."""

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> "TransformerModel":
        if self.width % (2 * self.heads):
            # Positions are sines and cosines in pairs.
            raise wrong(
                "model.width",
                "model.width must be a multiple of twice model.heads, such as "
                f"{2 * self.heads * 8}, not {self.width}",
            )
        return self

    def text(self) -> str:
        """Return how people call the network."""
        return f"Transformer of {self.layers} + {self.layers} layers"


class UserModel(Section):
    """The network of a task file, which is what its model() returns."""

    task: ClassVar[str] = "user"

    name: Literal["user"] = "user"
    """user: model() of the task file, whose settings are keys of task."""

    def text(self) -> str:
        """Return how people call the network."""
        return "model()"


Model = ResnetModel | ImagenetResnetModel | VggModel | LstmModel | TransformerModel | UserModel


def models_of(task: str) -> list[str]:
    """Return the names of the models that a task trains."""
    return [model.model_fields["name"].default for model in get_args(Model) if model.task == task]
