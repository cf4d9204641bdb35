"""One token through a sequence layer as one call of the C++ library: what decoding takes on a CPU.

The layers' own forward passes in PyTorch are the definitions, and what all other calls take: with gradients, of several
tokens, with padding, under autocast or a compiler, on other devices, or of a layer whose parts were replaced or hooked.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nestling.layers.rotary import frequencies
from nestling.layers.titans_config import PATHS, TitansConfig
from nestling.layers.titans_scan import closed, swap
from nestling.layers.titans_state import TitansState
from nestling.memory.rule import FastWeights
from nestling.ops import compiled
from nestling.utils.transforms import is_transformed

if TYPE_CHECKING:
    from nestling.layers.attention import Attention, AttentionState
    from nestling.layers.titans import SelfModifyingTitans

# as the library counts them (ops/compiled/decode.h)
_PARTS = ("q", "k", "v", "gate", "eta", "alpha", "mu", "erase")
_RATES, _DECAYS, _READS = ("one", "learned", "gate"), ("none", "learned", "fixed"), ("before", "after", "chunk")


def may_step(x: Tensor) -> bool:
    """Whether a call on x is one of one token, without gradients, on a CPU."""
    if x.dim() != 3 or x.shape[1] != 1 or torch.is_grad_enabled() or is_transformed():
        return False
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def memory_step(
    layer: SelfModifyingTitans, x: Tensor, state: TitansState, mask: Tensor | None
) -> tuple[Tensor, TitansState] | None:
    """What `layer(x, state)` is for x [B, 1, D] that `may_step`, or None where the library cannot do it."""
    config, fast = layer.config, state.memories[0]
    convs, order = layer.path_convs, list(layer.path_convs)  # which is not that of PATHS
    paths = [convs[name] for name in PATHS] if order else [None] * 3
    anchor = layer.initial[0][0] if config.retain == "initial" and config.decay != "none" else None
    learned = (
        layer.in_proj.weight, layer.out_proj.weight, layer.norm_weight, layer.conv_weight, *paths, layer.eta_bias,
        layer.alpha_bias, layer.mu_bias, layer.erase_bias, anchor,
    )  # fmt: skip
    velocity, carried = fast.velocity or (None,), dict(zip(order, state.paths))
    given = (x, state.conv, fast.start[0], fast.now[0], *velocity, *map(carried.get, PATHS), *learned)
    if not _plain((layer.in_proj, layer.out_proj), mask, given) or not _of(x.shape[0], given[1:8]):
        return None
    given = [None if t is None else t.contiguous() for t in given]
    made = [None if t is None else torch.empty_like(t) for t in (*given[:2], *given[3:8])]
    reach = _number(config.erase_range, x.dtype)
    compiled.run("memory_step", x.dtype, layer.one_token, ((*given, reach), made), x.shape[0])
    y, conv, now, *rest = made
    new = FastWeights(fast.start, (now,), tuple(rest[: len(fast.velocity)]))
    closes = [(seen + 1) % config.main_chunk_size == 0 for seen in state.position.tolist()]
    if any(closes):
        (new,) = swap((closed(config, swap((new,))[0], all(closes) or torch.tensor(closes)),))
    carried = dict(zip(PATHS, rest[1:]))
    return y, TitansState(state.position + 1, conv, (new,), tuple(carried[name] for name in order))


def attention_step(
    layer: Attention, x: Tensor, state: AttentionState, mask: Tensor | None
) -> tuple[Tensor, AttentionState] | None:
    """What `layer(x, state)` is for x [B, 1, D] that `may_step`, or None where the library cannot do it."""
    linear = [m for m in (layer.q_proj, layer.k_proj, layer.v_proj, layer.gate_proj, layer.out_proj) if m is not None]
    norms = [None if norm is None else norm.weight for norm in (layer.q_norm, layer.k_norm)]
    gate, conv = (None if part is None else part.weight for part in (layer.gate_proj, layer.conv))
    learned = (
        layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight, gate, layer.out_proj.weight, conv, *norms
    )  # fmt: skip
    own = (x, state.convolution, state.keys, state.values)
    whole = state.valid, state.positions, state.tokens
    if not _plain(linear, mask, (*own, *learned)) or not _of(x.shape[0], (*own, *whole)):
        return None
    columns = state.keys.shape[1]
    places = (x.shape[0], columns)
    if state.values.shape != state.keys.shape or not state.valid.shape == state.positions.shape == places:
        return None
    if [t.dtype for t in whole] != [torch.bool, torch.int64, torch.int64] or state.tokens.dim() != 1:
        return None
    keep = columns + 1 if layer.window is None else min(columns + 1, layer.window - 1)
    window = None if layer.window is None else _number(layer.window, torch.int64)
    eps = _number(0.0 if layer.q_norm is None else layer.q_norm.eps, x.dtype)
    given = [None if t is None else t.contiguous() for t in (*own, *state[2:5], window, *learned)]
    given += [eps, _frequencies(layer.head_dim // 2, layer.rope_theta, x.dtype)]
    made = [torch.empty_like(t) for t in given[:2]]
    made += [t.new_empty(t.shape[0], keep, *t.shape[2:]) for t in given[2:6]] + [torch.empty_like(state.tokens)]
    sizes = (
        layer.dim, layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.conv_size, gate is not None,
        columns, keep,
    )  # fmt: skip
    compiled.run("attention_step", x.dtype, sizes, (given, made), x.shape[0])
    y, convolution, keys, values, valid, positions, tokens = made
    return y, type(state)(keys, values, valid, positions, tokens, convolution)


def sizes_of(config: TitansConfig) -> tuple[int, ...] | None:
    """`MemoryStep` of the library; None for memories that are deep or that project."""
    if config.architecture != "linear" or config.adaptive or config.self_targets:
        return None
    seen = sum((name in config.convolved) << i for i, name in enumerate(_PARTS))
    return (
        config.dim, config.num_heads, config.head_width, config.conv_size, config.qkv_conv, seen, config.output_gate,
        config.momentum, config.erase_gate, _RATES.index(config.rate), _DECAYS.index(config.decay),
        _READS.index(config.read), config.objective == "l2", config.dgd, config.gated_erase, config.step != "plain",
        config.rate == "gate", config.tied_write, config.normalize_values,
    )  # fmt: skip


def _plain(linear: Iterable[nn.Module], mask: Tensor | None, tensors: Iterable[Tensor | None]) -> bool:
    """Whether modules and tensors are as the layer made them, of one type that the library takes, without padding."""
    if any(type(m) is not nn.Linear or m._forward_hooks or m._forward_pre_hooks for m in linear):
        return False
    given = [t for t in tensors if t is not None]
    if any(type(t) is not Tensor and type(t) is not nn.Parameter for t in given):
        return False
    return compiled.is_available(*given) and (mask is None or bool(mask.all()))


def _of(batch: int, carried: Iterable[Tensor | None]) -> bool:
    """Whether a state's tensors are of so many sequences, on the CPU: the library goes by addresses."""
    return all(t is None or (t.shape[0] == batch and t.device.type == "cpu") for t in carried)


@cache
def _number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([value], dtype=dtype, device="cpu")


@cache
def _frequencies(half: int, theta: float, dtype: torch.dtype) -> Tensor:
    return frequencies(half, theta, dtype, torch.device("cpu"))
