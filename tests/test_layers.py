"""Imports point down only: the house plan of the design, read off the source."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "egtrain"

LAYERS = [
    {"__main__"},
    {"cli"},
    {"sweep", "bench", "sharpness", "runs"},
    {"session", "saved_run", "export"},
    {"dry_run"},
    {"cost", "header"},
    {"build"},
    {"plan"},
    {"train"},
    {"run", "evaluate", "weight_files"},
    {"ranks", "run_directory", "logs", "figures"},
    {"workers", "checkpoint", "tables", "tasks"},
    {"config", "integrations"},
    {"models", "data", "optim", "statistics"},
    {"progress"},
    {"formatting", "task_file", "disk", "over_seeds"},
    {"errors", "nested", "__init__"},
]
"""Rooms of the package, the highest first. A room may import those below it, and its own files."""

LAZY_UPWARD = {("__init__", "saved_run")}
"""`egtrain.load_run` is the one name that the package hands out, and it is imported when asked
for."""

TALKS_TO_RANKS = {
    "workers.py",
    "ranks/distributed.py",
    "ranks/torchrun.py",
    "optim/ddp.py",
    "integrations/states.py",
    "optim/processes.py",
    "optim/sharded.py",
}
"""Files that may import torch.distributed: a worker is never a rank, and only these know ranks."""

KNOWS_CONFIG = {
    "config",
    "build",
    "plan",
    "cost",
    "header",
    "dry_run",
    "session",
    "saved_run",
    "export",
    "sweep",
    "runs",
    "bench",
    "sharpness",
    "cli",
    "__main__",
}
"""Rooms that may see a configuration; below `build` objects are made of plain values."""


@dataclass(frozen=True)
class Import:
    """One imported module; `lazy` if that happens in a function, or for the type checker only."""

    module: str
    line: int
    lazy: bool


def sources(*rooms: str) -> list[Path]:
    """Return the package's files, or those of some rooms."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not rooms or room_of(path) in rooms]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Return the modules that a file imports; `from a import b` may mean a or a.b, and counts as
    a.b.
    """
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")), lazy=False))


def _imports(node: ast.AST, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (
                Import(f"{child.module}.{alias.name}", child.lineno, lazy) for alias in child.names
            )
        elif isinstance(child, ast.Attribute) and ast.unparse(child) == "torch.distributed":
            yield Import("torch.distributed", child.lineno, lazy)
        in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from _imports(child, lazy or in_function or for_types_only)


def imported_room(module: str) -> str | None:
    """Return the room of egtrain that an imported module is in."""
    parts = module.split(".")
    if parts[0] != "egtrain":
        return None
    is_room = len(parts) > 1 and (
        (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
    )
    return parts[1] if is_room else "__init__"


def level_of(room: str) -> int:
    for level, rooms in enumerate(LAYERS):
        if room in rooms:
            return level
    pytest.fail(
        f"egtrain/{room} has no place in LAYERS of {__file__}: give it one, as low as it can stand"
    )


def test_every_room_imports_only_rooms_below_it() -> None:
    wrong = []
    for path in sources():
        room = room_of(path)
        for imported in imports_of(path):
            other = imported_room(imported.module)
            if other is None or other == room or (imported.lazy and (room, other) in LAZY_UPWARD):
                continue
            if level_of(other) <= level_of(room):
                wrong.append(
                    f"{name_of(path)}:{imported.line} imports {imported.module}, which is not "
                    "below it"
                )
    assert not wrong, "\n".join(wrong)


def test_optim_imports_nothing_but_torch() -> None:
    allowed = sys.stdlib_module_names | {"torch"}
    wrong = [
        f"{name_of(path)}:{i.line} imports {i.module}"
        for path in sources("optim")
        for i in imports_of(path)
        if i.module.split(".")[0] not in allowed and not i.module.startswith("egtrain.optim.")
    ]
    assert not wrong, "egtrain.optim is for other people's loops too:\n" + "\n".join(wrong)


def test_integrations_know_the_library_and_one_framework_each() -> None:
    wrong = [
        f"{name_of(path)}:{i.line} imports {i.module}"
        for path in sources("integrations")
        for i in imports_of(path)
        if imported_room(i.module) not in {None, "integrations", "optim"}
    ]
    assert not wrong, "a framework's user has a loop already:\n" + "\n".join(wrong)
    frameworks = {"accelerate", "lightning", "pytorch_lightning", "transformers"}
    users = {
        name_of(path)
        for path in sources()
        if any(i.module.split(".")[0] in frameworks for i in imports_of(path))
    }
    assert users == {"integrations/lightning.py"}


def test_data_and_models_import_nothing_above_them() -> None:
    below = {"disk", "errors", "formatting", "nested", "progress", "task_file"}
    wrong = [
        f"{name_of(path)}:{i.line} imports {i.module}"
        for path in sources("data", "models")
        for i in imports_of(path)
        if imported_room(i.module) not in {None, room_of(path), *below}
    ]
    assert not wrong, "data and models are plain tensors and plain modules:\n" + "\n".join(wrong)


def test_only_these_files_talk_to_other_ranks() -> None:
    users = {
        name_of(p)
        for p in sources()
        if any(f"{i.module}.".startswith("torch.distributed.") for i in imports_of(p))
    }
    assert users <= TALKS_TO_RANKS
    assert {"workers.py", "ranks/distributed.py", "ranks/torchrun.py"} <= users


def test_nothing_below_the_builder_sees_a_configuration() -> None:
    users = {
        room_of(p)
        for p in sources()
        if any(imported_room(i.module) == "config" for i in imports_of(p))
    }
    assert users <= KNOWS_CONFIG
    assert "build" in users


@pytest.mark.parametrize(
    "start", ["__main__.py", "config/files.py", *(name_of(p) for p in sources("cli"))]
)
def test_help_presets_and_config_errors_do_without_torch(start: str) -> None:
    waiting, seen = [PACKAGE / start], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for imported in imports_of(path):
            if not imported.lazy:
                assert imported.module.split(".")[0] != "torch", (
                    f"importing {start} imports torch in {name_of(path)}:{imported.line}: move it "
                    "into the function"
                )
                waiting.extend(files_of(imported.module))


def files_of(module: str) -> list[Path]:
    """Return the files that importing a module of egtrain runs: its packages and itself."""
    parts = module.split(".")
    if parts[0] != "egtrain":
        return []
    files = []
    for end in range(1, len(parts) + 1):
        place = PACKAGE.joinpath(*parts[1:end])
        files += [f for f in (place / "__init__.py", place.with_suffix(".py")) if f.is_file()]
    return files
