"""From settings to a configuration; every error is a sentence with the place and the fix."""

from collections.abc import Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from egtrain.config.schema import DEFAULT_NAMES, UNIONS, Config
from egtrain.config.section import Section
from egtrain.config.tasks import USER, UserSettings
from egtrain.config.user_task import checked, parameters_of
from egtrain.config.yaml_text import Key, Settings, describe
from egtrain.errors import UsageError, did_you_mean
from egtrain.task_file import Parameter, TaskFile


def _known_keys() -> dict[str, list[str]]:
    """Return the keys of every section, including those of all members of a union."""
    known: dict[str, list[str]] = {"": []}
    for name, info in Config.model_fields.items():
        known[""].append(name)
        if name in UNIONS:
            keys = [key for member in UNIONS[name].values() for key in member.model_fields]
            known[name] = list(dict.fromkeys(["name", *keys]))
        elif isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            known[name] = list(info.annotation.model_fields)
    return known


KNOWN_KEYS = _known_keys()
"""The keys of each section; those of the top level are under an empty name."""
DOTTED_KEYS = [
    f"{section}.{key}" if section else key for section, keys in KNOWN_KEYS.items() for key in keys
]


def validated(settings: Settings, file: TaskFile | None = None) -> Config:
    """Return the configuration, or raise UsageError about the first wrong setting.

    `file` is the task file that the command line names: its own settings are checked too.
    """
    own = None if file is None else parameters_of(file)
    _check_keys(settings, own)
    values = dict(settings.values)
    for section, default in DEFAULT_NAMES.items():
        if section in values:
            values[section] = {"name": default, **values[section]}
    if own is not None and values["task"]["name"] == USER:
        values["task"] = _with_own_settings(values["task"], own, settings)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(_translated(error, settings)) from None
    if file is None or not isinstance(config.task, UserSettings):
        return config
    return config.model_copy(update={"task": config.task.with_code(file)})


def _with_own_settings(
    task: Mapping[str, object], own: Mapping[str, Parameter], settings: Settings
) -> dict[str, object]:
    """Return the section `task` with every setting of the task file, checked."""
    values = dict(task)
    for name, parameter in own.items():
        try:
            values[name] = checked(parameter, values.get(name, parameter.default))
        except ValidationError as error:
            errors = error.errors(include_url=False)
            entry = _entry(errors[0])
            wishes = dict.fromkeys(_wish(e) for e in errors if _entry(e) == entry)
            problem = (
                f"{'.'.join(('task', name, *entry))} must be {' or '.join(wishes)}, not "
                f"{describe(errors[0]['input'])}"
            )
            raise UsageError(_placed(settings, ("task", name), problem)) from None
    return values


def _entry(error: ErrorDetails) -> Key:
    """Return the numbers of the list entry that is wrong, empty for a whole value."""
    return tuple(str(part) for part in error["loc"] if isinstance(part, int))


def _check_keys(settings: Settings, own: Mapping[str, Parameter] | None) -> None:
    for name, value in settings.values.items():
        at = settings.place((name,))
        if name == "inherits" or name not in KNOWN_KEYS[""]:
            key = (name, next(iter(value))) if isinstance(value, dict) and value else (name,)
            raise UsageError(f"{at}: {unknown_key('.'.join(key))}")
        if name not in KNOWN_KEYS:
            continue
        if not isinstance(value, dict):
            raise UsageError(
                f"{at}: {name} must be a group of keys, such as {KNOWN_KEYS[name][0]}, not "
                f"{describe(value)}"
            )
        allowed, member, members = KNOWN_KEYS[name], "", UNIONS.get(name, {})
        if members:
            member = _member(name, value, settings)
            allowed = list(members[member].model_fields)
        if (name, member) == ("task", USER):
            if own is None:
                continue  # they were checked when the run began
            allowed += own
        for key in value:
            if key in allowed:
                continue
            at = settings.place((name, key))
            if (name, member) == ("task", USER):
                hint = did_you_mean(key, list(own or ()))
                known = f"; it has {', '.join(own)}" if own else ""
                raise UsageError(f"{at}: the task file has no setting 'task.{key}'{hint or known}")
            if key in KNOWN_KEYS[name]:
                owners = [other for other, model in members.items() if key in model.model_fields]
                raise UsageError(
                    f"{at}: {name} '{member}' has no key '{name}.{key}'; remove it, or set "
                    f"{name}.name to {' or '.join(owners)}"
                )
            raise UsageError(f"{at}: {unknown_key(f'{name}.{key}')}")


def _member(section: str, value: dict[str, object], settings: Settings) -> str:
    """Return the name that says which keys a section has."""
    name = value.get("name", DEFAULT_NAMES[section])
    if isinstance(name, str) and name in UNIONS[section]:
        return name
    hint = did_you_mean(name, list(UNIONS[section])) if isinstance(name, str) else ""
    at, known = settings.place((section, "name")), ", ".join(UNIONS[section])
    raise UsageError(f"{at}: {section}.name must be one of {known}, not {describe(name)}{hint}")


def unknown_key(dotted: str) -> str:
    """Return the message about a key that does not exist."""
    section, _, key = dotted.rpartition(".")
    if dotted in DOTTED_KEYS:
        return (
            f"'{dotted}' must be nested; "
            f"write '{section}:' and, indented in the next line, '{key}:'"
        )
    namesakes = [known for known in DOTTED_KEYS if known.rpartition(".")[2] == key and "." in known]
    hint = did_you_mean(dotted, DOTTED_KEYS)
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
        # Only extrapolations have a required key, and what requires it is the name set there.
        name = first["loc"][1]
        problem = f"extrapolation '{name}' needs {'.'.join(key)}; set it, such as 0.05"
        return _placed(settings, ("extrapolation", "name"), problem)
    wishes = dict.fromkeys(_wish(e) for e in errors if _error_key(e) == key)
    return _placed(
        settings,
        key,
        f"{'.'.join(key)} must be {' or '.join(wishes)}, not {describe(first['input'])}",
    )


def _placed(settings: Settings, key: Key, problem: str) -> str:
    place = settings.place(key)
    return f"{place}: {problem}" if place else problem


def _error_key(error: ErrorDetails) -> Key:
    """Return the key of an error, without pydantic's names of union members."""
    location = [str(part) for part in error["loc"]]
    if location[0] in UNIONS:
        del location[1:2]
    length = 2 if location[0] in KNOWN_KEYS else 1
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
        case "tuple_type" | "list_type":
            return "a list"
        case "none_required":
            return "null"
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
