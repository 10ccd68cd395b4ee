"""`egtrain export`: the weights of a run, in files that need no egtrain."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import (
    command_line,
    config_of,
    metrics_in,
    newest_checkpoint,
    run_here,
    write_texts,
)

import egtrain
from egtrain.checkpoint import read_checkpoint
from egtrain.config.files import load_config
from egtrain.models.lstm import LSTMLanguageModel
from egtrain.models.resnet import ResNet
from egtrain.weight_files import sha256_of, write_weights

TASK = """
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

{first}

def model():
    layers = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
    )
    layers[2].weight = layers[0].weight
    return layers


def dataset(split):
    torch.manual_seed(split == "test")
    x = torch.randn(64, 3)
    return TensorDataset(x, x.sum(1, keepdim=True)) if split != "validation" else None


def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean(), {{}}
"""


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run whose best checkpoint is not the last."""
    config = config_of(images, "data.validation=40", "optimizer.lr=1.0", "epochs=6")
    return run_here(tmp_path_factory.mktemp("exported") / "run", config)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """Return a file's tensors as a user without egtrain reads them."""
    if path.suffix == ".pt":
        tensors: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
        return tensors
    return safetensors.torch.load_file(path)


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_plain_module_takes_the_file_and_is_the_model_of_the_run(
    run: Path, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "folder" / f"weights.{ending}"
    assert command_line(capsys, "export", str(run), "--output", str(file)).code == 0
    model = ResNet(8, 4, 4)
    model.load_state_dict(loaded(file), strict=True)  # BatchNorm's counters too
    state = read_checkpoint(newest_checkpoint(run))[1]["model"]
    assert loaded(file).keys() == state.keys()
    for name, tensor in loaded(file).items():
        assert torch.equal(tensor, state[name])
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
    pixels = torch.rand(5, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(model.eval()(pixels), egtrain.load_run(run).model(pixels))


def test_which_checkpoint_is_exported_can_be_chosen(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = json.loads((run / "summary.json").read_text())["best"]
    steps = [int(file.stem[5:]) for file in (run / "checkpoints").glob("*.pt")]
    assert best["step"] != max(steps)
    for which, step in [
        ("last", max(steps)),
        ("best", best["step"]),
        (str(best["step"]), best["step"]),
        (newest_checkpoint(run).name, max(steps)),
        (str(newest_checkpoint(run)), max(steps)),
    ]:
        file = tmp_path / "weights.safetensors"
        command = ["export", str(run), "--checkpoint", which, "--output", str(file), "--force"]
        command.append("--json")
        found = json.loads(command_line(capsys, *command).stdout)
        assert found["step"] == step
        state = read_checkpoint(run / f"checkpoints/step-{step:08d}.pt")[1]["model"]
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded(file).items())
        assert json.loads(metadata_of(file)["step"]) == step


def test_the_metadata_say_where_the_weights_come_from(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.safetensors"
    options = ["--checkpoint", "best", "--output", str(file), "--json"]
    told = json.loads(command_line(capsys, "export", str(run), *options).stdout)
    metadata = metadata_of(file)
    (tmp_path / "config.yaml").write_text(metadata["config"])
    assert load_config(tmp_path / "config.yaml") == egtrain.load_run(run).config
    best = json.loads((run / "summary.json").read_text())["best"]
    metrics = json.loads(metadata["metrics"])
    assert metrics["validation"]["accuracy"] == best["validation"]["accuracy"]
    assert metrics == {
        line["split"]: {"loss": line["loss"], "accuracy": line["accuracy"]}
        for line in metrics_in(run)
        if line["step"] == best["step"] and line["split"] != "train"
    }
    assert metrics == told["metrics"]
    assert (metadata["preset"], metadata["egtrain"]) == ("quickstart", egtrain.__version__)
    assert (metadata["outputs"], metadata["format"]) == ("4", "pt")
    assert told["sha256"] == sha256_of(file)
    assert told["bytes"] == file.stat().st_size


def test_the_same_weights_make_the_same_file(tmp_path: Path) -> None:
    metadata = {letter: letter for letter in "abcdefgh"}
    for number in range(4):
        write_weights(tmp_path / f"{number}.safetensors", {"a": torch.ones(3)}, metadata)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_weights_that_share_their_memory_are_written_each_by_its_name(
    ending: str, tmp_path: Path
) -> None:
    tied = torch.randn(3, 2)
    views = {"embedding": tied, "decoder": tied, "part": tied[1:], "turned": tied.t()}
    write_weights(tmp_path / f"w.{ending}", views, {})
    found = loaded(tmp_path / f"w.{ending}")
    assert found.keys() == views.keys()
    assert all(torch.equal(found[name], views[name]) for name in views)
    assert len({tensor.data_ptr() for tensor in found.values()}) == 4
    assert found["part"].untyped_storage().nbytes() == 16


def test_a_language_model_is_exported_without_the_state_of_a_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path, words=93, pairs=1)
    config = load_config(
        "quickstart-lstm",
        [
            *[f'data.name="text:{tmp_path}"', "workers=2", "worker_batch_size=1", "steps=1"],
            *["model.layers=1", "model.width=8", "task.bptt=5", "threads=1", "device=cpu"],
            "schedule.shorten_warmup=true",
        ],
    )
    run = run_here(tmp_path / "run", config)
    file = tmp_path / "weights.safetensors"
    assert command_line(capsys, "export", str(run), "--output", str(file)).code == 0
    words = int(metadata_of(file)["outputs"])
    assert words == len(egtrain.load_run(run).data.vocabulary or ())
    model = LSTMLanguageModel(words, width=8, layers=1, dropout=0.1, columns=3)  # another batch
    model.load_state_dict(loaded(file), strict=True)
    text = torch.arange(words)[:, None]
    with torch.inference_mode():
        found, _ = model.eval()(text)
        assert torch.equal(found, egtrain.load_run(run).model(text)[0])


def test_a_run_of_a_task_file_with_tied_weights_is_exported_without_running_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "mine.py"
    mark = tmp_path / "the file was run"
    task.write_text(TASK.format(first=f"Path({str(mark)!r}).touch()"))
    run = tmp_path / "run"
    options = ["--set", "worker_batch_size=8", "--workers", "2", "--steps", "2", "--device", "cpu"]
    options += ["--set", "schedule.shorten_warmup=true", "--set", "threads=1"]
    assert (
        command_line(
            capsys, "train", "--task", str(task), "--preset", "eg", *options, "--output", str(run)
        ).code
        == 0
    )
    mark.unlink()  # train has run it
    file = tmp_path / "weights.safetensors"
    assert command_line(capsys, "export", str(run), "--output", str(file)).code == 0
    assert not mark.exists()
    model: torch.nn.Sequential = runpy.run_path(str(task))["model"]()
    weights = loaded(file)
    model.load_state_dict(weights, strict=True)
    assert torch.equal(weights["0.weight"], weights["2.weight"])  # tied
    assert torch.equal(weights["0.weight"], model[2].weight)
    metadata = metadata_of(file)
    assert "outputs" not in metadata
    assert str(task) in metadata["config"]


def test_a_file_is_replaced_only_where_that_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.pt"
    file.write_text("precious")
    refused = command_line(capsys, "export", str(run), "--output", str(file))
    assert refused.code == 2
    assert f"{file} exists already" in refused.line
    assert "--force" in refused.line
    assert file.read_text() == "precious"
    assert command_line(capsys, "export", str(run), "--output", str(file), "--force").code == 0
    assert loaded(file)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (["--output", "weights.bin"], 2, "must end with .safetensors or .pt, not 'weights.bin'"),
        (["--output", "weights"], 2, "must end with"),
        (["--output", "there/weights.pt"], 1, "cannot write there"),
        (["--output", "w.pt", "--checkpoint", "7"], 2, "no checkpoint of step 7: the steps are"),
        (["--output", "w.pt", "--checkpoint", "none.pt"], 3, "there is no checkpoint file none.pt"),
        (["--output", "w.pt", "--checkpoint", "other.pt"], 2, "not among the checkpoints of"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_line(
    options: list[str],
    code: int,
    problem: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("no folder")
    shutil.copy(newest_checkpoint(run), "other.pt")
    result = command_line(capsys, "export", str(run), *options)
    assert (result.code, result.stdout) == (code, "")
    assert problem in result.line
    assert {path.name for path in tmp_path.iterdir()} == {"there", "other.pt"}


def test_a_damaged_checkpoint_is_not_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(run, tmp_path / "run")
    file = newest_checkpoint(broken)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    options = ["--output", str(tmp_path / "w.pt"), "--checkpoint", file.name]
    result = command_line(capsys, "export", str(broken), *options)
    assert result.code == 3
    assert "is damaged" in result.line
    assert not (tmp_path / "w.pt").exists()
