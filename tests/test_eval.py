"""`egtrain eval` and `egtrain.load_run`: a run read back is the run that was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import command_line, config_of, metrics_in, newest_checkpoint, run_here, write_images
from torch import nn
from torch.optim.swa_utils import update_bn

import egtrain
from egtrain.errors import DataError, UsageError
from egtrain.models.resnet import ResNet
from egtrain.progress import Progress
from egtrain.tasks import Split
from egtrain.tasks.image import ImageTask

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run without validation."""
    return run_here(tmp_path_factory.mktemp("plain") / "run", config_of(images))


@pytest.fixture(scope="module")
def validated(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run's directory with validation, whose best checkpoint is not the last."""
    config = config_of(images, "data.validation=20", "optimizer.lr=0.3", "epochs=8")
    return run_here(tmp_path_factory.mktemp("validated") / "run", config)


def final_of(directory: Path) -> dict[str, dict[str, float]]:
    final: dict[str, dict[str, float]] = json.loads((directory / "summary.json").read_text())[
        "final"
    ]
    return final


def test_eval_finds_the_final_metrics(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = command_line(capsys, "eval", str(plain), "--json")
    assert (result.code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    told = {"run": str(plain), "step": 12, "split": "test", "precision": "fp32"}
    assert found == {**told, **final_of(plain)["test"]}

    result = command_line(capsys, "eval", str(plain))
    final = final_of(plain)["test"]
    text = f"accuracy {final['accuracy'] * 100:.2f} %, loss {final['loss']:#.4g}"
    assert result.stdout == f"test: {text} after 12 steps, in fp32\n"


def test_eval_of_the_validation_split(validated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(
        command_line(capsys, "eval", str(validated), "--split", "validation", "--json").stdout
    )
    assert {name: found[name] for name in ("loss", "accuracy")} == final_of(validated)["validation"]


def test_eval_of_the_best_checkpoint(validated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", "best", "--split", "validation", "--json"]
    found = json.loads(command_line(capsys, "eval", str(validated), *options).stdout)
    best = json.loads((validated / "summary.json").read_text())["best"]
    assert (found["step"], found["accuracy"]) == (best["step"], best["validation"]["accuracy"])
    (line,) = [
        m for m in metrics_in(validated) if (m["split"], m["step"]) == ("validation", best["step"])
    ]
    assert found["loss"] == line["loss"]


def test_best_without_validation_is_refused(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = command_line(capsys, "eval", str(plain), "--checkpoint", "best")
    assert result.code == 2
    assert "there is no best checkpoint" in result.line
    assert "data.validation" in result.line


def test_the_validation_split_of_a_run_without_is_refused(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = command_line(capsys, "eval", str(plain), "--split", "validation")
    assert result.code == 2
    assert "held out no validation samples" in result.line


def test_eval_of_a_file(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_path = command_line(
        capsys, "eval", str(plain), "--json", "--checkpoint", str(newest_checkpoint(plain))
    )
    by_name = command_line(capsys, "eval", str(plain), "--json", "--checkpoint", "step-00000008.pt")
    assert [json.loads(result.stdout)["step"] for result in (by_path, by_name)] == [12, 8]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "missing", "folder"])
def test_a_damaged_checkpoint_that_is_named_is_refused_in_a_line(
    damage: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = newest_checkpoint(plain).read_bytes()
    file = tmp_path / "some.pt"
    middle = len(data) // 2
    contents = {
        "truncated": data[: len(data) * 9 // 10],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
        "text": b"hello",
    }
    if damage in contents:
        file.write_bytes(contents[damage])
    elif damage == "folder":
        file.mkdir()
    result = command_line(capsys, "eval", str(plain), "--checkpoint", str(file))
    assert (result.code, result.stdout) == (3, "")
    assert str(file) in result.line


def test_fp32_is_not_evaluated_in_tf32(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = egtrain.load_run(plain)
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    seen = []

    def counts(*_: object) -> torch.Tensor:
        seen.append((cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision))
        return torch.ones(2, dtype=torch.float64)

    monkeypatch.setattr(run.task, "evaluate_batch", counts)
    run.evaluate("test")
    assert set(seen) == {("ieee", "ieee")}
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == before


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_evaluation_is_in_the_precision_of_the_run_and_says_so(
    precision: str,
    dtype: torch.dtype,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[torch.dtype] = []
    evaluate_batch = ImageTask.evaluate_batch

    def noted(self: ImageTask, model: nn.Module, split: Split, index: int) -> torch.Tensor:
        hook = model.get_submodule("stem").register_forward_hook(
            lambda module, inputs, output: seen.append(output.dtype)
        )
        sums = evaluate_batch(self, model, split, index)
        hook.remove()
        return sums

    monkeypatch.setattr(ImageTask, "evaluate_batch", noted)
    directory = run_here(tmp_path / "run", config_of(images, f"precision={precision}", "steps=1"))
    assert set(seen) == {dtype}
    seen.clear()
    found = json.loads(command_line(capsys, "eval", str(directory), "--json").stdout)
    assert set(seen) == {dtype}
    assert found["precision"] == precision
    assert found["loss"] == final_of(directory)["test"]["loss"]
    assert command_line(capsys, "eval", str(directory)).stdout.endswith(f", in {precision}\n")


def test_without_its_data_a_run_gives_its_model_and_says_which_are_missing(
    tmp_path: Path,
) -> None:
    file = write_images(tmp_path / "some.npz")
    directory = run_here(tmp_path / "run", config_of(file, "steps=2"))
    pixels = torch.rand(5, 3, 8, 8)
    with torch.inference_mode():
        expected = egtrain.load_run(directory).model(pixels)
    file.unlink()
    run = egtrain.load_run(directory)
    with torch.inference_mode():
        assert torch.equal(run.model(pixels), expected)
    for ask in (run.evaluate, lambda: run.task):
        with pytest.raises(DataError, match=r"some\.npz: no such file"):
            ask()


def test_a_run_knows_its_data_again_elsewhere_and_when_they_have_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_images(tmp_path / "here.npz")
    config = config_of(file, "steps=2")
    directory = run_here(tmp_path / "run", config)
    (tmp_path / "there").mkdir()
    moved = file.rename(tmp_path / "there/here.npz")
    capsys.readouterr()
    result = command_line(
        capsys, "eval", str(directory), "--data-dir", str(tmp_path / "there"), "--json"
    )
    assert json.loads(result.stdout)["accuracy"] == final_of(directory)["test"]["accuracy"]

    with np.load(moved) as arrays:
        changed = {name: arrays[name] for name in arrays}
    changed["x_train"][0] += 1
    np.savez(file, **changed)
    result = command_line(capsys, "eval", str(directory))
    assert (result.code, result.stdout) == (3, "")
    assert "the data are not those that" in result.line
    with pytest.raises(UsageError, match="the data are not those that it was trained on"):
        run_here(directory, config, resume=True)


def test_a_checkpoint_of_another_net_is_refused_in_a_line(
    plain: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run_here(tmp_path / "other", config_of(images, "model.width=6", "steps=1"))
    capsys.readouterr()
    result = command_line(capsys, "eval", str(plain), "--checkpoint", str(newest_checkpoint(other)))
    assert result.code == 2
    assert "'stem.weight' has shape [6, 3, 3, 3], the model's [4, 3, 3, 3]" in result.line


def test_a_directory_without_a_run_or_checkpoint_is_refused(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = command_line(capsys, "eval", str(tmp_path / "nowhere"))
    assert result.code == 2
    assert f"{tmp_path / 'nowhere'} holds no run" in result.line
    shutil.copy(plain / "config.yaml", tmp_path)
    result = command_line(capsys, "eval", str(tmp_path))
    assert result.code == 3
    assert "has no checkpoint yet" in result.line


def test_data_that_have_gone_are_an_error_and_may_be_elsewhere(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(plain, tmp_path / "run")
    text = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(text.replace("images.npz", "gone.npz"))
    result = command_line(capsys, "eval", str(directory))
    assert result.code == 3
    assert "gone.npz: no such file" in result.line


def test_a_run_is_evaluated_while_it_is_interrupted(images: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="interrupted"):
        run_here(tmp_path / "run", config_of(images), stop_after=5)
    assert egtrain.load_run(tmp_path / "run").step == 5


def test_load_run_gives_model_task_and_config(plain: Path, images: Path) -> None:
    run = egtrain.load_run(plain)
    assert run.step == 12
    assert run.config == config_of(images)
    assert not run.model.training
    assert run.evaluate() == run.evaluate("test") == final_of(plain)["test"]
    found, labels = run.task.batch(0, 0)
    assert run.model(found).shape == (len(labels), 4)


def test_load_run_gives_what_was_saved(plain: Path) -> None:
    from egtrain.checkpoint import read_checkpoint

    run = egtrain.load_run(str(plain), checkpoint="step-00000008.pt")
    state: dict[str, Any] = read_checkpoint(plain / "checkpoints/step-00000008.pt")[1]
    weights = run.model.state_dict()
    for name, tensor in state["model"].items():
        assert torch.equal(weights[name], tensor)


def test_load_run_raises_what_the_command_line_prints(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        egtrain.load_run(tmp_path)
    with pytest.raises(UsageError, match="no best checkpoint"):
        egtrain.load_run(plain, checkpoint="best")
    with pytest.raises(DataError, match="there is no checkpoint file"):
        egtrain.load_run(plain, checkpoint="none.pt")
    with pytest.raises(UsageError, match="held out no validation samples"):
        egtrain.load_run(plain).evaluate("validation")


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_model'"):
        egtrain.load_model  # noqa: B018


def test_batchnorm_statistics_of_a_saved_run_can_be_taken_anew(plain: Path) -> None:
    run = egtrain.load_run(plain)
    batches = [run.task.batch(worker, 0)[0] for worker in range(4)]
    update_bn(batches, run.model)
    hidden = torch.cat([run.model.get_submodule("stem")(batch) for batch in batches])
    torch.testing.assert_close(
        run.model.get_submodule("stem_norm").running_mean, hidden.mean(dim=(0, 2, 3))
    )
    assert run.model.get_submodule("stem_norm").num_batches_tracked == len(batches)


def test_a_saved_runs_model_loads_an_ordinary_state_and_gives_one(plain: Path) -> None:
    model = egtrain.load_run(plain).model
    ordinary = ResNet(8, 4, 4)
    for counter in ordinary.buffers():
        if not counter.is_floating_point():
            counter.fill_(7)
    model.load_state_dict(ordinary.state_dict())
    ordinary.load_state_dict(egtrain.load_run(plain).model.state_dict())
    torch.testing.assert_close(
        ordinary.state_dict(), egtrain.load_run(plain).model.state_dict(), rtol=0, atol=0
    )
    assert model.get_submodule("stem_norm").num_batches_tracked == 7


def test_what_is_possible_at_best_is_told_where_the_data_have_it(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    small = ["--steps", "1", "--workers", "1", "--set", "model.width=4"]
    small += ["--set", "data.validation=512"]
    result = command_line(
        capsys, "train", "--preset", "quickstart", *small, "--output", str(directory)
    )
    assert "% of at best 91 %, loss" in result.stdout
    assert result.stdout.count("at best") == 1  # known of the test split alone
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["best_possible"] == {"test": {"accuracy": 0.91}}
    result = command_line(capsys, "eval", str(directory))
    assert "% of at best 91 %, loss" in result.stdout
    result = command_line(capsys, "eval", str(directory), "--split", "validation")
    assert result.stdout.startswith("validation: ")
    assert "at best" not in result.stdout

    assert json.loads((plain / "summary.json").read_text())["best_possible"] is None


def test_evaluations_show_how_far_they_are_in_eval_and_in_train(
    images: Path,
    plain: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("egtrain.tasks.image.EVALUATION_BATCH", 32)
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Progress, "report", lambda progress, *told: seen.append(told))
    test_images = egtrain.load_run(plain).task.evaluation_size("test")
    batches = -(-test_images // 32)
    assert batches > 2
    expected = [("evaluating on test", done, batches) for done in range(1, batches + 1)]
    command_line(capsys, "eval", str(plain))
    assert seen == expected
    seen.clear()
    run_here(tmp_path / "run", config_of(images, "steps=2"))
    assert seen == expected
