"""Streaming generation: one token at a time, text as soon as it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.training.tokenizers import encode

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 takes the likeliest token; `top_k` keeps the k likeliest (0: all); `top_p` keeps the smallest set of
    likeliest tokens whose probabilities reach p.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and at most at 1, not {self.top_p}")

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> int:
        """A token id from logits [V]."""
        logits = logits.float()
        if not torch.isfinite(logits).any():
            raise ValueError("the model's output is not finite: its weights are damaged or its training diverged")
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits / self.temperature
        if 0 < self.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], -torch.inf)
        probabilities = logits.softmax(0)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            outside = ordered.cumsum(0) - ordered >= self.top_p  # the first token always stays
            probabilities[order[outside]] = 0
        return int(torch.multinomial(probabilities, 1, generator=generator))


class TextGenerator:
    """A model reading and writing one text, whose state it carries from call to call.

    Args:
        model: a causal language model in the Hugging Face convention.
        tokenizer: its tokenizer.
        state: where the text so far left off (a cache, e.g. from `load_state`); None starts a new text.
        seed: of the sampling; None draws a fresh one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        state: Cache | None = None,
        seed: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.state = model.eval(), tokenizer, state
        self._device = next(model.parameters()).device
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    @torch.no_grad()
    def stream(
        self, prompt: str, max_new_tokens: int, sampling: Sampling | None = None, stop: Event | None = None
    ) -> Iterator[str]:
        """Read a prompt, then yield new text piece by piece, each ending with a whole character.

        Ends after `max_new_tokens`, at the end-of-text token, or soon after `stop` is set. The state then holds the
        prompt and all that was yielded. ValueError if there is neither a prompt nor a text begun before.
        """
        ids = encode(self.tokenizer, prompt) if prompt else []
        if not ids:
            if self.state is not None:
                raise ValueError("the prompt is empty: give at least one character to go on with")
            ids = [self.tokenizer.eos_token_id]  # in training, a text follows the end of another
        yield from self.continued(ids, max_new_tokens, sampling, stop)

    @torch.no_grad()
    def continued(
        self, ids: list[int], max_new_tokens: int, sampling: Sampling | None = None, stop: Event | None = None
    ) -> Iterator[str]:
        """`stream` of a prompt of token ids."""
        sampling = sampling or Sampling()
        waiting: list[int] = []
        for count in range(max_new_tokens + 1):
            logits = self._read(ids)
            if count == max_new_tokens or (stop is not None and stop.is_set()):
                break
            token = sampling.choose(logits, self._generator)
            if token == self.tokenizer.eos_token_id:
                break
            ids = [token]
            waiting.append(token)
            text = self.tokenizer.decode(waiting, skip_special_tokens=True)
            if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(waiting) > 16:
                waiting = []
                yield text
        if waiting:
            yield self.tokenizer.decode(waiting, skip_special_tokens=True)

    def _read(self, ids: list[int]) -> Tensor:
        """Feed ids to the model; returns the logits [V] after the last (on the CPU)."""
        inputs = torch.tensor([ids], device=self._device)
        output = self.model(input_ids=inputs, past_key_values=self.state, use_cache=True, logits_to_keep=1)
        self.state = output.past_key_values
        return output.logits[0, -1].cpu()
