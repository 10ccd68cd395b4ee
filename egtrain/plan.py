"""The steps and rates of a configuration on given data."""

from dataclasses import dataclass

from egtrain.config.schema import Config
from egtrain.errors import UsageError
from egtrain.formatting import counted
from egtrain.optim import schedules


@dataclass(frozen=True)
class Plan:
    """The numbers of steps of a run, and its learning rate at the peak."""

    steps_per_epoch: int
    steps: int
    warmup_steps: int
    milestones: tuple[int, ...]
    peak_rate: float
    local_start: int | None
    """Updates before the local phase; None where there is none."""
    extrapolated_steps: range
    """The steps that shift the weights; empty without extrapolation."""

    @property
    def first_fall(self) -> int:
        """The step at which the learning rate first falls, or the end of the run."""
        return min(self.milestones, default=self.steps)

    @property
    def end_of_peak(self) -> str:
        """What ends the peak rate, for messages."""
        if self.first_fall == self.steps:
            return f"the run ends at step {self.steps:,}"
        return f"the rate falls at step {self.first_fall:,} of {self.steps:,}"

    @property
    def warmup_fits(self) -> bool:
        """Whether warm-up ends before the first decay and the end, so that there is a peak."""
        return self.warmup_steps < self.first_fall


def build_plan(config: Config, steps_per_epoch: int) -> Plan:
    """Return the steps and rates for an epoch of `steps_per_epoch` updates."""
    steps = config.steps if config.steps is not None else config.epochs * steps_per_epoch
    warmup_steps = round(config.schedule.warmup_epochs * steps_per_epoch)
    # At least one step at the peak rate, however short the run is.
    milestones = (
        tuple(max(1, round(m * steps)) for m in config.schedule.milestones)
        if config.schedule.decay == "step"
        else ()
    )
    local_start = config.local_start_fraction()
    return Plan(
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        warmup_steps=warmup_steps,
        milestones=milestones,
        peak_rate=config.optimizer.scaled_lr(config.batch_size),
        local_start=None if local_start is None else round(local_start * steps),
        extrapolated_steps=config.extrapolation.steps(steps, warmup_steps, local_start),
    )


def build_schedule(config: Config, plan: Plan) -> schedules.Schedule:
    """Return the learning rate as a function of the step."""
    if config.schedule.decay == "step":
        schedule = schedules.step_decay(plan.peak_rate, plan.milestones, config.schedule.factor)
    elif config.schedule.decay == "cosine":
        schedule = schedules.cosine_decay(plan.peak_rate, plan.warmup_steps, plan.steps)
    elif config.schedule.decay == "inverse-sqrt":
        schedule = schedules.inverse_sqrt(plan.peak_rate, plan.warmup_steps)
    else:
        schedule = schedules.constant(plan.peak_rate)
    return schedules.with_warmup(schedule, plan.warmup_steps, config.schedule.warmup_from)


def with_fitting_warmup(config: Config, steps_per_epoch: int) -> Config:
    """Return the configuration with a warm-up that ends before the first decay and the run.

    A longer warm-up is shortened to half of that time, if allowed.

    Raises:
        UsageError: it does not fit, and `schedule.shorten_warmup` is false.
    """
    plan = build_plan(config, steps_per_epoch)
    if plan.warmup_fits:
        return config
    if not config.schedule.shorten_warmup:
        raise UsageError(
            f"schedule.warmup_epochs {config.schedule.warmup_epochs:g} takes "
            f"{counted(plan.warmup_steps, 'step')}, and {plan.end_of_peak}: "
            f"set it to at most {(plan.first_fall - 1) / steps_per_epoch:.6g}, or train longer"
        )
    epochs = plan.first_fall // 2 / steps_per_epoch
    schedule = config.schedule.model_copy(update={"warmup_epochs": epochs})
    return config.model_copy(update={"schedule": schedule})
