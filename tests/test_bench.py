"""What `egtrain bench` says of the variants, with steps counted in gradients instead of seconds."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from egtrain import bench
from egtrain.bench import VARIANTS, Comparison, compare_costs, median_interval, seconds_taken
from egtrain.cli import app
from egtrain.errors import UsageError
from egtrain.tasks.image import ImageTask
from egtrain.workers import Ranks

SMALL = ["worker_batch_size=4", "model.width=2", "threads=1", "device=cpu", "precision=fp32"]
WEIGHTS_BYTES = 4 * 1_356
"""Of the small net."""


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """All variants over the small net, each step taking as many seconds as gradients."""
    with pytest.MonkeyPatch.context() as patch:
        count_gradients_for_time(patch)
        return compare_costs("quickstart", SMALL, workers=2, rounds=2)


def count_gradients_for_time(patch: pytest.MonkeyPatch) -> None:
    loss, taken = ImageTask.loss, [0]

    def counted(self: ImageTask, *arguments: Any) -> Any:
        taken[0] += 1
        return loss(self, *arguments)

    def seconds(action: Callable[[], object], ranks: Ranks) -> float:
        before = taken[0]
        action()
        return float(taken[0] - before)

    patch.setattr(ImageTask, "loss", counted)
    patch.setattr(bench, "seconds_taken", seconds)


def test_every_choice_of_zeta_is_there_beside_plain_training(comparison: Comparison) -> None:
    assert list(comparison.variants) == list(VARIANTS)
    assert comparison.left_out == {}
    assert comparison.step_seconds == 2


@pytest.mark.parametrize("name", VARIANTS)
def test_the_ratio_is_that_of_the_gradients_where_they_take_the_time(
    name: str, comparison: Comparison
) -> None:
    expected = {
        "extragradient": 2.0,
        "sam": 2.0,
        "extragradient every 4": 1.25,
        "sam every 4": 1.25,
    }.get(name, 1.0)
    cost = comparison.variants[name]
    assert (cost.ratio, cost.low, cost.high) == (expected, expected, expected)
    assert cost.gradients_per_step == pytest.approx(expected, abs=0.25)


def test_memory_is_what_the_variant_keeps_and_nothing_more_is_communicated(
    comparison: Comparison,
) -> None:
    costs = comparison.variants
    assert len({cost.communicated_bytes for cost in costs.values()}) == 1
    assert costs["none"].communicated_bytes == WEIGHTS_BYTES + 4 * 2 * 6
    # A past gradient for each of two workers, and the weights to return to.
    more = costs["local"].peak_bytes - costs["none"].peak_bytes
    assert 2 * WEIGHTS_BYTES <= more <= 5 * WEIGHTS_BYTES


def test_the_variant_acts_in_every_step_that_is_timed() -> None:
    for name in VARIANTS:
        config = bench.config_of("resnet-eg-postlocal", name, ["device=cpu"])
        assert config.extrapolation.name == name.split()[0]
        assert config.post_local.period is None


def test_a_variant_that_the_base_does_not_allow_is_left_out_with_the_reason_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count_gradients_for_time(monkeypatch)
    plain = [*SMALL, "optimizer.momentum=0"]
    comparison = compare_costs("quickstart", plain, rounds=2, wanted=["optimistic"])
    assert list(comparison.variants) == ["none", "optimistic"]
    with pytest.raises(UsageError, match="momentum"):
        compare_costs("quickstart", plain, rounds=2, wanted=["msam"])


def test_each_round_begins_with_another_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[object] = []

    def seconds(action: Any, ranks: Ranks) -> float:
        timed.append(action.args[0])
        return 1.0

    monkeypatch.setattr(bench, "seconds_taken", seconds)
    compare_costs("quickstart", SMALL, rounds=4, wanted=["local", "gaussian"])
    rounds = [timed[start : start + 3] for start in range(0, 12, 3)]
    assert all(len(set(map(id, measured))) == 3 for measured in rounds)
    plain, local, gaussian = rounds[0]
    assert [measured[0] for measured in rounds] == [plain, local, gaussian, plain]


def test_the_interval_holds_the_median() -> None:
    median, low, high = median_interval([1.0, 1.1, 0.9, 1.0, 5.0])
    assert low <= median == 1.0 <= high
    assert median_interval([2.0] * 5) == (2.0, 2.0, 2.0)


def test_the_command_prints_json_and_a_table() -> None:
    arguments = [
        "bench",
        "--preset",
        "quickstart",
        "--variants",
        "local",
        "--rounds",
        "2",
        "--data",
        "synthetic",
    ]
    arguments += [part for setting in SMALL for part in ("--set", setting)]
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    shown = json.loads(result.stdout)
    assert shown["preset"] == "quickstart"
    assert set(shown["variants"]) == {"none", "local"}
    wanted = {"ratio", "low", "high", "gradients_per_step", "peak_bytes", "communicated_bytes"}
    assert set(shown["variants"]["local"]) == wanted
    assert 0 < shown["variants"]["local"]["low"] <= shown["variants"]["local"]["high"]
    table = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "local" in table
    assert "95 % interval" in table


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("locl", "unknown variant 'locl'; did you mean 'local'"),
        ("local,,sam", "names with commas between them"),
    ],
)
def test_a_wrong_name_is_refused_with_a_hint(variants: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(
            app, ["bench", "--preset", "quickstart", "--variants", variants], catch_exceptions=False
        )


def test_a_gpu_is_timed_by_its_own_clock_while_the_host_runs_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def elapsed_time(self, end: "Event") -> float:
            said.append("read")
            return 40.0

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: said.append("wait"))
    assert seconds_taken(lambda: said.append("step"), Ranks(device=torch.device("cuda"))) == 0.04
    # The first step keeps the device busy while the host prepares the one that is timed.
    assert said == ["step", "record", "step", "record", "wait", "read"]
