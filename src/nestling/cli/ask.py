"""`nestling ask`: a question about what was read, answered from levels alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.common import print_json


def main(
    model: Annotated[Path, typer.Argument(help="A model with levels that learn.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    state: Annotated[
        Path | None, typer.Option(help="What it learned, the file that nestling learn wrote [MODEL.state].")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer, in tokens.")] = 60,
    always: Annotated[
        bool,
        typer.Option(
            "--always", help="Answer by what was learned, also where nothing learned expects the question more."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Ask a model about what it has read.

    It answers from what its levels have learned alone: the text itself is out of its sight. With the answer stands how
    sure it is, the mean probability of the answer's tokens, and how sure the model without levels would be of the same.
    Whatever predicts the question best answers: what was learned, of snapshots (nestling learn --snapshots) one of
    them, or the model as it was before it read anything, where the question is about something else.

    [bold]Examples[/bold]

    After nestling learn runs/smol notes/:
      nestling ask runs/smol "Who has the key of shed B?"

    Of another reader, for a program:
      nestling ask runs/smol --state my.state --json "Who has the key of shed B?"
    """
    from nestling.cms.cache import LevelsCache
    from nestling.cms.learning_model import LearningMixin
    from nestling.generation import load_state
    from nestling.generation.answers import answer, before_question, prompt_ids
    from nestling.generation.load import load_model
    from nestling.sessions.snapshots import recall_nearest

    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    state = model.with_name(f"{model.name}.state") if state is None else state
    loaded, tokenizer = load_model(model, device)
    if not isinstance(loaded, LearningMixin) or not loaded.learner.fast:
        raise ValueError(f"{model} has no levels that learn while it reads: make one with nestling convert")
    cache = load_state(state, loaded)
    recalled = None
    if isinstance(cache, LevelsCache) and question.strip():
        ids = prompt_ids(tokenizer, [(question, "")])
        given = before_question(tokenizer, ids)
        recalled = recall_nearest(loaded, cache, ids, tokenizer.eos_token_id, nothing=not always, given=given)
    found = answer(loaded, tokenizer, cache, question, max_new_tokens)
    if as_json:
        print_json({"question": question, **asdict(found), "state": str(state), "recalled": recalled})
        return
    typer.echo(found.answer)
    if recalled is not None:
        by = f"what was known after {recalled}" if recalled else "nothing learned, which expects this question more"
        typer.echo(f"by {by}", err=True)
    typer.echo(f"sure {found.confidence:.3f}, without levels {found.without_levels:.3f}", err=True)
