"""Questions with a closed set of answers: how likely a model finds each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from experiments.shared.continual.streams import Ids, repeated


@torch.no_grad()
def weigh(
    model: nn.Module, prompt: Ids, choices: Sequence[Ids], context: DynamicCache | None = None
) -> tuple[list[float], list[bool]]:
    """Of each choice after a prompt (and what comes before it, `context`): its log-probability, and whether the
    greedy continuation is just that. The prompt is read once."""
    out = model(torch.tensor([list(prompt)]), past_key_values=repeated(context, 1), use_cache=True)
    first, longest = out.logits[:, -1:], max(map(len, choices))
    logits = first.expand(len(choices), -1, -1)
    ids = torch.tensor([[*c, *[0] * (longest - len(c))] for c in choices])  # padding at the end: no mask is needed
    if longest > 1:
        rest = model(ids[:, :-1], past_key_values=repeated(out.past_key_values, len(choices)), use_cache=True)
        logits = torch.cat([logits, rest.logits], 1)
    losses = F.cross_entropy(logits.float().mT, ids, reduction="none")
    greedy = logits.argmax(-1) == ids
    return (
        [-loss[: len(c)].sum().item() for loss, c in zip(losses, choices, strict=True)],
        [bool(same[: len(c)].all()) for same, c in zip(greedy, choices, strict=True)],
    )
