"""The parts of the benchmark. Each takes the settings and returns rows of figures, with the columns they share."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nestling.bench import measure
from nestling.bench.block import Softmax, block
from nestling.bench.measure import Settings, Timing
from nestling.layers.mixers import MIXERS, build_mixer
from nestling.ops import compiled, delta_rule, delta_rule_reference


@dataclass
class Table:
    """One part's figures: rows by column name, and what a reader should know about them."""

    title: str
    rows: list[dict]
    notes: list[str] = field(default_factory=list)


def _layer(settings: Settings, name: str = "selfmod", **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_mixer(name, settings.dim, settings.heads, **options).to(settings.device)


def _compare(timing: Timing, name: str, base: str, tokens: int) -> dict:
    """Tokens per second of both and their ratio over the rounds."""
    low, high = timing.spread(name, base)
    return {
        "tokens/s": tokens / timing.median(name),
        f"{base} tokens/s": tokens / timing.median(base),
        "ratio": timing.ratio(name, base),
        "low": low,
        "high": high,
        "rounds": timing.rounds,
    }


def chunk(settings: Settings) -> Table:
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
    rows = [{"what": "delta rule", "tokens": tokens} | _compare(timing, "chunk form", "loop", tokens)]

    layer, x = _layer(s), s.random(1, s.layer_loop_tokens, s.dim)

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
    rows.append({"what": "layer", "tokens": x.shape[1]} | _compare(timing, "chunk form", "loop", x.shape[1]))
    return Table("Chunk form against the token loop, forward and backward", rows)


def lengths(settings: Settings) -> Table:
    """The layer against the softmax block of its width, over the length of the sequence."""
    s, rows = settings, []
    layer, base = _layer(s), block(s.dim, s.heads, s.device)
    for tokens in s.lengths:
        batch = s.batch if tokens <= s.tokens else 1
        x = s.random(batch, tokens, s.dim)
        steps = {"layer": measure.train_step(layer, x, s), "block": measure.train_step(base, x, s)}
        timing = measure.interleave(steps, s)
        rows.append({"tokens": tokens, "batch": batch} | _compare(timing, "layer", "block", batch * tokens))
    table = Table("SelfModifyingTitans against a softmax attention + MLP block, forward and backward", rows)
    where = crossing(rows)
    table.notes.append(
        f"The layer overtakes the block at about {where:,.0f} tokens."
        if where
        else f"The layer does not overtake the block up to {rows[-1]['tokens']:,} tokens."
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


def mixers(settings: Settings) -> Table:
    """Every sequence layer against the softmax block at the target's size."""
    s = settings
    x = s.random(s.batch, s.tokens, s.dim)
    steps = {name: measure.train_step(_layer(s, name), x, s) for name in MIXERS}
    steps["selfmod, expansion 2"] = measure.train_step(_layer(s, "selfmod", expansion=2), x, s)
    steps["selfmod in PyTorch"] = _in_pytorch(measure.train_step(_layer(s, "selfmod"), x, s))
    steps["softmax attention alone"] = measure.train_step(Softmax(s.dim, s.heads).to(s.device), x, s)
    steps["block"] = measure.train_step(block(s.dim, s.heads, s.device), x, s)
    timing = measure.interleave(steps, s)
    count = s.batch * s.tokens
    rows = [{"layer": name} | _compare(timing, name, "block", count) for name in steps if name != "block"]
    return Table(f"Every layer against the softmax block, T {s.tokens}, forward and backward", rows)


def _in_pytorch(step: Callable[[], None]) -> Callable[[], None]:
    """The step without the compiled forms."""

    def run() -> None:
        with compiled.disabled():
            step()

    return run


def efficiency(settings: Settings) -> Table:
    """The fraction of the machine's matrix-product rate that layer and block achieve."""
    s, rows = settings, []
    x = s.random(s.batch, s.tokens, s.dim)
    contenders = {"layer": _layer(s), "block": block(s.dim, s.heads, s.device)}
    steps = {name: measure.train_step(module, x, s) for name, module in contenders.items()}
    rates = [measure.product_rate(s)]
    timing = measure.interleave(steps, s)
    rates.append(measure.product_rate(s))
    for name, step in steps.items():
        flops, count = measure.count_flops(step), s.batch * s.tokens
        with torch.no_grad(), s.autocast():
            forward = measure.count_flops(lambda m=contenders[name]: m(x))
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


def decode(settings: Settings) -> Table:
    """Latency of one more token, and bytes of state, by position in the text."""
    s = settings
    hope, attention = _layer(s), _layer(s, "attention")
    states = {}
    with torch.no_grad():
        state, seen = None, 0
        for position in s.positions:  # one prefill, on the way to the last position
            while seen < position:
                step = min(1024, position - seen)
                _, state = hope(s.random(1, step, s.dim), state)
                seen += step
            states["selfmod", position] = (hope, state)
        _, start = attention(s.random(1, 4, s.dim))
        for position in s.positions:  # what is in the cache does not change the time it takes
            states["attention", position] = (attention, _grown(start, position))
        tokens = [s.random(1, 1, s.dim) for _ in range(s.decode_tokens)]
        # one token that is not timed; behind it the state is inside a chunk, where it is largest
        carried = {key: layer(tokens[0], state)[1] for key, (layer, state) in states.items()}
        sizes = {key: state_bytes(state) for key, state in carried.items()}
        timings = {}
        for name, layer in (("selfmod", hope), ("attention", attention)):
            seconds: dict = {position: [] for position in s.positions}
            for turn, x in enumerate(tokens):  # positions in turn, token by token, each as often first as last
                at = turn % len(s.positions)
                for position in s.positions[at:] + s.positions[:at]:
                    after: list = []
                    step = partial(_advance, layer, x, carried[name, position], after)
                    seconds[position].append(measure.clock(step, s))
                    (carried[name, position],) = after
            timings[name] = Timing(seconds)
    rows, first = [], s.positions[0]
    for name, timing in timings.items():
        for position in s.positions:
            rows.append(
                {
                    "layer": name,
                    "position": position,
                    "ms/token": timing.median(position) * 1e3,
                    f"over {first:,}": timing.ratio(first, position),
                    "state bytes": sizes[name, position],
                }
            )
    note = "The memory reads its way to each position; attention's cache is filled with random keys and values."
    return Table("Decoding one token at a time, one layer, one sequence", rows, [note])


def _advance(layer: torch.nn.Module, x: Tensor, state, after: list) -> None:
    after.append(layer(x, state)[1])


def _grown(state, position: int):
    """An attention state of `position` columns."""
    shape = (1, position, *state.keys.shape[2:])
    index = torch.arange(position, device=state.keys.device)[None]
    return state._replace(
        keys=torch.randn(shape, dtype=state.keys.dtype, device=state.keys.device),
        values=torch.randn(shape, dtype=state.keys.dtype, device=state.keys.device),
        valid=torch.ones_like(index, dtype=torch.bool),
        positions=index,
        tokens=torch.full_like(state.tokens, position),
    )


def state_bytes(state) -> int:
    """Bytes of a state's tensors, shared storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tree_leaves(state)}
    return sum(storages.values())


def memory(settings: Settings) -> Table:
    """Peak memory of a training step over the length, each in a process of its own."""
    s, rows = settings, []
    layer = _layer(s)
    segment = layer.segment_size
    boundary = sum(t.numel() * t.element_size() for t in tree_leaves(layer.initial_state(1)))
    for kept, size in (("boundary states", segment), ("everything", 0)):
        for tokens in s.memory_lengths if size else s.memory_lengths[:2]:
            grown = _peak_growth(s, tokens, size)
            rows.append({"keeps": kept, "tokens": tokens, "MiB over idle": grown / 2**20})
            base = next(r for r in rows if r["keeps"] == kept)
            linear = tokens / base["tokens"]
            first = base["MiB over idle"]
            rows[-1]["over linear growth"] = rows[-1]["MiB over idle"] / first / linear if first else None
            rows[-1]["boundary states MiB"] = (tokens / segment * boundary / 2**20) if size else None
    note = f"Recomputed in pieces of {segment} tokens; one boundary state is {boundary / 2**20:.2f} MiB."
    return Table("Peak memory of a training step, one sequence", rows, [note])


def _peak_growth(settings: Settings, tokens: int, segment_size: int) -> int:
    """Bytes by which a training step raises the peak of a fresh process."""
    values = dict(
        dim=settings.dim, heads=settings.heads, tokens=tokens, segment_size=segment_size, device=settings.device,
        dtype=settings.dtype, threads=torch.get_num_threads(), warm=min(settings.memory_lengths[0], 128),
    )  # fmt: skip
    command = [sys.executable, "-m", "nestling.bench.peak", json.dumps(values)]
    threads = str(torch.get_num_threads())
    # freed blocks go back to the system at once, so that the peak is what is alive and not what is fragmented
    quiet = {"OMP_NUM_THREADS": threads, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory at {tokens} tokens failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)["bytes"]


def peers(settings: Settings) -> Table:
    """Public implementations of the same ideas, where they are installed, at the target's size."""
    s = settings
    x = s.random(s.batch, s.tokens, s.dim)
    found, notes = {"selfmod": measure.train_step(_layer(s), x, s)}, []
    for name, build in PEERS.items():
        try:
            found[name] = build(s, x)
        except ImportError as error:
            notes.append(f"{name}: skipped, {error.name or error} is not installed.")
    timing = measure.interleave(found, s)
    rows = [{"layer": name} | _compare(timing, name, "selfmod", s.batch * s.tokens) for name in found]
    return Table(f"Public implementations, T {s.tokens}", rows, notes)


def _titans_pytorch(settings: Settings, x: Tensor) -> Callable[[], None]:
    neural_memory = importlib.import_module("titans_pytorch").NeuralMemory
    torch.manual_seed(0)
    size = settings.dim // settings.heads
    layer = neural_memory(dim=settings.dim, chunk_size=64, heads=settings.heads, dim_head=size).to(x.device)
    return measure.train_step(layer, x, settings)


def _nested_learning(settings: Settings, x: Tensor) -> Callable[[], None]:
    """Its training step: gradients of a pass without writes, then a pass that writes without gradients."""
    module = importlib.import_module("nested_learning.titan.self_modifying")
    torch.manual_seed(0)
    config = module.SelfModifyingTitansConfig(dim=settings.dim, chunk_size_other=64, momentum=0.9)
    layer = module.SelfModifyingTitans(config).to(x.device)
    gradients = measure.train_step(layer, x, settings)

    def step() -> None:
        gradients()
        layer.apply_updates_inplace(x)

    return step


PEERS = {
    "titans-pytorch NeuralMemory (one kind of memory)": _titans_pytorch,
    "nested-learning SelfModifyingTitans (no gradients through writes)": _nested_learning,
}


def model(settings: Settings) -> Table:
    """Whole models of a named size: a training step's forward and backward, Hope against Hope-Attention."""
    from nestling.models import sizes
    from nestling.models.hope import HopeForCausalLM

    s, steps, peaks, counts = settings, {}, {}, {}
    base = sizes.config(s.model or "tiny")
    for mixer in ("selfmod", "attention"):
        torch.manual_seed(0)
        config = base if mixer == base.mixer else sizes.matched_config(base, mixer)
        network = HopeForCausalLM(config).to(s.device)
        ids = torch.randint(config.vocab_size, (s.model_batch, s.model_tokens), device=s.device)

        def step(network=network, ids=ids) -> None:
            with s.autocast():
                loss = network(ids, labels=ids, use_cache=False).loss
            loss.backward()
            network.zero_grad(set_to_none=True)

        steps[mixer], counts[mixer] = step, sum(p.numel() for p in network.parameters())
        if s.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks[mixer] = torch.cuda.max_memory_allocated() / 2**20
    timing = measure.interleave(steps, s)
    count = s.model_batch * s.model_tokens
    rows = []
    for mixer in steps:
        row = {"mixer": mixer, "parameters": counts[mixer], "batch": s.model_batch, "tokens": s.model_tokens}
        row |= _compare(timing, mixer, "attention", count)
        rows.append(row | ({"peak MiB": peaks[mixer]} if peaks else {}))
    return Table(f"Models of size {s.model or 'tiny'}, forward and backward", rows)


PARTS: dict[str, Callable[[Settings], Table]] = {
    "chunk": chunk,
    "lengths": lengths,
    "mixers": mixers,
    "efficiency": efficiency,
    "decode": decode,
    "memory": memory,
    "peers": peers,
    "model": model,
}
