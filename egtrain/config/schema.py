"""The configuration of a run: everything it depends on, in one strict, typed, frozen object.

Nothing here imports torch, so that a wrong option is reported at once.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from egtrain.config.extrapolations import SECTIONS, AnyExtrapolation
from egtrain.config.models import Model, ResnetModel, UserModel, models_of
from egtrain.config.optimizers import Optimizer, SgdOptimizer
from egtrain.config.schedule import PostLocalConfig, ScheduleConfig
from egtrain.config.section import Count, Positive, Section, wrong
from egtrain.config.tasks import DATA, USER, DataConfig, ImageSettings, Task, UserSettings
from egtrain.config.yaml_text import describe, write_settings, write_value
from egtrain.errors import did_you_mean


class InitConfig(Section):
    """The weights that training begins with, where they are not drawn from the seed."""

    file: str | None = None
    """Weights (.safetensors, a state_dict of torch, a checkpoint of egtrain) or a run directory;
    null: drawn from the seed."""
    sha256: str | None = None
    """SHA-256 of the file, which may hold nothing else; null: noted when the run begins."""
    strict: bool = True
    """Refuse weights that do not fit the model; false: take those that fit."""


class CheckpointConfig(Section):
    """When checkpoints are saved, and which are kept."""

    every: Count | None = None
    """Steps between checkpoints; null: at every evaluated epoch."""
    keep: Literal["last", "all"] = "last"
    """last: the last two, the best and the final one; all: every one."""


class LogConfig(Section):
    """What is logged."""

    every: Count = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard files too."""


class Config(Section):
    """Everything that a run depends on."""

    preset: str = ""
    """Name of the preset; for information only."""
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
    """fp32, no TF32; bf16: mixed precision; auto: bf16 where the device computes in it natively,
    else fp32."""
    channels_last: bool = True
    """Keep images channels-last in memory."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Give the same result, bit for bit, on any number of ranks of one device type."""
    threads: Count | None = None
    """CPU threads per rank; null: the cores divided by the ranks, or 1 with deterministic."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA where there is a GPU."""
    evaluate_every: Positive = 1.0
    """Epochs between evaluations; may be a fraction."""
    task: Annotated[Task, Field(discriminator="name")] = ImageSettings()
    """What is learned, and how it is measured; the keys depend on name."""
    data: DataConfig = DataConfig()
    model: Annotated[Model, Field(discriminator="name")] = ResnetModel()
    """The network; the keys depend on name."""
    init: InitConfig = InitConfig()
    optimizer: Annotated[Optimizer, Field(discriminator="name")] = SgdOptimizer()
    """The base optimizer, which makes the update; the keys depend on name."""
    schedule: ScheduleConfig = ScheduleConfig()
    extrapolation: Annotated[AnyExtrapolation, Field(discriminator="name")] = SECTIONS["none"]()
    """Where the gradient is taken; the keys depend on name."""
    post_local: PostLocalConfig = PostLocalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def batch_size(self) -> int:
        """Samples B in the batch of one update, K·b."""
        return self.workers * self.worker_batch_size

    @property
    def title(self) -> str:
        """Model and data in a few words, such as `resnet-20 (width 16) on cifar10`."""
        if isinstance(self.task, UserSettings) or isinstance(self.model, UserModel):
            return Path(getattr(self.task, "file", "")).name
        model = self.model.model_dump()
        size = "{name}-{depth}" if "depth" in model else "{layers}-layer {name}"
        kind, _, place = self.data.name.partition(":")
        data = f"{kind}:{Path(place).name}" if place else kind
        return f"{size.format(**model)} (width {self.model.width}) on {data}"

    def local_start_fraction(self) -> float | None:
        """Return the fraction of the run at which the local phase begins; None without one."""
        if self.post_local.period is None:
            return None
        return (
            self.schedule.milestones[0]
            if self.post_local.start == "first-decay"
            else self.post_local.start
        )

    @field_validator("preset")
    @classmethod
    def _no_path(cls, preset: str) -> str:
        # It names run directories.
        if not can_name_a_folder(preset):
            raise wrong(
                "preset",
                "preset must be a name of at most 200 characters without '/', not "
                f"{describe(preset)}",
            )
        return preset

    @model_validator(mode="after")
    def _fitting_the_task(self) -> "Config":
        task = self.task.name
        if self.model.task != task:
            raise wrong(
                "model.name",
                f"task '{task}' has no model '{self.model.name}'; set model.name to "
                f"{' or '.join(models_of(task))}, or task.name to {self.model.task}",
            )
        names, forms = DATA[task]
        if task == USER and self.data.name != USER:
            raise wrong("data.name", "a task file has its own data: leave data.name out")
        name = self.data.name
        kind, colon, place = name.partition(":")
        prefixes = [form.partition(":")[0] for form in forms]
        if name not in names and not (kind in prefixes and place):
            missing = "npz" in prefixes and Path(name).suffix == ".npz" and not colon
            hint = f"; did you mean 'npz:{name}'?" if missing else did_you_mean(name, names)
            known = " or ".join([", ".join([*names, *forms[:-1]]), forms[-1]])
            raise wrong("data.name", f"data.name must be {known}, not {name!r}{hint}")
        if self.data.loaders and task != USER:
            raise wrong(
                "data.loaders", "data.loaders is for task files; other data need none: remove it"
            )
        if self.data.image_size is not None and kind != "folder":
            raise wrong(
                "data.image_size",
                "data.image_size is for folder:DIR, not for other data; remove it",
            )
        if task in ("language", "translation") and self.data.validation:
            raise wrong(
                "data.validation",
                "data.validation must be 0, because texts have a validation part already; "
                "remove it",
            )
        return self

    @model_validator(mode="after")
    def _weights_to_begin_with(self) -> "Config":
        if self.init.file is None and self.init != InitConfig():
            key = "init.sha256" if self.init.strict else "init.strict"
            raise wrong(key, f"{key} is about the weights of init.file: name some with --init-from")
        return self

    @model_validator(mode="after")
    def _finite_rate(self) -> "Config":
        if not math.isfinite(self.optimizer.scaled_lr(self.batch_size)):
            raise wrong(
                "optimizer.lr",
                f"optimizer.lr is too large for batches of {self.batch_size}; lower it",
            )
        return self

    @model_validator(mode="after")
    def _momentum_to_follow(self) -> "Config":
        name, base = self.extrapolation.name, self.optimizer
        bases = self.extrapolation.momentum_of
        if not bases:
            return self
        if base.name not in bases:
            raise wrong(
                "extrapolation.name",
                f"extrapolation '{name}' needs the momentum of {' or '.join(bases)}; set "
                f"optimizer.name to {bases[0]}",
            )
        key = "momentum" if base.name in ("sgd", "lars") else "beta1"
        if getattr(base, key) == 0:
            raise wrong(
                "extrapolation.name",
                f"extrapolation '{name}' needs a base with momentum; set optimizer.{key} above "
                "0, such as 0.9",
            )
        if base.name == "sgd" and base.nesterov:
            raise wrong(
                "extrapolation.name",
                f"extrapolation '{name}' needs a base without look-ahead; set "
                "optimizer.nesterov to false",
            )
        return self

    @model_validator(mode="after")
    def _local_phase_is_defined(self) -> "Config":
        if self.post_local.period is None:
            return self
        if self.post_local.start == "first-decay" and not (
            self.schedule.decay == "step" and self.schedule.milestones
        ):
            raise wrong(
                "post_local.period",
                "post_local.start 'first-decay' needs schedule.decay step with a milestone; set "
                "post_local.start to a fraction of the run, such as 0.5",
            )
        start = self.local_start_fraction()
        until = getattr(self.extrapolation, "until", None)
        if start == 0 and self.extrapolation.name != "none":
            raise wrong(
                "post_local.start",
                "extrapolation is defined while gradients are averaged: set post_local.start above "
                "0, or extrapolation.name to none",
            )
        if start is not None and until is not None and until > start:
            raise wrong(
                "extrapolation.until",
                "extrapolation is defined while gradients are averaged: set extrapolation.until "
                f"to at most {start:g}",
            )
        return self


def can_name_a_folder(name: str) -> bool:
    """Return whether a name is printable, of at most 200 characters and without a '/'."""
    return "/" not in name and name.isprintable() and len(name) <= 200


UNIONS: dict[str, dict[str, type[Section]]] = {
    section: {member.model_fields["name"].default: member for member in get_args(info.annotation)}
    for section, info in Config.model_fields.items()
    if info.discriminator == "name"
}
"""The members of each section whose keys depend on its name, by name."""

DEFAULT_NAMES: dict[str, str] = {
    section: Config.model_fields[section].default.name for section in UNIONS
}
"""The default name of such a section."""


NOT_OF_THE_RUN = frozenset({"preset", "task.file", "data.loaders"})
"""Names, of a file whose content counts too, and how a run is carried out: results do not depend on
them."""


def config_to_yaml(config: Config) -> str:
    """Return the fully resolved configuration as YAML that loads back equal."""
    return write_settings(_plain(config))


def differences(a: Config, b: Config) -> list[str]:
    """Return what changes from a to b, as `optimizer.lr: 0.1 -> 0.2`.

    Keys of `NOT_OF_THE_RUN` do not count.
    """
    old, new = flat_settings(a), flat_settings(b)
    keys = [
        key
        for key in dict.fromkeys([*old, *new])
        if key not in NOT_OF_THE_RUN and old.get(key) != new.get(key)
    ]
    return [f"{key}: {old.get(key, '(not set)')} -> {new.get(key, '(not set)')}" for key in keys]


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for section in UNIONS:
        # `name` may be left out, and the keys of two members can be the same.
        union = schema["properties"][section]
        union["anyOf"] = union.pop("oneOf")
        del union["discriminator"]
    names = {"type": "array", "items": {"type": "string"}}
    schema["properties"] = {
        "inherits": {
            "anyOf": [{"type": "string"}, names],
            "description": "Presets or .yaml files whose settings this file starts from; later "
            "ones win.",
        },
        **schema["properties"],
    }
    return schema


def _plain(config: Config) -> dict[str, Any]:
    values = config.model_dump()
    return values | {
        section: {"name": values[section].pop("name"), **values[section]} for section in UNIONS
    }


def flat_settings(config: Config) -> dict[str, str]:
    """Return every setting as text under its dotted key."""
    return {name: write_value(value) for name, value in flat_values(config).items()}


def flat_values(config: Config) -> dict[str, Any]:
    """Return every setting under its dotted key."""
    flat: dict[str, Any] = {}
    for name, value in _plain(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat
