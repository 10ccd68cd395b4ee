"""The sections `schedule` and `post_local`: what changes during a run."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from egtrain.config.section import Count, NotNegative, Section, wrong


class ScheduleConfig(Section):
    """The learning rate over the run."""

    warmup_epochs: Annotated[float, Field(ge=0, le=1e9)] = 5.0
    """Epochs of linear warm-up; may be a fraction. Setting it sets shorten_warmup to false."""
    shorten_warmup: bool = True
    """Shorten a warm-up that does not end before the first decay and the run, to half of that
    time; false: such a warm-up is an error."""
    warmup_from: NotNegative = 0.1
    """Learning rate at the first step; lowered to the peak if above it."""
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
                "schedule.milestones must be increasing fractions of the run between 0 and 1, such "
                f"as [0.5, 0.75], not {list(milestones)}",
            )
        return milestones


class PostLocalConfig(Section):
    """Post-local SGD (Lin et al. 2020, arXiv 1808.07217): a last phase that averages weights."""

    period: Count | None = None
    """Local updates H of a worker between two averages of the weights; null: no local phase."""
    start: Annotated[float, Field(ge=0, lt=1)] | Literal["first-decay"] = "first-decay"
    """Where it begins, as a fraction of the run, or at the first milestone of the schedule."""
