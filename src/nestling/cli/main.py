"""The `nestling` command. To add a command, write `nestling/cli/NAME.py` with a function `main` and add its name below.

Heavy imports (torch, transformers) belong inside a command's function, so that `nestling --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from nestling.cli.common import App, friendly

# in the order of the help
COMMANDS = (
    "data",
    "train",
    "generate",
    "convert",
    "learn",
    "ask",
    "chat",
    "label",
    "demo",
    "eval",
    "tune",
    "bench",
    "inspect",
    "doctor",
)

app = App(
    name="nestling",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Nested Learning: train and use language models whose layers learn while they read.\n\n"
    "Every command has examples in its --help and machine-readable output with --json.",
)
for name in COMMANDS:
    app.command(name)(friendly(importlib.import_module(f"nestling.cli.{name}").main))


def _version(wanted: bool) -> None:
    if wanted:
        from nestling.version import __version__

        typer.echo(f"nestling {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
