"""The end of a text: its open chunk is learned as it is, a shorter one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nestling.cms.backbones import Layers
from nestling.cms.learner import Learner
from nestling.cms.state import StreamState


def finished(learner: Learner, layers: Layers, state: StreamState, next_tokens: Tensor | None = None) -> StreamState:
    """The streams' state after their open chunk of n tokens was learned and closed, as a chunk of n tokens.

    Levels step by the share n / chunk_size of a whole step, so a token weighs as much as any other. The chunk then
    counts as whole: what is read next opens another, and the boundaries of all levels stay where they are. The
    sequence layers know nothing of it and go on.

    Args:
        layers: the cache's, of all blocks; they stay as they are.
        next_tokens: [B, 1], the targets of the last token, if they are known; else it is only a target itself. A chunk
            of a single token without one stays open: there is nothing to learn from it yet.
    """
    tokens, hidden, size = state.tokens, state.hidden, learner.chunk_size
    target = tokens[:, -1:] if next_tokens is None else next_tokens
    count = tokens.shape[1] - (next_tokens is None)
    if count < 1 or hidden is None:
        return state
    end = -(-state.position // size) * size
    state = replace(state, position=end, dropped=state.dropped - (end - state.position))
    tail = learner.restored(layers, state.start)
    _, _, state = learner.learn(hidden[:, :count], tokens[:, :count], target, tail, state, torch.is_grad_enabled())
    return replace(state, tokens=tokens[:, :0], hidden=None, start=None)
