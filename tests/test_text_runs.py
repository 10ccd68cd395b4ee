"""Language and translation runs keep the promises of image runs: any number of ranks, exact resume,
evaluation.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import metrics_in, newest_checkpoint, outcome, run_here, run_on_ranks, write_texts
from typer.testing import CliRunner

import egtrain
from egtrain.__main__ import main
from egtrain.checkpoint import read_checkpoint
from egtrain.cli import app
from egtrain.config.files import load_config
from egtrain.config.schema import Config
from egtrain.data.subwords import Subwords
from egtrain.errors import DataError, InterruptedRun, UsageError

pytestmark = pytest.mark.timeout(180)

STEPS, EPOCH = 9, 5
COMMON = [
    *(
        f"steps={STEPS}",
        "workers=2",
        "worker_batch_size=4",
        "schedule.warmup_epochs=0.5",
        "evaluate_every=1",
    ),
    *(
        "precision=fp32",
        "device=cpu",
        "deterministic=true",
        "log.tensorboard=false",
        "extrapolation.ratio=0.5",
    ),
]
TASKS = {
    "lstm-eg": [
        "data.name=text:{}",
        "task.bptt=5",
        "model.width=6",
        "model.layers=2",
        "checkpoint.every=3",
    ],
    "transformer-eg": [
        *("data.name=pairs:{}", "task.subwords=40", "task.max_length=60", "checkpoint.every=3"),
        *("model.width=8", "model.layers=1", "model.heads=2", "model.feedforward=8"),
    ],
}
Undisturbed = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with texts of five batches of eight."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder, words=8 * 5 * EPOCH + 12, pairs=8 * EPOCH + 3)
    return folder


def settings(preset: str, texts: Path, *further: str) -> list[str]:
    return [setting.format(texts) for setting in [*COMMON, *TASKS[preset], *further]]


def config_of(preset: str, texts: Path, *further: str) -> Config:
    return load_config(preset, settings(preset, texts, *further))


@pytest.fixture(scope="module")
def undisturbed(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return a function that gives the outcome of a preset's tiny run."""
    done: dict[tuple[str, ...], dict[str, Any]] = {}

    def find(*key: str) -> dict[str, Any]:
        if key not in done:
            directory = tmp_path_factory.mktemp("undisturbed") / "run"
            done[key] = outcome(run_here(directory, config_of(key[0], texts, *key[1:])))
        return done[key]

    return find


@pytest.mark.parametrize("preset", TASKS)
def test_two_ranks_give_the_same_run_bit_for_bit(
    preset: str, texts: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    options = [part for setting in settings(preset, texts) for part in ("--set", setting)]
    run_on_ranks(["train", "--preset", preset, *options, "--output", "run"], tmp_path, 2)
    assert outcome(tmp_path / "run") == undisturbed(preset)


@pytest.mark.parametrize(
    "step", [2, 5, 7], ids=["mid-epoch", "end of an epoch", "mid-epoch, the second"]
)
@pytest.mark.parametrize("preset", TASKS)
def test_an_interrupted_run_ends_as_if_it_was_not(
    preset: str, step: int, texts: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    config = config_of(preset, texts)
    with pytest.raises(InterruptedRun, match=f"interrupted after step {step}"):
        run_here(tmp_path / "run", config, stop_after=step)
    assert outcome(run_here(tmp_path / "run", config, resume=True)) == undisturbed(preset)


def test_a_run_saved_on_two_ranks_goes_on_on_one(
    texts: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The checkpoint of a step in the middle of an epoch holds the state of each worker, whoever
    carried it.
    """
    options = [
        part for setting in settings("lstm-eg", texts, "steps=9") for part in ("--set", setting)
    ]
    run_on_ranks(["train", "--preset", "lstm-eg", *options, "--output", "run"], tmp_path, 2)
    run = tmp_path / "run"
    for name in ("summary.json", "checkpoints/step-00000009.pt"):
        (run / name).unlink()
    assert int(re.findall(r"\d+", newest_checkpoint(run).name)[0]) % EPOCH > 0
    assert outcome(run_here(run, config_of("lstm-eg", texts), resume=True)) == undisturbed(
        "lstm-eg"
    )


def test_each_worker_keeps_a_hidden_state_of_its_own(
    texts: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    _, state = read_checkpoint(
        newest_checkpoint(run_here(tmp_path / "run", config_of("lstm-eg", texts)))
    )
    first, second = state["workers"]["buffers"]
    assert first.numel() == 2 * 2 * 4 * 6
    assert (first != second).any()
    assert (first != 0).all()


@pytest.mark.parametrize("preset", TASKS)
def test_a_local_phase_goes_on_where_it_was(
    preset: str, texts: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    further = ("post_local.period=3", "post_local.start=0.4")
    config = config_of(preset, texts, *further)
    with pytest.raises(InterruptedRun):
        run_here(tmp_path / "run", config, stop_after=6)
    assert outcome(run_here(tmp_path / "run", config, resume=True)) == undisturbed(preset, *further)


def test_a_second_gradient_on_the_same_words_starts_from_the_same_state(
    undisturbed: Undisturbed,
) -> None:
    """With shifts too small to change a weight, two gradients a step make the same run as one."""
    one, two = (
        undisturbed("lstm-eg", f"extrapolation.name={name}", "extrapolation.ratio=1e-30")
        for name in ("local", "extragradient")
    )
    parts = [name for name in two if name.startswith(("state.model", "state.workers.buffers"))]
    assert len(parts) > 3
    assert [one[name] for name in parts] == [two[name] for name in parts]


def test_dropout_is_a_function_of_seed_worker_and_step(texts: Path, tmp_path: Path) -> None:
    """With a rate of zero and the same mini-batch again, the loss differs by its dropout alone."""
    config = config_of("lstm-eg", texts, "steps=6", "model.dropout=0.5", "optimizer.lr=1e-30")
    losses = [
        m["loss"] for m in metrics_in(run_here(tmp_path / "run", config)) if m["split"] == "train"
    ]
    assert losses[0] != losses[EPOCH]  # the same windows, from a state of zero
    again = [
        m["loss"] for m in metrics_in(run_here(tmp_path / "again", config)) if m["split"] == "train"
    ]
    assert again == losses


@pytest.mark.parametrize(
    ("preset", "metric"), [("lstm-eg", "perplexity"), ("transformer-eg", "bleu")]
)
def test_the_best_checkpoint_goes_by_what_is_better(
    preset: str, metric: str, texts: Path, tmp_path: Path
) -> None:
    """A low perplexity, and a high BLEU."""
    directory = run_here(tmp_path / "run", config_of(preset, texts, "steps=15", "optimizer.lr=0.5"))
    values = [line[metric] for line in metrics_in(directory) if line["split"] == "validation"]
    best = json.loads((directory / "summary.json").read_text())["best"]
    assert best["validation"] == {metric: (min if metric == "perplexity" else max)(values)}
    assert egtrain.load_run(directory, checkpoint="best").step == best["step"]


@pytest.fixture(scope="module")
def translating(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("translating") / "run"
    return run_here(directory, config_of("transformer-eg", texts))


def test_evaluation_by_beam_search_writes_the_hypotheses_and_shows_some(translating: Path) -> None:
    result = CliRunner().invoke(
        app, ["eval", str(translating), "--beam", "3"], catch_exceptions=False
    )
    lines = result.stdout.splitlines()
    assert re.fullmatch(
        rf"test: bleu \d+\.\d+, loss \d+\.\d+ after {STEPS} steps, in fp32", lines[0]
    )
    assert re.match(r"beam 3, nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:", lines[1])
    assert sum(line.startswith("source: ") for line in lines) == 3
    written = (translating / "hypotheses-test-beam3.txt").read_text().splitlines()
    assert len(written) == 13
    assert lines[5] == f"hypothesis: {written[0]}"


def test_greedy_evaluation_gives_what_training_logged(translating: Path) -> None:
    result = CliRunner().invoke(
        app, ["eval", str(translating), "--beam", "1", "--json"], catch_exceptions=False
    )
    found = json.loads(result.stdout)
    final = json.loads((translating / "summary.json").read_text())["final"]["test"]
    assert found["bleu"] == pytest.approx(final["bleu"], abs=1e-9)
    assert found["loss"] == pytest.approx(final["loss"])
    assert (found["beam"], Path(found["hypotheses"]).name) == (1, "hypotheses-test-beam1.txt")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_translations_are_made_in_the_precision_of_the_run(
    precision: str, dtype: torch.dtype, texts: Path, tmp_path: Path
) -> None:
    config = config_of("transformer-eg", texts, f"precision={precision}")
    run = egtrain.load_run(run_here(tmp_path / "run", config))
    seen: list[torch.dtype] = []
    for module in run.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run.translate()
    assert set(seen) == {dtype}


@pytest.mark.parametrize("preset", ["lstm-eg", "transformer-eg"])
def test_without_its_text_a_run_gives_its_model_and_words_and_says_which_are_missing(
    preset: str, texts: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "texts"
    shutil.copytree(texts, moved)
    directory = run_here(tmp_path / "run", config_of(preset, moved))
    weights = egtrain.load_run(directory).model.state_dict()
    shutil.rmtree(moved)
    run = egtrain.load_run(directory)
    torch.testing.assert_close(run.model.state_dict(), weights, rtol=0, atol=0)
    if preset == "lstm-eg":
        assert run.data.vocabulary is not None
        assert run.data.vocabulary[:2] == ("<unk>", "<eos>")
        assert "alpha" in run.data.vocabulary
    else:
        assert run.data.subwords is not None
        subwords = Subwords(run.data.subwords)
        assert subwords.decode(subwords.encode(["alpha beta."])[0]) == "alpha beta."
    with pytest.raises(DataError, match=f"{moved}: no such file or folder, here or in "):
        run.evaluate()


def test_language_runs_are_evaluated_without_a_beam(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run_here(tmp_path / "run", config_of("lstm-eg", texts))
    final = json.loads((directory / "summary.json").read_text())["final"]
    assert egtrain.load_run(directory).evaluate("test") == pytest.approx(final["test"])
    with pytest.raises(
        UsageError, match="beam search is for runs that translate: leave --beam out"
    ):
        egtrain.load_run(directory).translate()
    monkeypatch.setattr("sys.argv", ["egtrain", "eval", str(directory), "--beam", "2"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert (
        capsys.readouterr().err
        == "egtrain: beam search is for runs that translate: leave --beam out\n"
    )
