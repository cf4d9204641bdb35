"""`nestling generate`: stream text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.common import print_json


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or a saved Hugging Face model.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to go on with; several are read one after another.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens written per prompt.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens (0: all).")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens that reach this probability.")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    carry: Annotated[
        bool, typer.Option("--carry/--fresh", help="Carry the state from prompt to prompt, or start each afresh.")
    ] = True,
    state: Annotated[
        Path | None, typer.Option(help="Go on from the state in this file if it exists, and write it back at the end.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Ask for prompts until an empty line.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print prompts and texts as JSON instead of streaming.")
    ] = False,
) -> None:
    """Write text with a trained model, token by token.

    The model's state is what it remembers of the text so far: of fixed size for a Hope model, however long the text.
    It is carried from one prompt to the next, and with --state from one call to the next.

    [bold]Examples[/bold]

    Go on from a prompt, the same every time:
      nestling generate runs/book --prompt "It was the best of" --greedy

    Two prompts, the second read with the first in mind:
      nestling generate runs/book -p "My name is Pip." -p "My name is"

    A conversation that is remembered on disk:
      nestling generate runs/book -i --state pip.state
    """
    from nestling.generation import Sampling, TextGenerator, load_state, save_state
    from nestling.generation.load import load_model

    sampling = Sampling(0.0 if greedy else temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens must not be negative, not {max_new_tokens}")
    if state is not None and not carry:
        raise ValueError("--state keeps what is carried, so it cannot go with --fresh")
    if interactive and as_json:
        raise ValueError("--interactive cannot go with --json")
    model, tokenizer = load_model(checkpoint, device)
    resumed = load_state(state, model) if state is not None and state.exists() else None
    generator = TextGenerator(model, tokenizer, resumed, seed)
    texts = []
    for text in _prompts(prompt, interactive):
        if not carry:
            generator.state = None
        pieces = []
        if not as_json:
            typer.echo("" if interactive else text, nl=False)
        for piece in generator.stream(text, max_new_tokens, sampling):
            pieces.append(piece)
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if not as_json:
            typer.echo()
        texts.append({"prompt": text, "text": "".join(pieces)})
    if state is not None and generator.state is not None:
        save_state(state, generator.state, model)
    if as_json:
        print_json({"results": texts, "state": None if state is None else str(state)})


def _prompts(given: list[str] | None, interactive: bool):
    yield from given or ([] if interactive else [""])
    while interactive:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text:
            return
        yield text
