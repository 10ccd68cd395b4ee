"""`egtrain presets`: list the shipped presets, or show one with everything it inherits."""

import sys
from typing import Annotated, Any

import typer


def presets(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A preset or a .yaml file to show fully resolved, for example "
            "resnet-eg; without it, all are listed.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON, for example: egtrain presets resnet-eg --json"),
    ] = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            help="Print the JSON schema of a .yaml file, for example: egtrain presets "
            "--schema > schema.json",
        ),
    ] = False,
) -> None:
    """List the presets, or show one fully resolved, for example: egtrain presets resnet-eg >
    my.yaml
    """
    # Imported here, because --help needs none of it.
    from egtrain.config import files
    from egtrain.config import schema as config_schema
    from egtrain.errors import UsageError

    if schema:
        if name is not None:
            raise UsageError(f"--schema describes every preset; leave out {name!r}")
        _print_json(config_schema.json_schema())
    elif name is not None:
        resolved = files.load_config(name)
        if json:
            _print_json(resolved.model_dump(mode="json"))
        else:
            typer.echo(config_schema.config_to_yaml(resolved), nl=False)
    else:
        if sys.stdout.isatty() and not json:
            _print_table()
            return
        descriptions = {preset: files.preset_description(preset) for preset in files.preset_names()}
        if json:
            _print_json(
                [{"name": preset, "description": text} for preset, text in descriptions.items()]
            )
        else:
            for preset, text in descriptions.items():
                typer.echo(f"{preset}\t{text}")


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _print_table() -> None:
    """Print families and variants once each, which fits a screen where the list of all combinations
    does not.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from egtrain.config.files import preset_description, preset_families, preset_names

    families = preset_families()
    owners: dict[str, list[str]] = {}
    for family, variants in families.items():
        for variant in variants:
            owners.setdefault(variant, []).append(family)
    composed = {f"{family}-{variant}" for variant, listed in owners.items() for family in listed}
    groups = {
        "PRESET": {
            name: preset_description(name) for name in preset_names() if name not in composed
        },
        "FAMILY": {family: preset_description(f"family/{family}") for family in families},
        "VARIANT": {
            variant: preset_description(f"variant/{variant}") + _exceptions(listed, list(families))
            for variant, listed in owners.items()
        },
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    for title, descriptions in groups.items():
        table.add_row(Text(title, style="bold"))
        for name, text in descriptions.items():
            table.add_row(Text(f"  {name}", no_wrap=True), Text(text))
        table.add_row()
    console = Console()
    console.print(table)
    console.print("FAMILY-VARIANT is a preset too, such as resnet-eg.")


def _exceptions(listed: list[str], families: list[str]) -> str:
    """Return which families have a variant, where not all do, by the shorter list."""
    missing = [family for family in families if family not in listed]
    if not missing:
        return ""
    return (
        f" (not {', '.join(missing)})"
        if len(missing) < len(listed)
        else f" ({', '.join(listed)} only)"
    )
