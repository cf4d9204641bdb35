"""`nestling bench`: what the layers cost on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.common import a_file
from nestling.utils.files import new_file, write_text


def main(
    what: Annotated[
        str, typer.Argument(help="layers; optim: a step of each optimiser; or continuum: reading with levels.")
    ] = "layers",
    only: Annotated[
        str | None,
        typer.Option(
            help="Parts, comma-separated: chunk, lengths, mixers, efficiency, decode, decode_models, memory, peers, "
            "model; optim, optim_target, optim_bfloat16, orthogonality, dgd; reading, chunks, streams, meta_grads."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run? The figures mean nothing.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    repeats: Annotated[int | None, typer.Option(help="Rounds of each comparison, 7 unless given.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="A comparison has fewer rounds where they would take longer, 30 unless given.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model size (tiny, mini, 10m, ... 1.3b) to measure whole.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a model's batch.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each sequence of a model's batch.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 (autocast).")] = "float32",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", parser=a_file, help="Write all figures to this file (-: to stdout, and nothing else)."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(parser=a_file, help="Draw the figures into this PNG.")] = None,
) -> None:
    """Measure speed, memory and latency on this machine, correctness first.

    Every fast form is compared with its definition before anything is timed; where one differs, the differences are
    printed, no figure is, and the exit code is 1. What is compared runs in turn in one process; a ratio is the
    median over rounds. Leave the machine alone meanwhile: the load is written beside the figures.

    [bold]Examples[/bold]

    Everything, a quarter of an hour on one core:
      nestling bench --json bench.json --plot bench.png

    Two parts:
      nestling bench --only mixers,efficiency

    Optimisers, five minutes on one core:
      nestling bench optim --json optim.json --plot optim.png

    A model that learns while it reads, its state, and training through what it learns:
      nestling bench continuum

    A model on a GPU:
      nestling bench --model 350m --device cuda --dtype bfloat16
    """
    import torch

    from nestling.bench import GROUPS, QUICK, BenchSettings, Incorrect, run, show

    if threads < 1:
        raise ValueError(f"--threads must be at least 1, not {threads}")
    if what not in GROUPS:
        raise ValueError(f"nestling bench measures {' or '.join(GROUPS)}, not {what!r}; --only takes single parts")
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {plot} has no ending to tell the format by: give it .png, .svg or .pdf")
    torch.set_num_threads(threads)
    chosen = dict(QUICK) if quick else {}
    given = dict(repeats=repeats, seconds=seconds, model=model, model_batch=batch, model_tokens=tokens)
    chosen |= {name: value for name, value in given.items() if value is not None}
    settings = BenchSettings(**(chosen | dict(device=device, dtype=dtype)))
    silent = str(json_file) == "-"

    def report(name: str, table) -> None:
        if not silent:
            from rich.console import Console
            from rich.table import Table

            grid = Table(
                title=table.title, title_justify="left", caption="\n".join(table.notes), caption_justify="left"
            )
            for column, value in table.rows[0].items():
                grid.add_column(column, justify="left" if isinstance(value, str) else "right")
            for row in table.rows:
                grid.add_row(*(show.number(row.get(column), column) for column in table.rows[0]))
            Console().print(grid)

    parts = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    if parts is None and what != "layers":
        parts = list(GROUPS[what])
    try:
        result = run(settings, parts, report)
    except Incorrect as wrong:
        typer.secho("the fast forms do not equal their definitions; no figures:", fg="red", err=True)
        for failure in wrong.failures:
            typer.echo(f"  {failure}", err=True)
        raise typer.Exit(1) from None
    if silent:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    else:
        typer.echo(show.machine(result["environment"]))
        if json_file is not None:
            write_text(json_file, json.dumps(result, indent=1) + "\n")
    if plot is not None:
        with new_file(plot) as aside:
            show.plot(result, aside)
