"""`nestling label`: sort texts by labels that were learned from examples."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.common import a_file, a_path, print_json, readable


def main(
    model: Annotated[Path, typer.Argument(parser=a_path, help="Any model: a run, a Hugging Face folder.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to label.")] = None,
    learn: Annotated[
        list[Path] | None,
        typer.Option(parser=a_path, help="Learn the examples of a .csv, .tsv or .jsonl file; may be given often."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(parser=a_path, help="Label the texts of such a file and count the right ones.")
    ] = None,
    forget: Annotated[
        Path | None, typer.Option(parser=a_path, help="Forget the examples of such a file, which were learned.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(parser=a_file, help="What is known: gone on from, and written [MODEL.labels].")
    ] = None,
    columns: Annotated[str, typer.Option(help="The names of the two columns: of the text and of the label.")] = (
        "text,label"
    ),
    top: Annotated[int, typer.Option(help="So many labels for each text, the likeliest first.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Label texts, by labels learned from a few examples of each.

    The model only reads, and stays as it is; a memory on what it makes of each text is solved for all examples ever
    shown. So new labels may come at any time, no old one is forgotten, and what is forgotten by --forget was never
    there. Examples are read once and not kept. With each label stands how far it is believed, from 0 to 1.

    [bold]Examples[/bold]

    Learn from a table with the columns text and label, then ask:
      nestling label SmolLM2-135M --learn intents.csv
      nestling label SmolLM2-135M "what is left on my card?" --top 3

    New labels a week later, and how many of a held-out file are right:
      nestling label SmolLM2-135M --learn more.jsonl --check held-out.jsonl --json
    """
    from nestling.generation.load import load_model
    from nestling.sessions.labels import Labels, examples
    from nestling.utils.locks import sole_writer

    names = tuple(part.strip() for part in columns.split(","))
    if len(names) != 2 or not all(names):
        raise ValueError(f"--columns takes two names with a comma between, as text,label, not {columns!r}")
    if top < 1:
        raise ValueError(f"--top must be at least 1, not {top}")
    if not (texts or learn or check or forget):
        raise ValueError("there is nothing to do: give texts, or a file with --learn, --check or --forget")
    asked = [readable(text, "a text") for text in texts or []]
    shown = [examples(path, names) for path in learn or []]
    gone, held = (examples(path, names) if path else None for path in (forget, check))
    state = model.with_name(f"{model.name}.labels") if state is None else state
    with sole_writer(state):
        known = Labels(*load_model(model, device))
        if state.exists() or not shown:
            known.load(state)
        if gone:
            known.forget(*gone)
        for found in shown:
            known.learn(*found)
        if gone or shown:
            known.save(state)
    said: dict[str, Any] = {
        "state": str(state),
        "labels": len(known.names),
        "examples": round(float(known.memory.count)),
    }
    said |= {"state_bytes": state.stat().st_size}
    if held:
        answers = known.answer(held[0])
        right = sum(a.labels[0] == label for a, label in zip(answers, held[1], strict=True))
        said["check"] = {"texts": len(held[0]), "right": right, "accuracy": right / len(held[0])}
    rows = [{"text": t, **asdict(a)} for t, a in zip(asked, known.answer(asked, top))] if asked else []
    if as_json:
        print_json(said | {"texts": rows})
        return
    for row in rows:
        typer.echo("  ".join(f"{name} {b:.2f}" for name, b in zip(row["labels"], row["beliefs"])))
    if held:
        typer.echo(f"{said['check']['right']} of {said['check']['texts']} right ({said['check']['accuracy']:.3f})")
    if shown or gone:
        typer.echo(f"{said['labels']} labels from {said['examples']} examples, in {state}", err=True)
