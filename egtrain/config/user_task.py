"""The settings of a task file: its functions' keyword parameters, typed and strict."""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from egtrain.config.tasks import UserSettings
from egtrain.config.yaml_text import write_value
from egtrain.errors import UsageError
from egtrain.task_file import Parameter, TaskFile

PLAIN = "true or false, a number, text, a list of these, or one of Literal[...]"


def parameters_of(file: TaskFile) -> dict[str, Parameter]:
    """Return the settings of a task file by name.

    Raises:
        UsageError: a parameter cannot be a setting.
    """
    found: dict[str, Parameter] = {}
    for parameters in file.parameters.values():
        for name, parameter in parameters.items():
            if name in UserSettings.model_fields or name.startswith("_"):
                raise file.wrong(
                    f"{parameter.owner}() has a parameter '{name}', a name that egtrain uses: "
                    "rename it"
                )
            try:
                checked(parameter, parameter.default)
                write_value(parameter.default)
            except (ValidationError, TypeError, UsageError):
                raise file.wrong(
                    f"the parameter '{name}' of {parameter.owner}() is a setting, so its default "
                    f"must be {PLAIN}, and of the type that it is annotated with, not "
                    f"{parameter.default!r}"
                ) from None
            other = found.setdefault(name, parameter)
            if (other.kind, other.default) != (parameter.kind, parameter.default):
                raise file.wrong(
                    f"'{name}' is a parameter of {other.owner}() and of {parameter.owner}(), which "
                    "makes it one setting: give it the same type and default"
                )
    return found


def checked(parameter: Parameter, value: Any) -> Any:
    """Return a value of a setting.

    Raises:
        ValidationError: it is not of the parameter's type.
        TypeError: no YAML value is of that type.
    """
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return TypeAdapter(_strict(parameter.kind), config=strict).validate_python(value)


def _strict(kind: Any) -> Any:
    """Return a parameter's type for pydantic: a YAML list may stand for a tuple."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if kind in (bool, int, float, str, type(None)) or origin is Literal:
        return kind
    if origin in (Union, types.UnionType):
        return Union[tuple(_strict(part) for part in arguments)]  # noqa: UP007
    if origin in (list, tuple):
        parts = tuple(part if part is Ellipsis else _strict(part) for part in arguments)
        return Annotated[origin[parts] if parts else origin, Field(strict=False)]
    raise TypeError(f"{kind} is not plain")
