"""Where the time goes of a model that learns while it reads: forward in chunks, backward, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.bench import measure
from nestling.bench.continuum import PLAIN, _model, _with_default, speed
from nestling.bench.settings import BenchSettings
from nestling.bench.table import Table
from nestling.cms.fast_linear import Factors, applied, features

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = (64, 128, 256)  # tokens of a chunk
SHARES = {"all blocks": 1.0, "last third": 1 / 3}  # of the blocks, which learn


def chunks(settings: BenchSettings) -> Table:
    """A plain forward; the same in chunks; with a backward pass to the levels' factors; with their update, as read."""
    s, model = settings, _model(settings)
    sizes = SIZES if s.dim >= 128 else (8, 16)  # small with --quick
    tokens = 2 * max(sizes)
    ids = torch.randint(model.config.vocab_size, (1, tokens + 1), device=s.device)
    calls: dict[str, Callable[[], object]] = {PLAIN: lambda: _forward(model, ids, tokens)}
    for size in sizes:
        # the learner sees a text's first chunk, then whole calls of it: the rate is for as much change per token
        for part, share in SHARES.items():
            levels = _with_default(model, share)
            levels.learner = replace(
                levels.learner, levels=(replace(levels.learner.levels[0], chunk_size=size, lr=0.04 * size / 64),)
            )
            if share == 1:
                calls[f"forward in chunks of {size}"] = lambda size=size: _forward(model, ids, size)
                calls[f"and backward, {size}"] = lambda size=size, m=levels: _backward(m, ids, size)
            calls[f"and update, {size}, {part}"] = lambda m=levels: _read(m, ids)
    for part, share in SHARES.items():
        levels = _with_default(model, share, fast=True)
        calls[f"--fast, {part}"] = lambda m=levels: _read(m, ids)
    timing = measure.interleave(calls, s)
    rows = [speed(timing, name, tokens) | {"rounds": timing.rounds} for name in calls]
    note = "Rank 16 on the MLPs. --fast: chunks of 128, two steps in each. "
    note += f"Forward and backward go through all blocks; a plain forward takes {tokens} at once."
    return Table(f"Where reading's time goes, {tokens} tokens, a model of SmolLM2-135M's shape", rows, [note])


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Tensor, size: int) -> None:
    """All but the last token in pieces, the cache carried."""
    past: Any = None
    for at in range(0, ids.shape[1] - 1, size):
        past = model(ids[:, at : at + size], past_key_values=past, use_cache=True).past_key_values


def _backward(model: PreTrainedModel, ids: Tensor, size: int) -> None:
    """The same with the loss of every piece, and its gradient at factors that stay at zero."""
    modules, rank = model.learner.modules[0], model.learner.levels[0].rank
    ups = [torch.zeros(1, m.out_features, rank, device=ids.device, requires_grad=True) for m in modules]
    deltas = [
        Factors(up, features(rank, m.in_features, n, up.dtype, up.device))
        for n, (up, m) in enumerate(zip(ups, modules))
    ]
    learning, model.learning, past = model.learning, False, None
    try:
        with applied(modules, deltas), torch.enable_grad():
            for at in range(0, ids.shape[1] - 1, size):
                out = model(ids[:, at : at + size], past_key_values=past, use_cache=True)
                loss = F.cross_entropy(out.logits[0].float(), ids[0, at + 1 : at + size + 1], reduction="sum")
                torch.autograd.grad(loss, ups)
                past = out.past_key_values
                for layer in past.layers:
                    layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    finally:
        model.learning = learning


@torch.no_grad()
def _read(model: PreTrainedModel, ids: Tensor) -> None:
    """As `nestling learn` does, every chunk learned at once."""
    model(ids[:, :-1], use_cache=True, next_tokens=ids[:, -1:])
