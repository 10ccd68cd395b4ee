"""What is shown while a run trains: a live bar on a terminal, a few plain lines elsewhere."""

import io
import os
import pty
import sys
import time
from contextlib import suppress

import pytest

from egtrain.logs.training_display import TrainingDisplay
from egtrain.tasks import ACCURACY, LOSS

METRICS = (LOSS, ACCURACY)


def show(display: TrainingDisplay, steps: int) -> None:
    with display:
        for step in range(1, steps + 1):
            display.step(
                step, step / 4, {"loss": 2.0 / step, "accuracy": 0.5, "gradient_norm": 9.0}, 1234.5
            )
            if step % 4 == 0:
                display.evaluation(step, step / 4, "test", {"loss": 1.0, "accuracy": 0.4321})


def test_on_a_pipe_the_display_is_a_few_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    show(TrainingDisplay("resnet-eg", metrics=METRICS, epochs=500, steps=2000, stream=stream), 8)
    assert stream.getvalue().splitlines() == [
        "resnet-eg: 500 epochs, 2,000 steps",
        "epoch   1/500  step     4/2,000  test: loss 1.000  accuracy 43.21 %",
        "epoch   2/500  step     8/2,000  test: loss 1.000  accuracy 43.21 %",
        "resnet-eg: stopped at step 8 of 2,000 after 0:00:00",
    ]


@pytest.mark.parametrize(
    ("epochs", "start_step", "text"),
    [
        (1, 0, "x: 1 epoch, 20 steps"),
        (0.16, 0, "x: 20 steps"),
        (2.5, 0, "x: 20 steps"),
        (2, 5, "x: from step 5, 20 steps in all"),
    ],
)
def test_a_run_begins_with_its_epochs_only_where_they_are_whole(
    epochs: float, start_step: int, text: str
) -> None:
    stream = io.StringIO()
    with TrainingDisplay("x", epochs=epochs, steps=20, start_step=start_step, stream=stream):
        pass
    assert stream.getvalue().splitlines()[0] == text


def test_on_a_pipe_there_is_at_most_one_training_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    with TrainingDisplay("x", metrics=METRICS, epochs=1, steps=100, stream=stream) as display:
        for step in range(1, 101):
            now += 1.0
            display.step(
                step, step / 100, {"loss": 0.5, "accuracy": 0.25, "gradient_norm": 9.0}, 1234.5
            )
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12
    assert (
        lines[1]
        == "epoch 1/1  step  10/100  loss 0.5000  accuracy 25.00 %  1,234 samples/s  0:01:30 left"
    )
    assert lines[-1] == "x: done at step 100 of 100 after 0:01:40"


def test_a_closed_pipe_ends_the_display_and_not_the_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    show(TrainingDisplay("x", metrics=METRICS, epochs=2, steps=8, stream=stream), 8)
    stream.close()


@pytest.mark.parametrize(
    "variables",
    [{"TERM": "xterm-256color"}, {"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}],
    ids=["colour", "no colour", "dumb"],
)
def test_a_terminal_is_given_back_as_it_was_also_after_an_exception(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    controller, terminal = pty.openpty()
    stdout, stderr = sys.stdout, sys.stderr

    def interrupted_run(display: TrainingDisplay) -> None:
        with display:
            display.step(1, 0.25, {"loss": 2.0, "accuracy": 0.5}, 1e6)
            time.sleep(0.3)
            display.message("a message")
            raise KeyboardInterrupt

    with os.fdopen(terminal, "w") as stream:
        name = "a-name-that-is-much-too-long-for-its-column"
        display = TrainingDisplay(
            name, metrics=METRICS, epochs=2, steps=8, stream=stream, seconds_between_lines=0
        )
        with pytest.raises(KeyboardInterrupt):
            interrupted_run(display)
        os.set_blocking(controller, False)
        output = ""
        with suppress(BlockingIOError):
            while True:
                output += os.read(controller, 4096).decode()
    os.close(controller)
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert "a message" in output
    assert "stopped at step 1 of 8" in output
    if variables["TERM"] == "dumb":
        assert "\x1b" not in output
        assert (
            "epoch 1/2  step 1/8  loss 2.000  accuracy 50.00 %  1,000,000 samples/s\r\n" in output
        )
        return
    assert "epoch 1/2  step 1/8  loss 2.000  accuracy 50.00 %" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1, "the cursor is shown again"
    assert ("\x1b[3" in output) == ("NO_COLOR" not in variables)
