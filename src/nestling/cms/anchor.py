"""An anchor: texts of the model's own making on which what it learns must leave it as it was.

Reading a text of one kind pushes the levels far from what the model says of others. With an anchor every chunk's
gradient is that of

    mean over the chunk of -log p(next token)  +  weight * mean over a text of the anchor of KL(before || now)

so what reading gains is weighed against what it changes elsewhere. The texts are the model's, so nothing but the model
is needed; `before` is the model without its levels. It costs another forward and backward pass over one of the texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.cms.fast_linear import Delta, applied

if TYPE_CHECKING:
    from nestling.cms.learner import Learner

LIKELY = 64  # next tokens whose chances are kept one by one; the others are kept as a sum


@dataclass(frozen=True)
class Anchor:
    """What the model said of some texts before it learned.

    Attributes:
        weight: of the distance from it, against the loss of what is read.
        texts: ids [T] of each.  likely: the K likeliest tokens after each of its tokens [T, K].  logs: log of their
            chances [T, K].
    """

    weight: float
    texts: tuple[Tensor, ...]
    likely: tuple[Tensor, ...]
    logs: tuple[Tensor, ...]

    def distance(self, index: int, logits: Tensor) -> Tensor:
        """KL(before || now) of a text's logits [B, T, V], unlikely tokens as one: nats, the mean over T, [B]."""
        likely, before = self.likely[index], self.logs[index]
        logits = _exact(logits)
        logs = logits.gather(-1, likely.expand(logits.shape[0], -1, -1)) - logits.logsumexp(-1, keepdim=True)
        rest, left = (_rest(x) for x in (before, logs))
        near = (before.exp() * (before - logs)).sum(-1) + rest * (rest.log() - left.log())
        return near.mean(-1)


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _rest(logs: Tensor) -> Tensor:
    """The chance of all other tokens, [..., K] -> [...], never below rounding: it is divided by."""
    return (1 - logs.exp().sum(-1)).clamp_min(1e-6)


@torch.no_grad()
def set_anchor(model: Any, texts: Iterable[Sequence[int]], weight: float) -> None:
    """Let what the model learns from now on leave these texts as likely as they are to the model without its levels.

    Args:
        model: with levels that learn.
        texts: ids of each, an end-of-text token first.  weight: 0 takes the anchor off.

    Raises:
        ValueError: a weight that is negative or not finite, or no text of a token or more.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be finite and not negative (0 for no anchor); got {weight}")
    ids = [torch.tensor(list(text), device=next(model.parameters()).device) for text in texts]
    ids = [text for text in ids if len(text)]
    if weight and not ids:
        raise ValueError("texts holds no token: an anchor needs some text")
    if weight and (several := [level.steps for level in model.learner.levels if level.steps > 1]):
        raise ValueError(f"an anchor goes with one step a chunk, but a level takes {several[0]}: convert the model "
                         "without --fast (Level(steps=1)), or leave the anchor out (weight 0)")  # fmt: skip
    model.learner.anchor = None
    if not weight:
        return
    learning, model.learning = model.learning, False
    try:
        logs = [_exact(model(text[None], use_cache=False).logits[0]).log_softmax(-1) for text in ids]
    finally:
        model.learning = learning
    found = [x.topk(min(LIKELY, x.shape[-1])) for x in logs]
    model.learner.anchor = Anchor(weight, tuple(ids), tuple(f.indices for f in found), tuple(f.values for f in found))


def anchored(
    anchor: Anchor, learner: Learner, grads: Sequence[Tensor], used: Sequence[Tensor], deltas: Sequence[Delta],
    layers: Any, at: int, count: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of a chunk's summed loss with the anchor's: of the chunk's `count` tokens, the `at`-th chunk.

    Args:
        used: the leaves that `deltas`, what each layer has learned, are made of.  layers: of the kinds of the cache.
    """
    backbone, index, batch = learner.backbone, at % len(anchor.texts), used[0].shape[0]
    with torch.enable_grad(), applied([m for i in learner.fast for m in learner.modules[i]], deltas):
        ids = anchor.texts[index].expand(batch, -1)
        fresh = [backbone.restored(layer, None) for layer in layers]
        logits = learner.above(backbone.run(backbone.embed(ids), fresh, 0, learner.first), fresh)
        far = anchor.distance(index, logits).sum()
        pulls = torch.autograd.grad(anchor.weight * count * far, used)
    return tuple(g + p for g, p in zip(grads, pulls, strict=True))
