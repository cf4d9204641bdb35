"""`nestling learn`: a model reads texts and goes on learning."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.common import a_file, a_path, print_json

DTYPES = ("float32", "bfloat16")


def main(
    model: Annotated[
        Path,
        typer.Argument(
            parser=a_path, help="A model with levels that learn: from nestling convert, or a Hope run or checkpoint."
        ),
    ],
    text: Annotated[list[str], typer.Argument(help="Files or folders, read one after another; - is standard input.")],
    state: Annotated[
        Path | None,
        typer.Option(
            parser=a_file,
            help="The file of what it learned: gone on from if it is there, written while reading [MODEL.state].",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens after which attention begins anew, 0 for never [2048; a recurrent model: never]."),
    ] = None,
    probe: Annotated[
        int, typer.Option(help="Tokens at each document's beginning that are scored before and after reading it.")
    ] = 512,
    control: Annotated[bool, typer.Option("--control", help="Score them without any learning, too.")] = False,
    held_out: Annotated[
        Path | None,
        typer.Option(parser=a_path, help="A text that is never learned, scored first and after every document."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            parser=a_file,
            help="Hold sentences out of every document, and write what is known of them before and after: Markdown.",
        ),
    ] = None,
    anchor: Annotated[
        float,
        typer.Option(
            help="Leave texts of the model's own making as they were, with this weight (16 holds them well): "
            "less harm elsewhere, less gain, twice the time."
        ),
    ] = 0.0,
    sleep: Annotated[
        int,
        typer.Option(
            help="After the last document read all again so many times, sentences shuffled: far more is known "
            "afterwards, and more is harmed elsewhere."
        ),
    ] = 0,
    least: Annotated[
        int | None,
        typer.Option(
            help="A short document, a note of a few sentences, is read again until so many tokens of it were read; "
            "0: once [256]."
        ),
    ] = None,
    snapshots: Annotated[
        int,
        typer.Option(
            help="Keep what was known at the end of so many documents, and take up again what predicts the next "
            "document, or a question, best: earlier ones are not lost to later ones."
        ),
    ] = 0,
    save_every: Annotated[
        int, typer.Option(help="Chunks between two checkpoints; 0: as often as costs a twentieth of the time.")
    ] = 0,
    new_session: Annotated[
        bool,
        typer.Option("--new-session", help="Read from the beginning with what was learned so far, whatever was read."),
    ] = False,
    page: Annotated[
        Path | None, typer.Option(parser=a_file, help="Write a page of the session: one HTML file.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="Which files of a folder, as a glob.")] = "**/*",
    dtype: Annotated[str, typer.Option(help="Of the model's weights: float32 or bfloat16.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Threads; with one, every run gives the same bits.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Let a model read texts and learn from them.

    For every document it prints how well the model predicted it at first sight (reading), and how well it predicts its
    beginning before and after, in a fresh context, by what its levels have learned alone.

    What it learned is the state, one file, which nestling generate takes too. While reading, the file follows: however
    the command ends, the same command goes on where the file stands, and on one thread to the same bits.

    [bold]Examples[/bold]

    Read two books:
      nestling learn runs/smol war.txt peace.txt --state my.state

    A log as it is written, in bounded memory for as long as it goes on:
      tail -f app.log | nestling learn runs/smol - --state log.state

    What it knew before and after, as a page, with a text it never learns from:
      nestling learn runs/smol notes/ --state my.state --control --held-out other.txt --page session.html

    Read a notebook, then sleep on it, so that questions are answered in other words than its own:
      nestling learn runs/smol notes/ --sleep 2

    A shelf of books on different things, none of which shall drive out another:
      nestling learn runs/smol books/ --snapshots 8

    Was anything learned, and what did it cost? On sentences that were not read:
      nestling learn runs/smol notes/ --check check.md

    Then write with what it learned:
      nestling generate runs/smol --prompt "..." --state my.state
    """
    import torch

    from nestling.generation.load import load_model
    from nestling.sessions import Session, Settings, Stopped, find_texts
    from nestling.sessions.check import check_page, open_rest
    from nestling.sessions.progress import ReadingProgress
    from nestling.sessions.sleep import LEAST, with_readings, with_sleep
    from nestling.utils.locks import sole_writer
    from nestling.utils.machine import stop_requests

    settings = Settings(context, probe, control, check is not None, save_every, anchor, snapshots)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, not {threads}")
    state = model.with_name(f"{model.name}.state") if state is None else state
    with sole_writer(state):
        pass  # another session at the file shows now, not after a model was loaded
    if threads is not None:
        torch.set_num_threads(threads)
    texts = find_texts(text, pattern) if check is None else find_texts(text, pattern, open_rest)
    slept = with_sleep(texts, sleep)[len(texts) :]
    loaded, tokenizer = load_model(model, device)
    texts = with_readings(texts, tokenizer, LEAST if least is None else least) + slept
    loaded = loaded.to(getattr(torch, dtype))
    ids = None if held_out is None else _held_out(held_out, tokenizer, probe)
    progress = ReadingProgress(shown=not quiet)
    session = Session(
        loaded, tokenizer, texts, state, settings, new=new_session, held_out=ids, pipe=sys.stdin.buffer, show=progress
    )
    if session.resumed and not quiet:
        typer.echo(_where(session), err=True)
    try:
        with stop_requests() as stop:
            result = session.run(stop)
    except Stopped:
        progress.close()
        typer.echo(f"stopped; {state} holds what was read, and the same command goes on", err=True)
        raise typer.Exit(130) from None
    finally:
        progress.close()
    result = {"model": str(model), **result, "page": None if page is None else str(page)}
    if check is not None:
        checked = check_page(result, check)
    if page is not None:
        from nestling.sessions import page as write_page

        write_page(session, page, str(model))
    if as_json:
        print_json(result)
    else:
        _say(result)
        if check is not None:
            typer.echo(f"{checked}check: {check}")


def _held_out(path: Path, tokenizer: Any, count: int) -> list[int]:
    """The first tokens of the held-out text."""
    from nestling.sessions.documents import TokenReader, find_texts
    from nestling.sessions.readers import open_document

    if not count:
        raise ValueError("--held-out is scored as many tokens as --probe says, which is 0: raise --probe")
    if path.is_dir():
        raise ValueError(f"--held-out takes a file, and {path} is a folder")
    found = find_texts([str(path)])[0]
    with open_document(path) as file:
        return TokenReader(tokenizer, file.read, found.name).take(count)


def _where(session: Any) -> str:
    notes = session.notes
    if notes.done:
        return f"{session.path}: these texts were read already; --new-session reads them again"
    place = f"document {notes.document + 1} of {len(notes.texts)}, {notes.tokens:,} tokens in"
    return f"{session.path}: going on in {place}"


def _say(result: dict[str, Any]) -> None:
    for row in result["documents"]:
        typer.echo(f"{row['name']}: {row['bytes']:,} bytes, {row['tokens']:,} tokens")
        if (recalled := row.get("recalled")) is not None:
            typer.echo(f"  begun with what was known after {recalled}" if recalled else "  begun with nothing learned")
        typer.echo(f"  reading  {_loss(row['reading'])}")
        if row["before"]:
            typer.echo(f"  first {row['probe_tokens']} tokens in a fresh context")
            for name in ("control", "before", "after"):
                if row[name]:
                    typer.echo(f"  {name:8} {_loss(row[name])}")
        for n, level in enumerate(row["levels"]):
            typer.echo(f"  level {n}, every {level['chunk_size']} tokens: {_level(level)}")
        if row["not_finite"]:
            typer.echo(f"  {row['not_finite']:,} tokens had a loss that is not finite: nothing was learned from them")
    for row in result["held_out"][:1] + result["held_out"][1:][-1:]:
        typer.echo(f"held out, {'after ' + row['behind'] if row['behind'] else 'at first'}: {_loss(row)}")
    typer.echo(f"read {result['tokens']:,} tokens; state of {result['state_bytes'] / 1e6:,.1f} MB in {result['state']}")
    if result["page"]:
        typer.echo(f"page: {result['page']}")


def _loss(row: dict[str, Any]) -> str:
    if row["bits_per_byte"] is None:
        return "not finite"
    return f"{row['bits_per_byte']:.4f} bits/byte  {row['nats_per_token']:.4f} nats/token"


def _level(level: dict[str, Any]) -> str:
    mean = f", norm {level['written'] / level['updates']:.3g} on average" if level["updates"] else ""
    refused = f", {level['refused']:,} refused" if level["refused"] else ""
    return f"{level['updates']:,} updates{mean}{refused}"
