"""The section `extrapolation`: where the gradient is taken."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from egtrain.config.section import Count, NotNegative, Section, wrong

Scaling = Literal["none", "layer", "filter"]

LENGTHS = ("ratio", "rate", "size")
"""Keys that say how far a shift along a gradient goes; exactly one of them is given."""


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
        if (
            isinstance(data, dict)
            and data.get("scaling", "none") == "none"
            and all(data.get(length) is None for length in LENGTHS)
        ):
            return {**data, "ratio": "1/K"}
        return data

    @model_validator(mode="after")
    def _exactly_one_length(self) -> "_AlongGradient":
        given = [length for length in LENGTHS if getattr(self, length) is not None]
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


def length_key(extrapolation: Extrapolation) -> str | None:
    """Return the key that says how far the shift goes; None without extrapolation."""
    keys = (*LENGTHS, "radius")
    return next((key for key in keys if getattr(extrapolation, key, None) is not None), None)
