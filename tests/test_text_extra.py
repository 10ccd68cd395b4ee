"""Only translation needs what `egtrain[text]` installs, and says so if it is missing."""

import sys
import tomllib
from pathlib import Path

import pytest
from helpers import command_line

PACKAGES = ("sacrebleu", "sentencepiece")


@pytest.fixture
def without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PACKAGES, *(m for m in sys.modules if m.partition(".")[0] in PACKAGES)):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


HINT = "translation needs sacrebleu and sentencepiece; install with: pip install 'egtrain[text]'"
TRAIN = ("train", "--device", "cpu", "--steps", "2", "--output", "run")


@pytest.mark.usefixtures("without_the_extra")
@pytest.mark.parametrize("data", ["synthetic", "pairs:texts"])
def test_translation_names_the_extra_and_leaves_nothing_behind(
    data: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for part in ("train", "valid", "test"):
        for language in ("en", "de"):
            (tmp_path / "texts").mkdir(exist_ok=True)
            (tmp_path / "texts" / f"{part}.{language}").write_text("a b c\n" * 9)
    result = command_line(capsys, *TRAIN, "--preset", "quickstart-transformer", "--data", data)
    assert (result.code, result.stdout) == (2, "")
    assert result.line == HINT
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_the_extra")
def test_one_package_that_is_missing_is_named_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "sentencepiece")
    result = command_line(capsys, *TRAIN, "--preset", "quickstart-transformer")
    assert result.line == HINT.replace(" and sentencepiece", "")


@pytest.mark.usefixtures("without_the_extra")
@pytest.mark.parametrize(
    "command",
    [
        ("presets",),
        ("presets", "transformer-eg"),
        (*TRAIN, "--preset", "quickstart", "--set", "model.width=2"),
        (*TRAIN, "--preset", "quickstart-lstm", "--set", "model.width=4"),
    ],
    ids=" ".join,
)
def test_everything_else_does_without_it(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    result = command_line(capsys, *command)
    assert (result.code, result.stderr) == (0, "")


@pytest.mark.usefixtures("without_the_extra")
def test_the_plan_of_a_translation_can_be_seen_without_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = command_line(capsys, "train", "--preset", "quickstart-transformer", "--dry-run")
    assert (result.code, result.stderr) == (0, "")
    assert HINT in result.stdout


def test_the_extra_brings_what_the_message_promises_and_the_tests_have_it() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    names = [requirement.partition(">")[0] for requirement in project["dependencies"]]
    extras = project["optional-dependencies"]
    assert not set(names) & set(PACKAGES)
    assert [requirement.partition(">")[0] for requirement in extras["text"]] == [*PACKAGES]
    assert "egtrain[text]" in extras["test"]
