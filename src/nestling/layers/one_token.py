"""One token through a sequence layer as one call of the C++ library: what decoding takes on a CPU.

The layers' own forward passes in PyTorch are the definitions, and what all other calls take: with gradients, of several
tokens, with padding, under autocast or a compiler, on other devices, or of a layer whose parts were replaced or hooked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from nestling.layers.convolution import ShortConvolution
from nestling.layers.rotary import frequencies
from nestling.layers.titans_config import PATHS, TitansConfig
from nestling.layers.titans_groups import MemoryGroup, groups_of
from nestling.layers.titans_scan import closed, swap
from nestling.layers.titans_state import TitansState
from nestling.memory.architectures import LinearMemory
from nestling.memory.rule import FastWeights
from nestling.ops import compiled
from nestling.utils.transforms import is_transformed

if TYPE_CHECKING:
    from nestling.layers.attention import Attention, AttentionState
    from nestling.layers.titans import SelfModifyingTitans

# as the library counts them (ops/compiled/memory_step.h)
_PARTS = ("x", "q", "k", "v", "gate", "eta", "alpha", "mu", "erase")
_ROLES = (*PATHS, "eta", "alpha", "memory")
_RATES, _DECAYS, _READS = ("one", "learned", "gate"), ("none", "learned", "fixed"), ("before", "after", "chunk")
_STEPS = ("plain", "layer", "joint")
_GROUPS, _LAYERS = 3, 2
_TABLE = 3 * _GROUPS * _LAYERS  # of a state: weights at the chunk's start, now, and velocities

_KINDS: dict[str, type[nn.Module]] = {
    "q_proj": nn.Linear, "k_proj": nn.Linear, "v_proj": nn.Linear, "gate_proj": nn.Linear, "out_proj": nn.Linear,
    "conv": ShortConvolution, "q_norm": nn.RMSNorm, "k_norm": nn.RMSNorm,
}  # fmt: skip


def may_step(x: Tensor) -> bool:
    """Whether a call on x is one of one token, without gradients, on a CPU."""
    if x.dim() != 3 or x.shape[1] != 1 or torch.is_grad_enabled() or is_transformed():
        return False
    return x.is_cpu and not torch.is_autocast_enabled("cpu")


class MemoryPlan(NamedTuple):
    """What the steps of a layer of memories have in common."""

    sizes: tuple[int, ...]  # `MemoryStep` of the library
    groups: tuple[MemoryGroup, ...]
    numbers: tuple[str | None, ...]  # the layer's parameters by name, in the library's order; None: it has none
    paths: tuple[str, ...]  # with a convolution of their own
    anchored: bool
    shapes: tuple[tuple[int, ...], ...]  # of a state
    slots: tuple[tuple[int, bool], ...]  # where the library's table has each memory tensor of it, and which are starts


def memory_plan(config: TitansConfig) -> MemoryPlan:
    """The plan of a layer with these settings."""
    groups, rule = groups_of(config), config.rule
    there = (
        ("eta_bias", config.rate != "one"), ("alpha_bias", config.decay == "learned"), ("mu_bias", config.momentum),
        ("erase_bias", config.erase_gate), ("log_first_rate", config.first_rate is not None),
        ("log_projection_rate", config.projection_rate is not None),
    )  # fmt: skip
    numbers = tuple(name if given else None for name, given in there)
    sizes = [
        config.dim, config.num_heads, config.head_width, config.expansion * config.head_width, config.conv_size,
        config.qkv_conv, sum((name in config.convolved) << i for i, name in enumerate(_PARTS)), config.output_gate,
        config.momentum, config.erase_gate, _RATES.index(config.rate), _DECAYS.index(config.decay),
        _READS.index(config.read), rule.objective == "l2", rule.dgd, rule.gated_erase, _STEPS.index(rule.step),
        rule.relative, rule.tied_write, config.erasing, config.normalize_values, rule.self_targets,
        rule.erase_layer == "last",
    ]  # fmt: skip
    for i in range(_GROUPS):
        sizes += [0, 0, 0, 0] if i >= len(groups) else _sizes_of(groups[i])
    places = {name: (g, i) for g, group in enumerate(groups) for i, name in enumerate(group.names)}
    for role in _ROLES:
        sizes += places.get(role, (-1, 0))
    anchored = config.retain == "initial" and config.decay != "none"
    paths = PATHS if config.qkv_conv else ()
    slots = tuple(
        ((part * _GROUPS + g) * _LAYERS + layer, part == 0)
        for g, group in enumerate(groups)
        for part in range(3 if config.momentum else 2)
        for layer in range(len(group.architecture.shapes()))
    )
    return MemoryPlan(tuple(map(int, sizes)), groups, numbers, paths, anchored, _shapes_of(config), slots)


def _sizes_of(group: MemoryGroup) -> list[int]:
    memory = group.architecture
    deep = not isinstance(memory, LinearMemory)
    skip = 0 if isinstance(memory, LinearMemory) else 1 if memory.residual else 2 if memory.inner else 0
    return [len(group.names), 1 + deep, memory.outputs, skip]


def memory_step(
    layer: SelfModifyingTitans, x: Tensor, state: TitansState, mask: Tensor | None
) -> tuple[Tensor, TitansState] | None:
    """What `layer(x, state)` is for x [B, 1, D] that `may_step`, or None where the library cannot do it."""
    config, plan = layer.config, layer.one_token
    if x.shape[2] != config.dim or not isinstance(state, TitansState) or len(state.memories) != len(plan.groups):
        return None
    if (learned := _parameters_of(layer, plan)) is None:
        return None
    weights, anchors = learned
    if not _plain((*weights, *anchors), x.dtype, mask):
        return None
    if not _fits((state.conv, *state.paths, *_flat(state.memories)), x.shape[0], plan.shapes, x.dtype):
        return None
    if state.position.shape != x.shape[:1]:
        return None
    x = x.contiguous()
    carried = dict(zip(layer.path_order, state.paths))
    tails = [None if t is None else t.contiguous() for t in (state.conv, *map(carried.get, PATHS))]
    held = [w.contiguous() for w in _flat(state.memories)]
    table: list[Tensor | None] = [None] * _TABLE
    new_table = table.copy()
    for i, (slot, starts) in enumerate(plan.slots):
        table[slot] = held[i]
        if not starts:
            new_table[slot] = held[i] = torch.empty_like(held[i])
    reach = _number(config.erase_range, x.dtype)
    y, *made = [None if t is None else torch.empty_like(t) for t in (x, *tails)]
    given = (x, *tails, *table, *weights, reach, *anchors)
    outputs = (y, *made, *new_table[_GROUPS * _LAYERS :])
    compiled.run("memory_step", x.dtype, plan.sizes, (given, outputs), x.shape[0])
    news, seen, at = [], state.position.tolist(), 0
    for fast, group in zip(state.memories, plan.groups):
        parts = []
        for part in fast:
            parts.append(tuple(held[at : at + len(part)]))
            at += len(part)
        new = FastWeights(*parts)
        closes = [(n + 1) % group.chunk_size == 0 for n in seen]
        if any(closes):
            (new,) = swap((closed(config, swap((new,))[0], all(closes) or torch.tensor(closes)),))
        news.append(new)
    conv, *paths = made
    if plan.paths:
        kept = dict(zip(PATHS, paths))
        paths = [kept[name] for name in layer.path_order]
    return y, TitansState(state.position + 1, conv, tuple(news), tuple(paths) if plan.paths else ())


def _parameters_of(
    layer: SelfModifyingTitans, plan: MemoryPlan
) -> tuple[list[Tensor | None], list[Tensor | None]] | None:
    """Matrices and numbers in the library's order, and what the weights decay towards; None where one was replaced.

    Read from the modules' own tables: looked up as attributes they take as long as the step.
    """
    own, modules = layer._parameters, layer._modules
    projections = modules["in_proj"], modules["out_proj"]
    if any(type(m) is not nn.Linear or m._forward_hooks or m._forward_pre_hooks for m in projections):
        return None
    try:
        convs = modules["path_convs"]._parameters
        taps = [convs[name] for name in PATHS] if plan.paths else [None] * 3
        numbers = [None if name is None else own[name] for name in plan.numbers]
        conv = own["conv_weight"] if layer.config.conv_size else None
        norm = own["norm_weight"]
        matrices = [m._parameters["weight"] for m in projections]
    except KeyError:  # a parametrization has taken it
        return None
    initial = modules["initial"]._modules.values() if plan.anchored else ()
    anchors = _table(tuple(group._parameters.values()) for group in initial)
    return [*matrices, norm, conv, *taps, *numbers], anchors


def _flat(memories: tuple[FastWeights, ...]) -> list[Tensor]:
    return [w for fast in memories for part in fast for w in part]


def _table(groups: Iterable[tuple[Tensor, ...]]) -> list[Tensor | None]:
    """The layers' tensors of every group, as the library's table of so many groups and layers."""
    table: list[Tensor | None] = [None] * (_GROUPS * _LAYERS)
    for i, weights in enumerate(groups):
        table[i * _LAYERS : i * _LAYERS + len(weights)] = weights
    return table


def _shapes_of(config: TitansConfig) -> tuple[tuple[int, ...], ...]:
    """Of one sequence's tensors in a state but its position, the memories' as `_flat` gives them."""
    inner = config.num_heads * config.head_width
    shapes: list[tuple[int, ...]] = [(max(config.conv_size - 1, 0), config.dim)]
    shapes += [(config.qkv_conv - 1, inner)] * (len(PATHS) if config.qkv_conv else 0)
    for group in groups_of(config):
        own = [(len(group.names), config.num_heads, *shape) for shape in group.architecture.shapes()]
        shapes += own * (3 if config.momentum else 2)
    return tuple(shapes)


def _fits(tensors: Sequence[Tensor], batch: int, shapes: Sequence[tuple[int, ...]], kind: torch.dtype) -> bool:
    """Whether a state's tensors are of these shapes, of the call's type, on the CPU: the library goes by addresses."""
    if len(tensors) != len(shapes):
        return False
    for t, shape in zip(tensors, shapes):
        if type(t) is not Tensor or t.shape != (batch, *shape) or t.dtype != kind or not t.is_cpu:
            return False
    return True


def attention_step(
    layer: Attention, x: Tensor, state: AttentionState, mask: Tensor | None
) -> tuple[Tensor, AttentionState] | None:
    """What `layer(x, state)` is for x [B, 1, D] that `may_step`, or None where the library cannot do it."""
    learned, batch, columns = _weights_of(layer), x.shape[0], state.keys.shape[1]
    if learned is None or not _plain(learned, x.dtype, mask):
        return None
    heads = columns, layer.num_kv_heads, layer.head_dim
    floating, whole = (state.convolution, state.keys, state.values), (state.positions, state.tokens)
    fits = _fits(floating, batch, ((max(layer.conv_size - 1, 0), layer.dim), heads, heads), x.dtype)
    fits = fits and _fits(whole, batch, ((columns,), ()), torch.int64)
    if not fits or not _fits((state.valid,), batch, ((columns,),), torch.bool):
        return None
    keep = columns + 1 if layer.window is None else min(columns + 1, layer.window - 1)
    window = None if layer.window is None else _number(layer.window, torch.int64)
    norm = layer._modules.get("q_norm")
    given = [*(t.contiguous() for t in (x, *floating, state.valid, *whole)), window, *learned]
    given += [_number(0.0 if norm is None else norm.eps, x.dtype)]
    given += [_frequencies(layer.head_dim // 2, layer.rope_theta, x.dtype)]
    made = [torch.empty_like(t) for t in given[:2]]
    made += [t.new_empty(batch, keep, *t.shape[2:]) for t in given[2:6]] + [torch.empty_like(state.tokens)]
    sizes = (
        layer.dim, layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.conv_size, learned[3] is not None,
        columns, keep,
    )  # fmt: skip
    compiled.run("attention_step", x.dtype, sizes, (given, made), batch)
    y, convolution, keys, values, valid, positions, tokens = made
    return y, type(state)(keys, values, valid, positions, tokens, convolution)


def _weights_of(layer: Attention) -> list[Tensor | None] | None:
    """Matrices, taps and norms in the library's order; None where one was replaced."""
    modules, found = layer._modules, []
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj", "conv", "q_norm", "k_norm"):
        module = modules.get(name)
        if module is None:
            found.append(None)
            continue
        if type(module) is not _KINDS[name] or module._forward_hooks or module._forward_pre_hooks:
            return None
        found.append(module._parameters["weight"])
    return found


def _plain(learned: Iterable[Tensor | None], kind: torch.dtype, mask: Tensor | None) -> bool:
    """Whether parameters are as a layer made them, of a type that the library takes, and no token is padding."""
    for t in learned:
        if t is None:
            continue
        if type(t) is not nn.Parameter and type(t) is not Tensor:
            return False
        if t.dtype != kind or not t.is_cpu or not t.is_contiguous():
            return False
    return compiled.takes(kind) and (mask is None or bool(mask.all()))


@cache
def _number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([value], dtype=dtype, device="cpu")


@cache
def _frequencies(half: int, theta: float, dtype: torch.dtype) -> Tensor:
    return frequencies(half, theta, dtype, torch.device("cpu"))
