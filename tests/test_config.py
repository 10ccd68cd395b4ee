"""The configuration: what is accepted, what it means, and what errors say."""

import contextlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from egtrain.build import (
    build_direction,
    build_model,
    build_optimizer,
    worker_state_bytes,
)
from egtrain.config.files import config_from_yaml_text, load_config
from egtrain.config.models import models_of
from egtrain.config.optimizers import SgdOptimizer
from egtrain.config.schema import UNIONS, Config, config_to_yaml, differences, json_schema
from egtrain.config.yaml_text import parse_settings, parse_value, write_settings
from egtrain.data.sets import IMAGES
from egtrain.errors import UsageError
from egtrain.optim import MSAM

MODELS = ", ".join(UNIONS["model"])
DIRECTIONS = UNIONS["extrapolation"]
ALONG_GRADIENT = [name for name, keys in DIRECTIONS.items() if "ratio" in keys.model_fields]
IMAGE_MODELS = " or ".join(models_of("image"))
IMAGE_DATA = f"{', '.join(IMAGES)}, synthetic, npz:FILE or folder:DIR"


def complaint(text: str, source: str = "x.yaml") -> str:
    with pytest.raises(UsageError) as error:
        config_from_yaml_text(text, source)
    return str(error.value)


def set_complaint(*overrides: str, preset: str = "resnet-eg") -> str:
    with pytest.raises(UsageError) as error:
        load_config(preset, list(overrides))
    return str(error.value)


# What a configuration means


def test_defaults_are_the_reference_settings_without_extrapolation() -> None:
    config = Config()
    assert config.batch_size == 2048
    assert config.optimizer.scaled_lr(config.batch_size) == pytest.approx(3.2)
    assert config.extrapolation.name == "none"


@pytest.mark.parametrize(
    ("scaling", "base", "rate"),
    [("linear", 64, 3.2), ("sqrt", 64, 0.1 * math.sqrt(32)), ("none", 64, 0.1)],
)
def test_scaled_lr_follows_its_rule(scaling: str, base: int, rate: float) -> None:
    optimizer = SgdOptimizer(lr=0.1, base_batch_size=base, lr_scaling=scaling)  # type: ignore[arg-type]
    assert optimizer.scaled_lr(2048) == pytest.approx(rate, rel=1e-12)
    assert optimizer.scaled_lr(base) == 0.1


@pytest.mark.parametrize("scaling", ["linear", "sqrt", "none"])
def test_without_a_base_batch_size_the_rate_is_used_as_it_is(scaling: str) -> None:
    optimizer = SgdOptimizer(lr=0.4, base_batch_size=None, lr_scaling=scaling)  # type: ignore[arg-type]
    assert optimizer.scaled_lr(2048) == 0.4


@pytest.mark.parametrize(
    ("name", "rate"),
    [("sgd", 3.2), ("lars", 2.4), ("lamb", 0.01), ("adam", 0.004), ("adamw", 0.004)],
)
def test_each_optimizer_has_a_default_rate_of_its_own(name: str, rate: float) -> None:
    optimizer = config_from_yaml_text(f"optimizer: {{name: {name}}}\n", "x.yaml").optimizer
    assert optimizer.scaled_lr(2048) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "fraction"),
    [
        ("{}", None),
        ("{start: 0.3}", None),
        ("{period: 4}", 0.5),
        ("{period: 1, start: 0.3}", 0.3),
        ("{period: 4, start: 0}", 0),
    ],
)
def test_the_local_phase_begins_at_the_first_decay_or_where_it_is_set(
    keys: str, fraction: float | None
) -> None:
    assert (
        config_from_yaml_text(f"post_local: {keys}\n", "x.yaml").local_start_fraction() == fraction
    )


def test_a_configuration_cannot_be_changed() -> None:
    config = load_config("resnet-eg")
    for section, key in (
        (config, "seed"),
        (config.optimizer, "lr"),
        (config.extrapolation, "ratio"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)
    assert hash(config) == hash(load_config("resnet-eg"))


def test_ratio_one_over_k_follows_the_number_of_workers() -> None:
    config = load_config("resnet-eg", ["workers=64"])
    assert config.extrapolation.name == "local"
    assert config.extrapolation.ratio == "1/K"
    assert config.extrapolation.settings(config.workers)["ratio"] == 1 / 64
    given_number = load_config("resnet-eg", ["extrapolation.ratio=0.25"]).extrapolation
    assert given_number.name == "local"
    assert given_number.settings(64)["ratio"] == 0.25
    absolute = load_config("resnet-eg", ["extrapolation.rate=0.25"]).extrapolation
    assert absolute.name == "local"
    assert absolute.settings(64)["ratio"] is None


def test_every_key_is_described_in_the_json_schema() -> None:
    schema = json_schema()
    json.dumps(schema, allow_nan=False)
    sections = {name for name, value in schema["properties"].items() if "$ref" in value}
    assert sections == {"data", "init", "schedule", "post_local", "checkpoint", "log"}
    assert "inherits" in schema["properties"]
    undescribed = [
        key
        for model in (schema, *schema["$defs"].values())
        for key, value in model["properties"].items()
        if key not in sections and "description" not in value
    ]
    assert undescribed == []
    open_ended = [n for n, model in schema["$defs"].items() if model["additionalProperties"]]
    assert open_ended == ["UserSettings"], "the keys of a task file are its own"


@pytest.mark.parametrize("section", UNIONS)
def test_the_json_schema_offers_every_member_and_lets_the_name_be_left_out(section: str) -> None:
    schema = json_schema()
    members = [ref["$ref"].rpartition("/")[2] for ref in schema["properties"][section]["anyOf"]]
    assert members == [member.__name__ for member in UNIONS[section].values()]
    assert not {"oneOf", "discriminator"} & schema["properties"][section].keys()
    assert all("name" not in schema["$defs"][member].get("required", []) for member in members)


def test_differences_name_each_changed_key_once() -> None:
    a = load_config("resnet-eg")
    b = load_config(
        "resnet-sgd", ["optimizer.lr=0.2", "schedule.milestones=[0.5]", "data.offline=true"]
    )
    assert differences(a, a) == []
    assert differences(a, b) == [
        "data.offline: false -> true",
        "optimizer.lr: 0.1 -> 0.2",
        "schedule.milestones: [0.5, 0.75] -> [0.5]",
        "extrapolation.name: local -> none",
        "extrapolation.until: null -> (not set)",
        "extrapolation.ratio: 1/K -> (not set)",
        "extrapolation.rate: null -> (not set)",
        "extrapolation.size: null -> (not set)",
        "extrapolation.scaling: none -> (not set)",
        "extrapolation.precondition: base -> (not set)",
    ]


def test_differences_of_another_optimizer_name_the_keys_of_both() -> None:
    changed = differences(
        load_config("resnet-sgd"), load_config("resnet-sgd", ["optimizer.name=lars"])
    )
    assert changed[0] == "optimizer.name: sgd -> lars"
    assert "optimizer.nesterov: true -> (not set)" in changed
    assert "optimizer.trust_coefficient: (not set) -> 0.001" in changed
    assert not any(
        line.startswith(("optimizer.momentum", "optimizer.weight_decay")) for line in changed
    )


def test_importing_the_configuration_does_not_import_torch() -> None:
    code = (
        "import sys, egtrain.config.files as c; c.load_config('resnet-eg'); "
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False).returncode
        == 0
    )


# Reading and writing YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("+3", 3),
        ("010", 10),
        ("0x10", 16),
        ("null", None),
        ("~", None),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("1/K", "1/K"),
        ("npz:/a b/c#d.npz", "npz:/a b/c#d.npz"),
        ("*x & !y %z", "*x & !y %z"),
        ("'1e-3'", "1e-3"),
        ('"a\\tb"', "a\tb"),
        ("[0.5, 1e-3, null, 'x']", [0.5, 0.001, None, "x"]),
        ("[]", []),
    ],
)
def test_the_right_hand_side_of_an_override_is_a_yaml_scalar_or_list(
    text: str, value: object
) -> None:
    parsed = parse_value(text, "--set a=" + text)
    assert parsed == value
    assert type(parsed) is type(value)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)


@settings(deadline=None, max_examples=60, database=None)
@given(SCALARS, st.lists(SCALARS, max_size=3))
def test_what_is_written_reads_back_equal(value: object, items: list[object]) -> None:
    values = {"value": value, "group": {"items": items}}
    assert parse_settings(write_settings(values), "x.yaml").values == values


@pytest.mark.parametrize(
    "text", ["null", "1e-3", "yes", " a ", "a: b", "#", "é\u0085\u2028\\\"'", "\U0001f600", "", "~"]
)
def test_text_that_looks_like_something_else_survives_the_round_trip(text: str) -> None:
    config = Config.model_validate({"data": {"dir": text}})
    assert config_from_yaml_text(config_to_yaml(config), "x.yaml") == config


@pytest.mark.parametrize(
    "value", ["yes", "Off", "n", "null", "1/K", "a: b", 1e-05, 1e22, 0.1, None, True, 7]
)
def test_readers_of_yaml_1_1_take_the_same_value(value: object) -> None:
    assert yaml.safe_load(write_settings({"key": value})) == {"key": value}


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 7\r\noptimizer:\r\n  lr: 0.3\r\n")
    config = load_config(file)
    assert (config.seed, config.optimizer.lr) == (7, 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1\nseed: 2\n",
            "x.yaml:2: duplicate key 'seed', first set in line 1; delete one of them",
        ),
        (
            "optimizer:\n  lr: 1\n  momentum: 0\n  lr: 2\n",
            "x.yaml:4: duplicate key 'optimizer.lr', first set in line 2; delete one of them",
        ),
        ("seed: 1\noptimizer:\n\tlr: 1\n", "x.yaml:3: not valid YAML"),
        ("seed: [1\n", "x.yaml:2: not valid YAML"),
        ("a: 1\n---\nb: 1\n", "x.yaml:2: a second document starts here"),
        ("seed: 1\nepochs: \x07\n", "x.yaml:2: character #x0007 is not allowed"),
        ("- 1\n- 2\n", "x.yaml:1: the top level must be 'key: value' lines, not a list"),
        ("just text\n", "x.yaml:1: the top level must be 'key: value' lines, not 'just text'"),
        ("seed: 1\n? [a, b]\n: 1\n", "x.yaml:2: a key must be a plain word"),
        ('data:\n  dir: "\\UFFFFFFFF"\n', "x.yaml"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    assert complaint(text).startswith(message)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n"])
def test_a_file_without_settings_is_refused(text: str) -> None:
    assert complaint(text) == (
        "x.yaml:1: the file holds no settings; write 'key: value' lines or 'inherits: [PRESET]'"
    )


def test_an_alias_bomb_is_refused_at_its_first_anchor() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert complaint("seed: 1\n" + bomb).startswith(
        "x.yaml:2: anchors and aliases (&name, *name) are not allowed"
    )
    assert complaint("seed: *nothing\n").startswith("x.yaml:1: anchors and aliases")


def test_tags_are_refused_and_nothing_is_constructed(tmp_path: Path) -> None:
    witness = tmp_path / "made"
    text = f"seed: 1\ntask: !!python/object/apply:os.mkdir ['{witness}']\n"
    assert complaint(text).startswith(
        "x.yaml:2: the tag 'tag:yaml.org,2002:python/object/apply:os.mkdir' is not allowed"
    )
    assert complaint("!!python/name:os.system seed: 1\n").startswith("x.yaml:1: ")
    assert not witness.exists()


@pytest.mark.parametrize(
    "nested", ["[" * 100_000, "a: {" * 50_000, "- " * 100_000, "seed: " + "[" * 20 + "]" * 20]
)
def test_deep_nesting_is_refused_without_running_out_of_stack(nested: str) -> None:
    assert complaint(nested).startswith("x.yaml:1: ")


@settings(deadline=None, max_examples=60, database=None)
@given(
    st.text(
        alphabet=st.sampled_from("ab:-#?!&*<|>%@'\"[]{},\n\t \\x0.~1eé\u2028\ufeff\x00\ud800"),
        max_size=40,
    )
)
def test_any_text_is_either_read_or_refused_as_a_usage_error(text: str) -> None:
    for read in (lambda: parse_settings(text, "x.yaml"), lambda: parse_value(text, "--set a=b")):
        with contextlib.suppress(UsageError):
            read()


def test_a_file_over_a_megabyte_or_of_countless_values_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "big.yaml"
    file.write_text("seed: 1\n" + "# filler\n" * 120_000)
    with pytest.raises(UsageError, match=r"big\.yaml:\d+: larger than 1,000,000 bytes"):
        load_config(file)
    assert complaint("#" * 1_000_001).startswith("x.yaml: larger than 1,000,000 bytes")
    assert complaint("seed: 1\nx: [" + "1," * 400_000 + "]").startswith(
        "x.yaml:2: more than 10,000 values"
    )


def test_a_file_that_is_not_utf8_is_refused_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes("seed: 1\ndata:\n  dir: /données\n".encode("latin-1"))
    with pytest.raises(
        UsageError, match=r"latin\.yaml:3: byte 0xe9 is not UTF-8; save the file as UTF-8"
    ):
        load_config(file)


def test_paths_that_are_no_readable_file_are_refused(tmp_path: Path) -> None:
    for path, problem in (
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "this is a folder"),
        (tmp_path / ("x" * 5000 + ".yaml"), "cannot be read"),
    ):
        with pytest.raises(UsageError, match=problem):
            load_config(path)
    with pytest.raises(UsageError, match="unknown preset"):
        load_config("x" * 100_000)


# Wrong keys and values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimzer:\n  lr: 1\n",
            "x.yaml:1: unknown key 'optimzer.lr'; did you mean 'optimizer.lr'?",
        ),
        (
            "seed: 1\n\noptimizer:\n  leanring: 1\n  lr: 1\n",
            "x.yaml:4: unknown key 'optimizer.leanring'",
        ),
        (
            "optimizer:\n  momentm: 0.9\n",
            "x.yaml:2: unknown key 'optimizer.momentm'; did you mean 'optimizer.momentum'?",
        ),
        ("lr: 1\n", "x.yaml:1: unknown key 'lr'; did you mean 'optimizer.lr'?"),
        ("worker: 1\n", "x.yaml:1: unknown key 'worker'; did you mean 'workers'?"),
        ("zzz: 1\n", "x.yaml:1: unknown key 'zzz'; `egtrain presets --schema` lists all keys"),
        ("1: 2\n", "x.yaml:1: unknown key '1'; `egtrain presets --schema` lists all keys"),
        ("<<: {seed: 1}\n", "x.yaml:1: unknown key '<<.seed'"),
        (
            "optimizer.lr: 1\n",
            "x.yaml:1: 'optimizer.lr' must be nested; write 'optimizer:' and, indented in the "
            "next line, 'lr:'",
        ),
        (
            "seed: 1\noptimizer:\nepochs: 1\n",
            "x.yaml:2: optimizer must be a group of keys, such as name, not null",
        ),
        (
            "extrapolation: local\n",
            "x.yaml:1: extrapolation must be a group of keys, such as name, not 'local'",
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_a_suggestion(text: str, message: str) -> None:
    assert complaint(text).startswith(message)


@pytest.mark.parametrize(
    ("override", "rest"),
    [
        ("epochs=many", "epochs must be a whole number, not 'many'"),
        ("epochs=2.0", "epochs must be a whole number, not 2.0"),
        ("epochs=true", "epochs must be a whole number, not true"),
        ("epochs=null", "epochs must be a whole number, not null"),
        ("epochs=0", "epochs must be at least 1, not 0"),
        ("epochs=[1]", "epochs must be a whole number, not a list"),
        ("workers=9999999999", "workers must be at most 2,147,483,647, not 9999999999"),
        ("seed=-1", "seed must be at least 0, not -1"),
        ("compile=yes", "compile must be true or false, not 'yes'"),
        ("compile=1", "compile must be true or false, not 1"),
        (
            "schedule.decay=linear",
            "schedule.decay must be step, cosine, inverse-sqrt or constant, not 'linear'",
        ),
        ("data.dir=5", "data.dir must be text (write it in quotes), not 5"),
        (
            "data.name=cifar-10",
            f"data.name must be {IMAGE_DATA}, not 'cifar-10'; did you mean 'cifar10'?",
        ),
        (
            "data.name=npz:",
            f"data.name must be {IMAGE_DATA}, not 'npz:'",
        ),
        ("data.loaders=2", "data.loaders is for task files; other data need none: remove it"),
        ("data.image_size=32", "data.image_size is for folder:DIR, not for other data; remove it"),
        ("model.depth=21", "model.depth must be 6n + 2, such as 20 or 26, not 21"),
        ("optimizer.lr=0", "optimizer.lr must be greater than 0, not 0"),
        ("optimizer.lr='0.1'", "optimizer.lr must be a number, not '0.1'"),
        ("optimizer.lr=1e308", "optimizer.lr is too large for batches of 2048; lower it"),
        ("optimizer.lr=nan", "'nan' is not a finite number; write a finite one, or null for none"),
        (
            "optimizer.lr=-.INF",
            "'-.INF' is not a finite number; write a finite one, or null for none",
        ),
        ("optimizer.lr=1e999", "'1e999' is not a finite number; write a smaller one"),
        ("optimizer.momentum=1", "optimizer.momentum must be less than 1, not 1"),
        ("schedule.milestones=0.5", "schedule.milestones must be a list, not 0.5"),
        ("schedule.milestones=[0.5, x]", "schedule.milestones.1 must be a number, not 'x'"),
        (
            "schedule.milestones=[0.75, 0.5]",
            "schedule.milestones must be increasing fractions of the run between 0 and 1, such "
            "as [0.5, 0.75], "
            "not [0.75, 0.5]",
        ),
        (
            "schedule.milestones=[0.5, 1]",
            "schedule.milestones must be increasing fractions of the run between 0 and 1, such "
            "as [0.5, 0.75], "
            "not [0.5, 1.0]",
        ),
        ("extrapolation.ratio=-1", "extrapolation.ratio must be at least 0 or 1/K, not -1"),
        ("extrapolation.ratio=1/16", "extrapolation.ratio must be a number or 1/K, not '1/16'"),
        ("extrapolation.until=0", "extrapolation.until must be greater than 0, not 0"),
        ("log.every=0", "log.every must be at least 1, not 0"),
        ("log.every=" + "9" * 5000, "a number of 5000 characters is too long; write it shorter"),
        ("optimzer.lr=1", "unknown key 'optimzer.lr'; did you mean 'optimizer.lr'?"),
        (
            "data.name=my/pictures.npz",
            f"data.name must be {IMAGE_DATA}, not 'my/pictures.npz'; "
            "did you mean 'npz:my/pictures.npz'?",
        ),
        ("lr=1", "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        ("optimizer=1", "'optimizer' is a group; set one of its keys, such as optimizer.name"),
        ("optimizer.lr.x=1", "unknown key 'optimizer.lr.x'; did you mean 'optimizer.lr'?"),
        (
            "inherits=[resnet-eg]",
            "inherits belongs in a file; name the preset with --preset instead",
        ),
        ("seed", "write KEY=VALUE, such as optimizer.lr=0.2"),
        ("=1", "write KEY=VALUE, such as optimizer.lr=0.2"),
        ("seed=", "the value is missing; write null for none, or '' for empty text"),
        ("seed={a: 1}", "a mapping cannot be set; set its keys one by one"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(override: str, rest: str) -> None:
    message = set_complaint(override)
    assert message.startswith(f"--set {override}"[:200] + ": " + rest)
    assert "\n" not in message


def test_a_file_of_images_is_not_suggested_where_text_is_trained_on() -> None:
    message = set_complaint("data.name=my/pictures.npz", preset="quickstart-lstm")
    assert message.endswith("text:FOLDER, not 'my/pictures.npz'")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_in_python_too(value: float) -> None:
    with pytest.raises(ValidationError):
        SgdOptimizer(weight_decay=value)


def test_numbers_that_are_not_finite_are_refused_with_their_line() -> None:
    assert complaint("seed: 1\noptimizer:\n  lr: .nan\n").startswith(
        "x.yaml:3: '.nan' is not a finite number"
    )
    assert complaint("schedule:\n  milestones:\n  - 0.1\n  - .inf\n").startswith(
        "x.yaml:4: '.inf' is not a finite"
    )


@pytest.mark.parametrize("preset", ["../elsewhere", "/tmp/x", "a\nb", "x" * 201])
def test_the_preset_is_a_name_and_no_path(preset: str) -> None:
    assert complaint("seed: 1\n" + write_settings({"preset": preset})).startswith(
        "x.yaml:2: preset must be a name"
    )


def test_terminal_escapes_in_a_key_are_not_passed_on() -> None:
    assert "\x1b" not in complaint('"\\e[31mseed": 1\n')


def test_an_item_of_a_list_is_reported_with_its_own_line() -> None:
    assert complaint("schedule:\n  milestones:\n  - 0.1\n  - x\n") == (
        "x.yaml:4: schedule.milestones.1 must be a number, not 'x'"
    )


# Overrides


def test_overrides_are_applied_and_the_last_of_equal_keys_wins() -> None:
    config = load_config(
        "resnet-eg",
        [
            "optimizer.lr=1e-3",
            "schedule.milestones=[0.25, 0.5]",
            "optimizer.base_batch_size=null",
            "seed=1",
            "seed = 2",
        ],
    )
    assert config.optimizer.lr == 0.001
    assert config.schedule.milestones == (0.25, 0.5)
    assert config.optimizer.base_batch_size is None
    assert config.seed == 2
    assert config.optimizer.momentum == 0.9


# Extrapolation


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "{name: local, ratio: 0.1, rate: 0.1}",
            "extrapolation.ratio and extrapolation.rate exclude each other",
        ),
        (
            "{name: extragradient, rate: 0.1, size: 0.1}",
            "extrapolation.rate and extrapolation.size exclude each other",
        ),
        (
            "{name: local, size: 0.1}",
            "extrapolation.size needs extrapolation.scaling layer or filter",
        ),
        (
            "{name: optimistic, scaling: layer}",
            "extrapolation.scaling 'layer' needs extrapolation.size; set it, such as 0.05",
        ),
        (
            "{name: optimistic, scaling: filter, ratio: 1/K}",
            "extrapolation.scaling 'filter' needs extrapolation.size and no extrapolation.ratio; "
            "set it",
        ),
        (
            "{name: optimistic, scaling: layer, ratio: 0.1, size: 0.1}",
            "extrapolation.scaling 'layer' needs",
        ),
        (
            "{name: gaussian}",
            "extrapolation 'gaussian' needs extrapolation.size; set it, such as 0.05",
        ),
        (
            "{name: gaussian, size: 0.1, ratio: 0.1}",
            "extrapolation 'gaussian' has no key 'extrapolation.ratio'; remove it, or set "
            f"extrapolation.name to {' or '.join(ALONG_GRADIENT)}",
        ),
        (
            "{until: 0.5}",
            "extrapolation 'none' has no key 'extrapolation.until'; remove it, or set "
            "extrapolation.name",
        ),
        (
            "{name: locl}",
            f"extrapolation.name must be one of {', '.join(DIRECTIONS)}, not 'locl'; did you "
            "mean 'local'?",
        ),
        ("{name: null}", "extrapolation.name must be one of none, local"),
        ("{name: [a]}", "extrapolation.name must be one of none, local"),
        ("{name: sam, radius: -1}", "extrapolation.radius must be at least 0, not -1"),
    ],
)
def test_an_impossible_extrapolation_is_refused(keys: str, message: str) -> None:
    assert complaint(f"seed: 1\nextrapolation: {keys}\n").startswith(f"x.yaml:2: {message}")


@pytest.mark.parametrize("name", ["local", "optimistic", "gradient-noise", "extragradient"])
def test_the_length_along_a_gradient_is_one_of_three(name: str) -> None:
    for keys in ("", ", ratio: 0.5", ", ratio: 1/K", ", rate: 0", ", size: 0.1, scaling: layer"):
        config = config_from_yaml_text(f"extrapolation: {{name: {name}{keys}}}\n", "x.yaml")
        length = config.extrapolation
        assert length.name == name
        given = [getattr(length, key) for key in ("ratio", "rate", "size")]
        assert sum(value is not None for value in given) == 1
        assert config_from_yaml_text(config_to_yaml(config), "again") == config
    default = config_from_yaml_text(f"extrapolation: {{name: {name}}}\n", "x.yaml").extrapolation
    assert getattr(default, "ratio", None) == "1/K"


def test_another_extrapolation_drops_what_was_inherited_for_the_old_one() -> None:
    noise = load_config("resnet-eg", ["extrapolation.size=0.1", "extrapolation.name=gaussian"])
    assert noise.extrapolation.model_dump() == {
        "name": "gaussian",
        "size": 0.1,
        "scaling": "filter",
        "norm_and_bias": False,
        "until": None,
    }
    assert load_config("resnet-gaussian", ["extrapolation.name=none"]).extrapolation.name == "none"
    local = load_config("resnet-gaussian", ["extrapolation.name=local"]).extrapolation
    assert local.name == "local"
    assert (local.ratio, local.size, local.scaling) == ("1/K", None, "none")


def test_the_same_extrapolation_name_keeps_what_was_inherited() -> None:
    config = load_config(
        "resnet-gaussian", ["extrapolation.name=gaussian", "extrapolation.until=0.5"]
    )
    assert config.extrapolation.model_dump()["size"] == 0.05


def test_a_length_replaces_the_inherited_one() -> None:
    rate = load_config("resnet-eg", ["extrapolation.rate=0.1"]).extrapolation
    assert rate.name == "local"
    assert (rate.ratio, rate.rate) == (None, 0.1)
    size = load_config(
        "resnet-eg", ["extrapolation.scaling=layer", "extrapolation.size=0.02"]
    ).extrapolation
    assert size.name == "local"
    assert (size.ratio, size.size, size.scaling) == (None, 0.02, "layer")


def test_a_missing_size_points_at_the_new_name_and_not_at_the_preset() -> None:
    assert set_complaint("extrapolation.name=smoothout") == (
        "--set extrapolation.name=smoothout: extrapolation 'smoothout' needs "
        "extrapolation.size; set it, such as 0.05"
    )


def test_two_lengths_in_one_command_are_refused_in_either_order() -> None:
    for overrides in (
        ["extrapolation.ratio=0.1", "extrapolation.rate=0.1"],
        ["extrapolation.rate=0.1", "extrapolation.ratio=0.1"],
    ):
        assert "exclude each other" in set_complaint(*overrides)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("{}", "needs a base without look-ahead; set optimizer.nesterov to false"),
        (
            "{momentum: 0}",
            "needs a base with momentum; set optimizer.momentum above 0, such as 0.9",
        ),
        (
            "{name: lars, momentum: 0}",
            "needs a base with momentum; set optimizer.momentum above 0, such as 0.9",
        ),
        (
            "{name: adamw, beta1: 0}",
            "needs a base with momentum; set optimizer.beta1 above 0, such as 0.9",
        ),
    ],
)
def test_a_shift_along_the_momentum_needs_one(base: str, message: str) -> None:
    text = f"optimizer: {base}\nextrapolation:\n  radius: 1\n  name: msam\n"
    assert complaint(text) == f"x.yaml:4: extrapolation 'msam' {message}"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("{}", "needs a base without look-ahead; set optimizer.nesterov to false"),
        (
            "{nesterov: false, momentum: 0}",
            "needs a base with momentum; set optimizer.momentum above 0, such as 0.9",
        ),
        *(
            (f"{{name: {name}}}", "needs the momentum of sgd; set optimizer.name to sgd")
            for name in ("lars", "lamb", "adam", "adamw")
        ),
    ],
)
def test_nesterovs_look_ahead_needs_sgd_with_momentum_that_does_not_look_ahead(
    base: str, message: str
) -> None:
    text = f"optimizer: {base}\nextrapolation:\n  name: nesterov\n"
    assert complaint(text) == f"x.yaml:3: extrapolation 'nesterov' {message}"


@pytest.mark.parametrize(
    "base", ["{nesterov: false}", "{name: lars}", "{name: lamb}", "{name: adam}"]
)
def test_a_shift_along_the_momentum_goes_with_every_base_that_has_one(base: str) -> None:
    config = config_from_yaml_text(f"optimizer: {base}\nextrapolation: {{name: msam}}\n", "x.yaml")
    assert config.extrapolation.name == "msam"


# The local phase


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("post_local: {period: 0}", "1: post_local.period must be at least 1, not 0"),
        (
            "post_local: {start: 1.0}",
            "1: post_local.start must be less than 1 or first-decay, not 1.0",
        ),
        (
            "post_local: {start: soon}",
            "1: post_local.start must be a number or first-decay, not 'soon'",
        ),
        (
            "schedule: {decay: cosine}\npost_local: {period: 4}",
            "2: post_local.start 'first-decay' needs schedule.decay step with a milestone; set "
            "post_local.start to a "
            "fraction of the run, such as 0.5",
        ),
        (
            "schedule: {milestones: []}\npost_local: {period: 4}",
            "2: post_local.start 'first-decay' needs",
        ),
        (
            "post_local: {period: 4}\nextrapolation: {name: sam, until: 0.6}",
            "2: extrapolation is defined while gradients are averaged: set extrapolation.until "
            "to at most 0.5",
        ),
        (
            "extrapolation: {name: local}\npost_local: {period: 4, start: 0}",
            "2: extrapolation is defined while gradients are averaged: set post_local.start "
            "above 0, or "
            "extrapolation.name to none",
        ),
    ],
)
def test_an_impossible_local_phase_is_refused(text: str, message: str) -> None:
    assert complaint(text + "\n").startswith(f"x.yaml:{message}")


def test_a_local_phase_that_never_comes_asks_for_nothing() -> None:
    text = (
        "schedule: {decay: cosine}\nextrapolation: {name: sam, until: 0.9}\n"
        "post_local: {start: 0}\n"
    )
    assert config_from_yaml_text(text, "x.yaml").local_start_fraction() is None


# Sections whose keys depend on their name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimizer: {name: lars, nesterov: true}",
            "optimizer 'lars' has no key 'optimizer.nesterov'; remove it, or set optimizer.name "
            "to sgd",
        ),
        (
            "optimizer: {trust_coefficient: 1}",
            "optimizer 'sgd' has no key 'optimizer.trust_coefficient'; remove it, or set "
            "optimizer.name to lars",
        ),
        (
            "optimizer: {name: adam, adapt_norm_and_bias: true}",
            "optimizer 'adam' has no key 'optimizer.adapt_norm_and_bias'; remove it, or set "
            "optimizer.name to lars or "
            "lamb",
        ),
        (
            "model: {name: vgg, shortcut: identity}",
            "model 'vgg' has no key 'model.shortcut'; remove it, or set model.name to resnet",
        ),
        (
            "optimizer: {name: lamp}",
            "optimizer.name must be one of sgd, lars, lamb, adam, adamw, not 'lamp'; did you",
        ),
        (
            "model: {name: vg}",
            f"model.name must be one of {MODELS}, not 'vg'; did you mean 'vgg'?",
        ),
        ("model: {name: 11}", f"model.name must be one of {MODELS}, not 11"),
        ("model: {name: vgg, depth: 16}", "model.depth must be 11, not 16"),
        ("model: {name: vgg, widht: 8}", "unknown key 'model.widht'; did you mean 'model.width'?"),
        (
            "optimizer: {name: lars, trust_coefficient: 0}",
            "optimizer.trust_coefficient must be greater than 0, not 0",
        ),
        ("optimizer: {name: lars, lr: -1}", "optimizer.lr must be greater than 0, not -1"),
        ("optimizer: {name: adam, beta2: 1}", "optimizer.beta2 must be less than 1, not 1"),
        ("optimizer: {name: adam, eps: 0}", "optimizer.eps must be greater than 0, not 0"),
        (
            "optimizer: {name: lamb, weight_decay: -1}",
            "optimizer.weight_decay must be at least 0, not -1",
        ),
        (
            "optimizer: {name: lamb, clip_norm: 0}",
            "optimizer.clip_norm must be greater than 0, not 0",
        ),
        (
            "extrapolation: {name: extragradient, every: 0}",
            "extrapolation.every must be at least 1, not 0",
        ),
        (
            "extrapolation: {name: local, every: 2}",
            "extrapolation 'local' has no key 'extrapolation.every'; remove it, or set "
            "extrapolation.name to extragradient or "
            "sam",
        ),
        (
            "extrapolation: {name: local, precondition: yes}",
            "extrapolation.precondition must be base or none, not 'yes'",
        ),
        (
            "extrapolation: {name: msam, radius: -1}",
            "extrapolation.radius must be at least 0, not -1",
        ),
    ],
)
def test_a_key_or_value_of_another_member_is_refused(text: str, message: str) -> None:
    assert complaint(f"seed: 1\n{text}\n").startswith(f"x.yaml:2: {message}")


TEXTS = {
    task: {"task": {"name": task}, "model": {"name": model}, "data": {"name": "synthetic"}}
    for task, model in (("language", "lstm"), ("translation", "transformer"))
}
"""The fewest settings for a run of another task."""


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section in UNIONS for name in UNIONS[section]]
)
def test_every_member_survives_the_round_trip(section: str, name: str) -> None:
    further = {"gaussian": {"size": 0.1}, "smoothout": {"size": 0.1}}.get(name, {})
    own = {"task": {"width": 3}, **{key: {"name": "user"} for key in ("task", "model", "data")}}
    base: dict[str, Any] = {
        "user": own,
        **{key: {"optimizer": {"nesterov": False}} for key in ("msam", "nesterov")},
        **dict.fromkeys(("language", "lstm"), TEXTS["language"]),
        **dict.fromkeys(("translation", "transformer"), TEXTS["translation"]),
    }.get(name, {})
    text = write_settings({**base, section: {**base.get(section, {}), "name": name, **further}})
    config = config_from_yaml_text(text, "x.yaml")
    assert config_from_yaml_text(config_to_yaml(config), "again") == config
    assert config_to_yaml(config).count(f"{section}:\n  name: {name}\n") == 1
    assert hash(config) == hash(config_from_yaml_text(text, "x.yaml"))


@pytest.mark.parametrize("name", ["lars", "lamb", "adam", "adamw"])
def test_another_optimizer_drops_all_that_was_set_for_the_old_one(name: str) -> None:
    fresh = config_from_yaml_text(f"optimizer: {{name: {name}}}\n", "x.yaml").optimizer
    assert load_config("resnet-eg", [f"optimizer.name={name}"]).optimizer == fresh
    # What the layer sets itself stays, wherever it stands among the overrides.
    chosen = load_config("resnet-eg", ["optimizer.lr=0.02", f"optimizer.name={name}"]).optimizer
    assert chosen == fresh.model_copy(update={"lr": 0.02})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.name=lstm",
            f"task 'image' has no model 'lstm'; set model.name to {IMAGE_MODELS}, or "
            "task.name to language",
        ),
        (
            "data.name=wikitext2",
            f"data.name must be {IMAGE_DATA}, not 'wikitext2'",
        ),
        (
            "task.bptt=3",
            "task 'image' has no key 'task.bptt'; remove it, or set task.name to language",
        ),
    ],
)
def test_task_model_and_data_must_fit_together(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load_config("resnet-eg", [override])


def test_a_text_has_no_validation_split_to_choose() -> None:
    with pytest.raises(
        UsageError, match=r"data.validation must be 0, because texts have a validation part"
    ):
        load_config("lstm-eg", ["data.validation=10"])


def test_the_width_of_a_transformer_is_shared_by_its_heads() -> None:
    with pytest.raises(
        UsageError, match=r"model.width must be a multiple of twice model.heads, such as 64, not 60"
    ):
        load_config("transformer-eg", ["model.width=60"])


def test_another_model_drops_what_was_set_for_the_old_one() -> None:
    assert load_config("resnet-eg", ["model.name=vgg"]).model.model_dump() == {
        "name": "vgg",
        "depth": 11,
        "width": 64,
    }


def test_the_same_name_and_a_name_left_out_keep_what_was_inherited(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="optimizer: {name: lars, lr: 0.7}\n",
        child="inherits: base\noptimizer: {momentum: 0.5}\n",
    )
    for overrides in ([], ["optimizer.name=lars"]):
        optimizer = load_config(tmp_path / "child.yaml", overrides).optimizer
        assert optimizer.name == "lars"
        assert (optimizer.lr, optimizer.momentum) == (0.7, 0.5)
    # `sgd` is what a section without a name is, so naming it changes nothing.
    write(
        tmp_path, plain="optimizer: {lr: 0.7}\n", named="inherits: plain\noptimizer: {name: sgd}\n"
    )
    assert load_config(tmp_path / "named.yaml").optimizer.lr == 0.7


# What becomes of it


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
        (["optimizer.momentum=0"], {"momentum": 0, "nesterov": False}),
        (
            [
                "optimizer.name=lars",
                "optimizer.trust_coefficient=0.02",
                "optimizer.adapt_norm_and_bias=true",
            ],
            {
                "momentum": 0.9,
                "trust_coefficient": 0.02,
                "adapt_norm_and_bias": True,
                "decay_norm_and_bias": False,
            },
        ),
        (
            ["optimizer.name=lamb", "optimizer.decay_norm_and_bias=true"],
            {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "decay_norm_and_bias": True},
        ),
        (
            ["optimizer.name=adam", "optimizer.beta1=0.8"],
            {"betas": (0.8, 0.999), "eps": 1e-8, "weight_decay": 0},
        ),
        (
            ["optimizer.name=adamw", "optimizer.eps=1e-3"],
            {"betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.01},
        ),
    ],
)
def test_the_optimizer_is_built_as_it_is_set(
    overrides: list[str], expected: dict[str, object]
) -> None:
    config = load_config("resnet-eg", overrides)
    optimizer = build_optimizer(config.optimizer, nn.Linear(2, 2))
    assert type(optimizer).__name__.lower() == config.optimizer.name
    assert {key: optimizer.defaults[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["local", "optimistic", "gradient-noise", "extragradient"])
@pytest.mark.parametrize("precondition", ["base", "none"])
def test_a_direction_is_preconditioned_as_it_is_set(name: str, precondition: str) -> None:
    overrides = [f"extrapolation.name={name}", f"extrapolation.precondition={precondition}"]
    assert (
        getattr(build_direction(load_config("resnet-eg", overrides)), "precondition", "")
        == precondition
    )


def test_the_direction_along_the_momentum_is_built_as_it_is_set() -> None:
    overrides = [
        "extrapolation.name=msam",
        "extrapolation.radius=0.7",
        "optimizer.nesterov=false",
    ]
    assert build_direction(load_config("resnet-eg", overrides)) == MSAM(radius=0.7)


@pytest.mark.parametrize(
    ("overrides", "copies"),
    [
        (["extrapolation.name=none"], 0),
        ([], 1),
        (["post_local.period=4"], 3),
        (["post_local.period=4", "extrapolation.name=none", "optimizer.momentum=0"], 1),
        (["post_local.period=4", "extrapolation.name=none", "optimizer.name=lars"], 2),
        (["post_local.period=4", "extrapolation.name=none", "optimizer.name=lamb"], 3),
    ],
)
def test_the_state_of_a_worker_is_counted_in_copies_of_the_weights(
    overrides: list[str], copies: int
) -> None:
    config = load_config("resnet-eg", ["model.depth=8", "model.width=2", *overrides])
    model = build_model(config, 10, torch.device("cpu"))
    weights = sum(p.numel() for p in model.parameters())
    statistics = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    assert worker_state_bytes(config, 10) == 4 * (copies * weights + statistics)


# Inheritance


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_files_inherit_in_order_and_groups_are_merged(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="seed: 1\nepochs: 11\noptimizer:\n  lr: 0.1\n  momentum: 0.1\n",
        b="seed: 2\noptimizer:\n  lr: 0.2\n",
        child="inherits: [a.yaml, b]\noptimizer:\n  weight_decay: 0.3\n"
        "schedule:\n  milestones: [0.1]\n",
    )
    config = load_config(tmp_path / "child.yaml", ["optimizer.momentum=0.4"])
    assert (config.seed, config.epochs, config.preset) == (2, 11, "child")
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.2, 0.4, 0.3)
    assert config.schedule.milestones == (0.1,)


def test_a_parent_that_is_named_twice_is_whole_both_times(tmp_path: Path) -> None:
    write(tmp_path, child="inherits: [variant/gaussian, variant/sgd, variant/gaussian]\n")
    assert load_config(tmp_path / "child.yaml").extrapolation.model_dump()["size"] == 0.05


def test_a_file_may_inherit_a_shipped_preset_of_its_own_name(tmp_path: Path) -> None:
    write(tmp_path, **{"resnet-eg": "inherits: resnet-eg\nepochs: 5\n"})
    assert load_config(tmp_path / "resnet-eg.yaml") == load_config("resnet-eg", ["epochs=5"])


def test_a_wrong_value_in_a_parent_is_reported_where_it_stands(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="seed: 1\noptimizer:\n  nesterov: true\n  lr: -1\n",
        child="inherits: [base]\nepochs: 3\n",
    )
    with pytest.raises(UsageError) as error:
        load_config(tmp_path / "child.yaml")
    assert (
        str(error.value)
        == f"{tmp_path / 'base.yaml'}:4: optimizer.lr must be greater than 0, not -1"
    )
    # Once another layer has set it, the parent's value is gone and that layer is to blame.
    assert load_config(tmp_path / "child.yaml", ["optimizer.lr=1"]).optimizer.lr == 1
    with pytest.raises(UsageError, match=r"^--set optimizer\.lr=-2: "):
        load_config(tmp_path / "child.yaml", ["optimizer.lr=-2"])


def test_an_unknown_key_in_a_parent_is_reported_where_it_stands(tmp_path: Path) -> None:
    write(tmp_path, base="seed: 1\nmodle:\n  depth: 8\n", child="inherits: [base]\nepochs: 3\n")
    with pytest.raises(
        UsageError, match=r"base\.yaml:2: unknown key 'modle\.depth'; did you mean 'model\.depth'\?"
    ):
        load_config(tmp_path / "child.yaml")


def test_inheriting_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="inherits: [b]\n",
        b="seed: 1\ninherits:\n  - resnet-eg\n  - c.yaml\n",
        c="inherits: [a]\n",
    )
    with pytest.raises(
        UsageError,
        match=r"c\.yaml:1: inherits goes in a circle \(.*a\.yaml -> .*b\.yaml -> .*c\.yaml",
    ):
        load_config(tmp_path / "a.yaml")
    write(tmp_path, own="seed: 1\ninherits: [own.yaml]\n")
    with pytest.raises(UsageError, match=r"own\.yaml:2: inherits goes in a circle"):
        load_config(tmp_path / "own.yaml")


def test_a_long_chain_is_refused_and_a_wide_one_is_quick(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path, **{f"deep{number}": f"inherits: [deep{number + 1}]\n"})
    with pytest.raises(UsageError, match="more than 20 files deep"):
        load_config(tmp_path / "deep0.yaml")
    for number in range(19):
        write(
            tmp_path,
            **{f"wide{number}": f"inherits: [{', '.join([f'wide{number + 1}'] * 3)}]\n"},
        )
    write(tmp_path, wide19="seed: 5\n")
    assert load_config(tmp_path / "wide0.yaml").seed == 5


@pytest.mark.parametrize(
    ("inherits", "message"),
    [
        ("resnet-ge", "unknown preset 'resnet-ge'; did you mean 'resnet-eg'?"),
        (
            "[resnet-eg, family/resnt]",
            "unknown preset 'family/resnt'; did you mean 'family/resnet'?",
        ),
        ("gone.yaml", "the inherited file "),
        ("5", "inherits must be a list of presets"),
        ("[5]", "inherits must be a list of presets"),
        ("null", "inherits must be a list of presets"),
    ],
)
def test_a_wrong_parent_is_refused_with_its_line(
    tmp_path: Path, inherits: str, message: str
) -> None:
    write(tmp_path, child=f"seed: 1\ninherits: {inherits}\n")
    with pytest.raises(UsageError) as error:
        load_config(tmp_path / "child.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'child.yaml'}:2: {message}")


def test_the_resolved_file_of_a_run_keeps_its_preset_name(tmp_path: Path) -> None:
    config = load_config("resnet-eg", ["seed=3"])
    write(tmp_path, config=config_to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml", ["extrapolation.rate=0.1"]).preset == "resnet-eg"
