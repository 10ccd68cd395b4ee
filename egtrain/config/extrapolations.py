"""The section `extrapolation`: where the gradient is taken; one table row per choice of ζ."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Field, create_model, model_validator

from egtrain.config.section import Count, NotNegative, Section, wrong

Scaling = Literal["none", "layer", "filter"]

LENGTHS = ("ratio", "rate", "size")
"""Keys for the length of a shift along a gradient; exactly one of them is given."""


class Extrapolation(Section):
    """What every choice of ζ has; by itself, plain mini-batch training."""

    name: str = "none"

    momentum_of: ClassVar[tuple[str, ...]] = ()
    """Base optimizers whose momentum it follows; it needs one of them, without look-ahead.
    Empty: it works with every base."""

    @property
    def new_samples(self) -> bool:
        """Whether there is a second gradient, on other samples than the first."""
        return False

    def steps(self, total: int, warmup_steps: int, local_start: float | None) -> range:
        """Return the steps of a run that shift the weights.

        Args:
            total: steps of the run.
            warmup_steps: those of the warm-up.
            local_start: the fraction of the run at which a local phase begins.
        """
        return range(0)

    def settings(self, workers: int) -> dict[str, Any]:
        """Return the settings of the direction for K workers."""
        return self.model_dump(exclude={"name", "until", "every", "samples", "after_warmup"})


class Shift(Extrapolation):
    """Keys of every choice of ζ that is one."""

    until: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the run after which there is none; null: to the end, or to the start of the local
    phase."""

    def steps(self, total: int, warmup_steps: int, local_start: float | None) -> range:
        """Return the steps of a run that shift the weights."""
        until = min(end for end in (1.0, self.until, local_start) if end is not None)
        return range(round(until * total))


class TwoGradients(Shift):
    """Keys of every shift that takes a second gradient in the same step."""

    every: Count = 1
    """Steps from one shift to the next; the others are plain steps."""

    def steps(self, total: int, warmup_steps: int, local_start: float | None) -> range:
        """Return the steps of a run that shift the weights."""
        return super().steps(total, warmup_steps, local_start)[:: self.every]


class AlongGradient(Shift):
    """The shift follows a gradient; exactly one of ratio, rate and size says how far."""

    ratio: NotNegative | Literal["1/K"] | None = None
    """Length as a ratio of the learning rate, or 1/K (K workers), which is also the default where
    scaling is none."""
    rate: NotNegative | None = None
    """Length as a learning rate, instead of ratio."""
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
    def _exactly_one_length(self) -> "AlongGradient":
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

    def settings(self, workers: int) -> dict[str, Any]:
        """Return the settings of the direction for K workers."""
        ratio = 1 / workers if self.ratio == "1/K" else self.ratio
        return {**super().settings(workers), "ratio": ratio}


class AlongSecondGradient(TwoGradients, AlongGradient):
    """The gradient is a second one of the same step."""

    samples: Literal["same", "new"] = "same"
    """Whether the second gradient is taken on the same samples or on new ones."""

    @property
    def new_samples(self) -> bool:
        """Whether the second gradient is on other samples than the first."""
        return self.samples == "new"


class Noise(Shift):
    """The shift is drawn at random."""

    size: NotNegative
    """Size of the noise; relative to the norm of the weights unless scaling is none."""
    scaling: Scaling = "filter"
    """Scale the noise to the norm of the weights: not at all, layer by layer, or filter by
    filter."""
    norm_and_bias: bool = False
    """Shift normalisation parameters and biases too."""


class AgainstSecondGradient(TwoGradients):
    """The shift goes uphill, by a fixed length."""

    radius: NotNegative = 0.05
    """Length of the shift."""


class AlongMomentum(Shift):
    """The shift follows the momentum of SGD."""

    momentum_of: ClassVar[tuple[str, ...]] = ("sgd",)


class AlongNormalisedMomentum(AlongMomentum):
    """The shift follows the momentum of any base that has one, by a fixed length.

    The default radius is that of the MSAM class of its authors; their CIFAR-100 examples, networks
    of millions of weights, take 3.
    """

    momentum_of: ClassVar[tuple[str, ...]] = ("sgd", "lars", "lamb", "adam", "adamw")

    radius: NotNegative = 0.3
    """Length of the shift."""
    after_warmup: bool = True
    """No shift during the warm-up."""

    def steps(self, total: int, warmup_steps: int, local_start: float | None) -> range:
        """Return the steps of a run that shift the weights."""
        steps = super().steps(total, warmup_steps, local_start)
        return steps[warmup_steps:] if self.after_warmup else steps


@dataclass(frozen=True)
class Row:
    """A choice of ζ."""

    name: str
    direction: str | None
    """The class in `egtrain/optim/directions/<name>.py`, whose arguments are the section's keys;
    None where the gradient is taken at the weights themselves."""
    keys: type[Extrapolation]
    says: str
    source: str

    def section(self) -> type[Extrapolation]:
        """Return the section of this name: the row's keys."""
        only_this: Any = Literal[self.name]
        description = f"{self.name}: {self.says}."
        return create_model(
            f"{self.direction or 'No'}Extrapolation",
            __base__=self.keys,
            __doc__=self.source,
            name=(only_this, Field(default=self.name, description=description)),
        )


# fmt: off
ROWS = (
    Row("none", None, Extrapolation,
        "the gradient is taken at the weights themselves",
        "Plain mini-batch training."),
    Row("local", "LocalGradient", AlongGradient,
        "along the worker's previous gradient",
        "EXTRAP-SGD (Lin et al. 2020, arXiv 2006.05720)."),
    Row("optimistic", "OptimisticGradient", AlongGradient,
        "along the previous mean gradient",
        "Extrapolation from the past (Popov 1980)."),
    Row("gradient-noise", "GradientNoise", AlongGradient,
        "along the worker's previous gradient less the mean one",
        "After gradient noise convolution (Haruki et al. 2019, arXiv 1906.10822)."),
    Row("gaussian", "GaussianNoise", Noise,
        "normal noise",
        "Isotropic smoothing."),
    Row("smoothout", "SmoothOut", Noise,
        "uniform noise",
        "SmoothOut (Wen et al. 2018, arXiv 1805.07898)."),
    Row("extragradient", "Extragradient", AlongSecondGradient,
        "along a second gradient at the unshifted weights",
        "Stochastic extragradient (Korpelevich 1976)."),
    Row("sam", "SAM", AgainstSecondGradient,
        "against the normalised gradient at the unshifted weights",
        "Sharpness-aware minimisation, per worker (Foret et al. 2021, arXiv 2010.01412)."),
    Row("msam", "MSAM", AlongNormalisedMomentum,
        "along the normalised momentum of the base optimizer",
        "MSAM (Becker et al. 2024, arXiv 2401.12033)."),
    Row("nesterov", "Nesterov", AlongMomentum,
        "along the momentum of SGD, as far as that alone goes",
        "Nesterov's look-ahead (Nesterov 1983)."),
)
# fmt: on
"""Every choice of ζ. How many gradients a step it takes is said by the direction itself."""

SECTIONS: dict[str, type[Extrapolation]] = {row.name: row.section() for row in ROWS}
DIRECTIONS: dict[str, str | None] = {row.name: row.direction for row in ROWS}

if TYPE_CHECKING:
    AnyExtrapolation = Extrapolation
else:
    AnyExtrapolation = Union[tuple(SECTIONS.values())]  # noqa: UP007 - made from the table


def length_key(extrapolation: Extrapolation) -> str | None:
    """Return the key that says how far the shift goes; None without extrapolation."""
    keys = (*LENGTHS, "radius")
    return next((key for key in keys if getattr(extrapolation, key, None) is not None), None)
