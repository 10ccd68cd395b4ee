"""A user's task file: plain Python, run only where the command line names it.

Its code runs through `TaskFile.call`, which turns what goes wrong there into one report: what was
called, and the user's traceback from their file on.
"""

import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from egtrain.errors import EgtrainError, UsageError

CALLS: dict[str, tuple[str, ...]] = {
    "model": (),
    "dataset": ("split",),
    "loss": ("model", "batch"),
    "collate": ("samples",),
    "decode": ("model", "batch"),
}
"""The functions of a task file with the arguments that they are called with."""
REQUIRED = ("model", "dataset", "loss")
PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
"""The folder of our own code."""


class TaskFileError(EgtrainError):
    """An exception in the code of a task file; the message ends with the user's traceback."""


@dataclass(frozen=True)
class Parameter:
    """A keyword parameter with a default, which is a setting of the task."""

    owner: str
    """The function that has it."""
    kind: Any
    """Its annotation, or else the type of its default."""
    default: Any


@dataclass(frozen=True)
class TaskFile:
    """A task file that has been run."""

    path: Path
    """Absolute."""
    sha256: str
    """Of its content."""
    module: ModuleType = field(repr=False)
    parameters: Mapping[str, Mapping[str, Parameter]] = field(repr=False)
    """The keyword parameters of each function, by the function's name."""

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.path.name

    def has(self, function: str) -> bool:
        """Return whether the file has one of the functions of `CALLS`."""
        return function in self.parameters

    def call(self, function: str, *arguments: Any, settings: Mapping[str, Any]) -> Any:
        """Call a function of the file with those of the settings that it takes.

        Raises:
            TaskFileError: it raised an exception.
        """
        own = {name: settings[name] for name in self.parameters[function]}
        with self.running(f"{function}({', '.join(CALLS[function])})"):
            return getattr(self.module, function)(*arguments, **own)

    @contextmanager
    def running(self, called: str) -> Iterator[None]:
        """Report an exception as one of the user's code; send what it prints to standard error.

        Raises:
            TaskFileError: the block raised an exception.
            UsageError: it left the working directory, which other paths are relative to.
        """
        folder = os.getcwd()
        try:
            # Standard output is for results, which may be JSON.
            with redirect_stdout(sys.stderr):
                yield
        except EgtrainError:
            raise
        except (Exception, SystemExit) as error:
            raise TaskFileError(_report(error, self.path, called)) from error
        if os.getcwd() != folder:
            os.chdir(folder)
            raise self.wrong(
                f"{called} changes the working directory: leave os.chdir() out, and name files "
                "relative to Path(__file__).parent"
            )

    def wrong(self, problem: str) -> UsageError:
        """Return the error of a file that does not keep to what a task file is."""
        return UsageError(f"{self.name}: {problem}")


def load_task_file(path: Path) -> TaskFile:
    """Run a task file and return it.

    Its folder becomes the first of `sys.path`, as for `python FILE`, so that it can import what
    lies beside it. Nothing is written: its byte code is not kept.

    Raises:
        UsageError: it is not there, is no Python, needs a missing package, or lacks a function.
        TaskFileError: it raised an exception.
    """
    path = path.expanduser().absolute()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"--task {path.name}: cannot be read ({error.strerror}); name a Python file with "
            "model(), dataset(split) and loss(model, batch)"
        ) from None
    name = path.stem
    if _is_taken(name):
        raise UsageError(
            f"{path.name} has the name of the module '{name}' and would hide it: rename the file"
        )
    module = ModuleType(name)
    module.__file__ = str(path)
    file = TaskFile(path, hashlib.sha256(source).hexdigest(), module, {})
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        reason = getattr(error, "msg", None) or str(error)
        raise UsageError(
            f"{path.name}{f':{line}' if line else ''}: this is no Python ({reason}); a task file "
            "is a Python file with model(), dataset(split) and loss(model, batch)"
        ) from None
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[name] = module  # for classes of its own in processes that load samples
    with file.running("importing it"):
        try:
            exec(code, module.__dict__)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if not package or _is_of_file(error, path):
                raise
            raise file.wrong(
                f"it needs the package '{package}', which is not installed: pip install {package}"
            ) from None
    return TaskFile(path, file.sha256, module, _parameters(file))


def _is_taken(name: str) -> bool:
    """Return whether Python or an installed package has a module of this name."""
    if name in sys.stdlib_module_names or name == "egtrain":
        return True
    installed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    found = PathFinder.find_spec(name, installed)
    return found is not None and found.origin is not None


def _is_of_file(error: ModuleNotFoundError, path: Path) -> bool:
    """Return whether a module is missing from something that lies beside the file."""
    package = (error.name or "").partition(".")[0]
    return (path.parent / package).exists() or (path.parent / f"{package}.py").exists()


def _parameters(file: TaskFile) -> dict[str, dict[str, Parameter]]:
    """Return the settings of each function, after checking that it can be called."""
    found: dict[str, dict[str, Parameter]] = {}
    for name, arguments in CALLS.items():
        function = getattr(file.module, name, None)
        shown = f"{name}({', '.join(arguments)})"
        if function is None and name not in REQUIRED:
            continue
        if not callable(function):
            problem = "is missing: add it" if function is None else "is no function: make it one"
            raise file.wrong(f"{shown} {problem}")
        try:
            signature = inspect.signature(function)
            taken = signature.bind(*arguments).arguments
        except (TypeError, ValueError):
            raise file.wrong(
                f"{name} must be callable as {shown}: give every further parameter a default"
            ) from None
        hints = _hints(function)
        found[name] = {}
        for parameter in signature.parameters.values():
            if parameter.name in taken or parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                continue
            if parameter.kind == parameter.POSITIONAL_ONLY:
                raise file.wrong(
                    f"'{parameter.name}' of {name}() is a setting, which is given by its name: "
                    "remove the '/' after it"
                )
            kind = hints.get(parameter.name, type(parameter.default))
            if kind is type(None):
                raise file.wrong(
                    f"'{parameter.name}' of {name}() is a setting whose type None does not say: "
                    f"annotate it, such as {parameter.name}: int | None = None"
                )
            found[name][parameter.name] = Parameter(name, kind, parameter.default)
    return found


def _hints(function: Any) -> dict[str, Any]:
    """Return the types of the parameters of a function, a class or whatever else is callable."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, type):
        function = function.__init__  # type: ignore[misc]
    elif not inspect.isroutine(function):
        function = type(function).__call__
    try:
        return get_type_hints(function)
    except Exception:
        return {}  # an annotation that only a type checker sees: the defaults have types too


def _report(error: BaseException, path: Path, called: str) -> str:
    """Return what was called, and the traceback from the user's file on."""
    summary = traceback.TracebackException.from_exception(error, compact=True)
    frames = list(summary.stack)
    own = [n for n, frame in enumerate(frames) if _same(frame.filename, path)]
    # Without one, such as for a class from a file beside it: what our own code has called.
    ours = [n for n, frame in enumerate(frames) if frame.filename.startswith(PACKAGE)]
    first = own[0] if own else ours[-1] + 1
    summary.stack = traceback.StackSummary.from_list(frames[first:])
    lines = (
        "".join(summary.format(chain=False))
        .rstrip()
        .removeprefix("Traceback (most recent call last):\n")
    )
    return f"{path.name}: {called} failed:\n{lines}"


def _same(name: str, path: Path) -> bool:
    return os.path.abspath(name) == os.path.abspath(path)
