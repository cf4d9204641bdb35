"""State of the self-modifying Titans layer, and the inputs and states it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from nestling.memory.rule import FastWeights

if TYPE_CHECKING:
    from nestling.layers.titans_cache import CachedMemories


class TitansState(NamedTuple):
    """State of a stream; every tensor begins with the batch dimension."""

    position: Tensor  # tokens seen, int64 [B]
    conv: Tensor  # last inputs of the convolution, [B, conv_size - 1, D]
    memories: tuple[FastWeights, ...]  # one for each group of memories of one shape and chunk size
    # last inputs of the convolutions of q, k and v, [B, qkv_conv - 1, H p]; a state from before they were has none
    paths: tuple[Tensor, ...] = ()
    cached: CachedMemories | tuple[()] = ()  # of a layer with `cache_every`


def state_dtype(x: Tensor) -> Tensor:
    """x in the type a state is kept in: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def check_call(layer: nn.Module, x: Tensor, state: TitansState | None, mask: Tensor | None):
    """Refuse an input or a state that does not fit the layer, before anything is computed."""
    dim = layer.config.dim
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"x must be [B, T, {dim}]; got {tuple(x.shape)}")
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
    if state.conv.shape[1:] != (size, dim):
        raise ValueError(
            f"state holds a convolution's last inputs {tuple(state.conv.shape[1:])}, this layer's are {(size, dim)}"
        )
    size, inner = max(layer.config.qkv_conv - 1, 0), layer.num_heads * layer.head_dim
    found, wanted = [tuple(path.shape[1:]) for path in state.paths], [(size, inner)] * len(layer.path_convs)
    if found != wanted:
        raise ValueError(
            f"state holds last inputs {found} of the convolutions after the projections, this layer's are {wanted}: it "
            "comes from a layer with another qkv_conv"
        )
    if bool(state.cached) != (layer.config.cache_every is not None):
        had, has = ("keeps", "does not") if state.cached else ("does not keep", "does")
        raise ValueError(f"state is of a layer that {had} memories, this one {has}: cache_every differs")
    for fast, weights in zip(state.memories, layer.initial, strict=True):
        if bool(fast.velocity) != layer.config.momentum:
            raise ValueError(
                f"state is of a layer with momentum={bool(fast.velocity)}, this one's is {layer.config.momentum}"
            )
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
