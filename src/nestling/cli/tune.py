"""`nestling tune`: search an optimiser's settings on the user's own training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.common import a_folder, a_path, assignments, print_json

# an option in the panel of this name of the help
what, search = (partial(typer.Option, rich_help_panel=panel) for panel in ("What is tuned", "The search"))


def main(
    text: Annotated[
        list[str] | None, typer.Argument(help="Text to train on, as for `nestling train`.", metavar="TEXT...")
    ] = None,
    command: Annotated[
        str | None,
        what(help="Your own script: a command line with {lr}, {alpha}, {periods}, ... that prints its figure."),
    ] = None,
    call: Annotated[
        str | None,
        what(metavar="MODULE:FUNCTION", help="A Python function of an optuna trial that returns its figure."),
    ] = None,
    config: Annotated[
        Path | None, what(parser=a_path, help="A configuration of `nestling train` (JSON or YAML).")
    ] = None,
    option: Annotated[
        list[str] | None, what("--option", "-o", metavar="NAME=VALUE", help="Change it, e.g. steps=300.")
    ] = None,
    optimizer: Annotated[
        str, what(help="The optimiser of a training run: m3, adamw, muon, package.module.Class.")
    ] = "m3",
    space: Annotated[
        list[str] | None,
        search(
            "--space",
            "-s",
            metavar="NAME=RANGE",
            help="LOW:HIGH, LOW:HIGH:log, LOW:HIGH:int, or choices A|B|C (may be repeated).",
        ),
    ] = None,
    trials: Annotated[int, search(help="Trials in the end, those done before included.")] = 20,
    time_limit: Annotated[float | None, search(help="Start no further trial after so many minutes.")] = None,
    metric: Annotated[str | None, search(help="The figure's name in the JSON lines a command prints.")] = None,
    maximize: Annotated[bool, search("--maximize", help="Larger is better.")] = False,
    no_prune: Annotated[bool, search("--no-prune", help="Let hopeless trials run to their end.")] = False,
    seed: Annotated[int, search(help="Of the proposals.")] = 0,
    out: Annotated[Path, typer.Option(parser=a_folder, help="The study's folder; the same folder goes on.")] = Path(
        "runs/tune"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Search lr, alpha and periods of M3 (or any settings) on your own training.

    The first trial takes the defaults, so the answer also says what tuning is worth. Trials that do worse than the
    median of the others are stopped early. The study is on disk: stop at any time, and the same command goes on.

    [bold]Examples[/bold]

    On a text, with the options of `nestling train`:
      nestling tune book.txt -o steps=300 --trials 15

    On your own script, which prints a number at its end, or JSON lines such as {"step": 100, "loss": 2.31}:
      nestling tune --command "python train.py --lr {lr} --alpha {alpha} --periods {periods}"

    Only the learning rate, in a range of your own:
      nestling tune --command "python train.py --lr {lr}" --space lr=1e-4:1e-2:log

    Any settings, by name:
      nestling tune book.txt -s lr=1e-3:1e-1:log -s ns_steps=3:7:int -s "coefficients=muon|polar_express"

    A function of an optuna trial:
      nestling tune --call my_module:objective --maximize
    """
    from nestling.tuning import Space, tune

    if time_limit is not None and time_limit < 0:
        raise ValueError(f"--time-limit must not be negative, not {time_limit}")
    objective = _objective(text, command, call, config, option, optimizer, metric)
    found = tune(
        objective,
        out,
        space=Space.parse(space or []),
        trials=trials,
        time_limit=None if time_limit is None else 60 * time_limit,
        maximize=maximize,
        prune=not no_prune,
        seed=seed,
        say=(lambda line: None) if quiet else (lambda line: typer.echo(line, err=True)),
    )
    if as_json:
        print_json(found.to_dict())
    else:
        _tell(found)
    if found.best is None:
        raise typer.Exit(1)


def _objective(text, command, call, config, option, optimizer, metric):
    """The one thing to tune; ValueError unless exactly one was named."""
    from nestling.tuning import Command, TrainingRun, load_callable

    ways = {"TEXT or --config": text or config, "--command": command, "--call": call}
    named = [name for name, given in ways.items() if given]
    if len(named) != 1:
        said = "nothing is named to tune" if not named else f"{' and '.join(named)} exclude each other"
        raise ValueError(f"{said}: give text to train on (or --config), --command, or --call")
    if option and not (text or config):
        raise ValueError("-o changes a training run; a command takes its options itself")
    if metric and not command:
        raise ValueError("--metric names a figure that a --command prints; a training run has its own")
    if command:
        return Command(command, metric)
    if call:
        return load_callable(call)
    from nestling.training.config import TrainConfig

    base = TrainConfig.load(config) if config else TrainConfig().changed(steps=300)
    changes = {"data.text": list(text)} if text else {}
    return TrainingRun(base.changed(**({"optim.name": optimizer} | changes | assignments(option or [], "--option"))))


def _tell(found) -> None:
    done = f"{found.finished} trials finished, {found.pruned} pruned, {found.failed} failed"
    typer.echo(f"{'stopped: ' if found.interrupted else ''}{done}; the study is in {found.folder}")
    if found.best is None:
        typer.echo("no trial has finished yet; the same command goes on")
        return
    better = "" if found.first is None else f" (with the defaults: {found.first:.5g})"
    typer.echo(f"best: {found.value:.5g}{better}")
    for name, value in found.best.items():
        typer.echo(f"  {name} = {value}")
    typer.echo(f"to use it:\n  {found.paste}")
