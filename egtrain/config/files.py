"""How presets, files and overrides become one configuration: inheritance, and `a.b=c` on top.

A shipped preset is a single file, or a family and a variant composed by name: `resnet-eg` is
`family/resnet` with `variant/eg` on top, because the key `variants` of `family/resnet` lists `eg`.
"""

from functools import cache
from pathlib import Path

from egtrain.config.checks import DOTTED_KEYS, KNOWN_KEYS, unknown_key, validated
from egtrain.config.extrapolations import LENGTHS
from egtrain.config.schema import DEFAULT_NAMES, Config
from egtrain.config.tasks import USER, UserSettings
from egtrain.config.yaml_text import (
    Key,
    Settings,
    describe,
    parse_settings,
    parse_value,
    read_settings,
)
from egtrain.errors import UsageError, did_you_mean
from egtrain.task_file import TaskFile

_MAX_INHERITANCE = 20


class TypedOption(str):
    """An override `KEY=VALUE` that the user gave as an option, such as `--seed 3`."""

    typed = ""
    """What the user typed, for messages."""


def presets_dir() -> Path:
    """Return the folder of the shipped presets: in the package, or beside it in a checkout.

    Raises:
        UsageError: there is none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "presets", package.parent / "presets"):
        if (folder / "family").is_dir():
            return folder
    raise UsageError(f"the shipped presets are missing from {package}; install egtrain again")


def preset_names() -> list[str]:
    """Return the shipped presets that can be trained: single files first, then each family's."""
    alone = sorted(path.stem for path in presets_dir().glob("*.yaml"))
    composed = [
        f"{family}-{variant}"
        for family, variants in preset_families().items()
        for variant in variants
    ]
    return list(dict.fromkeys([*alone, *composed]))


def preset_description(name: str) -> str:
    """Return a preset's leading comment, or those of its family and its variant."""
    path = _shipped(name)
    files = [path] if path.is_file() else [_shipped(part) for part in _composed()[name]]
    first_lines = [file.read_text(encoding="utf-8").partition("\n")[0] for file in files]
    return ": ".join(line.removeprefix("#").strip() for line in first_lines if line.startswith("#"))


def preset_families() -> dict[str, list[str]]:
    """Return the shipped families, each with its variants in the order of its file.

    Raises:
        UsageError: a family names a variant that does not exist.
    """
    return _families(presets_dir())


def load_config(
    presets: str | Path, overrides: list[str] | None = None, task: TaskFile | None = None
) -> Config:
    """Return the configuration of a shipped preset or a .yaml file, with KEY=VALUE overrides.

    With a task file its model, data and loss replace the preset's, and a variant such as `eg` is a
    preset too. For the config.yaml of a run it must be the run's.

    Raises:
        UsageError: a name, file, key or value is wrong; the message says where it was set.
    """
    if isinstance(presets, Path) or presets.endswith((".yaml", ".yml")):
        path = Path(presets)
        label, name = str(presets), path.stem
    else:
        path = _shipped(presets, task is not None)
        label, name = _label(path), presets.replace("/", "-")
    settings = _inherited(_read(path, label), path, label, {}, {})
    if _is_family(path):
        settings.values.pop("variants", None)
    if task is not None:
        settings = _of_task_file(task, settings)
    _merge(settings, _overrides(overrides or [], own_task=task is not None))
    settings.values.setdefault("preset", name)
    if task is not None and settings.values["task"].get("sha256") != task.sha256:
        raise UsageError(
            f"{settings.place(('task', 'sha256'))}: {task.name} has changed since: bring it back "
            "as it was"
        )
    return validated(settings, task)


def _of_task_file(task: TaskFile, settings: Settings) -> Settings:
    """Return settings for the task of a file, with its settings among them kept."""
    named = {"name": USER, "file": str(task.path), "sha256": task.sha256}
    result = Settings({"task": {"name": USER}}, {(): f"--task {task.name}"})
    _merge(result, settings)
    _merge(result, Settings({"task": named, "model": {"name": USER}, "data": {"name": USER}}))
    return result


def config_file_of(directory: Path) -> Path:
    """Return the configuration file of a run directory.

    Raises:
        UsageError: the directory holds no run.
    """
    file = directory / "config.yaml"
    if not file.is_file():
        raise UsageError(
            f"{directory} holds no run: there is no config.yaml; name a directory that `train` made"
        )
    return file


def load_run_config(
    directory: Path,
    overrides: list[str] | None = None,
    task: TaskFile | None = None,
    allow_changes: bool = False,
) -> Config:
    """Return the configuration of a run directory, with KEY=VALUE overrides.

    Args:
        directory: the run's.
        overrides: of its settings.
        task: the run's task file; without it the code of the task does not run.
        allow_changes: take a task file that has changed since.

    Raises:
        UsageError: the directory holds no run, the task file is not the run's, or an override is
            wrong.
    """
    file = config_file_of(directory)
    if task is not None:
        saved = load_config(file).task
        if not isinstance(saved, UserSettings):
            raise UsageError(f"{directory} was not trained with a task file: leave out --task")
        if saved.sha256 != task.sha256 and not allow_changes:
            raise UsageError(
                f"{task.name} is not as it was when {directory} was trained with it: name that "
                "file, or add --allow-changes"
            )
    return load_config(file, overrides, task)


def config_from_yaml_text(text: str, source: str) -> Config:
    """Return the configuration of YAML text, called `source` in messages; it can inherit presets.

    Raises:
        UsageError: a key or value is wrong; the message says in which line.
    """
    return validated(_inherited(parse_settings(text, source), None, source, {}, {}))


def _label(path: Path) -> str:
    """Return a file's name for messages: for a shipped preset, its path among the presets."""
    folder = presets_dir()
    return (
        str(Path("presets", path.relative_to(folder))) if path.is_relative_to(folder) else str(path)
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _is_family(path: Path) -> bool:
    """Return whether a file is a shipped family; only there `variants` is allowed."""
    return path.resolve().parent == (presets_dir() / "family").resolve()


@cache
def _families(folder: Path) -> dict[str, list[str]]:
    known = sorted(path.stem for path in (folder / "variant").glob("*.yaml"))
    families = {}
    for path in sorted((folder / "family").glob("*.yaml"), key=lambda path: path.stem):
        label = _label(path)
        settings = _inherited(read_settings(path, label), path, label, {}, {})
        variants = settings.values.get("variants", [])
        if not isinstance(variants, list):
            raise UsageError(
                f"{settings.place(('variants',))}: variants must be a list, such as [sgd, eg]"
            )
        for number, variant in enumerate(variants):
            if variant not in known:
                place = settings.place(("variants", str(number)))
                hint = did_you_mean(str(variant), known) or f"; there are {', '.join(known)}"
                raise UsageError(f"{place}: unknown variant {describe(variant)}{hint}")
        families[path.stem] = variants
    return families


def _composed() -> dict[str, tuple[str, str]]:
    """Return the family and variant of each composed preset; the longest family wins."""
    families = preset_families()
    return {
        f"{family}-{variant}": (f"family/{family}", f"variant/{variant}")
        for family in sorted(families, key=len)
        for variant in families[family]
    }


def _shipped(name: str, for_task_file: bool = False) -> Path:
    """Return the file of a shipped preset, or where a composed one's would be.

    For a task file, a variant is a preset.
    """
    folder = presets_dir()
    known = {str(path.relative_to(folder).with_suffix("")): path for path in folder.rglob("*.yaml")}
    if name in known:
        return known[name]
    if name in _composed():
        return folder / f"{name}.yaml"
    variant = f"variant/{name}"
    if for_task_file and variant in known:
        return known[variant]
    names = [*preset_names(), *known]
    if for_task_file:
        names += [known_name.removeprefix("variant/") for known_name in known]
    hint = _other_families(name) or did_you_mean(name, names)
    if variant in known:
        families = [f for f, variants in preset_families().items() if name in variants]
        family = "resnet" if "resnet" in families else "".join(families[:1])
        such = f", or name a family's, such as {family}-{name}" if families else ""
        hint = f"; it is a variant: add --task FILE{such}"
    if _is_file(Path(f"{name}.yaml")):
        hint = f"; did you mean the file '{name}.yaml'?"
    raise UsageError(f"unknown preset {describe(name)}{hint or '; `egtrain presets` lists them'}")


def _other_families(name: str) -> str:
    """Return a hint at the families that have the variant of a name, or nothing."""
    families = preset_families()
    for family in families:
        variant = name.removeprefix(f"{family}-")
        owners = [other for other, variants in families.items() if variant in variants]
        if variant != name and owners:
            return f"; '{variant}' is a variant of {', '.join(owners)} only"
    return ""


def _read(path: Path, label: str) -> Settings:
    """Read a settings file; a composed preset has no file and inherits its two parts."""
    parts = (
        _composed().get(path.stem) if path.parent == presets_dir() and not _is_file(path) else None
    )
    if parts is None:
        return read_settings(path, label)
    return Settings({"inherits": list(parts)}, {(): f"preset {path.stem}"})


def _find_parent(name: str, child: Path | None, place: str) -> tuple[Path, str]:
    """Return the file and label of what `inherits` names: shipped, or beside the child."""
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
        raise UsageError(
            f"{place}: the inherited file '{path}' does not exist; paths are relative to this file"
        )
    return path, _label(path)


def _inherited(
    settings: Settings,
    path: Path | None,
    label: str,
    children: dict[Path, str],
    done: dict[Path, Settings],
) -> Settings:
    """Return the settings laid over everything they inherit."""
    place = settings.place(("inherits",))
    parents = settings.values.pop("inherits", [])
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(
        isinstance(parent, str) and parent for parent in parents
    ):
        raise UsageError(
            f"{place}: inherits must be a list of presets, such as [family/resnet, variant/eg]"
        )
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
            raise UsageError(
                f"{place}: inherits is more than {_MAX_INHERITANCE} files deep; shorten the chain"
            )
        if resolved not in done:
            read = _read(parent_path, parent_label)
            done[resolved] = _inherited(read, parent_path, parent_label, children, done)
        _merge(result, done[resolved])
    if path is None or not _is_family(path):
        result.values.pop("variants", None)
    settings.places = {key: at for key, at in settings.places.items() if key[:1] != ("inherits",)}
    shipped = path is not None and path.resolve().is_relative_to(presets_dir().resolve())
    _say_who_set_the_warmup(settings, shipped)
    _merge(result, settings)
    return result


def _overrides(overrides: list[str], own_task: bool) -> Settings:
    """Return KEY=VALUE overrides as one layer; their order matters only for equal keys.

    With `own_task` the keys of `task` are those of a task file, which are checked later.
    """
    settings = Settings()
    for override in overrides:
        typed = getattr(override, "typed", f"--set {override}")
        source = " ".join(typed.split())[:200]
        dotted, equals, text = override.partition("=")
        dotted = dotted.strip()
        if not equals or not dotted:
            raise UsageError(f"{source}: write KEY=VALUE, such as optimizer.lr=0.2")
        if dotted == "inherits":
            raise UsageError(
                f"{source}: inherits belongs in a file; name the preset with --preset instead"
            )
        if dotted in KNOWN_KEYS:
            example = f"{dotted}.{KNOWN_KEYS[dotted][0]}"
            raise UsageError(
                f"{source}: '{dotted}' is a group; set one of its keys, such as {example}"
            )
        if own_task and dotted in ("task.name", "task.file"):
            raise UsageError(f"{source}: --task says which task it is: leave {dotted} out")
        of_task = own_task and dotted.startswith("task.") and dotted.count(".") == 1
        if dotted not in DOTTED_KEYS and not of_task:
            raise UsageError(f"{source}: {unknown_key(dotted)}")
        key = tuple(dotted.split("."))
        target = settings.values
        for part in key[:-1]:
            target = target.setdefault(part, {})
        target[key[-1]] = parse_value(text, source)
        settings.places[key] = source
    _say_who_set_the_warmup(settings, shipped=False)
    return settings


def _say_who_set_the_warmup(layer: Settings, shipped: bool) -> None:
    """Allow a shipped preset's warm-up to be shortened, a user's only on request."""
    schedule = layer.values.get("schedule")
    if isinstance(schedule, dict) and "warmup_epochs" in schedule:
        schedule.setdefault("shorten_warmup", shipped)


def _merge(base: Settings, layer: Settings) -> None:
    """Lay settings over others: groups are merged, other values replaced.

    A new name of a model, optimizer or extrapolation drops what was set for the old one, and one of
    ratio, rate and size drops the others. So one variant can replace another.
    """
    for section, default in DEFAULT_NAMES.items():
        old, new = base.values.get(section), layer.values.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            if "name" in new and new["name"] != old.get("name", default):
                _drop(base, section, [key for key in old if key != "name"])
            elif section == "extrapolation" and any(
                new.get(length) is not None for length in LENGTHS
            ):
                _drop(base, section, [length for length in LENGTHS if length in old])
    gone: set[Key] = set()
    for name, value in layer.values.items():
        replaced = base.values.get(name)
        if isinstance(value, dict) and isinstance(replaced, dict):
            base.values[name] = {**replaced, **value}
            gone |= {(name, key) for key in value}
        else:
            base.values[name] = dict(value) if isinstance(value, dict) else value
            gone.add((name,))
    base.places = {
        key: at for key, at in base.places.items() if not gone & {key[:1], key[:2]}
    } | layer.places


def _drop(settings: Settings, section: str, keys: list[str]) -> None:
    for key in keys:
        del settings.values[section][key]
        settings.places = {at: p for at, p in settings.places.items() if at[:2] != (section, key)}
