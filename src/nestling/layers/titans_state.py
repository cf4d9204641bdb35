"""State and settings of the self-modifying Titans layer, and what it refuses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nestling.memory.architectures import LinearMemory, MLPMemory
from nestling.memory.rule import FastWeights

ADAPTIVE = ("k", "v", "q", "eta", "alpha")


class TitansState(NamedTuple):
    """State of a stream; every tensor begins with the batch dimension."""

    position: Tensor  # tokens seen, int64 [B]
    conv: Tensor  # last inputs of the convolution, [B, conv_size - 1, D]
    memories: tuple[FastWeights, ...]  # one for each group of memories of one shape and chunk size


class MemoryGroup(NamedTuple):
    """Memories of one shape and one chunk size, updated as one stack."""

    names: tuple[str, ...]
    architecture: LinearMemory | MLPMemory
    chunk_size: int


def state_dtype(x: Tensor) -> Tensor:
    """x in the type a state is kept in: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def check_settings(settings: dict):
    """Every wrong option by name, before any parameter exists."""
    s = settings
    least = dict(dim=1, num_heads=1, expansion=1, chunk_size=1, conv_size=0, segment_size=0)
    optional = {name: 1 for name in ("head_dim", "memory_chunk_size") if s[name] is not None}
    for name, smallest in (least | optional).items():
        if not isinstance(s[name], int) or s[name] < smallest:
            raise ValueError(f"{name} must be an integer of at least {smallest}; got {s[name]!r}")
    for name in ("norm_limit", "initial_rate"):
        if not s[name] > 0:
            raise ValueError(f"{name} must be positive; got {s[name]!r}")
    if s["head_dim"] is None and s["dim"] % s["num_heads"]:
        raise ValueError(
            f"dim {s['dim']} is not a multiple of num_heads {s['num_heads']}: change one, or give head_dim"
        )
    own = s["memory_chunk_size"]
    if own is not None and own % s["chunk_size"] and s["chunk_size"] % own:
        raise ValueError(
            f"memory_chunk_size {own} and chunk_size {s['chunk_size']}: one must be a multiple of the other"
        )
    horizon = s["horizon"]
    if len(horizon) != 2 or min(horizon) <= 1:
        raise ValueError(f"horizon must be two numbers of tokens above 1; got {horizon!r}")
    unknown = set(s["adaptive"]) - set(ADAPTIVE)
    if unknown:
        raise ValueError(f"adaptive may hold {', '.join(ADAPTIVE)}; got {', '.join(sorted(unknown))}")
    choices = dict(
        architecture=("mlp", "linear"), gates=("mlp", "linear"), decay=("learned", "fixed", "none"),
        rate=("learned", "one"), retain=("initial", "zero"), read=("before", "after", "chunk"),
    )  # fmt: skip
    for name, allowed in choices.items():
        if s[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {s[name]!r}")
    if "eta" in s["adaptive"] and s["rate"] != "learned":
        raise ValueError(f'adaptive holds "eta", which needs rate="learned"; got {s["rate"]!r}')
    if "alpha" in s["adaptive"] and s["decay"] != "learned":
        raise ValueError(f'adaptive holds "alpha", which needs decay="learned"; got {s["decay"]!r}')
    narrow = [name for name in ("eta", "alpha") if name in s["adaptive"]]
    if narrow and not s["self_targets"]:
        raise ValueError(
            f"self_targets=False makes the value every memory's target, which {' and '.join(narrow)}, a number each, "
            "cannot take: leave them out of adaptive"
        )


def check_call(layer: nn.Module, x: Tensor, state: TitansState | None, mask: Tensor | None):
    """Refuse an input or a state that does not fit the layer, before anything is computed."""
    if x.dim() != 3 or x.shape[-1] != layer.dim:
        raise ValueError(f"x must be [B, T, {layer.dim}]; got {tuple(x.shape)}")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"x must hold at least one sequence of one token; got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point; got {x.dtype}")
    own = layer.in_proj.weight.dtype
    if x.dtype != own and (torch.float64 in (x.dtype, own) or not torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"x is {x.dtype}, but this layer's parameters are {own}: convert one, or use autocast")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(x.shape[:2])}; got {mask.dtype} {tuple(mask.shape)}")
    if state is None:
        return
    if not isinstance(state, TitansState) or len(state.memories) != len(layer.groups):
        raise ValueError(f"state must be a TitansState of this layer's settings; got {type(state).__name__}")
    if state.position.shape[0] != x.shape[0]:
        raise ValueError(f"state is of a batch of {state.position.shape[0]}, but x has {x.shape[0]} sequences")
    size = 0 if layer.conv_weight is None else layer.conv_weight.shape[1] - 1
    if state.conv.shape[1:] != (size, layer.dim):
        raise ValueError(
            f"state holds a convolution's last inputs {tuple(state.conv.shape[1:])}, this layer's are "
            f"{(size, layer.dim)}"
        )
    for fast, weights in zip(state.memories, layer.initial, strict=True):
        if bool(fast.velocity) != layer.momentum:
            raise ValueError(f"state is of a layer with momentum={bool(fast.velocity)}, this one's is {layer.momentum}")
        for part in fast:
            if part and len(part) != len(weights):
                raise ValueError(f"state holds memories of {len(part)} layers, this layer's have {len(weights)}")
            for w, initial in zip(part, weights, strict=False):  # no velocity without momentum
                if w.shape[1:] != initial.shape:
                    own = tuple(initial.shape)
                    raise ValueError(f"state holds weights {tuple(w.shape[1:])}, this layer's are {own}")
                if w.dtype != state_dtype(initial).dtype:
                    kept = state_dtype(initial).dtype
                    raise ValueError(f"state is {w.dtype}, but this layer keeps its state in {kept}")
                if w.device != x.device:
                    raise ValueError(f"state is on {w.device}, but x is on {x.device}: move one of them")
