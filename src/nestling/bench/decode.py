"""What one more token costs: latency, and bytes of state, by position in the text."""

from __future__ import annotations

import random
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nestling.bench import measure
from nestling.bench.layers import LENGTHS
from nestling.bench.measure import Timing
from nestling.bench.modules import layer_of
from nestling.bench.settings import BenchSettings
from nestling.bench.table import Table

LAYERS: dict[str, dict] = LENGTHS | {"attention": {}}
ATTENTION_UP_TO = 131_072  # tokens: a step makes a new cache, of gigabytes beyond


def decode(settings: BenchSettings) -> Table:
    """Latency of one more token, over attention's and over the first position's, and bytes of state."""
    s = settings
    layers = {name: layer_of(s, name, **options) for name, options in LAYERS.items()}
    carried = {}
    with torch.no_grad():
        for name, layer in layers.items():
            state, seen = None, 0
            for position in _positions(s, name):  # one prefill, on the way to the last position
                # what is in attention's cache does not change the time it takes
                while seen < (4 if name == "attention" else position):
                    step = min(4096, position - seen)
                    _, state = layer(s.random(1, step, s.dim), state)
                    seen += step
                carried[name, position] = _grown(state, position) if name == "attention" else state
        tokens = [s.random(1, 1, s.dim) for _ in range(s.decode_tokens)]
        # one token that is not timed; after it the state is inside a chunk, where it is largest
        carried = {key: layers[key[0]](tokens[0], state)[1] for key, state in carried.items()}
        sizes = {key: state_bytes(state) for key, state in carried.items()}
        seconds: dict = {key: [] for key in carried}
        turns, order = list(carried), random.Random(0)
        for x in tokens:
            order.shuffle(turns)  # who comes after attention over many tokens finds the caches empty
            for name, position in turns:
                after: list = []
                step = partial(_advance, layers[name], x, carried[name, position], after)
                seconds[name, position].append(measure.clock(step, s))
                (carried[name, position],) = after
    timing, rows, first = Timing(seconds), [], s.positions[0]
    for name, position in carried:
        base = "attention", position
        rows.append(
            {
                "layer": name,
                "position": position,
                "ms/token": timing.median((name, position)) * 1e3,
                "over attention": timing.ratio(base, (name, position)) if base in carried else None,
                f"over {first:,}": timing.ratio((name, first), (name, position)),
                "state bytes": sizes[name, position],
            }
        )
    notes = ["The layers read their way to each position; attention's cache is filled with random keys and values."]
    if s.positions[-1] > ATTENTION_UP_TO:
        notes.append(f"Attention is left out beyond {ATTENTION_UP_TO:,} tokens, where a step makes gigabytes anew.")
    return Table("Decoding one token at a time, one layer, one sequence", rows, notes)


def decode_models(settings: BenchSettings) -> Table:
    """Latency of one more token of whole models at the first position, over the same model with full attention."""
    from nestling.models import sizes
    from nestling.models.hope import HopeForCausalLM

    s, rows = settings, []
    for size in s.decode_models:
        base, carried, models = sizes.config(size), {}, {}
        ids = torch.randint(base.vocab_size, (1, s.positions[0]), generator=torch.Generator().manual_seed(0)).to(
            s.device
        )
        for mixer in ("hope", "selfmod", "attention"):
            torch.manual_seed(0)
            config = base if mixer == base.mixer else sizes.matched_config(base, mixer)
            models[mixer] = HopeForCausalLM(config).to(s.device).eval()
        with torch.no_grad():
            for mixer, model in models.items():
                carried[mixer] = model(ids, use_cache=True).past_key_values
            seconds: dict = {mixer: [] for mixer in models}
            for turn in range(s.decode_tokens + 1):
                for mixer, model in models.items():
                    token = ids[:, turn % ids.shape[1], None]
                    step = partial(model, token, past_key_values=carried[mixer], use_cache=True)
                    seconds[mixer].append(measure.clock(step, s))
        timing = Timing({mixer: taken[1:] for mixer, taken in seconds.items()})
        for mixer in models:
            rows.append(
                {
                    "size": size,
                    "sequence layers": "hope (the default)" if mixer == "hope" else mixer,
                    "position": s.positions[0],
                    "ms/token": timing.median(mixer) * 1e3,
                    "over attention": timing.ratio("attention", mixer),
                    "tokens": timing.rounds,
                }
            )
    return Table("Decoding one token at a time, whole models of as many parameters", rows)


def _positions(settings: BenchSettings, name: str) -> tuple[int, ...]:
    """Where a layer is measured."""
    return tuple(p for p in settings.positions if name != "attention" or p <= ATTENTION_UP_TO)


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
