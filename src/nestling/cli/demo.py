"""`nestling demo`: a small Hope and a Transformer of its size, trained side by side, and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.common import a_folder, a_path, print_json
from nestling.cli.laboratory import laboratory


def main(
    text: Annotated[
        Path | None,
        typer.Option(parser=a_path, help="A text file or folder of your own; else the standard library's sources."),
    ] = None,
    out: Annotated[Path, typer.Option(parser=a_folder, help="The demo's folder.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="From start to report; a slow machine takes at least 60 steps.")] = 4.0,
    threads: Annotated[int, typer.Option(help="Threads of each of the two models.")] = 1,
    seed: Annotated[int, typer.Option(help="Decides weights and the order of the text.")] = 0,
    experiments: Annotated[
        Path | None,
        typer.Option(parser=a_path, help="Where the demo's code is (default: the folder experiments of the checkout)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a small Hope and a Transformer side by side on real text, and write a report.

    Both have the same number of parameters and read the same bytes in the same order. The report is one HTML file that
    opens from the disk. The command fails (exit code 1) unless both models learned: unless their loss on held-out text
    ends clearly below what the frequencies of the bytes alone would give.

    Ctrl-C ends the training early and reports on what there is (exit code 130). Running it again starts afresh and
    replaces the earlier demo in the same folder.

    [bold]Examples[/bold]

    The demo, about four minutes:
      nestling demo

    Your own text, for a quarter of an hour:
      nestling demo --text my_book.txt --minutes 15 --out runs/my_book
    """
    demo = laboratory("demo", experiments)
    config = demo.DemoConfig(out=str(out), minutes=minutes, threads=threads, seed=seed)
    outcome = demo.run(config, demo.own_text(text) if text else demo.standard_library())
    if as_json:
        print_json(demo.finite(demo.headline(outcome.result) | {"report": str(outcome.report)}))
    else:
        _say(outcome, demo.verdict(outcome.result))
    if outcome.stopped:
        raise typer.Exit(130)
    if not outcome.learned:
        raise typer.Exit(1)


def _say(outcome, verdict: str) -> None:
    typer.echo()
    typer.secho(verdict, fg="green" if outcome.learned else "red")
    typer.echo(f"report: {outcome.report.resolve()}")
    for model in outcome.result["models"].values():
        folder = Path(model["checkpoint"]).parent.parent
        typer.echo(f'try it: nestling generate {folder} --prompt "def "')
