"""Options that several commands share, and how options become settings."""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from egtrain.data.sets import IMAGES, PAIRS, TEXTS
from egtrain.errors import UsageError

if TYPE_CHECKING:
    from egtrain.task_file import TaskFile

what_option = partial(typer.Option, rich_help_panel="What")
length_option = partial(typer.Option, rich_help_panel="How long")
batch_option = partial(typer.Option, rich_help_panel="Batch")
place_option = partial(typer.Option, rich_help_panel="Where it runs")
output_option = partial(typer.Option, rich_help_panel="Output")
"""Options by their group in --help."""


def complete_preset() -> list[str]:
    """Return the presets, of which the shell is shown those that begin like its word."""
    # Imported here, so that --help does not wait for it.
    from egtrain.config.files import preset_names

    return preset_names()


PresetName = Annotated[
    str | None,
    what_option(
        metavar="NAME|FILE",
        help="A preset (`egtrain presets` lists them) or a YAML file.",
        autocompletion=complete_preset,
    ),
]
TaskPath = Annotated[
    Path | None,
    what_option(
        "--task",
        metavar="FILE",
        help="A Python file with your own model(), dataset(split) and loss(model, batch).",
    ),
]
RunTaskPath = Annotated[
    Path | None,
    what_option(
        "--task", metavar="FILE", help="The run's task file, which runs only where it is named."
    ),
]
ChangedTask = Annotated[
    bool,
    what_option("--allow-changes", help="Take a task file that has changed since the run."),
]
Settings = Annotated[
    list[str] | None,
    what_option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. optimizer.lr=0.2."),
]
DataName = Annotated[
    str | None,
    what_option(
        "--data",
        metavar="NAME",
        help=f"{', '.join(IMAGES)}, npz:FILE, folder:DIR; {', '.join(TEXTS)}, text:FOLDER; "
        f"{', '.join(PAIRS)}, pairs:FOLDER; or synthetic.",
    ),
]
DataDir = Annotated[Path | None, what_option(metavar="DIR", help="Folder that holds the data.")]
MovedDataDir = Annotated[
    Path | None, what_option(metavar="DIR", help="Folder that holds the data, if they have moved.")
]
Offline = Annotated[bool, what_option("--offline", help="Never download data.")]
Device = Annotated[str | None, place_option(metavar="auto|cpu|cuda", help="Where to compute.")]
OutputRoot = Annotated[
    Path | None,
    output_option(
        metavar="ROOT",
        help="ROOT of the default folder; without it $EGTRAIN_RUNS, or else runs.",
    ),
]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run directory, as `train` makes it.")
]
CheckpointName = Annotated[
    str,
    what_option(
        "--checkpoint",
        metavar="last|best|N|FILE",
        help="Which weights: N is a step; best needs a validation split.",
    ),
]
AsJson = Annotated[bool, output_option("--json", help="Print the result as JSON.")]


class Commands(TyperGroup):
    """The commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        _leave_out_types_that_say_nothing(self.get_params(ctx))
        super().format_help(ctx, formatter)


def _leave_out_types_that_say_nothing(parameters: Iterable[Any]) -> None:
    """Hide in the help the types of flags and arguments, and limits such as `[x>=1]`."""
    for parameter in parameters:
        parameter.min = parameter.max = None
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None
        if getattr(parameter, "is_flag", False):
            parameter.metavar = " "


class OnceEach(TyperCommand):
    """A command that refuses an option given twice, and names a missing one."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        _leave_out_types_that_say_nothing(self.get_params(ctx))
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            UsageError: an option that takes one value is given twice, or a required one is missing.
        """
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in given:
            single = not getattr(option, "multiple", True) and not getattr(option, "is_flag", True)
            if single and given.count(option) > 1:
                raise UsageError(f"{option.opts[0]} is given twice, and takes one value: give one")
        if not any(parameter.is_eager for parameter in given):  # such as --help
            for option in self.get_params(ctx):
                if option.required and option not in given:
                    value = option.metavar or "VALUE"
                    raise UsageError(f"{option.opts[0]} is missing: add {option.opts[0]} {value}")
        return super().parse_args(ctx, args)


def runs_root(given: Path | None = None) -> Path:
    """Return the folder of runs: as given, or else $EGTRAIN_RUNS, or else `runs`."""
    return given or Path(os.environ.get("EGTRAIN_RUNS") or "runs")


def task_file(path: Path | None, data: str | None = None) -> "TaskFile | None":
    """Return the task file that an option names, after running it.

    Raises:
        UsageError: it is no task file, or `data` are named too.
        TaskFileError: its code raised an exception.
    """
    if path is None:
        return None
    if data is not None:
        raise UsageError("a task file has its own data: leave out --data")
    # Imported here, so that --help does not wait for it.
    from egtrain.cli.importing import ending_at_interrupt
    from egtrain.task_file import load_task_file

    with ending_at_interrupt():
        return load_task_file(path)


def overrides_of(
    data: str | None,
    data_dir: Path | None,
    offline: bool,
    device: str | None,
    options: Mapping[str, object],
) -> list[str]:
    """Return options as `KEY=VALUE`; those that were not given are None.

    `options` holds one command's options by setting. `epochs` undoes the `steps` of a preset.

    Raises:
        UsageError: both epochs and steps were given.
    """
    # Imported here, so that --help does not wait for it.
    from egtrain.config.files import TypedOption
    from egtrain.config.yaml_text import write_value

    given: dict[str, object] = {
        "data.name": data,
        "data.dir": None if data_dir is None else str(data_dir.absolute()),
        "data.offline": offline or None,
        "device": device,
        **options,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if "epochs" in given:
        if "steps" in given:
            raise UsageError("--epochs and --steps exclude each other: give one")
        given["steps"] = None
    names = {"data.name": "--data", "data.offline": "--offline", "init.file": "--init-from"}
    overrides: list[str] = []
    for key, value in given.items():
        override = TypedOption(f"{key}={write_value(value)}")
        override.typed = f"{names.get(key, '--' + key.replace('.', '-'))} {value}"
        overrides.append(override)
    return overrides
