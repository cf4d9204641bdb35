"""`nestling chat`: a conversation that is remembered in levels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestling.cli.common import a_file, a_path, print_json, readable

if TYPE_CHECKING:
    from nestling.generation import Sampling
    from nestling.sessions.chat import Conversation

HELP = "/what-changed  /undo (the last turn)  /forget (everything)  /quit"


def main(
    model: Annotated[Path, typer.Argument(parser=a_path, help="A model with levels that learn.")],
    state: Annotated[
        Path | None,
        typer.Option(parser=a_file, help="What it remembers: gone on from, written after every turn [MODEL.state]."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    always: Annotated[
        bool,
        typer.Option(
            "--always", help="Answer by what is remembered, also where nothing learned expects the turn more."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the conversation as JSON at its end.")] = False,
) -> None:
    """Talk with a model that remembers.

    It learns from what it is told, turn by turn, and remembers it in the next session, when the transcript is gone. Its
    own words it does not learn from. A turn that has nothing to do with what is remembered is answered as if nothing
    was. Where the tokenizer has a chat template the turns are put as that does.

    /what-changed shows what it knows better than before this session, /undo unlearns the last turn, /forget everything,
    /quit ends. What is said may also come from a pipe, a turn a line.

    [bold]Examples[/bold]

    Go on where the last conversation, or nestling learn, left off:
      nestling chat runs/smol

    From a file, with a memory of its own:
      nestling chat runs/smol --state ada.state --json < turns.txt
    """
    from nestling.cms.cache import LevelsCache
    from nestling.generation import Sampling, load_notes, load_state, save_state
    from nestling.generation.load import load_model
    from nestling.sessions.chat import Conversation
    from nestling.utils.locks import sole_writer

    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    sampling = Sampling(temperature)
    state = model.with_name(f"{model.name}.state") if state is None else state
    with sole_writer(state):
        loaded, tokenizer = load_model(model, device)
        kept, notes = (load_state(state, loaded), load_notes(state)) if state.exists() else (None, None)
        talk = Conversation(loaded, tokenizer, kept if isinstance(kept, LevelsCache) else None, seed, always)
        shown = not as_json
        if shown and sys.stdin.isatty():
            typer.echo(HELP, err=True)
        for text in _lines():
            if text == "/quit":
                break
            try:
                _turn(talk, text, max_new_tokens, sampling, shown)
            except ValueError as error:
                typer.echo(f"error: {error}", err=True)
            save_state(state, talk.now.memory, loaded, notes=notes)
    if as_json:
        turns = [{"said": said, "answer": answer} for said, answer in talk.now.turns]
        print_json({"turns": turns, "changes": talk.what_changed(), "state": str(state)})


def _turn(talk: Conversation, text: str, count: int, sampling: Sampling, shown: bool) -> None:
    """Follow a command, or say the text and show the answer."""
    from nestling.utils.machine import stop_requests

    if text == "/forget":
        talk.forget()
        typer.echo("all is forgotten; /undo brings it back", err=True)
    elif text == "/undo":
        typer.echo("undone" if talk.undo() else "there is nothing to undo", err=True)
    elif text == "/what-changed":
        for change in talk.what_changed() if shown else ():
            _say(change)
    elif text.startswith("/"):
        raise ValueError(f"there is no {text}: {HELP}")
    else:
        with stop_requests() as stop:
            for piece in talk.say(readable(text, "what was said"), count, sampling, stop):
                if shown:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        if shown:
            typer.echo()


def _say(change: dict[str, Any]) -> None:
    typer.echo(f"{change['said']}\n  {change['before']:.3f} -> {change['now']:.3f} bits/byte")
    for token in change["examples"]:
        typer.echo(f"  ...{token['context'][-30:]}[{token['token']}]  {token['before']:.3f} -> {token['after']:.3f}")


def _lines() -> Any:
    """What is said, until the end of the input or Ctrl-C; empty lines are passed over."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text:
            yield text
