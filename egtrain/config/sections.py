"""The sections of a configuration: strict, typed and frozen, each with a sentence for every key.

Nothing here imports torch, so that a wrong option is reported at once.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Scaling = Literal["none", "layer", "filter"]
LearningRate = Annotated[
    float, Field(gt=0, description="Learning rate at a batch of base_batch_size samples.")
]
BaseBatchSize = Annotated[
    Count | None,
    Field(description="Samples in the batch that lr was chosen for; null: lr is used as it is."),
]
RateScaling = Annotated[
    Literal["none", "sqrt", "linear"],
    Field(description="How the learning rate grows from base_batch_size to the batch of the run."),
]
MomentumFactor = Annotated[float, Field(ge=0, lt=1)]
WeightDecay = Annotated[
    float, Field(ge=0, description="Factor of the weights that is added to their gradient.")
]


class Section(BaseModel):
    """A part of the configuration: unknown keys, other types and numbers that are not finite are
    refused.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def wrong(key: str, problem: str) -> PydanticCustomError:
    """Return the error of a dotted key."""
    # A plain ValueError would not tell which key to point at, and braces in values would be taken
    # for placeholders.
    return PydanticCustomError("setting", "{problem}", {"key": key, "problem": problem})


class DataConfig(Section):
    """What is trained on."""

    name: str = "cifar10"
    """synthetic (embedded, no download), or what the task reads.

    image: cifar10, cifar100 or npz:FILE (x_train, y_train, x_test, y_test); language: wikitext2 or
    text:FOLDER (train.txt, valid.txt, test.txt); translation: multi30k or pairs:FOLDER (train.en,
    train.de and so on)."""
    dir: str | None = None
    """Folder that holds the data; null: $EGTRAIN_DATA, then the user cache, then a download."""
    offline: bool = False
    """Never download."""
    train_samples: Count | None = None
    """Train on only so many samples (images, windows of text, pairs of sentences); null: all."""
    validation: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Number of training images that are held out for validation; texts have a validation part of
    their own."""


class ImageSettings(Section):
    """Image classification: cross-entropy and top-1 accuracy; a sample is an image."""

    name: Literal["image"] = "image"
    """image: classify images."""
    augment: bool = True
    """Crop and flip training images at random."""


class LanguageSettings(Section):
    """Language modelling over words: perplexity; a sample is a window of text in one of the batch's
    columns.
    """

    name: Literal["language"] = "language"
    """language: predict each word of a text from those before it."""
    bptt: Annotated[int, Field(ge=1, le=100_000)] = 30
    """Words in a window, through which gradients flow back; the hidden state goes on to the next
    window."""
    max_vocabulary: Annotated[int, Field(ge=3, le=2**31 - 1)] | None = None
    """Most different words that the training text may have; null: any number."""


class TranslationSettings(Section):
    """Translation of sentences: cross-entropy and BLEU; a sample is a pair of sentences."""

    name: Literal["translation"] = "translation"
    """translation: turn sentences of one language into those of another."""
    source: str = "en"
    """Language to translate from: the ending of its files."""
    target: str = "de"
    """Language to translate into: the ending of its files."""
    subwords: Annotated[int, Field(ge=16, le=1_000_000)] = 8000
    """Size of the subword vocabulary that both languages share, learned from the training text."""
    max_length: Annotated[int, Field(ge=2, le=100_000)] = 128
    """Most subwords that a sentence may have."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of the probability that the training loss spreads over all subwords (Szegedy et al.
    2016)."""
    beam: Annotated[int, Field(ge=1, le=1000)] = 4
    """Hypotheses that `egtrain eval` keeps for a sentence; 1 is greedy, as during training."""
    length_penalty: NotNegative = 1.0
    """Exponent of the length by which a hypothesis's log-probability is divided."""


Task = ImageSettings | LanguageSettings | TranslationSettings

DATA: dict[str, tuple[list[str], str]] = {
    "image": (["cifar10", "cifar100", "synthetic"], "npz:FILE"),
    "language": (["wikitext2", "synthetic"], "text:FOLDER"),
    "translation": (["multi30k", "synthetic"], "pairs:FOLDER"),
}
"""The data that a task reads: the names, and the form of one's own."""

MODELS: dict[str, list[str]] = {
    "image": ["resnet", "vgg"],
    "language": ["lstm"],
    "translation": ["transformer"],
}
"""The models that a task trains."""


class ResnetModel(Section):
    """The CIFAR ResNet with three stages (He et al. 2016, arXiv 1512.03385)."""

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


class VggModel(Section):
    """VGG with BatchNorm, in its form for small images (Simonyan & Zisserman 2015, arXiv
    1409.1556).
    """

    name: Literal["vgg"] = "vgg"
    """vgg: plain convolutions and max-pooling."""
    depth: Literal[11] = 11
    """Number of weighted layers of the published network."""
    width: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Channels of the first stage; the later ones have two, four, eight and eight times as many."""


class LstmModel(Section):
    """An LSTM language model with tied embeddings (Zaremba et al. 2014, arXiv 1409.2329; Press &
    Wolf 2017).
    """

    name: Literal["lstm"] = "lstm"
    """lstm: long short-term memory over words."""
    layers: Annotated[int, Field(ge=1, le=1000)] = 3
    """Number of LSTM layers."""
    width: Annotated[int, Field(ge=1, le=100_000)] = 650
    """Units of each layer, and of the embeddings."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Probability of dropping a unit before, between and after the layers."""


class TransformerModel(Section):
    """A pre-norm Transformer encoder-decoder (Vaswani et al. 2017, arXiv 1706.03762)."""

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


Model = ResnetModel | VggModel | LstmModel | TransformerModel


class _Optimizer(Section):
    lr: LearningRate = 0.1
    base_batch_size: BaseBatchSize = 64
    lr_scaling: RateScaling = "linear"
    weight_decay: WeightDecay = 1e-4
    clip_norm: Positive | None = None
    """Largest norm of the mean gradient; null: not clipped."""

    def scaled_lr(self, batch_size: int) -> float:
        """Return the peak learning rate at a batch of so many samples."""
        if self.base_batch_size is None or self.lr_scaling == "none":
            return self.lr
        growth = batch_size / self.base_batch_size
        return self.lr * (growth if self.lr_scaling == "linear" else math.sqrt(growth))


class SgdOptimizer(_Optimizer):
    """torch.optim.SGD, its rate scaled linearly with the batch (Goyal et al. 2017, arXiv
    1706.02677).
    """

    name: Literal["sgd"] = "sgd"
    """sgd: torch.optim.SGD."""
    momentum: MomentumFactor = 0.9
    """Momentum factor."""
    nesterov: bool = True
    """Nesterov momentum; without effect where momentum is 0."""


class _TrustRatio(_Optimizer):
    adapt_norm_and_bias: bool = False
    """Give normalisation parameters and biases a trust ratio too."""
    decay_norm_and_bias: bool = False
    """Let normalisation parameters and biases decay too."""


class LarsOptimizer(_TrustRatio):
    """Layer-wise adaptive rates for SGD (You et al. 2017, arXiv 1708.03888).

    As in the paper, lr is the global rate, and a layer's own is lr times its trust ratio. The
    default is SimCLR's, 0.3 for 256 samples with this trust coefficient (arXiv 2002.05709).
    """

    name: Literal["lars"] = "lars"
    """lars: SGD with a trust ratio for each layer."""
    lr: LearningRate = 0.3
    base_batch_size: BaseBatchSize = 256
    momentum: MomentumFactor = 0.9
    """Momentum factor."""
    trust_coefficient: Positive = 0.001
    """Factor of the ratio between the norm of a layer's weights and that of its gradient."""


class _Moments(_Optimizer):
    lr: LearningRate = 1e-3
    base_batch_size: BaseBatchSize = 128
    lr_scaling: RateScaling = "sqrt"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the mean of the gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of the mean of their squares."""
    eps: Positive = 1e-8
    """Added to the root of the mean of squares."""


class AdamOptimizer(_Moments):
    """torch.optim.Adam (Kingma & Ba 2015, arXiv 1412.6980), whose experiments had a rate of 0.001
    for 128 samples.

    The rate of an adaptive method grows with the root of the batch (Malladi et al. 2022, arXiv
    2205.10287).
    """

    name: Literal["adam"] = "adam"
    """adam: torch.optim.Adam."""
    weight_decay: WeightDecay = 0.0


class AdamwOptimizer(_Moments):
    """torch.optim.AdamW, with decay apart from the gradient (Loshchilov & Hutter 2019, arXiv
    1711.05101).

    The rate is Adam's, the decay PyTorch's default.
    """

    name: Literal["adamw"] = "adamw"
    """adamw: torch.optim.AdamW."""
    weight_decay: Annotated[
        float, Field(ge=0, description="Factor of the weights that is taken off at a rate of 1.")
    ] = 0.01


class LambOptimizer(_Moments, _TrustRatio):
    """Layer-wise adaptive rates for Adam (You et al. 2020, arXiv 1904.00962).

    The default rate, 0.005 for 512 samples, is the paper's for ResNet-50, as is its growth with the
    root of the batch; the decay is its BERT's.
    """

    name: Literal["lamb"] = "lamb"
    """lamb: Adam with a trust ratio for each layer."""
    lr: LearningRate = 0.005
    base_batch_size: BaseBatchSize = 512
    eps: Positive = 1e-6
    """Added to the root of the mean of squares."""
    weight_decay: Annotated[
        float, Field(ge=0, description="Factor of the weights that is added to their update.")
    ] = 0.01


Optimizer = SgdOptimizer | LarsOptimizer | LambOptimizer | AdamOptimizer | AdamwOptimizer


class ScheduleConfig(Section):
    """The learning rate over the run."""

    warmup_epochs: Annotated[float, Field(ge=0, le=1e9)] = 5.0
    """Epochs of linear warm-up; may be a fraction. Setting it sets shorten_warmup to false."""
    shorten_warmup: bool = True
    """Shorten a warm-up that does not end before the first decay and the run do, to half of that
    time; false: such a warm-up is an error."""
    warmup_from: NotNegative = 0.1
    """Learning rate at the first step; lowered to the peak where it lies above it."""
    decay: Literal["step", "cosine", "inverse-sqrt", "constant"] = "step"
    """step: times factor at each milestone; cosine: a half cosine to zero; inverse-sqrt: by the
    root of the step, after the warm-up; constant: none."""
    milestones: Annotated[tuple[float, ...], Field(strict=False)] = (0.5, 0.75)
    """Fractions of the run, increasing, each in (0, 1); used by step only."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor at each milestone; used by step only."""

    @field_validator("milestones")
    @classmethod
    def _increasing(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        pairs = zip((0.0, *milestones), (*milestones, 1.0), strict=True)
        if any(low >= high for low, high in pairs):
            raise wrong(
                "schedule.milestones",
                "schedule.milestones must be increasing fractions of the run between 0 and 1, "
                "such as [0.5, 0.75], "
                f"not {list(milestones)}",
            )
        return milestones


class NoExtrapolation(Section):
    """Plain mini-batch training."""

    name: Literal["none"] = "none"
    """none: the gradient is taken at the weights themselves."""


class _Until(Section):
    until: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the run after which there is none; null: to the end, or to the start of the local
    phase."""


class _AlongGradient(_Until):
    """The shift follows a gradient; exactly one of ratio, rate and size says how far."""

    ratio: NotNegative | Literal["1/K"] | None = None
    """Length as a ratio of the learning rate, or 1/K (K workers), which is also the default where
    scaling is none."""
    rate: NotNegative | None = None
    """Length as a learning rate of its own, instead of ratio."""
    size: NotNegative | None = None
    """Length relative to the norm of the weights; required with scaling layer or filter, instead of
    ratio."""
    scaling: Scaling = "none"
    """Scale the shift to the norm of the weights: not at all, layer by layer, or filter by
    filter."""
    precondition: Literal["base", "none"] = "base"
    """base: scale the gradient as lars, lamb, adam and adamw scale theirs; none: leave it as it
    is."""

    @model_validator(mode="before")
    @classmethod
    def _default_ratio(cls, data: Any) -> Any:
        lengths = ("ratio", "rate", "size")
        if (
            isinstance(data, dict)
            and data.get("scaling", "none") == "none"
            and all(data.get(length) is None for length in lengths)
        ):
            return {**data, "ratio": "1/K"}
        return data

    @model_validator(mode="after")
    def _exactly_one_length(self) -> "_AlongGradient":
        given = [
            length for length in ("ratio", "rate", "size") if getattr(self, length) is not None
        ]
        if self.scaling != "none" and given != ["size"]:
            surplus = next((length for length in given if length != "size"), None)
            without = f" and no extrapolation.{surplus}" if surplus else ""
            problem = f"needs extrapolation.size{without}; set"
            raise wrong(
                "extrapolation.scaling",
                f"extrapolation.scaling '{self.scaling}' {problem} it, such as 0.05",
            )
        if len(given) > 1:
            both = " and ".join(f"extrapolation.{length}" for length in given)
            raise wrong(
                f"extrapolation.{given[-1]}", f"{both} exclude each other; keep one of them"
            )
        if self.scaling == "none" and self.size is not None:
            raise wrong(
                "extrapolation.size",
                "extrapolation.size needs extrapolation.scaling layer or filter; set it, or use "
                "ratio or rate instead",
            )
        return self

    def resolved_ratio(self, workers: int) -> float | None:
        """Return the ratio as a number for K workers; None where rate or size is given instead."""
        return 1 / workers if self.ratio == "1/K" else self.ratio


class LocalExtrapolation(_AlongGradient):
    """EXTRAP-SGD (Lin et al. 2020, arXiv 2006.05720)."""

    name: Literal["local"] = "local"
    """local: along the worker's own previous gradient."""


class OptimisticExtrapolation(_AlongGradient):
    """Extrapolation from the past (Popov 1980)."""

    name: Literal["optimistic"] = "optimistic"
    """optimistic: along the previous mean gradient."""


class GradientNoiseExtrapolation(_AlongGradient):
    """After gradient noise convolution (Haruki et al. 2019, arXiv 1906.10822)."""

    name: Literal["gradient-noise"] = "gradient-noise"
    """gradient-noise: along the worker's own previous gradient less the mean one."""


class ExtragradientExtrapolation(_AlongGradient):
    """Stochastic extragradient (Korpelevich 1976)."""

    name: Literal["extragradient"] = "extragradient"
    """extragradient: along a second gradient at the unshifted weights."""
    samples: Literal["same", "new"] = "same"
    """Whether the second gradient is taken on the same samples or on new ones."""
    every: Count = 1
    """Shift on every so-many-th step only; the others are plain steps."""


class _Noise(_Until):
    size: NotNegative
    """Size of the noise; relative to the norm of the weights unless scaling is none."""
    scaling: Scaling = "filter"
    """Scale the noise to the norm of the weights: not at all, layer by layer, or filter by
    filter."""
    norm_and_bias: bool = False
    """Shift normalisation parameters and biases too."""


class GaussianExtrapolation(_Noise):
    """Isotropic smoothing."""

    name: Literal["gaussian"] = "gaussian"
    """gaussian: normal noise."""


class SmoothOutExtrapolation(_Noise):
    """SmoothOut (Wen et al. 2018, arXiv 1805.07898)."""

    name: Literal["smoothout"] = "smoothout"
    """smoothout: uniform noise."""


class SamExtrapolation(_Until):
    """Sharpness-aware minimisation, per worker (Foret et al. 2021, arXiv 2010.01412)."""

    name: Literal["sam"] = "sam"
    """sam: against the normalised gradient at the unshifted weights."""
    radius: NotNegative = 0.05
    """Length of the shift."""
    every: Count = 1
    """Shift on every so-many-th step only; the others are plain steps."""


class MsamExtrapolation(_Until):
    """MSAM (Becker et al. 2024, arXiv 2401.12033).

    The default radius is that of the authors' MSAM class; their CIFAR-100 examples, networks of
    millions of weights, take 3.
    """

    name: Literal["msam"] = "msam"
    """msam: along the normalised momentum of the base optimizer."""
    radius: NotNegative = 0.3
    """Length of the shift."""
    after_warmup: bool = True
    """No shift during the warm-up."""


Extrapolation = (
    NoExtrapolation
    | LocalExtrapolation
    | OptimisticExtrapolation
    | ExtragradientExtrapolation
    | GaussianExtrapolation
    | SmoothOutExtrapolation
    | GradientNoiseExtrapolation
    | SamExtrapolation
    | MsamExtrapolation
)


class PostLocalConfig(Section):
    """Post-local SGD (Lin et al. 2020, arXiv 1808.07217): a second phase in which weights are
    averaged.
    """

    period: Count | None = None
    """Updates H that a worker makes on its own between two averages of the weights; null: never."""
    start: Annotated[float, Field(ge=0, lt=1)] | Literal["first-decay"] = "first-decay"
    """Where it begins, as a fraction of the run, or at the first milestone of the schedule."""


class CheckpointConfig(Section):
    """When the run is saved."""

    every: Count | None = None
    """Steps between checkpoints; null: at every evaluated epoch."""
    keep: Literal["last", "all"] = "last"
    """last: the last two, the best and the final one; all: every one."""


class LogConfig(Section):
    """What is written down."""

    every: Count = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard files too."""
