"""`nestling generate`: stream text from a trained model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nestling.cli.common import a_file, a_path, print_json, readable

if TYPE_CHECKING:
    from nestling.generation import Sampling, TextGenerator


def main(
    checkpoint: Annotated[
        Path, typer.Argument(parser=a_path, help="A run's folder, a checkpoint, or a saved Hugging Face model.")
    ],
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
        Path | None,
        typer.Option(
            parser=a_file, help="Go on from the state in this file if it exists, and write it back at the end."
        ),
    ] = None,
    forget_context: Annotated[
        bool, typer.Option("--forget-context", help="Of --state use what the levels learned alone, not what was read.")
    ] = False,
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
    from nestling.cms.cache import LevelsCache
    from nestling.generation import Sampling, TextGenerator, load_notes, load_state, save_state
    from nestling.generation.load import load_model
    from nestling.utils.locks import sole_writer

    sampling = Sampling(0.0 if greedy else temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens must not be negative, not {max_new_tokens}")
    if state is not None and not carry:
        raise ValueError("--state keeps what is carried, so it cannot go with --fresh")
    if forget_context and state is None:
        raise ValueError("--forget-context is about a state: name it with --state")
    if interactive and as_json:
        raise ValueError("--interactive cannot go with --json")
    prompts = [readable(text, "--prompt") for text in prompt or ([] if interactive else [""])]
    begun = state is not None and state.exists()
    for index, text in enumerate(prompts):
        if not text and (begun or (carry and index)):
            raise ValueError("--prompt is empty, and the text is begun: give at least one character to go on with")
    with nullcontext() if state is None else sole_writer(state):
        model, tokenizer = load_model(checkpoint, device)
        resumed, notes = (load_state(state, model), load_notes(state)) if state and state.exists() else (None, None)
        if forget_context and resumed is not None:
            if not isinstance(resumed, LevelsCache) or resumed.levels is None:
                raise ValueError(
                    f"--forget-context leaves what levels learned, and {state} holds nothing of levels: "
                    "let it read first (nestling learn)"
                )
            resumed.forget_context()
        written = _Writer(TextGenerator(model, tokenizer, resumed, seed), shown=not as_json, carry=carry)
        texts = []
        for text in chain(prompts, _asked() if interactive else ()):
            if not as_json:
                written.show("" if interactive else text)
            texts.append({"prompt": text, "text": written(text, max_new_tokens, sampling)})
            if written.stopped:
                break
        last = written.generator.state
        if state is not None and last is not None:  # also where the output failed: what was read is not lost
            save_state(state, last, model, notes=notes)
    if written.failure is not None:
        raise written.failure
    if as_json:
        print_json({"results": texts, "state": None if state is None else str(state)})
    if written.stopped:
        typer.echo("stopped" if state is None else f"stopped; {state} holds what was read and written", err=True)
        raise typer.Exit(130)


class _Writer:
    """Writes what a generator gives, until it is stopped or stdout fails; the generator's state stays whole."""

    def __init__(self, generator: TextGenerator, shown: bool, carry: bool) -> None:
        self.generator, self.stopped = generator, False
        self.failure: OSError | None = None
        self._shown, self._carry = shown, carry

    def __call__(self, prompt: str, count: int, sampling: Sampling) -> str:
        """The text that follows a prompt."""
        if not self._carry:
            self.generator.state = None
        from nestling.utils.machine import stop_requests

        pieces = []
        with stop_requests() as stop:
            for piece in self.generator.stream(prompt, count, sampling, stop):
                pieces.append(piece)
                if self._shown and not self.show(piece):
                    stop.set()
            self.stopped = stop.is_set() or self.failure is not None
        if self._shown:
            self.show("\n")
        return "".join(pieces)

    def show(self, text: str) -> bool:
        """Put a text on stdout at once; False if it cannot be."""
        if self.failure is None:
            try:
                sys.stdout.write(text)
                sys.stdout.flush()
            except OSError as error:
                self.failure = error
        return self.failure is None


def _asked() -> Iterator[str]:
    """Prompts from the terminal, until an empty line, its end or Ctrl-C."""
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if not text:
            return
        try:
            yield readable(text, "the prompt")
        except ValueError as error:
            typer.echo(f"error: {error}", err=True)
