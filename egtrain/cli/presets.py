"""`egtrain presets`: list the shipped presets, or show one with everything it inherits."""

import sys
from typing import Annotated, Any

import typer


def presets(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A preset or a .yaml file to show fully resolved, for example resnet-eg; without it, all are listed.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for example: egtrain presets resnet-eg --json")
    ] = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            help="Print the JSON schema of a .yaml file, for example: egtrain presets --schema > schema.json",
        ),
    ] = False,
) -> None:
    """List the presets, or show one fully resolved, for example: egtrain presets resnet-eg > my.yaml"""
    # Imported here, because --help needs none of it.
    from egtrain import config, config_files
    from egtrain.errors import UsageError

    if schema:
        if name is not None:
            raise UsageError(f"--schema describes every preset; leave out {name!r}")
        _print_json(config.json_schema())
    elif name is not None:
        resolved = config_files.load_config(name)
        if json:
            _print_json(resolved.model_dump(mode="json"))
        else:
            typer.echo(config.config_to_yaml(resolved), nl=False)
    else:
        descriptions = {preset: config_files.preset_description(preset) for preset in config_files.preset_names()}
        if json:
            _print_json([{"name": preset, "description": text} for preset, text in descriptions.items()])
        elif sys.stdout.isatty():
            _print_table(descriptions)
        else:
            for preset, text in descriptions.items():
                typer.echo(f"{preset}\t{text}")


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _print_table(descriptions: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("preset", "what it trains", box=None, pad_edge=False)
    for preset, text in descriptions.items():
        table.add_row(Text(preset, style="bold", no_wrap=True), Text(text))
    Console().print(table)
