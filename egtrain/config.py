"""The configuration of a run: a strict, typed, frozen schema, and how presets, files and overrides become one.

Nothing here imports torch, so that a wrong option is reported at once.
"""

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from egtrain.errors import UsageError
from egtrain.yaml_reader import (
    Key,
    Settings,
    describe,
    parse_settings,
    parse_value,
    read_settings,
    write_settings,
    write_value,
)

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Scaling = Literal["none", "layer", "filter"]


class Section(BaseModel):
    """A part of the configuration: unknown keys, other types and numbers that are not finite are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _wrong(key: str, problem: str) -> PydanticCustomError:
    # A plain ValueError would not tell which key to point at, and braces in values would be taken for placeholders.
    return PydanticCustomError("setting", "{problem}", {"key": key, "problem": problem})


class DataConfig(Section):
    """What is trained on."""

    name: str = "cifar10"
    """cifar10, cifar100, synthetic (embedded, no download) or npz:FILE (x_train, y_train, x_test, y_test)."""
    dir: str | None = None
    """Folder that holds the data; null: $EGTRAIN_DATA, then the user cache, then a download."""
    offline: bool = False
    """Never download."""
    train_samples: Count | None = None
    """Train on only so many samples; null: all."""
    validation: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Number of training samples that are held out for validation."""
    augment: bool = True
    """Crop and flip training images at random."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = ["cifar10", "cifar100", "synthetic"]
        if name in known or (name.startswith("npz:") and name != "npz:"):
            return name
        hint = _did_you_mean(name, known)
        raise _wrong("data.name", f"data.name must be {', '.join(known)} or npz:FILE, not {name!r}{hint}")


class ModelConfig(Section):
    """The network."""

    name: Literal["resnet"] = "resnet"
    """resnet: the CIFAR ResNet with three stages (He et al. 2016, arXiv 1512.03385)."""
    depth: Annotated[int, Field(ge=8, le=10_000)] = 20
    """Number of weighted layers, 6n + 2: 8, 14, 20, 32, 44, 56, 110."""
    width: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Channels of the first stage; the second has twice and the third four times as many."""
    shortcut: Literal["identity", "projection"] = "identity"
    """Shortcut where the shape changes: identity pads with zeros, projection is a 1x1 convolution."""

    @field_validator("depth")
    @classmethod
    def _six_n_plus_two(cls, depth: int) -> int:
        if depth % 6 != 2:
            below = max(8, depth - (depth - 2) % 6)
            raise _wrong("model.depth", f"model.depth must be 6n + 2, such as {below} or {below + 6}, not {depth}")
        return depth


class OptimizerConfig(Section):
    """The base optimizer, which makes the update."""

    name: Literal["sgd"] = "sgd"
    """sgd: torch.optim.SGD."""
    lr: Positive = 0.1
    """Learning rate at a batch of base_batch_size samples."""
    base_batch_size: Count | None = 64
    """Samples in the batch that lr was chosen for; null: lr is used as it is."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "linear"
    """How the learning rate grows from base_batch_size to the batch of the run."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum factor."""
    nesterov: bool = True
    """Nesterov momentum; without effect where momentum is 0."""
    weight_decay: NotNegative = 1e-4
    """Factor of the weights that is added to their gradient."""
    clip_norm: Positive | None = None
    """Largest norm of the mean gradient; null: not clipped."""

    def scaled_lr(self, batch_size: int) -> float:
        """Return the peak learning rate at a batch of so many samples."""
        if self.base_batch_size is None or self.lr_scaling == "none":
            return self.lr
        growth = batch_size / self.base_batch_size
        return self.lr * (growth if self.lr_scaling == "linear" else math.sqrt(growth))


class ScheduleConfig(Section):
    """The learning rate over the run."""

    warmup_epochs: Annotated[float, Field(ge=0, le=1e9)] = 5.0
    """Epochs of linear warm-up; may be a fraction."""
    warmup_from: NotNegative = 0.1
    """Learning rate at the first step; lowered to the peak where it lies above it."""
    decay: Literal["step", "cosine", "constant"] = "step"
    """step: times factor at each milestone; cosine: a half cosine to zero; constant: none."""
    milestones: Annotated[tuple[float, ...], Field(strict=False)] = (0.5, 0.75)
    """Fractions of the run, increasing, each in (0, 1); used by step only."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor at each milestone; used by step only."""

    @field_validator("milestones")
    @classmethod
    def _increasing(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        pairs = zip((0.0, *milestones), (*milestones, 1.0), strict=True)
        if any(low >= high for low, high in pairs):
            raise _wrong(
                "schedule.milestones",
                "schedule.milestones must be increasing fractions of the run between 0 and 1, such as [0.5, 0.75], "
                f"not {list(milestones)}",
            )
        return milestones


class NoExtrapolation(Section):
    """Plain mini-batch training."""

    name: Literal["none"] = "none"
    """none: the gradient is taken at the weights themselves."""


class _Until(Section):
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the run after which there is no extrapolation."""


class _AlongGradient(_Until):
    """The shift follows a gradient; exactly one of ratio, rate and size says how far."""

    ratio: NotNegative | Literal["1/K"] | None = None
    """Length as a ratio of the learning rate, or 1/K (K workers), which is also the default where scaling is none."""
    rate: NotNegative | None = None
    """Length as a learning rate of its own, instead of ratio."""
    size: NotNegative | None = None
    """Length relative to the norm of the weights; required with scaling layer or filter, instead of ratio."""
    scaling: Scaling = "none"
    """Scale the shift to the norm of the weights: not at all, layer by layer, or filter by filter."""

    @model_validator(mode="before")
    @classmethod
    def _default_ratio(cls, data: Any) -> Any:
        lengths = ("ratio", "rate", "size")
        if (
            isinstance(data, dict)
            and data.get("scaling", "none") == "none"
            and all(data.get(length) is None for length in lengths)
        ):
            return {**data, "ratio": "1/K"}
        return data

    @model_validator(mode="after")
    def _exactly_one_length(self) -> "_AlongGradient":
        given = [length for length in ("ratio", "rate", "size") if getattr(self, length) is not None]
        if self.scaling != "none" and given != ["size"]:
            wrong = next((length for length in given if length != "size"), None)
            problem = f"needs extrapolation.size{f' and no extrapolation.{wrong}' if wrong else ''}; set"
            raise _wrong("extrapolation.scaling", f"extrapolation.scaling '{self.scaling}' {problem} it, such as 0.05")
        if len(given) > 1:
            both = " and ".join(f"extrapolation.{length}" for length in given)
            raise _wrong(f"extrapolation.{given[-1]}", f"{both} exclude each other; keep one of them")
        if self.scaling == "none" and self.size is not None:
            raise _wrong(
                "extrapolation.size",
                "extrapolation.size needs extrapolation.scaling layer or filter; set it, or use ratio or rate instead",
            )
        return self

    def resolved_ratio(self, workers: int) -> float | None:
        """Return the ratio as a number for K workers; None where rate or size is given instead."""
        return 1 / workers if self.ratio == "1/K" else self.ratio


class LocalExtrapolation(_AlongGradient):
    """EXTRAP-SGD (Lin et al. 2020, arXiv 2006.05720)."""

    name: Literal["local"] = "local"
    """local: along the worker's own previous gradient."""


class GlobalExtrapolation(_AlongGradient):
    """Extrapolation from the past (Popov 1980)."""

    name: Literal["global"] = "global"
    """global: along the previous mean gradient."""


class GradientNoiseExtrapolation(_AlongGradient):
    """After gradient noise convolution (Haruki et al. 2019, arXiv 1906.10822)."""

    name: Literal["gradient-noise"] = "gradient-noise"
    """gradient-noise: along the worker's own previous gradient less the mean one."""


class FreshExtrapolation(_AlongGradient):
    """Stochastic extragradient (Korpelevich 1976)."""

    name: Literal["fresh"] = "fresh"
    """fresh: along a second gradient at the unshifted weights."""
    samples: Literal["same", "new"] = "same"
    """Whether the second gradient is taken on the same samples or on new ones."""


class _Noise(_Until):
    size: NotNegative
    """Size of the noise; relative to the norm of the weights unless scaling is none."""
    scaling: Scaling = "filter"
    """Scale the noise to the norm of the weights: not at all, layer by layer, or filter by filter."""
    norm_and_bias: bool = False
    """Shift normalisation parameters and biases too."""


class GaussianExtrapolation(_Noise):
    """Isotropic smoothing."""

    name: Literal["gaussian"] = "gaussian"
    """gaussian: normal noise."""


class UniformExtrapolation(_Noise):
    """SmoothOut (Wen et al. 2018, arXiv 1805.07898)."""

    name: Literal["uniform"] = "uniform"
    """uniform: uniform noise."""


class SamExtrapolation(_Until):
    """Sharpness-aware minimisation, per worker (Foret et al. 2021, arXiv 2010.01412)."""

    name: Literal["sam"] = "sam"
    """sam: against the normalised gradient at the unshifted weights."""
    radius: NotNegative = 0.05
    """Length of the shift."""


Extrapolation = (
    NoExtrapolation
    | LocalExtrapolation
    | GlobalExtrapolation
    | FreshExtrapolation
    | GaussianExtrapolation
    | UniformExtrapolation
    | GradientNoiseExtrapolation
    | SamExtrapolation
)


class CheckpointConfig(Section):
    """When the run is saved."""

    every: Count | None = None
    """Steps between checkpoints; null: at every evaluated epoch."""
    keep: Literal["last", "all"] = "last"
    """last: the last two, the best and the final one; all: every one."""


class LogConfig(Section):
    """What is written down."""

    every: Count = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard files too."""


class Config(Section):
    """Everything that a run is a function of."""

    preset: str = ""
    """Name of the preset that it came from; informational."""
    task: Literal["image"] = "image"
    """What kind of data, model and metric."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seed of every random choice."""
    workers: Count = 16
    """Number K of logical workers."""
    worker_batch_size: Count = 128
    """Samples b of a worker's mini-batch; the batch is K times b."""
    epochs: Count = 300
    """Length of the run in epochs."""
    steps: Count | None = None
    """Length of the run in updates, instead of epochs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32; bf16: automatic mixed precision; auto: bf16 where the device computes in it natively, else fp32."""
    channels_last: bool = True
    """Keep images channels-last in memory."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Give bit for bit the same result on any number of ranks of one device type."""
    threads: Count | None = None
    """CPU threads a rank; null: the cores divided by the ranks, or 1 with deterministic."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA where there is a GPU."""
    evaluate_every: Count = 1
    """Epochs between evaluations."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    extrapolation: Annotated[Extrapolation, Field(discriminator="name")] = NoExtrapolation()
    """Where the gradient is taken; the keys depend on name."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def batch_size(self) -> int:
        """Samples B in the batch of one update, K·b."""
        return self.workers * self.worker_batch_size

    @field_validator("preset")
    @classmethod
    def _no_path(cls, preset: str) -> str:
        # Run directories are named after it.
        if "/" in preset or not preset.isprintable() or len(preset) > 200:
            raise _wrong(
                "preset", f"preset must be a name of at most 200 characters without '/', not {describe(preset)}"
            )
        return preset

    @model_validator(mode="after")
    def _finite_rate(self) -> "Config":
        if not math.isfinite(self.optimizer.scaled_lr(self.batch_size)):
            raise _wrong("optimizer.lr", f"optimizer.lr is too large for batches of {self.batch_size}; lower it")
        return self


_EXTRAPOLATIONS: dict[str, type[Section]] = {v.model_fields["name"].default: v for v in get_args(Extrapolation)}
_LENGTHS = ("ratio", "rate", "size")
_MAX_INHERITANCE = 20


def _known_keys() -> dict[str, list[str]]:
    """Return every dotted key, those of all extrapolations included; a section's keys stand under its name."""
    known: dict[str, list[str]] = {"": []}
    for name, info in Config.model_fields.items():
        known[""].append(name)
        if name == "extrapolation":
            keys = [key for variant in _EXTRAPOLATIONS.values() for key in variant.model_fields]
            known[name] = list(dict.fromkeys(["name", *keys]))
        elif isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            known[name] = list(info.annotation.model_fields)
    return known


_KNOWN = _known_keys()
_DOTTED = [f"{section}.{key}" if section else key for section, keys in _KNOWN.items() for key in keys]


def presets_dir() -> Path:
    """Return the folder of the shipped presets: inside the installed package, or beside it in a checkout.

    Raises:
        UsageError: there is none.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "presets", package.parent / "presets"):
        if (folder / "family").is_dir():
            return folder
    raise UsageError(f"the shipped presets are missing from {package}; install egtrain again")


def preset_names() -> list[str]:
    """Return the names of the shipped presets that can be trained."""
    return sorted(path.stem for path in presets_dir().glob("*.yaml"))


def preset_description(name: str) -> str:
    """Return the leading comment line of a shipped preset."""
    first = _shipped(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def load_config(presets: str | Path, overrides: list[str] | None = None) -> Config:
    """Return the configuration of a shipped preset or a .yaml file, with overrides such as `optimizer.lr=0.2`.

    Raises:
        UsageError: a name, file, key or value is wrong; the message says where it was set.
    """
    if isinstance(presets, Path) or presets.endswith((".yaml", ".yml")):
        path = Path(presets)
        label, name = str(presets), path.stem
    else:
        path = _shipped(presets)
        label, name = _label(path), presets.replace("/", "-")
    settings = _inherited(read_settings(path, label), path, label, {}, {})
    _merge(settings, _overrides(overrides or []))
    settings.values.setdefault("preset", name)
    return _validated(settings)


def config_from_yaml_text(text: str, source: str) -> Config:
    """Return the configuration of YAML text; `source` names it in messages, and `inherits` finds shipped presets.

    Raises:
        UsageError: a key or value is wrong; the message says in which line.
    """
    return _validated(_inherited(parse_settings(text, source), None, source, {}, {}))


def config_to_yaml(config: Config) -> str:
    """Return the fully resolved configuration as YAML that loads back equal."""
    return write_settings(_plain(config))


def differences(a: Config, b: Config) -> list[str]:
    """Return what changes from a to b, as `optimizer.lr: 0.1 -> 0.2`; the informational `preset` is left out."""
    old, new = flat_settings(a), flat_settings(b)
    keys = [key for key in dict.fromkeys([*old, *new]) if key != "preset" and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key, '(not set)')} -> {new.get(key, '(not set)')}" for key in keys]


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    names = {"type": "array", "items": {"type": "string"}}
    schema["properties"] = {
        "inherits": {
            "anyOf": [{"type": "string"}, names],
            "description": "Presets or .yaml files whose settings this file starts from; later ones win.",
        },
        **schema["properties"],
    }
    return schema


def _plain(config: Config) -> dict[str, Any]:
    values = config.model_dump()
    extrapolation = values["extrapolation"]
    values["extrapolation"] = {"name": extrapolation.pop("name"), **extrapolation}
    return values


def flat_settings(config: Config) -> dict[str, str]:
    """Return every setting as text under its dotted key."""
    flat: dict[str, str] = {}
    for name, value in _plain(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": write_value(inner) for key, inner in value.items()}
        else:
            flat[name] = write_value(value)
    return flat


def _did_you_mean(word: str, known: list[str]) -> str:
    # Matching takes quadratic time, and nobody mistypes a long text.
    if len(word) > 100:
        return ""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _label(path: Path) -> str:
    """Return how a file is called in messages: a shipped preset by its place among the presets."""
    folder = presets_dir()
    return str(Path("presets", path.relative_to(folder))) if path.is_relative_to(folder) else str(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _shipped(name: str) -> Path:
    folder = presets_dir()
    known = {str(path.relative_to(folder).with_suffix("")): path for path in folder.rglob("*.yaml")}
    if name in known:
        return known[name]
    hint = _did_you_mean(name, [*preset_names(), *known]) or "; `egtrain presets` lists them"
    if _is_file(Path(f"{name}.yaml")):
        hint = f"; did you mean the file '{name}.yaml'?"
    raise UsageError(f"unknown preset {describe(name)}{hint}")


def _find_parent(name: str, child: Path | None, place: str) -> tuple[Path, str]:
    """Return the file that `inherits` names, and what to call it: a shipped preset, else a file beside the child."""
    if not name.endswith((".yaml", ".yml")):
        try:
            path = _shipped(name)
        except UsageError as error:
            beside = None if child is None else child.parent / f"{name}.yaml"
            if beside is None or not _is_file(beside):
                raise UsageError(f"{place}: {error}") from None
            return beside, _label(beside)
        return path, _label(path)
    path = Path(name) if child is None else child.parent / name
    if not _is_file(path):
        raise UsageError(f"{place}: the inherited file '{path}' does not exist; paths are relative to this file")
    return path, _label(path)


def _inherited(
    settings: Settings, path: Path | None, label: str, children: dict[Path, str], done: dict[Path, Settings]
) -> Settings:
    """Return the settings on top of all that they inherit."""
    place = settings.place(("inherits",))
    parents = settings.values.pop("inherits", [])
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) and parent for parent in parents):
        raise UsageError(f"{place}: inherits must be a list of presets, such as [family/resnet, variant/eg]")
    if path is not None:
        children = {**children, path.resolve(): label}
    result = Settings()
    for number, parent in enumerate(parents):
        place = settings.place(("inherits", str(number)))
        parent_path, parent_label = _find_parent(parent, path, place)
        resolved = parent_path.resolve()
        if resolved in children:
            circle = list(children)[list(children).index(resolved) :]
            chain = " -> ".join([*(children[file] for file in circle), parent_label])
            raise UsageError(f"{place}: inherits goes in a circle ({chain}); remove one of them")
        if len(children) >= _MAX_INHERITANCE:
            raise UsageError(f"{place}: inherits is more than {_MAX_INHERITANCE} files deep; shorten the chain")
        if resolved not in done:
            read = read_settings(parent_path, parent_label)
            done[resolved] = _inherited(read, parent_path, parent_label, children, done)
        _merge(result, done[resolved])
    settings.places = {key: at for key, at in settings.places.items() if key[:1] != ("inherits",)}
    _merge(result, settings)
    return result


def _overrides(overrides: list[str]) -> Settings:
    """Return KEY=VALUE overrides as one layer of settings, so that their order matters for equal keys only."""
    settings = Settings()
    for override in overrides:
        source = "--set " + " ".join(override.split())[:200]
        dotted, equals, text = override.partition("=")
        dotted = dotted.strip()
        if not equals or not dotted:
            raise UsageError(f"{source}: write KEY=VALUE, such as optimizer.lr=0.2")
        if dotted == "inherits":
            raise UsageError(f"{source}: inherits belongs in a file; name the preset with --preset instead")
        if dotted in _KNOWN:
            example = f"{dotted}.{_KNOWN[dotted][0]}"
            raise UsageError(f"{source}: '{dotted}' is a group; set one of its keys, such as {example}")
        if dotted not in _DOTTED:
            raise UsageError(f"{source}: {_unknown(dotted)}")
        key = tuple(dotted.split("."))
        target = settings.values
        for part in key[:-1]:
            target = target.setdefault(part, {})
        target[key[-1]] = parse_value(text, source)
        settings.places[key] = source
    return settings


def _merge(base: Settings, layer: Settings) -> None:
    """Lay settings over others: groups are merged, other values replaced.

    A changed extrapolation.name drops what was set for the old one, and one of ratio, rate and size drops the others,
    so that a variant can be laid over another without undoing it key by key.
    """
    old, new = base.values.get("extrapolation"), layer.values.get("extrapolation")
    if isinstance(old, dict) and isinstance(new, dict):
        if "name" in new and new["name"] != old.get("name", "none"):
            _drop(base, [key for key in old if key != "name"])
        elif any(new.get(length) is not None for length in _LENGTHS):
            _drop(base, [length for length in _LENGTHS if length in old])
    gone: set[Key] = set()
    for name, value in layer.values.items():
        replaced = base.values.get(name)
        if isinstance(value, dict) and isinstance(replaced, dict):
            base.values[name] = {**replaced, **value}
            gone |= {(name, key) for key in value}
        else:
            base.values[name] = dict(value) if isinstance(value, dict) else value
            gone.add((name,))
    base.places = {key: at for key, at in base.places.items() if not gone & {key[:1], key[:2]}} | layer.places


def _drop(settings: Settings, keys: list[str]) -> None:
    for key in keys:
        del settings.values["extrapolation"][key]
        settings.places = {at: p for at, p in settings.places.items() if at[:2] != ("extrapolation", key)}


def _validated(settings: Settings) -> Config:
    """Return the configuration, with every complaint as one sentence about the first wrong setting."""
    _check_keys(settings)
    values = dict(settings.values)
    if "extrapolation" in values:
        values["extrapolation"] = {"name": "none", **values["extrapolation"]}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(_translated(error, settings)) from None


def _check_keys(settings: Settings) -> None:
    for name, value in settings.values.items():
        at = settings.place((name,))
        if name == "inherits" or name not in _KNOWN[""]:
            key = (name, next(iter(value))) if isinstance(value, dict) and value else (name,)
            raise UsageError(f"{at}: {_unknown('.'.join(key))}")
        if name not in _KNOWN:
            continue
        if not isinstance(value, dict):
            raise UsageError(f"{at}: {name} must be a group of keys, such as {_KNOWN[name][0]}, not {describe(value)}")
        allowed = _KNOWN[name]
        if name == "extrapolation":
            variant = value.get("name", "none")
            if not isinstance(variant, str) or variant not in _EXTRAPOLATIONS:
                hint = _did_you_mean(variant, list(_EXTRAPOLATIONS)) if isinstance(variant, str) else ""
                raise UsageError(
                    f"{settings.place((name, 'name'))}: extrapolation.name must be one of "
                    f"{', '.join(_EXTRAPOLATIONS)}, not {describe(variant)}{hint}"
                )
            allowed = list(_EXTRAPOLATIONS[variant].model_fields)
        for key in value:
            if key in allowed:
                continue
            at = settings.place((name, key))
            if key in _KNOWN[name]:
                owners = [other for other, model in _EXTRAPOLATIONS.items() if key in model.model_fields]
                raise UsageError(
                    f"{at}: extrapolation '{variant}' has no key '{name}.{key}'; remove it, or set extrapolation.name "
                    f"to {' or '.join(owners)}"
                )
            raise UsageError(f"{at}: {_unknown(f'{name}.{key}')}")


def _unknown(dotted: str) -> str:
    """Return the complaint about a key that does not exist."""
    section, _, key = dotted.rpartition(".")
    if dotted in _DOTTED:
        return f"'{dotted}' must be nested; write '{section}:' and, indented in the next line, '{key}:'"
    namesakes = [known for known in _DOTTED if known.rpartition(".")[2] == key and "." in known]
    hint = _did_you_mean(dotted, _DOTTED)
    if not section and namesakes:
        hint = f"; did you mean '{namesakes[0]}'?"
    return f"unknown key {describe(dotted)}{hint or '; `egtrain presets --schema` lists all keys'}"


def _translated(error: ValidationError, settings: Settings) -> str:
    errors = error.errors(include_url=False)
    first = errors[0]
    if first["type"] == "setting":
        context = first["ctx"]
        return _placed(settings, tuple(context["key"].split(".")), context["problem"])
    key = _error_key(first)
    if first["type"] == "missing":
        # Only an extrapolation has a required key, and it became required where its name was set.
        name = first["loc"][1]
        problem = f"extrapolation '{name}' needs {'.'.join(key)}; set it, such as 0.05"
        return _placed(settings, ("extrapolation", "name"), problem)
    wishes = dict.fromkeys(_wish(e) for e in errors if _error_key(e) == key)
    return _placed(settings, key, f"{'.'.join(key)} must be {' or '.join(wishes)}, not {describe(first['input'])}")


def _placed(settings: Settings, key: Key, problem: str) -> str:
    place = settings.place(key)
    return f"{place}: {problem}" if place else problem


def _error_key(error: ErrorDetails) -> Key:
    """Return the key of an error, without pydantic's names of union members."""
    location = [str(part) for part in error["loc"]]
    if location[0] == "extrapolation":
        del location[1:2]
    length = 2 if location[0] in _KNOWN else 1
    return (*location[:length], *(part for part in location[length:] if part.isdecimal()))


def _wish(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "int_type" | "int_from_float" | "int_parsing":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "string_type":
            return "text (write it in quotes)"
        case "tuple_type":
            return "a list"
        case "finite_number":
            return "a finite number"
        case "greater_than_equal":
            return f"at least {context['ge']:g}"
        case "greater_than":
            return f"greater than {context['gt']:g}"
        case "less_than_equal":
            return f"at most {context['le']:,}"
        case "less_than":
            return f"less than {context['lt']:g}"
        case "literal_error":
            return str(context["expected"]).replace("'", "")
    return f"valid ({error['msg']})"
