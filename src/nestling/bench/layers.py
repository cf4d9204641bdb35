"""What the sequence layers cost: the chunk form against the token loop, layers against a softmax block."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nestling.bench import measure
from nestling.bench.flops import count_flops
from nestling.bench.modules import Softmax, block, layer_of
from nestling.bench.settings import BenchSettings
from nestling.bench.table import Table, compare
from nestling.layers.mixers import MIXERS
from nestling.ops import compiled, delta_rule, delta_rule_reference

# what is measured over the length: the layers of the default Hope, and the paper's
LENGTHS: dict[str, dict] = {"memory_and_attention": {}, "window_attention": {"window": 256}, "selfmod": {}}


def chunk(settings: BenchSettings) -> Table:
    """The chunk form against the token loop: the operator, and the layer fed one token at a time."""
    s, size = settings, settings.dim // settings.heads
    g = torch.Generator().manual_seed(0)

    def random(*shape: int, unit: bool = False) -> Tensor:
        x = (torch.rand if unit else torch.randn)(*shape, generator=g).to(s.device)
        return x.requires_grad_()

    lead, tokens = (s.heads,), s.loop_tokens
    args = {"weight": random(*lead, size, size), "velocity": random(*lead, size, size)}
    args |= {name: random(*lead, tokens, size) for name in ("keys", "writes", "queries")}
    args |= {name: random(*lead, tokens, unit=True) for name in ("decay", "erase", "momentum")}
    with torch.no_grad():
        args["keys"].div_(args["keys"].norm(dim=-1, keepdim=True))

    def step(form: Callable) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(form(**args).reads.square().mean(), list(args.values()))

        return run

    timing = measure.interleave({"chunk form": step(delta_rule), "loop": step(delta_rule_reference)}, s)
    rows = [{"what": "delta rule", "tokens": tokens} | compare(timing, "chunk form", "loop", tokens)]

    layer, x = layer_of(s), s.random(1, s.layer_loop_tokens, s.dim)

    def token_by_token(x: Tensor) -> Tensor:
        state, outputs = None, []
        for t in range(x.shape[1]):
            y, state = layer(x[:, t : t + 1], state)
            outputs.append(y)
        return torch.cat(outputs, 1)

    class Loop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return token_by_token(x)

    steps = {"chunk form": measure.train_step(layer, x, s), "loop": measure.train_step(Loop(), x, s)}
    timing = measure.interleave(steps, s)
    rows.append({"what": "layer", "tokens": x.shape[1]} | compare(timing, "chunk form", "loop", x.shape[1]))
    return Table("Chunk form against the token loop, forward and backward", rows)


def lengths(settings: BenchSettings) -> Table:
    """The layers of the default Hope and the self-modifying one against the softmax block, over the length."""
    s, rows = settings, []
    layers = {name: layer_of(s, name, **options) for name, options in LENGTHS.items()}
    base = block(s.dim, s.heads, s.device)
    for tokens in s.lengths:
        batch = s.batch if tokens <= s.tokens else 1
        x = s.random(batch, tokens, s.dim)
        steps = {name: measure.train_step(module, x, s) for name, module in (layers | {"block": base}).items()}
        timing = measure.interleave(steps, s)
        head = {"tokens": tokens, "batch": batch}
        rows += [{"layer": name} | head | compare(timing, name, "block", batch * tokens) for name in layers]
    table = Table("Layers against a softmax attention + MLP block, forward and backward", rows)
    for name in layers:
        where = crossing([row for row in rows if row["layer"] == name])
        table.notes.append(
            f"`{name}` is as fast as the block from about {where:,.0f} tokens."
            if where
            else f"`{name}` is slower than the block up to {rows[-1]['tokens']:,} tokens."
        )
    return table


def crossing(rows: list[dict]) -> float | None:
    """The length where the ratio reaches 1, interpolated on logarithmic scales; None where it does not."""
    if rows and rows[0]["ratio"] >= 1:
        return rows[0]["tokens"]
    for a, b in zip(rows, rows[1:]):
        if a["ratio"] < 1 <= b["ratio"]:
            part = math.log(1 / a["ratio"]) / math.log(b["ratio"] / a["ratio"])
            return a["tokens"] * (b["tokens"] / a["tokens"]) ** part
    return None


def mixers(settings: BenchSettings) -> Table:
    """Every sequence layer against the softmax block at the target's size."""
    s = settings
    x = s.random(s.batch, s.tokens, s.dim)
    steps = {name: measure.train_step(layer_of(s, name), x, s) for name in MIXERS}
    steps["selfmod, expansion 2"] = measure.train_step(layer_of(s, "selfmod", expansion=2), x, s)
    steps["selfmod in PyTorch"] = _in_pytorch(measure.train_step(layer_of(s, "selfmod"), x, s))
    steps["softmax attention alone"] = measure.train_step(Softmax(s.dim, s.heads).to(s.device), x, s)
    steps["block"] = measure.train_step(block(s.dim, s.heads, s.device), x, s)
    timing = measure.interleave(steps, s)
    count = s.batch * s.tokens
    rows = [{"layer": name} | compare(timing, name, "block", count) for name in steps if name != "block"]
    return Table(f"Every layer against the softmax block, T {s.tokens}, forward and backward", rows)


def _in_pytorch(step: Callable[[], None]) -> Callable[[], None]:
    """The step without the compiled forms."""

    def run() -> None:
        with compiled.disabled():
            step()

    return run


def efficiency(settings: BenchSettings) -> Table:
    """The fraction of the machine's matrix-product rate that layer and block achieve."""
    s, rows = settings, []
    x = s.random(s.batch, s.tokens, s.dim)
    modules = {"layer": layer_of(s), "block": block(s.dim, s.heads, s.device)}
    steps = {name: measure.train_step(module, x, s) for name, module in modules.items()}
    rates = [measure.product_rate(s)]
    timing = measure.interleave(steps, s)
    rates.append(measure.product_rate(s))
    for name, step in steps.items():
        flops, count = count_flops(step), s.batch * s.tokens
        with torch.no_grad(), s.autocast():
            forward = count_flops(lambda m=modules[name]: m(x))
        rows.append(
            {
                "what": name,
                "MFLOP/token forward": forward / count / 1e6,
                "MFLOP/token forward and backward": flops / count / 1e6,
                "GFLOP/s": flops / timing.median(name) / 1e9,
                "of the machine's": flops / timing.median(name) / max(rates),
            }
        )
    note = f"A {s.product} x {s.product} product runs at {max(rates) / 1e9:,.1f} GFLOP/s here."
    return Table("Achieved fraction of the machine's matrix-product rate", rows, [note])
