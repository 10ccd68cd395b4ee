"""`egtrain presets`: list the shipped presets, or show one with all that it inherits."""

import sys
from typing import Annotated, Any

import typer

from egtrain.cli.options import complete_preset


def presets(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A preset or YAML file to show, such as resnet-eg; without it, all are listed.",
            show_default=False,
            autocompletion=complete_preset,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON."),
    ] = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            help="Print the JSON schema of a YAML file, which describes every key.",
        ),
    ] = False,
) -> None:
    """List the presets, or show one with every setting.

    Example: egtrain presets resnet-eg > my.yaml
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
    """Print each family and variant once: the combinations would not fit on a screen."""
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
        "Quickstarts: embedded data, no download": {
            name: preset_description(name) for name in preset_names() if name not in composed
        },
        "Families": {family: preset_description(f"family/{family}") for family in families},
        "Variants: FAMILY-VARIANT is a preset, such as resnet-eg": {
            variant: preset_description(f"variant/{variant}") + _exceptions(listed, list(families))
            for variant, listed in owners.items()
        },
    }
    console = Console(highlight=False)
    width = max(len(name) for descriptions in groups.values() for name in descriptions)
    for title, descriptions in groups.items():
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(width=width + 2, no_wrap=True)
        for name, text in descriptions.items():
            table.add_row(Text(f"  {name}"), Text(text))
        console.print(Text(title, style="bold"), table, "", sep="\n")


def _exceptions(listed: list[str], families: list[str]) -> str:
    """Return which families have a variant, or lack it, whichever list is shorter."""
    missing = [family for family in families if family not in listed]
    if not missing:
        return ""
    return (
        f" (not {', '.join(missing)})"
        if len(missing) < len(listed)
        else f" ({', '.join(listed)} only)"
    )
