"""The section `optimizer`: the base optimizers, and how their rates grow with the batch."""

from typing import Annotated, Literal

from pydantic import Field

from egtrain.config.rate_scaling import scaled_rate
from egtrain.config.section import Count, Positive, Section

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


class _Optimizer(Section):
    lr: LearningRate = 0.1
    base_batch_size: BaseBatchSize = 64
    lr_scaling: RateScaling = "linear"
    weight_decay: WeightDecay = 1e-4
    clip_norm: Positive | None = None
    """Largest norm of the mean gradient; null: not clipped."""

    def scaled_lr(self, batch_size: int) -> float:
        """Return the peak learning rate at a batch of `batch_size` samples."""
        return scaled_rate(self.lr, self.base_batch_size, self.lr_scaling, batch_size)


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

    As in the paper, lr is the global rate; a layer's rate is lr times its trust ratio. The default
    is SimCLR's, 0.3 for 256 samples with this trust coefficient (arXiv 2002.05709).
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

    The default rate, 0.005 for 512 samples, and its growth with the root of the batch are the
    paper's for ResNet-50; the decay is that for BERT.
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
