"""Three readings of the same bytes of a book: from a window's beginning on, in short contexts, as one stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nestling.layers.attention import Attention
from nestling.training.batches import windows
from nestling.training.data import Tokens
from nestling.training.evaluation import losses_of, token_losses


@torch.no_grad()
def whole(model: nn.Module, read: Tensor) -> Tensor:
    """Windows [W, T + 1], each from nothing to its end: the losses [W, T] in nats."""
    return torch.cat([token_losses(model, part) for part in read.split(4)])


@torch.no_grad()
def cut(model: nn.Module, read: Tensor, context: int, stride: int) -> Tensor:
    """The losses [W, T] of windows [W, T + 1] with at most `context` tokens before a prediction, at least
    `context - stride` of them once there are so many: every `stride` tokens the last `context` are read from nothing.

    Raises:
        ValueError: a window's tokens beyond the first context are no multiple of `stride`.
    """
    if (read.shape[1] - 1 - context) % stride:
        raise ValueError(f"windows of {read.shape[1] - 1} tokens less {context} are no multiple of stride ({stride})")
    pieces = read.unfold(1, context + 1, stride)
    losses = torch.cat([token_losses(model, part) for part in pieces.flatten(0, 1).split(32)])
    losses = losses.unflatten(0, pieces.shape[:2])
    return torch.cat([losses[:, 0], losses[:, 1:, -stride:].flatten(1)], 1)


@torch.no_grad()
def streamed(
    model: nn.Module, tokens: Tokens, starts: list[int], length: int, window: int, piece: int = 4096
) -> Tensor:
    """The losses [W, length] of windows at `starts` where the state is carried from the text's first token on.

    Attention over all of the past sees no more than the last `window` tokens.
    """
    cache, losses, end = None, [], starts[-1] + length
    device = next(model.parameters()).device
    with bounded(model, window):
        for first in range(0, end, piece):
            read = windows(tokens, [first], min(piece, end - first)).to(device)
            found = model(input_ids=read[:, :-1], past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            losses.append(losses_of(found.logits, read[:, 1:])[0])
    stream = torch.cat(losses)
    return torch.stack([stream[start : start + length] for start in starts])


@contextmanager
def bounded(model: nn.Module, window: int) -> Iterator[None]:
    """Attention over all of the past sees no more than `window` tokens, so that a stream without end can be read."""
    unbounded = [m for m in model.modules() if isinstance(m, Attention) and m.window is None]
    for module in unbounded:
        module.window = window
    try:
        yield
    finally:
        for module in unbounded:
            module.window = None
