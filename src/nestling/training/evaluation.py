"""Held-out loss: overall, in bits per byte, and by position in the context."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.training.batches import spread, windows
from nestling.training.data import Mixture, Tokens
from nestling.training.streaming import Stream
from nestling.utils.ranks import Ranks


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss in nats per token: `loss_at` [T] of the prediction made after 1..T tokens, `loss_in` [W] of each
    window, in the text's order."""

    loss: float
    bits_per_byte: float
    tokens: int
    loss_at: Tensor
    loss_in: Tensor

    def binned(self, bins: int) -> list[dict[str, float]]:
        """The loss by position in bins that widen geometrically: `first` and `last` position (from 1) and mean
        `loss`."""
        edges = bin_edges(len(self.loss_at), bins)
        return [
            {"first": first + 1, "last": last, "loss": float(self.loss_at[first:last].mean())}
            for first, last in itertools.pairwise(edges)
        ]


def bin_edges(length: int, bins: int) -> list[int]:
    """Edges 0 = e_0 < e_1 < ... = length of at most `bins` bins that widen geometrically."""
    edges = {0, length} | {round(length ** (i / bins)) for i in range(1, bins)}
    return sorted(edges)


def token_losses(model: nn.Module, window: Tensor, precision: str = "float32", apart: int | None = None) -> Tensor:
    """The loss of every prediction in windows [B, T + 1], in nats: [B, T], at least in float32.

    apart: the id that ends a text, after which the next one begins anew; None lets texts go on into each other.
    """
    ids = window[:, :-1]
    positions = {} if apart is None else {"position_ids": positions_apart(ids, apart)}
    with autocast(window.device, precision):
        logits = model(input_ids=ids, use_cache=False, **positions).logits
    return losses_of(logits, window[:, 1:])


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every prediction, in nats: logits [B, T, V] and targets [B, T] -> [B, T], at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def positions_apart(ids: Tensor, end: int) -> Tensor:
    """The place of every token in its text, [B, T]: 0 at a window's first and after every `end`."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begun = torch.zeros_like(ids)
    begun[:, 1:] = torch.where(ids[:, :-1] == end, places[:, 1:], 0)
    return places - begun.cummax(1).values


def autocast(device: torch.device, precision: str):
    """Mixed precision for "bf16", nothing for "float32"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Tokens | Mixture,
    *,
    seq_len: int,
    batch_size: int,
    max_batches: int | None = None,
    precision: str = "float32",
    ranks: Ranks | None = None,
    apart: int | None = None,
) -> Evaluation:
    """The loss of a model on windows spread evenly over a token stream.

    Args:
        model: a causal language model in the Hugging Face convention; its training mode is restored.
        tokens: the held-out stream; shorter than a window is fine, shorter than two tokens a ValueError. Of a mixture
            each stream is evaluated, on its share of the batches, and the losses count by their shares.
        seq_len: tokens predicted per window, each window read afresh.
        batch_size: windows at once.
        max_batches: at most so many batches; None: every window that fits.
        precision: "float32" or "bf16".
        ranks: the processes that share the work; each calls this.
        apart: see `token_losses`.
    """
    ranks = ranks or Ranks()
    if isinstance(tokens, Mixture):
        shortest = max(1, min(seq_len, *(len(stream) - 1 for stream in tokens.sources)))
        found = [
            evaluate(
                model, stream, seq_len=shortest, batch_size=batch_size, precision=precision, ranks=ranks, apart=apart,
                max_batches=None if max_batches is None else max(1, round(share * max_batches)),
            )
            for share, stream in zip(tokens.shares, tokens.sources)
        ]  # fmt: skip
        loss_at = torch.stack([share * one.loss_at for share, one in zip(tokens.shares, found)]).sum(0)
        loss, total = float(loss_at.mean()), sum(one.tokens for one in found)
        return Evaluation(loss, bits_per_byte(loss, tokens), total, loss_at, torch.cat([one.loss_in for one in found]))
    if len(tokens) < 2:
        raise ValueError(
            f"{len(tokens)} held-out tokens are too few to evaluate; hold out more (data.val_fraction or data.val_text)"
        )
    seq_len = min(seq_len, len(tokens) - 1)
    starts = spread(tokens, seq_len, batch_size * max_batches if max_batches else len(tokens))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, loss_in = torch.zeros(seq_len, dtype=torch.float64), torch.zeros(len(starts), dtype=torch.float64)
    try:
        for first in range(0, len(starts), batch_size):
            own = slice(first + ranks.rank, first + batch_size, ranks.size)
            mine = starts[own]
            # a rank without a row of its own runs too: a sharded model's parts are exchanged in its forward pass
            window = windows(tokens, mine or starts[:1], seq_len).to(device)
            losses = token_losses(model, window, precision, apart).double().cpu()
            if mine:
                total += losses.sum(0)
                loss_in[own] = losses.mean(1)
    finally:
        model.train(was_training)
    loss_at = ranks.sum(total) / len(starts)
    loss = float(loss_at.mean())
    return Evaluation(loss, bits_per_byte(loss, tokens), seq_len * len(starts), loss_at, ranks.sum(loss_in))


def bits_per_byte(loss: float, tokens: Tokens | Mixture | Stream) -> float:
    """Nats per token as bits per byte of the text the tokens stand for."""
    return loss / math.log(2) / max(tokens.bytes_per_token, 1e-9)
