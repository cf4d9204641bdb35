"""`nestling data`: texts, tokenised once by several processes, as a folder that `nestling train` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.common import a_folder, print_json


def main(
    text: Annotated[list[str], typer.Argument(help="Files and folders: .txt, .jsonl, .parquet.", metavar="TEXT...")],
    out: Annotated[Path, typer.Option(parser=a_folder, help="The folder to make, or to go on with.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, or a Hugging Face tokenizer's folder.")] = "bytes",
    weight: Annotated[
        list[float] | None, typer.Option(help="Once for each TEXT: how many times an epoch reads it, e.g. 0.5 or 2.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="The part held out, of every few megabytes.")] = 0.01,
    column: Annotated[str, typer.Option(help="Where the text is in .jsonl and .parquet.")] = "text",
    pattern: Annotated[str, typer.Option(help="Which files of a folder, as a glob.")] = "**/*",
    workers: Annotated[int | None, typer.Option(help="Processes (default: one for each core).")] = None,
    piece: Annotated[int, typer.Option(help="Megabytes that a process encodes at a time.")] = 16,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Tokenise texts of any size into a folder for nestling train.

    Needed only for much text: nestling train tokenises what fits into memory by itself. All processes work at once,
    none holds more than a piece of a file, and a command that was killed goes on when it is given again. A line of
    .jsonl and a row of .parquet is a document, any other file is one; an end-of-text token closes each.

    [bold]Examples[/bold]

    A folder of texts, then a run on it:
      nestling data texts/ --out tokens
      nestling train tokens --out runs/texts

    Two sources, the second read three times an epoch, with a tokenizer of your own:
      nestling data web.jsonl books/ --weight 1 --weight 3 --tokenizer my-tokenizer --out tokens

    Two folders that a run reads three to one by tokens, however large they are:
      nestling train web-tokens book-tokens --share 3 --share 1 --out runs/mixed

    Nothing reaches a text from the one before it in a window:
      nestling train tokens --out runs/texts -o data.documents=apart
    """
    import os

    from nestling.training.prepare import prepare
    from nestling.training.progress import bytes_bar

    with bytes_bar("tokenising", quiet) as told:
        made = prepare(
            text, out, tokenizer=tokenizer, weights=weight or (), val_fraction=val_fraction, column=column,
            pattern=pattern, workers=workers if workers is not None else os.cpu_count() or 1, piece=piece << 20,
            told=told,
        )  # fmt: skip
    if as_json:
        print_json({"out": str(out), **made})
        return
    for name, what in (("train", "to train on"), ("val", "held out")):
        part = made[name]
        typer.echo(
            f"{what}: {part['tokens']:,} tokens of {part['bytes']:,} bytes, {part['documents']:,} ends of documents"
        )
    typer.echo(f"try it: nestling train {out} --out runs/{out.name}")
