"""`egtrain train --init-from`: training that begins with given weights."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    arguments,
    command_line,
    config_of,
    newest_checkpoint,
    outcome,
    run_here,
    run_on_ranks,
    settings,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import egtrain
from egtrain.build import build_run, with_known_weights
from egtrain.checkpoint import read_checkpoint
from egtrain.config.files import load_config
from egtrain.errors import DataError, EgtrainError, UsageError
from egtrain.evaluate import evaluate
from egtrain.models.loading import load_weights, without_wrappers
from egtrain.models.resnet import ResNet
from egtrain.weight_files import read_weights, sha256_of, write_weights
from egtrain.workers import Ranks


@pytest.fixture(scope="module")
def source(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run."""
    return run_here(tmp_path_factory.mktemp("source") / "run", config_of(images))


def weights_in(run: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = read_checkpoint(newest_checkpoint(run))[1]["model"]
    return weights


def begun(images: Path, file: Path, *further: str) -> dict[str, Tensor]:
    """Return the weights of a run before its first step."""
    config = with_known_weights(config_of(images, f'init.file="{file}"', *further))
    return {name: t.clone() for name, t in build_run(config, Ranks()).model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def form(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Path:
    """Return the weights of the source in one of the forms that are read."""
    weights = weights_in(source)
    file = tmp_path / "weights.pt"
    match request.param:
        case "run":
            return source
        case "checkpoint":
            return newest_checkpoint(source)
        case "safetensors":
            write_weights(tmp_path / "w.safetensors", weights, {})
            return tmp_path / "w.safetensors"
        case "exported":
            write_weights(file, weights, {})
        case "before torch 1.6":
            torch.save(weights, file, _use_new_zipfile_serialization=False)
        case "wrapped":
            torch.save({f"_orig_mod.module.{name}": t for name, t in weights.items()}, file)
        case "double":
            torch.save({name: t.double() for name, t in weights.items()}, file)
        case key:
            torch.save({key: weights, "epoch": 3}, file)
    return file


FORMS = ["run", "checkpoint", "safetensors", "exported", "before torch 1.6", "wrapped", "double"]
FORMS += ["state_dict", "model_state_dict", "model"]


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_run_begins_with_the_weights_of_every_form_of_file(
    form: Path, source: Path, images: Path
) -> None:
    found = begun(images, form, "seed=7")
    assert equal(found, weights_in(source))
    assert {t.dtype for t in found.values()} == {torch.float32}


def test_exported_weights_evaluate_as_the_run_that_they_are_from(
    source: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.safetensors"
    command_line(capsys, "export", str(source), "--output", str(file))
    run = build_run(config_of(images, f'init.file="{file}"', "seed=7"), Ranks())
    before = egtrain.load_run(source).evaluate("test")
    assert evaluate(run.task, run.model, "test", Ranks(), "fp32") == before
    fresh = build_run(config_of(images, "seed=7"), Ranks())
    assert evaluate(fresh.task, fresh.model, "test", Ranks(), "fp32") != before


def test_a_run_says_and_records_where_it_starts_from(
    source: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = newest_checkpoint(source)
    options = ["--init-from", str(file), "--steps", "1", "--output", str(tmp_path / "run")]
    result = command_line(capsys, *arguments(images), *options)
    assert result.code == 0
    assert f"\nstarts from {file}\n" in result.stdout
    saved = load_config(tmp_path / "run/config.yaml").init
    assert (saved.file, saved.sha256, saved.strict) == (str(file), sha256_of(file), True)


def test_a_run_directory_is_recorded_as_its_newest_checkpoint(source: Path, images: Path) -> None:
    config = with_known_weights(config_of(images, f'init.file="{source}"'))
    assert config.init.file == str(newest_checkpoint(source))
    assert config.init.sha256 == sha256_of(newest_checkpoint(source))


# ---- what does not fit


def other_head(source: Path, path: Path) -> Path:
    """Write the source's weights with a head for 6 classes, another layer and one name missing."""
    weights = weights_in(source)
    (head,) = (name for name, t in weights.items() if t.ndim == 2)
    weights[head] = torch.zeros(6, weights[head].shape[1])
    del weights["stem_norm.bias"]
    save_file({name: t.contiguous() for name, t in weights.items()} | {"x": torch.ones(1)}, path)
    return path


def test_everything_that_does_not_fit_is_listed_in_one_error(
    source: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = other_head(source, tmp_path / "other.safetensors")
    options = ["--init-from", str(file), "--output", str(tmp_path / "run")]
    for dry_run in ([], ["--dry-run"]):
        result = command_line(capsys, *arguments(images), *options, *dry_run)
        assert (result.code, result.stdout) == (2, "")
        assert f"{file} has another architecture: 1 weight missing ('stem_norm.bias'); " in (
            result.line
        )
        assert "1 weight unknown to the model ('x')" in result.line
        assert "has shape [6, 16], the model's [4, 16])" in result.line
        assert "--no-init-strict" in result.line
        assert not (tmp_path / "run").exists()
    many = {f"layer{number}": torch.ones(2) for number in range(1000)}
    with pytest.raises(UsageError, match=r"1,000 weights unknown .*'layer2', and 997 more\)"):
        load_weights(ResNet(8, 4, 4), many)


def test_without_strictness_what_fits_is_taken_and_the_rest_is_told(
    source: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = other_head(source, tmp_path / "other.safetensors")
    found = begun(images, file, "init.strict=false", "seed=7")
    fresh = build_run(config_of(images, "seed=7"), Ranks()).model.state_dict()
    expected = weights_in(source)
    left_out = [name for name, t in found.items() if not torch.equal(t, expected[name])]
    assert {name.rpartition(".")[0] for name in left_out} == {"head", "stem_norm"} - (
        {"stem_norm"} if torch.equal(fresh["stem_norm.bias"], expected["stem_norm.bias"]) else set()
    )
    assert all(torch.equal(found[name], fresh[name]) for name in left_out)
    options = ["--init-from", str(file), "--no-init-strict", "--output", str(tmp_path / "run")]
    result = command_line(capsys, *arguments(images), *options, "--steps", "1")
    assert result.code == 0
    assert "not all weights are from other.safetensors: 1 weight missing" in result.stdout

    save_file({"x": torch.ones(1)}, tmp_path / "strange.safetensors")
    options = ["--init-from", str(tmp_path / "strange.safetensors"), "--no-init-strict"]
    result = command_line(capsys, *arguments(images), *options, "--dry-run")
    assert result.code == 2
    assert "1 weight unknown to the model ('x')" in result.line


class Tied(nn.Module):
    """A net whose two layers share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight


def test_of_tied_weights_one_name_is_enough_and_two_must_agree() -> None:
    model, weight = Tied(), torch.rand(2, 2)
    for names in (["first"], ["second"], ["first", "second"]):
        nn.init.zeros_(model.first.weight)
        assert load_weights(model, {f"{name}.weight": weight for name in names}) is None
        assert torch.equal(model.first.weight, weight)
        assert model.second.weight is model.first.weight
    untied = {"first.weight": weight, "second.weight": weight + 1}
    with pytest.raises(UsageError, match=r"'second.weight' is not equal to 'first.weight', with"):
        load_weights(model, untied)


def test_numbers_of_another_kind_are_not_taken_for_weights() -> None:
    model = nn.Linear(2, 2, bias=False)
    for numbers in (torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2, dtype=torch.complex64)):
        with pytest.raises(UsageError, match=r"'weight' holds (whole|complex) numbers, the model'"):
            load_weights(model, {"weight": numbers})


def test_a_model_that_is_called_as_a_wrapper_keeps_its_names(
    images: Path, source: Path, tmp_path: Path
) -> None:
    names = ["module.weight", "module.bias"]
    tensors = {name: torch.ones(1) for name in names}
    assert without_wrappers(tensors, names).keys() == tensors.keys()
    assert [*without_wrappers({f"module.{n}": torch.ones(1) for n in names}, names)] == names
    assert [*without_wrappers({"module.a": torch.ones(1), "b": torch.ones(1)}, ["a", "b"])] == [
        "module.a",
        "b",
    ]


# ---- files that are not what they should be


class Exploit:
    """Leaves a file behind when it is unpickled by anything but a safe loader."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    file, mark = tmp_path / "weights.pt", tmp_path / "the code has run"
    torch.save({"a": Exploit(mark)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DataError, match=r"weights\.pt is refused: .* holds code") as caught:
        read_weights(file)
    assert "\n" not in str(caught.value)
    file.write_bytes(pickle.dumps({"a": Exploit(mark)}))
    with pytest.raises(DataError, match=r"weights\.pt"):
        read_weights(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("w.pt", b"", "is damaged, or holds no weights"),
        ("w.pt", b"hello", "is damaged, or holds no weights"),
        ("w.pt", b"PK\x03\x04 no archive", "is damaged, or holds no weights"),
        ("w.safetensors", b"", "is damaged, or holds no weights"),
        ("w.safetensors", b"x" * 1000, "is damaged, or holds no weights"),
        ("w.pt", {}, "holds no weights"),
        ("w.pt", [torch.ones(2)], "holds no weights"),
        ("w.pt", {"epoch": 3, "a": torch.ones(2)}, "is no state_dict: its 'epoch' is no tensor"),
        ("w.pt", {3: torch.ones(2)}, "is no state_dict: its 3 is no tensor"),
        ("w.pt", {"a": torch.eye(2).to_sparse()}, "holds 'a' in a form that is not dense"),
    ],
)
def test_a_file_without_weights_is_refused_in_one_line(
    name: str, content: Any, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(DataError, match=problem) as caught:
        read_weights(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "checkpoint"])
def test_a_truncated_file_is_refused(kind: str, source: Path, tmp_path: Path) -> None:
    file = tmp_path / f"w.{kind}"
    if kind == "checkpoint":
        file = tmp_path / "step-00000012.pt"
        data = bytearray(newest_checkpoint(source).read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        write_weights(file, weights_in(source), {})
        file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(DataError, match="damaged"):
        read_weights(file)


@pytest.mark.parametrize(
    ("named", "code", "problem"),
    [
        ("none.pt", 3, "there are no weights"),
        (".", 2, "holds no run"),
        ("empty", 3, "holds no checkpoint"),
    ],
)
def test_a_place_without_weights_is_refused_before_anything_is_made(
    named: str,
    code: int,
    problem: str,
    source: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copy(source / "config.yaml", tmp_path / "empty")
    result = command_line(capsys, *arguments(images), "--init-from", named, "--output", "run")
    assert (result.code, result.stdout) == (code, "")
    assert problem in result.line
    assert not Path("run").exists()


def test_strictness_without_weights_is_refused(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = command_line(capsys, *arguments(images), "--no-init-strict")
    assert result.code == 2
    assert "--init-strict False: init.strict is about the weights of init.file" in result.line


# ---- resume, ranks, sweeps


def test_a_resumed_run_is_the_undisturbed_one_and_does_not_need_the_file(
    source: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.safetensors"
    write_weights(file, weights_in(source), {})
    config = with_known_weights(config_of(images, f'init.file="{file}"', "seed=3"))
    whole = outcome(run_here(tmp_path / "whole", config))
    with pytest.raises(EgtrainError, match="interrupted"):
        run_here(tmp_path / "run", config, stop_after=5)
    file.unlink()
    assert command_line(capsys, "train", "--resume", str(tmp_path / "run"), "--dry-run").code == 0
    assert command_line(capsys, "train", "--resume", str(tmp_path / "run")).code == 0
    assert outcome(tmp_path / "run") == whole
    fresh = outcome(run_here(tmp_path / "fresh", config_of(images, "seed=3")))
    assert fresh != whole


def test_a_run_without_a_checkpoint_takes_the_very_file_that_it_began_with(
    source: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.safetensors"
    write_weights(file, weights_in(source), {})
    config = with_known_weights(config_of(images, f'init.file="{file}"'))
    whole = outcome(run_here(tmp_path / "whole", config))
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tmp_path / "whole/config.yaml", run)  # killed before its first checkpoint
    as_it_was = file.read_bytes()
    write_weights(file, {n: t + 1 for n, t in weights_in(source).items()}, {})
    result = command_line(capsys, "train", "--resume", str(run))
    assert result.code == 3
    assert f"{file} is not the file of weights that was named at first" in result.line
    file.write_bytes(as_it_was)
    assert command_line(capsys, "train", "--resume", str(run)).code == 0
    assert outcome(run) == whole


@pytest.mark.parametrize("change", [["--init-from", "other.pt"], ["--no-init-strict"]])
def test_a_resumed_run_keeps_the_weights_that_it_began_with(
    change: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = command_line(capsys, "train", "--resume", str(source), *change, "--allow-changes")
    assert result.code == 2
    assert "init" in result.line


def test_two_ranks_begin_with_the_same_weights_as_one(
    source: Path, images: Path, tmp_path: Path
) -> None:
    file = newest_checkpoint(source)
    config = with_known_weights(config_of(images, f'init.file="{file}"'))
    one = outcome(run_here(tmp_path / "one", config))
    run_on_ranks([*arguments(images), "--init-from", str(file), "--output", "two"], tmp_path, 2)
    assert outcome(tmp_path / "two") == one


def test_every_cell_of_a_sweep_begins_with_the_same_content(
    source: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.pt"
    write_weights(file, weights_in(source), {})
    pairs = [*settings(images), "epochs=2", f'init.file="{file}"']
    options = [part for pair in pairs for part in ("--set", pair)]
    sweep = tmp_path / "sweep"
    command = ["sweep-batch", "--preset", "quickstart", "--batch-sizes", "32", *options]
    command += ["--seeds", "2", "--no-estimate", "--output", str(sweep)]
    assert command_line(capsys, *command).code == 0
    cells = sorted((sweep / "cells").iterdir())
    assert len(cells) == 2
    for cell in cells:
        assert load_config(cell / "config.yaml").init.sha256 == sha256_of(file)
    write_weights(file, {n: t + 1 for n, t in weights_in(source).items()}, {})
    result = command_line(capsys, *command)
    assert result.code == 2
    assert "init.sha256" in result.stderr
    assert json.loads((sweep / "sweep.json").read_text())["identity"]["presets"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        sha256_of(tmp_path)
