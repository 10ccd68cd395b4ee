"""Bars move on a terminal only, and what is wrong with the stream never ends the work."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import config_of, heed_signals, run_here

from egtrain.progress import Progress


def shown_on_terminal(monkeypatch: pytest.MonkeyPatch, work: object, size: str = "80") -> str:
    """Return what a terminal gets while `work` is called with a `Progress`."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", size)
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        with Progress(stream) as progress:
            work(progress)  # type: ignore[operator]
        os.set_blocking(controller, False)
        output = ""
        with suppress(BlockingIOError):
            while True:
                output += os.read(controller, 65536).decode()
    os.close(controller)
    return output


def test_several_bars_show_what_is_done_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def work(progress: Progress) -> None:
        nonlocal now
        whole, cell = progress.bar("sweep", 10, done=4), progress.bar("a cell", 200)
        whole.update(4)
        cell.update(0)
        now = 30.0
        whole.update(5)
        cell.update(50, beside="test accuracy 71.20 %", status="one line more")
        progress.message("a message")

    output = shown_on_terminal(monkeypatch, work)
    for text in ("sweep", "50 %", "0:02:30 left", "a cell", "25 %", "0:01:30 left"):
        assert text in output
    assert "test accuracy 71.20 %" in output
    assert "one line more" in output
    assert "a message" in output


def test_a_message_is_folded_between_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(progress: Progress) -> None:
        progress.message(" ".join(["accuracy"] * 5))

    lines = [line.strip() for line in shown_on_terminal(monkeypatch, work, "30").splitlines()]
    assert [line.count("accuracy") for line in lines if "acc" in line] == [3, 2]


def test_a_watched_bar_is_asked_before_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(progress: Progress) -> None:
        progress.bar("trace", 10).watch(lambda: (4, "20 products"))
        progress.message("")

    output = shown_on_terminal(monkeypatch, work)
    assert "40 %" in output
    assert "20 products" in output


def test_elsewhere_a_bar_is_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Progress(stream) as progress:
        for done in range(1, 31):
            now += 1.0
            progress.report("evaluating on test", done, 30)
    assert stream.getvalue().splitlines() == [
        "evaluating on test 37 %  0:00:19 left",
        "evaluating on test 70 %  0:00:09 left",
    ]


def test_a_silent_display_shows_nothing() -> None:
    stream = io.StringIO()
    with Progress(stream, silent=True, seconds_between_lines=0) as progress:
        progress.bar("x", 2).update(1)
        progress.message("x")
    assert not stream.getvalue()


def test_what_an_encoding_lacks_is_replaced() -> None:
    raw = io.BytesIO()
    with Progress(io.TextIOWrapper(raw, "ascii")) as progress:
        progress.message("71.20 ± 0.35 %, λ")
        assert raw.getvalue() == b"71.20 ? 0.35 %, ?\n"


def test_a_terminal_that_goes_ends_the_display_and_not_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    controller, terminal = pty.openpty()
    monkeypatch.setattr("threading.excepthook", lambda failure: pytest.fail(str(failure)))
    with os.fdopen(terminal, "w") as stream:
        with Progress(stream) as progress:
            bar = progress.bar("work", 10)
            os.close(controller)
            for done in range(10):
                bar.update(done)
                progress.message("a message")
                time.sleep(0.06)
        with suppress(OSError):
            stream.close()


def test_a_terminal_is_given_back_also_at_the_second_ctrl_c() -> None:
    code = """if True:
        import os, signal, time
        from egtrain.ranks import signals
        from egtrain.ranks.signals import StopSignal
        from egtrain.progress import Progress
        signals.ONE_REQUEST_SECONDS = 0.1
        with StopSignal() as stop, Progress() as progress:
            stop.training = True
            progress.bar("work", 10).update(1)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3)
        raise AssertionError
    """
    controller, terminal = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=terminal,
        stderr=terminal,
        env=variables,
        preexec_fn=heed_signals,
        check=False,
    )
    output = os.read(controller, 65536).decode()
    os.close(controller)
    os.close(terminal)
    assert done.returncode == 128 + signal.SIGINT, output
    assert "work" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l") >= 0


# ---- terminals that lack characters


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_here(tmp_path_factory.mktemp("run") / "λ-run", config_of(images, "steps=2"))


POOR = {
    "python": {"PYTHONIOENCODING": "ascii"},
    "locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("poor", POOR)
@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, ["--help"]),
        (0, ["presets"]),
        (2, ["presets", "λ±·×→"]),
        (2, ["train", "--preset", "quickstart", "--set", "λ=1"]),
        (0, ["eval", "RUN"]),
        (0, ["train", "--preset", "quickstart", "--dry-run", "--output", "λ"]),
        (0, ["train", "--preset", "quickstart", "--steps", "1", "--output", "OUTPUT"]),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_a_terminal_lacks_is_replaced_in_every_command(
    poor: str, code: int, arguments: list[str], run: Path, tmp_path: Path
) -> None:
    places = {"RUN": str(run), "OUTPUT": str(tmp_path / "λ-±")}
    done = subprocess.run(
        [sys.executable, "-m", "egtrain", *(places.get(a, a) for a in arguments)],
        capture_output=True,
        env={**os.environ, **POOR[poor]},
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode("ascii", "replace")
    assert done.returncode == code, done.stderr.decode("ascii", "replace")
    assert done.stdout.isascii()
    assert done.stderr.isascii()
