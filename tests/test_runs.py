"""`egtrain runs`: what a run leaves to be read, and the table of runs."""

import json
from pathlib import Path

import pytest
from helpers import config_of, run_here

from egtrain.errors import DivergedError

# ---- what a run leaves to be read


def test_the_summary_says_what_counts_and_which_way_is_better(images: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "run", config_of(images, "steps=2"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["metric"] == {"name": "accuracy", "unit": "fraction", "higher_is_better": True}


def test_a_run_notes_how_it_failed_until_it_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, note = tmp_path / "run", tmp_path / "run/failure.json"
    with pytest.raises(DivergedError):
        run_here(run, config_of(images, "optimizer.lr=1e30", extrapolation="none"))
    diverged = json.loads(note.read_text())
    assert diverged["exit_code"] == 4
    assert diverged["message"].startswith("the loss of worker 0 became nan at step ")

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("no memory\n\nis left")

    with monkeypatch.context() as patch:
        patch.setattr("egtrain.train.take_step", out_of_memory)
        with pytest.raises(RuntimeError):
            run_here(run, config_of(images, extrapolation="none"), resume=True)
    assert json.loads(note.read_text()) == {
        "exit_code": 1,
        "message": "RuntimeError: no memory is left",
    }

    run_here(run, config_of(images, extrapolation="none"), resume=True)
    assert not note.exists()
    assert (run / "summary.json").exists()
