"""The shipped presets: complete, short, and as METHOD's reference settings say; and the command
that shows them.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from egtrain.cli.presets import presets
from egtrain.config.files import (
    config_from_yaml_text,
    load_config,
    preset_description,
    preset_families,
    preset_names,
    presets_dir,
)
from egtrain.config.schema import Config, config_to_yaml, differences, json_schema
from egtrain.errors import UsageError

FAMILIES = {
    "resnet": ("cifar10", "resnet", 20),
    "resnet-cifar100": ("cifar100", "resnet", 20),
    "resnet8": ("cifar10", "resnet", 8),
    "vgg": ("cifar10", "vgg", 11),
    "vgg-cifar100": ("cifar100", "vgg", 11),
}
"""Data, model and depth."""
VARIANTS = {
    "sgd": ("none", "sgd", None),
    "eg": ("local", "sgd", None),
    "optimistic": ("optimistic", "sgd", None),
    "gradient-noise": ("gradient-noise", "sgd", None),
    "extragradient": ("extragradient", "sgd", None),
    "gaussian": ("gaussian", "sgd", None),
    "smoothout": ("smoothout", "sgd", None),
    "sam": ("sam", "sgd", None),
    "msam": ("msam", "sgd", None),
    "nesterov": ("nesterov", "sgd", None),
    "lars": ("none", "lars", None),
    "eg-lars": ("local", "lars", None),
    "lamb": ("none", "lamb", None),
    "eg-lamb": ("local", "lamb", None),
    "adam": ("none", "adam", None),
    "eg-adam": ("local", "adam", None),
    "postlocal": ("none", "sgd", 16),
    "eg-postlocal": ("local", "sgd", 16),
}
"""Extrapolation, optimizer and period of the local phase."""
TWO_GRADIENTS = {"extragradient", "sam"}
ALONG_MOMENTUM = {"msam", "nesterov"}
REFERENCE_FAMILIES = [family for family in FAMILIES if family != "resnet8"]
shipped = cache(load_config)


TEXT_FAMILIES = {
    "lstm": [
        variant
        for variant in VARIANTS
        if variant not in (*ALONG_MOMENTUM, "lars", "eg-lars", "lamb", "eg-lamb")
    ],
    # Its base is Adam, so that `eg` is EXTRAP-ADAM.
    "transformer": [
        variant
        for variant in VARIANTS
        if variant not in ("sgd", *ALONG_MOMENTUM, "lars", "eg-lars", "eg-adam")
    ],
}
"""Variants that make sense: without momentum there is nothing to follow, and a Transformer is not
trained with SGD."""
ALONE = {"quickstart", "quickstart-sgd", "quickstart-lstm", "quickstart-transformer"}


def test_every_family_is_shipped_with_every_variant_that_makes_sense() -> None:
    found = {family: sorted(variants) for family, variants in preset_families().items()}
    expected = {**{family: list(VARIANTS) for family in FAMILIES}, **TEXT_FAMILIES}
    assert found == {family: sorted(variants) for family, variants in expected.items()}
    combined = {
        f"{family}-{variant}" for family, variants in expected.items() for variant in variants
    }
    assert combined | ALONE == set(preset_names())


@pytest.mark.parametrize(
    ("name", "base"), [("lstm-eg", "sgd"), ("lstm-eg-adam", "adam"), ("transformer-eg", "adam")]
)
def test_extrapolation_leaves_the_base_optimizer_of_a_family_alone(name: str, base: str) -> None:
    config = shipped(name)
    assert (config.optimizer.name, config.extrapolation.name) == (base, "local")
    plain = name.replace("eg-", "") if "eg-" in name else name.replace("eg", base)
    assert config.optimizer == shipped(plain).optimizer


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_and_its_resolved_form_reads_back_equal(name: str) -> None:
    config = shipped(name)
    assert config.preset == name
    text = config_to_yaml(config)
    assert config_from_yaml_text(text, "resolved") == config
    # Other YAML readers take the same values from it.
    assert Config.model_validate(yaml.safe_load(text)) == config
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_composed_preset_is_its_family_and_its_variant_and_nothing_else(
    family: str, variant: str
) -> None:
    name = f"{family}-{variant}"
    config = shipped(name)
    assert config == config_from_yaml_text(
        f"inherits: [family/{family}, variant/{variant}]\npreset: {name}\n", "x"
    )
    assert (config.data.name, config.model.name, config.model.depth) == FAMILIES[family]
    assert (config.extrapolation.name, config.optimizer.name, config.post_local.period) == VARIANTS[
        variant
    ]
    comments = [preset_description(part) for part in (f"family/{family}", f"variant/{variant}")]
    assert preset_description(name) == ": ".join(comments)
    assert ("two gradients a step" in comments[1]) == (config.extrapolation.name in TWO_GRADIENTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_changes_what_it_is_named_after_and_nothing_else(variant: str) -> None:
    extrapolation, optimizer, period = VARIANTS[variant]
    expected = {"extrapolation"} if extrapolation != "none" else set()
    expected |= {"optimizer"} if optimizer != "sgd" or variant in ALONG_MOMENTUM else set()
    expected |= {"schedule"} if optimizer in ("adam", "lamb") else set()
    expected |= {"post_local"} if period else set()
    changed = differences(shipped("resnet-sgd"), shipped(f"resnet-{variant}"))
    assert {line.partition(".")[0] for line in changed} == expected
    schedule = [line for line in changed if line.startswith("schedule.")]
    assert all(line.startswith("schedule.warmup_from: ") for line in schedule)


@pytest.mark.parametrize("variant", ["lars", "lamb", "adam", "postlocal"])
def test_a_combination_is_its_two_variants(variant: str) -> None:
    plain, both = shipped(f"vgg-{variant}"), shipped(f"vgg-eg-{variant}")
    changed = differences(plain, both)
    assert all(line.startswith("extrapolation.") for line in changed)
    assert both.extrapolation == load_config("vgg-eg").extrapolation


@pytest.mark.parametrize("family", REFERENCE_FAMILIES)
def test_the_families_hold_the_reference_settings(family: str) -> None:
    config = shipped(f"{family}-eg-postlocal")
    assert (config.workers, config.worker_batch_size, config.epochs, config.steps) == (
        16,
        128,
        300,
        None,
    )
    assert config.model.width == (16 if config.model.name == "resnet" else 64)
    optimizer, schedule = config.optimizer, config.schedule
    assert optimizer.name == "sgd"
    assert (optimizer.lr, optimizer.base_batch_size, optimizer.lr_scaling) == (0.1, 64, "linear")
    assert (optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == (0.9, True, 1e-4)
    assert (schedule.warmup_epochs, schedule.warmup_from) == (5, 0.1)
    assert (schedule.decay, schedule.milestones, schedule.factor) == ("step", (0.5, 0.75), 0.1)
    assert config.task.augment
    assert config.extrapolation.name == "local"
    assert config.extrapolation.ratio == "1/K"
    assert (config.post_local.period, config.post_local.start) == (16, "first-decay")
    assert config.local_start_fraction() == 0.5


def test_rates_that_do_not_come_from_sgd_are_those_of_their_sources_and_measurements() -> None:
    rates = {
        variant: load_config(f"resnet-{variant}").optimizer.scaled_lr(2048)
        for variant in ("lars", "lamb", "adam")
    }
    assert rates == pytest.approx({"lars": 12.8, "lamb": 0.01, "adam": 0.004})


def test_warm_ups_begin_below_the_rate_that_they_lead_to() -> None:
    for name in preset_names():
        config = shipped(name)
        assert config.schedule.warmup_from <= config.optimizer.scaled_lr(config.batch_size) / 5, (
            name
        )


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


def test_a_file_named_without_its_ending_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr("egtrain.config.files.presets_dir", lambda: tmp_path)
    with pytest.raises(UsageError) as error:
        load_config("x-sgd")
    assert (
        str(error.value) == "presets/family/x.yaml:4: optimizer.momentum must be less than 1, not 2"
    )


def ship(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """Make a folder the one of the shipped presets; `family_a` is the file family/a.yaml."""
    for name, text in files.items():
        path = folder / f"{name.replace('_', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr("egtrain.config.files.presets_dir", lambda: folder)


def test_the_family_with_the_longest_name_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {
        "family_a": "# a\nvariants: [b-c, d]\n",
        "variant_b-c": "# b-c\nseed: 1\n",
        "variant_d": "seed: 2\n",
    }
    ship(
        tmp_path,
        monkeypatch,
        **short,
        **{"family_a-b": "# a-b\nvariants: [c]\n", "variant_c": "# c\nseed: 3\n"},
    )
    assert preset_names() == ["a-b-c", "a-d"]
    assert preset_description("a-b-c") == "a-b: c"
    assert load_config("a-b-c").seed == 3


def test_a_family_has_the_variants_of_the_one_that_it_inherits_or_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = {
        "family_a": "variants: [u, v]\n",
        "family_b": "inherits: [family/a]\n",
        "family_c": "inherits: [family/a]\nvariants: [v]\n",
        "family_d": "seed: 1\n",
    }
    ship(tmp_path, monkeypatch, variant_u="seed: 5\n", variant_v="seed: 6\n", **families)
    assert preset_families() == {"a": ["u", "v"], "b": ["u", "v"], "c": ["v"], "d": []}
    with pytest.raises(UsageError) as error:
        load_config("c-u")
    assert str(error.value) == "unknown preset 'c-u'; 'u' is a variant of a, b only"


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("[u, vv]", "presets/family/a.yaml:2: unknown variant 'vv'; did you mean 'uvv'?"),
        ("[u, 5]", "presets/family/a.yaml:2: unknown variant 5; there are u, uvv"),
        ("u", "presets/family/a.yaml:2: variants must be a list, such as [sgd, eg]"),
    ],
)
def test_wrong_variants_of_a_family_are_reported_with_their_line(
    variants: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(
        tmp_path,
        monkeypatch,
        variant_u="seed: 5\n",
        variant_uvv="seed: 6\n",
        family_a=f"# a\nvariants: {variants}\n",
    )
    with pytest.raises(UsageError) as error:
        preset_names()
    assert str(error.value) == message


def test_a_mistake_in_a_part_of_a_composed_preset_is_reported_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(tmp_path, monkeypatch, family_a="variants: [u]\n", variant_u="# u\n\nsed: 5\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("seed: 1\ninherits: [a-u]\n")
    for preset in ("a-u", mine):
        with pytest.raises(
            UsageError,
            match=r"^presets/variant/u\.yaml:3: unknown key 'sed'; did you mean 'seed'\?$",
        ):
            load_config(preset)


def test_a_file_may_start_from_a_composed_preset_or_a_family_but_has_no_variants(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("inherits: [vgg-eg-lars]\nepochs: 5\n")
    assert load_config(mine) == load_config("vgg-eg-lars", ["epochs=5"]).model_copy(
        update={"preset": "mine"}
    )
    mine.write_text("inherits: [family/vgg]\nepochs: 5\n")
    assert load_config(mine).model == load_config("vgg-sgd").model
    for file in (mine, tmp_path / "family" / "mine.yaml"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("epochs: 5\nvariants: [sgd]\n")
        with pytest.raises(UsageError, match=r"mine\.yaml:2: unknown key 'variants'"):
            load_config(file)
    with pytest.raises(UsageError, match=r"unknown key 'variants'"):
        load_config("resnet-eg", ["variants=[sgd]"])


def test_a_part_can_be_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(presets_dir())
    assert load_config("family/vgg.yaml").model == load_config("family/vgg").model


def test_presets_inside_an_installed_package_are_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "egtrain"
    monkeypatch.setattr("egtrain.config.files.__file__", str(package / "config" / "files.py"))
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
    # Quickstarts first, then one family after the other.
    assert [name for name, _ in rows[: len(ALONE)]] == sorted(ALONE)
    assert [name for name, _ in rows[len(ALONE) :]] == [
        f"{family}-{variant}"
        for family, variants in sorted(preset_families().items())
        for variant in variants
    ]
    assert json.loads(run("--json")) == [{"name": name, "description": text} for name, text in rows]


def test_the_list_is_a_table_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    presets()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) < 55
    text = " ".join(lines)
    parts = [
        *(f"family/{family}" for family in FAMILIES),
        *(f"variant/{variant}" for variant in VARIANTS),
    ]
    for part in [*parts, *ALONE]:
        assert f"{part.rpartition('/')[2]} {preset_description(part)}" in text
    assert "(not lstm, transformer)" in text
    assert "Variants: FAMILY-VARIANT is a preset, such as resnet-eg" in text
    assert "Quickstarts" in lines[0]


def test_the_table_says_which_families_have_a_variant_where_not_all_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    families = {"family_a": "variants: [u, v]\n", "family_b": "variants: [u]\n"}
    ship(
        tmp_path,
        monkeypatch,
        variant_u="# one\nseed: 5\n",
        variant_v="# two\nseed: 6\n",
        **families,
    )
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    presets()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "u one" in lines
    assert "v two (a only)" in lines


def test_a_preset_is_shown_fully_resolved() -> None:
    config = load_config("resnet-eg")
    assert config_from_yaml_text(run("resnet-eg"), "shown") == config
    assert Config.model_validate_json(run("resnet-eg", "--json")) == config


def test_the_schema_is_printed_and_takes_no_name() -> None:
    assert json.loads(run("--schema")) == json_schema()
    with pytest.raises(UsageError, match="leave out 'resnet-eg'"):
        run("--schema", "resnet-eg")


def test_showing_presets_does_not_import_torch() -> None:
    code = (
        "import sys; from egtrain.cli.presets import presets; presets('resnet-eg'); "
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, timeout=60, check=False, capture_output=True
    )
    assert result.returncode == 0, result.stderr.decode()
