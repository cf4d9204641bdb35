"""`nestling inspect`: any model seen as a nested system."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.common import a_file, a_folder, assignments, print_json


def main(
    target: Annotated[
        str | None,
        typer.Argument(
            help="A size (tiny, ... 1.3b), a folder with a run, a checkpoint or a Hugging Face model, a config.json, "
            "or module:factory."
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="adamw, sgd, muon, m3, dgd, or a class as package.module.Class; none: a deployed model."),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of the optimiser.")] = 1e-3,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the optimiser, e.g. momentum=0.9."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change the model, e.g. mixer=attention.")
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Tokens of an outer step: compares levels counted in tokens with steps.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a context, for costs that grow with it.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a few steps on random tokens and count what really changes.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps of --measure.")] = 3,
    batch: Annotated[int, typer.Option(help="Sequences of --measure.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of each sequence of --measure.")] = 64,
    figure: Annotated[
        Path | None, typer.Option(parser=a_file, help="Draw the levels into this .svg, .png or .pdf.")
    ] = None,
    html: Annotated[Path | None, typer.Option(parser=a_file, help="Write an interactive page: click a memory.")] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(
            parser=a_folder, help="Draw the paper's own decompositions into this folder, and do nothing else."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole system as JSON instead of a table.")] = False,
) -> None:
    """Show a model, with its optimiser, as a nested system of memories.

    Which memories there are, what each compresses, how often each is updated, who teaches whom, and what each level
    costs. A size or a configuration takes no memory, however large: nothing is allocated unless --measure is given.

    [bold]Examples[/bold]

    The levels of a 1.3B Hope under M3:
      nestling inspect 1.3b --optimizer m3

    What a trained model still learns once it is deployed, and a page to click through:
      nestling inspect runs/book --html book.html

    What really moves in a tiny Hope, against what is declared:
      nestling inspect tiny --optimizer adamw --measure

    Any model of your own: a function that returns a module, or a dict of arguments of nestling.levels:
      nestling inspect my_package.models:build --optimizer torch.optim.SGD --lr 0.1 -o momentum=0.9 --figure levels.svg
    """
    if gallery is not None:
        from nestling.nested_system.gallery import write_figures

        paths = [str(path) for path in write_figures(gallery)]
        return (
            print_json({"figures": paths}) if as_json else typer.echo("\n".join(f"written: {path}" for path in paths))
        )
    if target is None:
        raise ValueError("say what to inspect: a size such as tiny, a folder, a config.json or module:factory")
    from nestling.cli.targets import build_optimizer, load, random_tokens
    from nestling.nested_system.analyze import levels

    arguments = load(target, assignments(settings or [], "--set"), weights=measure)
    model = arguments["model"]
    if optimizer is not None:
        arguments["optimizer"] = build_optimizer(
            model, optimizer, lr, assignments(option or [], "--option"), tokens_per_step, context
        )
    elif option:
        raise ValueError("--option changes the optimiser: name one with --optimizer")
    given = dict(tokens_per_step=tokens_per_step, context_length=context)
    arguments |= {name: value for name, value in given.items() if value is not None}
    if measure:
        arguments.setdefault("measure", None)
        if arguments["measure"] is None:
            arguments["measure"] = random_tokens(model, batch, tokens)
        arguments["steps"] = steps
    else:
        arguments.pop("measure", None)
    system = levels(**arguments)
    for path, write in ((figure, system.figure), (html, system.page)):
        if path is not None:
            write(path)
    if as_json:
        return print_json(system.to_dict())
    from rich.console import Console

    Console(width=100, file=sys.stdout).print(system.table())
    if (tried := _calibration(target)) is not None:
        typer.echo(tried)
    for path in (figure, html):
        if path is not None:
            typer.echo(f"written: {path}")


def _calibration(target: str) -> str | None:
    """How the rule of a converted model was found, where it was calibrated."""
    from nestling.cms.files import CALIBRATION
    from nestling.sessions.calibrate import as_text

    file = Path(target).expanduser() / CALIBRATION
    if not file.is_file():
        return None
    try:
        return as_text(json.loads(file.read_text("utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): remove it, the model does not need it") from None
