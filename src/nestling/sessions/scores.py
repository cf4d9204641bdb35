"""How well a model predicts some tokens with what a stream has learned, in a fresh context and without learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.cms.cache import LevelsCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PIECE = 256  # tokens whose logits are held at once
AROUND = 56  # characters shown in front of an example


@torch.no_grad()
def score(model: PreTrainedModel, cache: LevelsCache | None, ids: list[int], start: int, context: int | None) -> Tensor:
    """Log-probabilities [N] of ids after the token `start`, attention beginning anew after `context` tokens.

    Args:
        cache: of the stream whose levels are applied; None: the model as it was before it read anything.
    """
    device = next(model.parameters()).device
    inputs, found = torch.tensor([[start, *ids[:-1]]], device=device), []
    targets = torch.tensor(ids, device=device)
    with model.adapted(LevelsCache() if cache is None else cache):
        past = None
        for at in range(0, len(ids), piece := min(PIECE, context or PIECE)):
            past = None if context and at % (context // piece * piece) == 0 else past
            out = model(inputs[:, at : at + piece], past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(log_probabilities(out.logits[0], targets[at : at + piece]))
    return torch.cat(found)


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, V], [N] -> [N], in float32, on the CPU."""
    return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu()


def examples(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], before: list[float], after: list[float], gains: int = 3
) -> list[dict[str, Any]]:
    """The tokens whose probability rose most, and the one whose fell most, each with the text in front of it."""
    changes = [
        (b - a, i) for i, (a, b) in enumerate(zip(_probabilities(before), _probabilities(after))) if b - a == b - a
    ]
    changes.sort()
    chosen = [i for _, i in changes[::-1][:gains]] + [i for change, i in changes[:1] if change < 0]
    return [
        {
            "context": tokenizer.decode(ids[max(0, i - AROUND) : i])[-AROUND:],
            "token": tokenizer.decode(ids[i : i + 1]),
            "before": _probabilities(before)[i],
            "after": _probabilities(after)[i],
        }
        for i in chosen
    ]


def _probabilities(logs: list[float]) -> list[float]:
    return torch.tensor(logs, dtype=torch.float64).exp().tolist()
