"""Read and write settings as YAML: plain data only, with the line where each value was set.

Scalars follow the YAML 1.2 core schema (`1e-3` is a number, `no` and `on` are text). Refused with
their line, since settings need none of them, are duplicate keys, anchors and aliases, tags,
several documents, not-a-number and infinity.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import yaml

from egtrain.errors import UsageError

Key = tuple[str, ...]
"""Where a value sits: ("optimizer", "lr")."""

MAX_BYTES = 1_000_000
_MAX_DEPTH = 10
_MAX_PLACES = 10_000
_INTEGER = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    word: value
    for name, value in (("true", True), ("false", False))
    for word in (name, name.title(), name.upper())
}
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*|1/K")
_WRITTEN_LINE = re.compile(r"( {2})?([A-Za-z_]\w*):(?: ([^ ].*))?", re.ASCII)
_WRITTEN_PLAIN = re.compile(r"[A-Za-z0-9_.+/-]*[A-Za-z0-9_.]")
_YAML_1_1_BOOLEANS = {"y", "n", "yes", "no", "on", "off"}


@dataclass
class Settings:
    """A tree of plain values, and where each key was set: `file.yaml:7`, `--set optimizer.lr=1`."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """Return where a key, or else the nearest key above it, was set; empty if neither was."""
        for length in range(len(key), -1, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return ""


def read_settings(path: Path, label: str) -> Settings:
    """Read a YAML file; `label` names it in messages.

    Raises:
        UsageError: the file cannot be read, is too large, is not UTF-8, or is refused by
            `parse_settings`.
    """
    try:
        if not path.is_file():
            if path.is_dir():
                raise UsageError(f"{label}: this is a folder; name a .yaml file in it")
            if path.exists():
                raise UsageError(f"{label}: not a regular file; name a .yaml file")
            raise UsageError(f"{label}: no such file; check the path, or name a shipped preset")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{label}: cannot be read ({reason}); check the path and its permissions"
        ) from None
    if len(raw) > MAX_BYTES:
        line = raw.count(b"\n") + 1
        raise UsageError(
            f"{label}:{line}: larger than {MAX_BYTES:,} bytes, which is no settings file; shorten "
            "it"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{label}:{line}: byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from None
    return parse_settings(text, label)


def parse_settings(text: str, label: str) -> Settings:
    """Parse YAML text whose top level is a mapping; `label` names it in messages.

    Raises:
        UsageError: the text is empty, not YAML, no mapping, or holds something refused here.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise UsageError(
            f"{label}: larger than {MAX_BYTES:,} bytes, which is no settings file; shorten it"
        )
    settings = Settings(places={(): f"{label}:1"})
    value = _Builder(text, label, settings.places).document()
    if value is None:
        raise UsageError(
            f"{label}:1: the file holds no settings; write 'key: value' lines or 'inherits: "
            "[PRESET]'"
        )
    if not isinstance(value, dict):
        line = settings.places[()]
        raise UsageError(f"{line}: the top level must be 'key: value' lines, not {describe(value)}")
    settings.values = value
    return settings


def read_written_settings(path: Path, label: str) -> dict[str, Any]:
    """Return what `read_settings` returns, some fifty times faster for what `write_settings` wrote.

    Raises:
        UsageError: as `read_settings`.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
        if len(text) <= MAX_BYTES:
            return _written_values(text)
    except (OSError, ValueError, UsageError):
        pass
    return read_settings(path, label).values


def _written_values(text: str) -> dict[str, Any]:
    """Return the values of YAML text as `write_settings` writes it.

    Raises:
        ValueError: the text is not of that form; it may still be YAML.
        UsageError: a value is not.
    """
    values: dict[str, Any] = {}
    group: dict[str, Any] | None = None
    for line in text.removesuffix("\n").split("\n"):
        match = _WRITTEN_LINE.fullmatch(line)
        if match is None:
            raise ValueError(line)
        indent, key, value = match.groups()
        if not indent:
            group = None
        target = group if indent else values
        if target is None or key in target:
            raise ValueError(line)
        if value is None:
            group = target[key] = {}
        else:
            target[key] = _written_value(value)
    if {} in values.values():
        raise ValueError("an empty group")
    return values


@lru_cache(maxsize=10_000)
def _written_value(text: str) -> Any:
    if _WRITTEN_PLAIN.fullmatch(text):
        return _resolve(text)
    if text[0] not in "[\"'":
        raise ValueError(text)
    return _Builder(text, "", {}, lines=False).document()


def parse_value(text: str, label: str) -> Any:
    """Parse the right-hand side of KEY=VALUE: a number, true, false, null, text or a list.

    Only a leading bracket or quote is YAML syntax here, so that paths may hold any character.

    Raises:
        UsageError: the text is empty, a mapping, a broken list, or not a finite number.
    """
    text = text.strip()
    if not text:
        raise UsageError(
            f"{label}: the value is missing; write null for none, or '' for empty text"
        )
    if text.startswith("{"):
        raise UsageError(f"{label}: a mapping cannot be set; set its keys one by one")
    if text[0] in "[\"'":
        return _Builder(text, label, {}, lines=False).document()
    try:
        return _resolve(text)
    except ValueError as error:
        raise UsageError(f"{label}: {error}") from None


def describe(value: object) -> str:
    """Return a value's name for messages: `'text'`, `true`, `null`, `a list`."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value) if isinstance(value, str) else write_value(value)
    return text if len(text) <= 60 else text[:56] + "…" + text[-1]


def write_settings(values: dict[str, Any], indent: str = "") -> str:
    """Return YAML text that `parse_settings` reads back as the same values."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{write_settings(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {write_value(value)}\n")
    return "".join(lines)


def write_value(value: object) -> str:
    """Return a scalar or a list as YAML on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(write_value, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        # YAML 1.1 readers take a number without a point for text.
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa}{'.0' if e and '.' not in mantissa else ''}{e}{exponent}"
    if not isinstance(value, str):
        return str(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _YAML_1_1_BOOLEANS and _is_text(value):
        return value
    escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
    return f'"{"".join(escaped)}"'


def _is_text(value: str) -> bool:
    try:
        return isinstance(_resolve(value), str)
    except ValueError:
        return False


def _resolve(text: str) -> Any:
    """Return the value of a plain scalar.

    Raises:
        ValueError: it is not finite, or has too many digits to be a setting.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"'{text}' is not a finite number; write a finite one, or null for none")
    if len(text) > 100 and (_INTEGER.fullmatch(text) or _FLOAT.fullmatch(text)):
        raise ValueError(f"a number of {len(text)} characters is too long; write it shorter")
    if _INTEGER.fullmatch(text):
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise ValueError(f"'{text}' is not a finite number; write a smaller one")
        return number
    return text


class _Builder:
    """Builds values from parser events; nothing is constructed unchecked."""

    def __init__(
        self, text: str, label: str, places: dict[Key, str], *, lines: bool = True
    ) -> None:
        self._text = text
        self._label = label
        self._places = places
        self._lines = lines
        self._events: Iterator[yaml.Event] = iter(())

    def document(self) -> Any:
        """Return the value of the only document, or None without one."""
        try:
            self._events = yaml.parse(self._text, Loader=yaml.SafeLoader)
            next(self._events)
            if isinstance(next(self._events), yaml.StreamEndEvent):
                return None
            first = next(self._events)
            self._places[()] = self._place(first)
            value = self._value(first, ())
            next(self._events)
            after = next(self._events)
            if not isinstance(after, yaml.StreamEndEvent):
                self._refuse(after, "a second document starts here; keep one document a file")
            return value
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self._label if mark is None else self._line(mark.line + 1)
            problem = (error.problem or "it cannot be parsed").rstrip(".")
            tab = r"'\t'" in problem
            hint = (
                "indent with spaces, not tabs"
                if tab
                else "check the indentation, quotes and brackets"
            )
            raise UsageError(f"{place}: not valid YAML ({problem}); {hint}") from None
        except yaml.reader.ReaderError as error:
            place = self._line(self._text.count("\n", 0, error.position) + 1)
            raise UsageError(
                f"{place}: character #x{error.character:04x} is not allowed; remove it"
            ) from None
        except (ValueError, OverflowError):
            # PyYAML lets e.g. an escape beyond Unicode through to chr().
            raise UsageError(f"{self._label}: not valid YAML; check its quoted text") from None

    def _value(self, event: yaml.Event, key: Key) -> Any:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self._refuse(
                event,
                "anchors and aliases (&name, *name) are not allowed; write the value out, or "
                "quote it",
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            self._refuse(
                event, f"the tag {describe(tag)} is not allowed; write a plain value, or quote it"
            )
        if len(self._places) > _MAX_PLACES:
            self._refuse(
                event, f"more than {_MAX_PLACES:,} values, which is no settings file; shorten it"
            )
        if len(key) > _MAX_DEPTH:
            self._refuse(event, f"nested more than {_MAX_DEPTH} levels deep; flatten it")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(key)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                item_key = (*key, str(len(items)))
                self._places[item_key] = self._place(event)
                items.append(self._value(event, item_key))
            return items
        if not isinstance(event, yaml.ScalarEvent):
            self._refuse(event, "a value is missing here; write one")
        if event.style in ("'", '"', "|", ">"):
            return str(event.value)
        try:
            return _resolve(event.value)
        except ValueError as error:
            self._refuse(event, str(error))

    def _mapping(self, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if (
                not isinstance(event, yaml.ScalarEvent)
                or event.anchor is not None
                or event.tag is not None
            ):
                self._refuse(event, "a key must be a plain word; write 'key: value'")
            name = str(event.value)
            if name in values:
                first = self._places[(*key, name)].rpartition(":")[2]
                dotted = describe(".".join((*key, name)))
                self._refuse(
                    event, f"duplicate key {dotted}, first set in line {first}; delete one of them"
                )
            self._places[(*key, name)] = self._place(event)
            values[name] = self._value(next(self._events), (*key, name))
        return values

    def _place(self, event: yaml.Event) -> str:
        return self._label if event.start_mark is None else self._line(event.start_mark.line + 1)

    def _line(self, line: int) -> str:
        return f"{self._label}:{line}" if self._lines else self._label

    def _refuse(self, event: yaml.Event, problem: str) -> NoReturn:
        raise UsageError(f"{self._place(event)}: {problem}")
