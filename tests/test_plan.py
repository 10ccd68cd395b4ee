"""The plan of a run: its steps, its warm-up, and the rates that they come to."""

import math
from pathlib import Path

import pytest

from egtrain.config.files import config_from_yaml_text, load_config
from egtrain.config.schema import Config, config_to_yaml
from egtrain.errors import UsageError
from egtrain.plan import build_plan, build_schedule, with_fitting_warmup


def rates(config: Config, steps_per_epoch: int) -> list[float]:
    """Return the learning rate of every step."""
    plan = build_plan(config, steps_per_epoch)
    schedule = build_schedule(config, plan)
    return [schedule(step) for step in range(plan.steps)]


@pytest.mark.parametrize(
    ("scaling", "growth"), [("linear", 32), ("sqrt", math.sqrt(32)), ("none", 1)]
)
@pytest.mark.parametrize(("workers", "share"), [(16, 128), (32, 64), (1, 2048)])
def test_the_peak_rate_follows_the_batch_of_all_workers(
    scaling: str, growth: float, workers: int, share: int
) -> None:
    config = load_config(
        "resnet-eg",
        [
            f"workers={workers}",
            f"worker_batch_size={share}",
            "optimizer.lr=0.1",
            "optimizer.base_batch_size=64",
            f"optimizer.lr_scaling={scaling}",
        ],
    )
    assert build_plan(config, 24).peak_rate == pytest.approx(0.1 * growth)
    assert max(rates(config, 24)) == pytest.approx(0.1 * growth)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["extrapolation.name=none"], range(0)),
        ([], range(100)),
        (["extrapolation.until=0.25"], range(25)),
        (["post_local.period=4"], range(50)),
        (["post_local.period=4", "post_local.start=0.3", "extrapolation.until=0.2"], range(20)),
        (["extrapolation.name=extragradient", "extrapolation.every=3"], range(0, 100, 3)),
        (
            ["extrapolation.name=sam", "extrapolation.every=4", "post_local.period=2"],
            range(0, 50, 4),
        ),
        (["extrapolation.name=msam", "optimizer.nesterov=false"], range(20, 100)),
        (
            [
                "extrapolation.name=msam",
                "extrapolation.after_warmup=false",
                "optimizer.nesterov=false",
            ],
            range(100),
        ),
    ],
)
def test_the_plan_says_which_steps_shift_the_weights(overrides: list[str], steps: range) -> None:
    config = load_config("resnet-eg", ["steps=100", "workers=2", "worker_batch_size=8", *overrides])
    plan = build_plan(config, steps_per_epoch=4)
    assert plan.warmup_steps == 20
    assert plan.extrapolated_steps == steps
    start = config.local_start_fraction()
    assert plan.local_start == (None if start is None else round(100 * start))


# A warm-up that does not fit


@pytest.mark.parametrize(
    ("epochs", "warmup"), [(1, 0.25), (2, 0.5), (9, 2.25), (10, 2.5), (11, 5), (300, 5)]
)
def test_a_short_run_of_a_preset_reaches_its_peak_rate_before_the_first_decay(
    epochs: int, warmup: float
) -> None:
    config = with_fitting_warmup(load_config("resnet-eg", [f"epochs={epochs}"]), 24)
    assert config.schedule.warmup_epochs == warmup
    first_half = rates(config, 24)[: 24 * epochs // 2]
    assert max(first_half) == pytest.approx(3.2)


@pytest.mark.parametrize("steps", range(1, 60))
@pytest.mark.parametrize("preset", ["resnet-eg", "quickstart", "transformer-eg"])
def test_every_number_of_steps_has_one_at_the_peak_rate(preset: str, steps: int) -> None:
    """With step decay at half of the run, a cosine, and the inverse square root."""
    config = load_config(preset, [f"steps={steps}"])
    fitting = with_fitting_warmup(config, 16)
    assert max(rates(fitting, 16)) == pytest.approx(build_plan(config, 16).peak_rate)


@pytest.mark.parametrize(
    ("preset", "overrides", "steps_per_epoch"),
    [
        ("quickstart", ["steps=40"], 16),
        ("resnet-eg", [], 24),
        ("resnet-eg", ["epochs=11"], 24),
        ("resnet-eg", ["epochs=1", "schedule.warmup_epochs=0"], 24),
        ("resnet-eg", ["epochs=2", "schedule.warmup_epochs=0.9"], 24),
    ],
)
def test_a_warm_up_that_fits_stays(preset: str, overrides: list[str], steps_per_epoch: int) -> None:
    config = load_config(preset, overrides)
    assert with_fitting_warmup(config, steps_per_epoch) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["epochs=2", "schedule.warmup_epochs=5"],
            "schedule.warmup_epochs 5 takes 120 steps, and the rate falls at step 24 of "
            "48: set it to at most 0.958333, or train longer",
        ),
        # Here the milestone rounds onto the end of the warm-up.
        (
            ["steps=39", "schedule.warmup_epochs=0.82"],
            "schedule.warmup_epochs 0.82 takes 20 steps, and the rate falls at step 20 "
            "of 39: set it to at most 0.791667, or train longer",
        ),
        (
            ["epochs=2", "schedule.warmup_epochs=2", "schedule.decay=cosine"],
            "schedule.warmup_epochs 2 takes 48 steps, and the run ends at step 48: "
            "set it to at most 1.95833, or train longer",
        ),
    ],
)
def test_a_warm_up_that_the_user_set_and_that_does_not_fit_is_refused(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        with_fitting_warmup(load_config("resnet-eg", overrides), 24)
    assert str(error.value) == message
    # The same in a file, and where the file of a run is read by the processes that share it.
    nested = "".join(f"  {s.removeprefix('schedule.').replace('=', ': ')}\n" for s in overrides[1:])
    (tmp_path / "mine.yaml").write_text(f"inherits: [resnet-eg]\nschedule:\n{nested}")
    config = load_config(tmp_path / "mine.yaml", overrides[:1])
    for read in (config, config_from_yaml_text(config_to_yaml(config), "config.yaml")):
        with pytest.raises(UsageError) as error:
            with_fitting_warmup(read, 24)
        assert str(error.value) == message


@pytest.mark.parametrize(("steps", "steps_per_epoch"), [(20, 128), (39, 24), (1000, 7), (2, 390)])
def test_the_longest_warm_up_that_a_message_names_fits_and_one_more_step_does_not(
    steps: int, steps_per_epoch: int
) -> None:
    overrides = [f"steps={steps}", "schedule.decay=cosine"]
    with pytest.raises(UsageError) as error:
        with_fitting_warmup(
            load_config("resnet-eg", [*overrides, "schedule.warmup_epochs=500"]), steps_per_epoch
        )
    longest = float(str(error.value).partition("at most ")[2].partition(",")[0])
    fitting = load_config("resnet-eg", [*overrides, f"schedule.warmup_epochs={longest}"])
    assert with_fitting_warmup(fitting, steps_per_epoch) == fitting
    longer = longest + 1 / steps_per_epoch
    with pytest.raises(UsageError):
        with_fitting_warmup(
            load_config("resnet-eg", [*overrides, f"schedule.warmup_epochs={longer}"]),
            steps_per_epoch,
        )


@pytest.mark.parametrize(
    ("text", "may_be_shortened"),
    [
        ("inherits: [resnet-eg]", True),
        ("inherits: [resnet-eg]\nschedule: {warmup_epochs: 5}", False),
        ("inherits: [resnet-eg]\nschedule: {warmup_epochs: 5, shorten_warmup: true}", True),
        ("inherits: [mine.yaml]\nepochs: 2", False),
        ("inherits: [mine.yaml, resnet8-eg]", True),
        ("schedule: {warmup_from: 0.2}", True),
    ],
)
def test_only_the_warm_up_of_a_preset_may_be_shortened(
    text: str, may_be_shortened: bool, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("schedule: {warmup_epochs: 3}\n")
    (tmp_path / "child.yaml").write_text(text)
    config = load_config(tmp_path / "child.yaml")
    assert config.schedule.shorten_warmup is may_be_shortened


def test_a_shortened_warm_up_is_shortened_once() -> None:
    short = with_fitting_warmup(load_config("resnet-eg", ["epochs=2"]), 24)
    again = config_from_yaml_text(config_to_yaml(short), "config.yaml")
    assert with_fitting_warmup(again, 24) == short
