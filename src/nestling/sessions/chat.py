"""A conversation that is remembered: what is said is learned, and the transcript may go.

Two things are kept apart. The *memory* is a stream that reads what the person says, turn by turn, and learns from it;
it is the state that a file holds. The *transcript* is the text that the answer is written from, with the weights the
memory has come to; nothing is learned from the model's own words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from nestling.cms.cache import LevelsCache
from nestling.generation.answers import before_question, prompt_ids
from nestling.generation.stream import Sampling, TextGenerator
from nestling.sessions.notes import measured
from nestling.sessions.scores import examples, score
from nestling.sessions.settings import check_model, choose_context
from nestling.sessions.snapshots import nearest
from nestling.training.tokenizers import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Turn = tuple[str, str]  # what the person said, what the model answered


@dataclass(frozen=True)
class Moment:
    """Where a conversation stands: values that are never written into, so that going back is taking an older one.

    Attributes:
        memory: what was learned.  turns: the transcript.
    """

    memory: LevelsCache
    turns: tuple[Turn, ...] = ()


class Conversation:
    """Talks, and learns from what it is told.

    Args:
        model: with levels that learn.  tokenizer: the model's; its chat template is used where it has one.
        memory: what earlier sessions learned; None for nothing.
        seed: of the sampling; None draws a fresh one.
        always: answer by the memory also where nothing learned predicts what is said better (`snapshots.nearest`).

    Raises:
        ValueError: a model without levels that learn.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, memory: LevelsCache | None = None,
        seed: int | None = None, always: bool = False,
    ) -> None:  # fmt: skip
        check_model(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.model.learner.context = choose_context(model, None)
        self.now, self._before = Moment(LevelsCache() if memory is None else memory.fork()), []
        self._seed, self._always, self._device = seed, always, next(model.parameters()).device
        if memory is not None and memory.levels is not None:  # of another text: none of it is lost, none is in sight
            with torch.no_grad():
                self.model.finish(self.now.memory)
            self.now.memory.forget_context()
        self._first = self.now.memory.fork()

    @torch.no_grad()
    def say(
        self, text: str, max_new_tokens: int = 200, sampling: Sampling | None = None, stop: Event | None = None
    ) -> Iterator[str]:
        """Learn what is said, then yield the answer piece by piece; the turn stands once it is read to its end.

        Raises:
            ValueError: nothing was said, or more than the model may see with its answer.
        """
        if not text.strip():
            raise ValueError("nothing was said")
        limit = getattr(self.model.config, "max_position_embeddings", None) or 1 << 20
        turns = [*self.now.turns, (text, "")]
        while len(ids := prompt_ids(self.tokenizer, turns)) + max_new_tokens > limit and len(turns) > 1:
            turns = turns[1:]  # the oldest leave the transcript; what was said in them stays learned
        if len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"this is {len(ids):,} tokens, and with {max_new_tokens:,} of an answer more than the {limit:,} that "
                "the model may see: let nestling learn read it, or ask for a shorter answer"
            )
        memory, pieces = self.learned(text), []
        with self.model.adapted(memory if self.bears_on(text) else LevelsCache()):
            writer = TextGenerator(self.model, self.tokenizer, seed=self._seed)
            for piece in writer.continued(ids, max_new_tokens, sampling, stop):
                pieces.append(piece)
                yield piece
        self._seed = None if self._seed is None else self._seed + 1
        self._go(replace(self.now, memory=memory, turns=(*turns[:-1], (text, "".join(pieces)))))

    def learned(self, text: str) -> LevelsCache:
        """The memory after it has read a text to its end."""
        end, memory = self.tokenizer.eos_token_id, self.now.memory.fork()
        ids = torch.tensor([[end, *encode(self.tokenizer, text)]], device=self._device)
        memory = self.model(ids, past_key_values=memory, use_cache=True, logits_to_keep=1).past_key_values
        self.model.finish(memory, ids[:, :1])
        return memory

    def bears_on(self, text: str) -> bool:
        """Whether the answer to a text is written by the memory: not where nothing learned predicts the text better."""
        known, ids = self.now.memory.fork(), prompt_ids(self.tokenizer, [(text, "")])
        known.snapshots = None  # a conversation goes on with what stands
        context, given = self.model.learner.context, before_question(self.tokenizer, ids)
        end = self.tokenizer.eos_token_id
        return self._always or nearest(self.model, known, ids, end, context, given=given) is None

    def undo(self) -> bool:
        """Go back to before the last turn or `forget`: what was learned then is unlearned. False: none is left."""
        if not self._before:
            return False
        self.now = self._before.pop()
        return True

    def forget(self) -> None:
        """Begin anew: nothing learned, nothing in the transcript."""
        self._go(Moment(LevelsCache()))

    def _go(self, moment: Moment) -> None:
        self._before.append(self.now)
        self.now = moment

    @torch.no_grad()
    def what_changed(self) -> list[dict[str, Any]]:
        """For each thing said in this session: bits per byte before the session and now, and single tokens."""
        found = []
        for said, _ in self.now.turns:
            ids = encode(self.tokenizer, said)
            before, now = (
                score(self.model, memory, ids, self.tokenizer.eos_token_id, self.model.learner.context).tolist()
                for memory in (self._first, self.now.memory)
            )
            size = len(said.encode())
            bits = [measured(-sum(logs), len(ids), size)["bits_per_byte"] for logs in (before, now)]
            changes = examples(self.tokenizer, ids, before, now)
            found.append({"said": said, "before": bits[0], "now": bits[1], "examples": changes})
        return found
