"""The shipped presets: complete, short, and as METHOD's reference settings say; and the command that shows them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from egtrain.cli.presets import presets
from egtrain.config import Config, config_to_yaml, differences, json_schema
from egtrain.config_files import config_from_yaml_text, load_config, preset_description, preset_names, presets_dir
from egtrain.errors import UsageError

FAMILIES = {"resnet": "cifar10", "resnet-cifar100": "cifar100"}
VARIANTS = {
    "sgd": "none",
    "eg": "local",
    "optimistic": "global",
    "extragradient": "fresh",
    "gaussian": "gaussian",
    "smoothout": "uniform",
    "gradient-noise": "gradient-noise",
    "sam": "sam",
}
TWO_GRADIENTS = {"fresh", "sam"}


def test_every_family_is_shipped_with_every_variant() -> None:
    combined = {f"{family}-{variant}" for family in FAMILIES for variant in VARIANTS}
    assert combined | {"quickstart", "quickstart-sgd"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_and_its_resolved_form_reads_back_equal(name: str) -> None:
    config = load_config(name)
    assert config.preset == name
    text = config_to_yaml(config)
    assert config_from_yaml_text(text, "resolved") == config
    # Other YAML readers take the same values from it.
    assert Config.model_validate(yaml.safe_load(text)) == config
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_combination_is_its_family_and_its_variant_and_nothing_else(family: str, variant: str) -> None:
    path = presets_dir() / f"{family}-{variant}.yaml"
    comment, inherits = path.read_text(encoding="utf-8").splitlines()
    assert comment.startswith("# ")
    assert inherits == f"inherits: [family/{family}, variant/{variant}]"
    config = load_config(path.stem)
    assert config.data.name == FAMILIES[family]
    assert config.extrapolation.name == VARIANTS[variant]
    changed = differences(load_config(f"{family}-sgd"), config)
    assert all(line.startswith("extrapolation.") for line in changed)
    assert ("two gradients a step" in preset_description(path.stem)) == (config.extrapolation.name in TWO_GRADIENTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_resnet_families_hold_the_reference_settings(family: str) -> None:
    config = load_config(f"{family}-eg")
    assert (config.workers, config.worker_batch_size, config.epochs, config.steps) == (16, 128, 300, None)
    assert (config.model.name, config.model.depth, config.model.width) == ("resnet", 20, 16)
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.lr, optimizer.base_batch_size, optimizer.lr_scaling) == (0.1, 64, "linear")
    assert (optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == (0.9, True, 1e-4)
    assert (schedule.warmup_epochs, schedule.warmup_from) == (5, 0.1)
    assert (schedule.decay, schedule.milestones, schedule.factor) == ("step", (0.5, 0.75), 0.1)
    assert config.data.augment
    assert config.extrapolation.name == "local"
    assert config.extrapolation.ratio == "1/K"


def test_the_quickstart_pair_differs_in_extrapolation_only() -> None:
    eg, sgd = load_config("quickstart"), load_config("quickstart-sgd")
    assert eg.data.name == sgd.data.name == "synthetic"
    assert (eg.extrapolation.name, sgd.extrapolation.name) == ("local", "none")
    assert all(line.startswith("extrapolation.") for line in differences(eg, sgd))


def test_every_preset_has_a_description_of_one_line() -> None:
    for name in preset_names():
        assert 20 <= len(preset_description(name)) <= 110


def test_parts_can_be_loaded_but_are_not_listed() -> None:
    part = load_config("family/resnet")
    assert (part.preset, part.extrapolation.name) == ("family-resnet", "none")
    assert not any("/" in name for name in preset_names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet-ge", "unknown preset 'resnet-ge'; did you mean 'resnet-eg'?"),
        ("Quickstart", "unknown preset 'Quickstart'; did you mean 'quickstart'?"),
        ("zzz", "unknown preset 'zzz'; `egtrain presets` lists them"),
        ("", "unknown preset ''; `egtrain presets` lists them"),
        ("../pyproject", "unknown preset '../pyproject'"),
    ],
)
def test_an_unknown_preset_is_refused_with_a_suggestion(name: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config(name)
    assert str(error.value).startswith(message)


def test_a_file_named_without_its_ending_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"did you mean the file 'mine\.yaml'\?"):
        load_config("mine")
    assert load_config("mine.yaml").seed == 1


def test_a_mistake_in_a_shipped_preset_is_reported_by_its_place_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "x.yaml").write_text("# x\n\noptimizer:\n  momentum: 2\n")
    (tmp_path / "x-sgd.yaml").write_text("inherits: [family/x]\n")
    monkeypatch.setattr("egtrain.config_files.presets_dir", lambda: tmp_path)
    with pytest.raises(UsageError) as error:
        load_config("x-sgd")
    assert str(error.value) == "presets/family/x.yaml:4: optimizer.momentum must be less than 1, not 2"


def test_presets_inside_an_installed_package_are_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "egtrain"
    monkeypatch.setattr("egtrain.config_files.__file__", str(package / "config_files.py"))
    with pytest.raises(UsageError, match="install egtrain again"):
        presets_dir()
    (tmp_path / "site" / "presets" / "family").mkdir(parents=True)
    assert presets_dir() == tmp_path / "site" / "presets"
    (package / "presets" / "family").mkdir(parents=True)
    assert presets_dir() == package / "presets"


# The command

app = typer.Typer()
app.command()(presets)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_list_is_tab_separated_where_it_is_not_read_on_a_terminal() -> None:
    rows = [line.split("\t") for line in run().splitlines()]
    assert rows == [[name, preset_description(name)] for name in preset_names()]
    assert json.loads(run("--json")) == [{"name": name, "description": text} for name, text in rows]


def test_the_list_is_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    presets()
    shown = capsys.readouterr().out
    assert "\t" not in shown
    assert all(name in shown and preset_description(name) in shown for name in preset_names())


def test_a_preset_is_shown_fully_resolved() -> None:
    config = load_config("resnet-eg")
    assert config_from_yaml_text(run("resnet-eg"), "shown") == config
    assert Config.model_validate_json(run("resnet-eg", "--json")) == config


def test_the_schema_is_printed_and_takes_no_name() -> None:
    assert json.loads(run("--schema")) == json_schema()
    with pytest.raises(UsageError, match="leave out 'resnet-eg'"):
        run("--schema", "resnet-eg")


def test_showing_presets_does_not_import_torch() -> None:
    code = "import sys; from egtrain.cli.presets import presets; presets('resnet-eg'); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
