"""Answers from what levels have learned alone: attention and memories know nothing of what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nestling.training.tokenizers import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """An answer, and how sure the model is of it: the mean probability of its tokens.

    Attributes:
        confidence: with what the levels learned.  without_levels: of the same answer, by the model without it.
    """

    answer: str
    confidence: float
    without_levels: float


@torch.no_grad()
def answer(model: Any, tokenizer: PreTrainedTokenizerBase, cache: Any, question: str, max_new_tokens: int) -> Answer:
    """The likeliest answer by what the first stream of a cache has learned; the cache stays as it is.

    The question is put as the tokenizer's chat template does, else as "Question: ... Answer:".

    Raises:
        ValueError: an empty question, or a model that gives no answer at all.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    ids = prompt_ids(tokenizer, [(question, "")])
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    with model.adapted(cache):
        ends = {"pad_token_id": tokenizer.pad_token_id or 0, "eos_token_id": tokenizer.eos_token_id}
        whole = model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False, **ends)
        sure = _confidence(model, whole, len(ids))
    with model.adapted(type(cache)()):  # of nothing read
        plain = _confidence(model, whole, len(ids))
    return Answer(tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True).strip(), sure, plain)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> list[int]:
    """Ids of a conversation up to the answer that is wanted: turns of what was asked and answered, the last one open.

    As the tokenizer's chat template puts it, else as "Question: ... Answer: ...".
    """
    if getattr(tokenizer, "chat_template", None):
        said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
        messages = [message for both in said for message in both][:-1]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    return encode(tokenizer, "\n".join(f"Question: {q}\nAnswer:{a and ' ' + a}" for q, a in turns))  # type: ignore[arg-type]


def before_question(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """How many ids of a prompt stand in front of its question, the same in every prompt: of the template."""
    other = prompt_ids(tokenizer, [("\N{INVERTED QUESTION MARK}", "")])
    return next((i for i, (a, b) in enumerate(zip(ids, other)) if a != b), min(len(ids), len(other)))


def _confidence(model: Any, ids: torch.Tensor, start: int) -> float:
    """Mean probability of the tokens from `start` on."""
    if ids.shape[1] == start:
        raise ValueError("the model gave no answer: raise --max-new-tokens")
    shares = model(ids).logits[0, start - 1 : -1].float().softmax(-1)
    return float(shares.gather(-1, ids[0, start:, None]).mean())
