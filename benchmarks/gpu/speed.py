"""The layers against an attention + MLP block with FlashAttention, and selfmod over the chunk size."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.clock import device, free, milliseconds, on_gpu, operations, peak_bytes, set_tf32, train_step
from benchmarks.gpu.record import Record
from nestling.layers import build_mixer
from nestling.layers.mixers import mixer_options

HEAD = 64  # channels of a head, in layers and block alike
TOKENS = 16_384  # of one call, over the batch
MIXERS = ("hope_memory", "window_attention", "gated_deltanet", "linear_attention", "selfmod")
CHUNKS = (256, 64, 512, 1024, 128, 32, 16)  # what tells most first


class Block(nn.Module):
    """Pre-norm causal softmax attention, then a pre-norm GELU MLP of four times the width."""

    def __init__(self, dim: int, heads: int, flash: bool) -> None:
        super().__init__()
        self.heads, self.flash = heads, flash
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.flash else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))

    @staticmethod
    def operations(batch: int, tokens: int, dim: int) -> int:
        """Forward and backward: products of the weights, and the half of the scores that is not masked."""
        return 3 * batch * tokens * (24 * dim**2 + 2 * tokens * dim)


def block(dim: int, heads: int, precision: str) -> Block:
    torch.manual_seed(0)
    return Block(dim, heads, flash=on_gpu() and precision.startswith("bf16")).to(device())


def mixer(name: str, dim: int, heads: int, **options: Any) -> nn.Module:
    """A layer by name, with those of the options that it has."""
    torch.manual_seed(0)
    own = {option: value for option, value in options.items() if option in mixer_options(name)}
    return build_mixer(name, dim, heads, **own).to(device())


def layer_operations(name: str, dim: int, heads: int, chunk: int) -> float:
    """Of a token, forward and backward: counted over one chunk, without what is computed anew to save memory."""
    one = mixer(name, dim, heads, chunk_size=chunk, segment_size=0)
    x = torch.randn(1, chunk, dim, device=device())
    return operations(train_step(one, x, "float32")) / chunk


def run(record: Record, options: dict[str, Any]) -> None:
    quick, rate = options["quick"], options["rates"].get("bf16 product TFLOP/s")
    wide, narrow, lengths, total = (32, 32, (64, 64), 64) if quick else (1024, 256, (4096, 1024), TOKENS)
    head, chunks = (16, (32, 16)) if quick else (HEAD, CHUNKS)
    measure = partial(_measure, record, rate=rate, total=total, head=head)
    for precision in ("bf16", "bf16+tf32"):  # the target first: width 1,024, T 4,096
        for name in ("block", "hope_memory", "window_attention"):
            measure(name, wide, lengths[0], precision)
    for name in MIXERS:
        measure(name, wide, lengths[0], "bf16")
    for chunk in chunks:
        act = partial(_chunk, wide, wide // head, max(1, total // lengths[0]), lengths[0], chunk, rate)
        record.attempt("chunk size", f"chunk {chunk}", act, 20)
        free()
    for dim, tokens, precision in (
        (wide, lengths[0], "float32"), (wide, lengths[1], "bf16"), (narrow, lengths[0], "bf16"),
        (wide, lengths[1], "float32"), (narrow, lengths[1], "bf16"), (narrow, lengths[1], "float32"),
    ):  # fmt: skip
        for name in ("block", *MIXERS[:-1]):
            measure(name, dim, tokens, precision)


def _measure(
    record: Record, name: str, dim: int, tokens: int, precision: str, *, rate: float | None, total: int, head: int
) -> None:
    key = f"{name}, width {dim}, T {tokens}, {precision}"
    if key not in record.tables.get("layers", {}):
        act = partial(_row, name, dim, dim // head, max(1, total // tokens), tokens, precision, rate)
        record.attempt("layers", key, act, 15)
        free()


def _row(name: str, dim: int, heads: int, batch: int, tokens: int, precision: str, rate: float | None) -> dict:
    set_tf32(precision)
    x = torch.randn(batch, tokens, dim, device=device())
    module = block(dim, heads, precision) if name == "block" else mixer(name, dim, heads)
    step = train_step(module, x, precision)
    time = milliseconds(step, budget=0.8, most=10)
    chunk = 64
    work = Block.operations(batch, tokens, dim) if name == "block" else None
    if work is None:
        work = batch * tokens * layer_operations(name, dim, heads, min(chunk, tokens))
    found = {"layer": name, "dim": dim, "tokens": tokens, "batch": batch, "precision": precision} | time
    return found | rates(work, batch * tokens, time["ms"], rate) | {"peak MiB": mebibytes(peak_bytes(step))}


def rates(work: float, tokens: int, ms: float, rate: float | None) -> dict[str, float | None]:
    """Tokens and operations a second, and the part of the device's bf16 rate."""
    done = work / ms / 1e9
    return {"tokens/s": 1e3 * tokens / ms, "MFLOP/token": work / tokens / 1e6, "TFLOP/s": done,
            "% of bf16 peak": 100 * done / rate if rate else None}  # fmt: skip


def mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def _chunk(dim: int, heads: int, batch: int, tokens: int, chunk: int, rate: float | None) -> dict[str, Any]:
    """selfmod with one chunk size, as Python launches it."""
    set_tf32("bf16+tf32")
    x = torch.randn(batch, tokens, dim, device=device())
    layer = mixer("selfmod", dim, heads, chunk_size=chunk)
    step = train_step(layer, x, "bf16")
    time = milliseconds(step, budget=0.6, most=5)
    work = batch * tokens * layer_operations("selfmod", dim, heads, chunk)
    found = {"chunk": chunk} | time | rates(work, batch * tokens, time["ms"], rate)
    found["peak MiB"] = mebibytes(peak_bytes(step))
    return found
