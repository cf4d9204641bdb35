"""What one more token costs: latency, and bytes of state, by position in the text."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nestling.bench import measure
from nestling.bench.measure import Timing
from nestling.bench.modules import layer_of
from nestling.bench.settings import BenchSettings
from nestling.bench.table import Table


def decode(settings: BenchSettings) -> Table:
    """Latency of one more token, and bytes of state, by position in the text."""
    s = settings
    hope, attention = layer_of(s), layer_of(s, "attention")
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
        # one token that is not timed; after it the state is inside a chunk, where it is largest
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
