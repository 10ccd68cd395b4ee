"""The command line: one file per subcommand, which parses, hands over and prints."""

from typing import Annotated

import typer

from egtrain import __version__
from egtrain.cli.bench import bench
from egtrain.cli.eval import evaluate_run
from egtrain.cli.export import export
from egtrain.cli.options import Commands, OnceEach
from egtrain.cli.plot_sharpness import plot_sharpness
from egtrain.cli.presets import presets
from egtrain.cli.runs import runs
from egtrain.cli.sweep_batch import sweep_batch
from egtrain.cli.train import train

app = typer.Typer(
    cls=Commands,
    help="Train neural networks with very large batches by extrapolation, "
    "and measure what it gains.\n\n"
    "Start with: egtrain train --preset quickstart",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command(cls=OnceEach)(train)
app.command("eval", cls=OnceEach)(evaluate_run)
app.command(cls=OnceEach)(export)
app.command(cls=OnceEach)(sweep_batch)
app.command(cls=OnceEach)(plot_sharpness)
app.command(cls=OnceEach)(bench)
app.command(cls=OnceEach)(runs)
app.command(cls=OnceEach)(presets)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"egtrain {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Hold the options that come before a subcommand."""
