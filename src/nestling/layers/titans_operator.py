"""The memories of a layer over one call as an operator of torch, `nestling::titans_scan` (decision D23).

`titans_scan.MemoryScan` is what it does. Python decides where chunks open and close, from the positions of sequences: a
compiler that traced this would see thousands of nodes, and another program at every position. So torch.compile and
torch.export see one operator for each layer and call, above the forms in PyTorch, C++ and Triton. The shapes of a state
do not depend on data: an open chunk is its weights at its start and now.

Between forward and backward an operator can keep only tensors. It keeps what it was given, and the backward pass does
the forward again: the memory of activation checkpointing, for one more forward. Eager calls do not come here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from nestling.layers.titans_config import TitansConfig
from nestling.layers.titans_groups import Numbers, feature_names, groups_of, number_names
from nestling.layers.titans_scan import Memories, MemoryScan
from nestling.memory.rule import Anchor, FastWeights
from nestling.ops.chunk import differentiate

_GIVEN = (
    "Tensor position, Tensor? lengths, Tensor[] features, Tensor[] numbers, Tensor[] memories, Tensor[] anchors, "
    "str config"
)
_AUTOGRAD = (DispatchKey.AutogradFunctionality, DispatchKey.AutogradOther, DispatchKey.ADInplaceOrView)


def scan(
    config: TitansConfig,
    key: str,
    numbers: Numbers,
    anchors: Sequence[Anchor],
    features: dict[str, Tensor],
    memories: Memories,
    position: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Memories]:
    """`MemoryScan.run` as one operator.

    Args:
        key: `key_of` the configuration, made before: a compiler does not trace JSON.
        position, lengths: tokens that each sequence has seen, and has here, from the front: [B]; None is all.
    """
    named = [features[name] for name in feature_names(config)]
    given = [n for n in numbers if n is not None], _flat(memories), [w for anchor in anchors for w in anchor]
    lists = [named, *given]
    if torch.compiler.is_compiling():
        y, new = _scan(position, lengths, *lists, key)
    else:  # torch.func, which passes the operator's own derivative by
        y, *new = _Transformed.apply(key, [len(part) for part in lists], position, lengths, *chain(*lists))
    rest = iter(new)
    return y, tuple(FastWeights(*(tuple(next(rest) for _ in part) for part in fast)) for fast in memories)


def key_of(config: TitansConfig) -> str:
    """A configuration as an operator's argument: JSON, which an exported program can keep."""
    return json.dumps(asdict(config))


@cache
def _configuration(key: str) -> TitansConfig:
    return TitansConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(key).items()})


def _flat(memories: Memories) -> list[Tensor]:
    return [w for fast in memories for part in fast for w in part]


def _grouped(config: TitansConfig, tensors: Sequence[Tensor]) -> Memories:
    rest, found = iter(tensors), []
    for count in [len(group.architecture.shapes()) for group in groups_of(config)]:
        start, now, velocity = (tuple(islice(rest, n)) for n in (count, count, count * config.momentum))
        found.append(FastWeights(start, now, velocity))
    return tuple(found)


def _run(position: Tensor, lengths: Tensor | None, lists: Sequence, key: str) -> tuple[Tensor, list[Tensor]]:
    """The operator's definition: reads [B, H, T, p] and the memories."""
    features, numbers, memories, anchors = lists
    config = _configuration(key)
    named = dict(zip(feature_names(config), features, strict=True))
    own = dict.fromkeys(Numbers._fields) | dict(zip(number_names(config), numbers, strict=True))
    rest, count = iter(anchors), [len(group.architecture.shapes()) if anchors else 0 for group in groups_of(config)]
    whole = MemoryScan(config, Numbers(**own), [tuple(islice(rest, n)) for n in count])
    tokens = [features[0].shape[2]] * len(position) if lengths is None else lengths.tolist()
    with torch.autocast(features[0].device.type, enabled=False):
        y, new = whole.run(named, _grouped(config, memories), position.tolist(), tokens)
    return y, _flat(new)


@torch.library.custom_op("nestling::titans_scan", mutates_args=(), schema=f"({_GIVEN}) -> (Tensor, Tensor[])")
def _scan(position, lengths, *args):
    lists, key = args[:-1], args[-1]
    y, new = _run(position, lengths, lists, key)
    y, *new = _apart([y, *new], chain(*lists))
    return y, new


@_scan.register_fake
def _(position, lengths, features, numbers, memories, anchors, key):
    names = feature_names(_configuration(key))
    return _place(features[names.index("q" if "q" in names else "x")]), [_place(w) for w in memories]


@torch.library.custom_op(
    "nestling::titans_scan_backward",
    mutates_args=(),
    schema=f"({_GIVEN}, Tensor?[] grads, bool[] needed) -> Tensor[]",
)
def _backward(position, lengths, *args):
    """Gradients of those of the given tensors that are `needed`, from those of the results, None for zeros."""
    *lists, key, grads, needed = args
    given = list(chain(*lists))
    with _recorded():
        leaves = [t.detach().requires_grad_(n) for t, n in zip(given, needed, strict=True)]
        y, new = _run(position, lengths, _split(leaves, [len(part) for part in lists]), key)
        pairs = [(o, g) for o, g in zip((y, *new), grads, strict=True) if g is not None and o.requires_grad]
        wanted, found = [t for t in leaves if t.requires_grad], [None] * sum(needed)
        if pairs:  # else all are of states that meta_grad="none" has cut off
            found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]
    return _apart(found, [*given, *(g for g in grads if g is not None)])


@_backward.register_fake
def _(position, lengths, *args):
    *lists, _, _, needed = args
    return [_place(t) for t, n in zip(chain(*lists), needed, strict=True) if n]


def _setup(ctx, inputs, output):
    position, lengths, *lists, ctx.key = inputs
    ctx.counts = [len(part) for part in lists]
    ctx.save_for_backward(position, lengths, *chain(*lists))
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_y, g_memories):
    position, lengths, *given = ctx.saved_tensors
    lists, needed = _split(given, ctx.counts), list(chain(*ctx.needs_input_grad[2:-1]))
    grads = [g_y, *g_memories]
    if torch.is_grad_enabled():  # a second derivative is wanted

        def definition(*leaves):
            y, new = _run(position, lengths, _split(leaves, ctx.counts), ctx.key)
            return [o if o.requires_grad else None for o in (y, *new)]

        found = differentiate(definition, given, grads, needed)
    else:
        rest = iter(_backward(position, lengths, *lists, ctx.key, grads, needed))
        found = [next(rest) if n else None for n in needed]
    return None, None, *_split(found, ctx.counts), None


_scan.register_autograd(_autograd, setup_context=_setup)


class _Transformed(torch.autograd.Function):
    """The operator as the transforms of torch.func know it: first derivatives, and vmap sample by sample."""

    generate_vmap_rule = True  # of the operators below

    @staticmethod
    def forward(key, counts, position, lengths, *given):
        y, new = _scan(position, lengths, *_split(given, counts), key)
        return y, *new

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.key, ctx.counts, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[4:]
        rest = iter(_Gradients.apply(ctx.key, ctx.counts, needed, *ctx.saved_tensors, *grads))
        return None, None, None, None, *(next(rest) if n else None for n in needed)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(
            "forward-mode derivatives (torch.func.jvp, jacfwd, hessian) of memories that learn are not available: use "
            "reverse mode (torch.func.grad, vjp, jacrev)"
        )


class _Gradients(torch.autograd.Function):
    """The first derivative, which has none of its own here."""

    generate_vmap_rule = True

    @staticmethod
    def forward(key, counts, needed, position, lengths, *tensors):
        count = sum(counts)
        return tuple(
            _backward(position, lengths, *_split(tensors[:count], counts), key, list(tensors[count:]), list(needed))
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "second derivatives of memories that learn are not available inside torch.func: take them outside it, by "
            "torch.autograd.grad(..., create_graph=True)"
        )

    jvp = _Transformed.jvp


def _one_by_one(operator: Any) -> None:
    """vmap of an operator: one call for each sample, for what is mapped may be weights as well as inputs."""

    def rule(info, in_dims, *args):
        values, spec = tree_flatten(args)
        dims = tree_flatten(in_dims, is_leaf=lambda x: x is None)[0]
        results = []
        for i in range(info.batch_size):
            chosen = [v if d is None else v.select(d, i) for v, d in zip(values, dims, strict=True)]
            results.append(operator(*tree_unflatten(chosen, spec)))
        stacked = tree_map(lambda *found: torch.stack(found), *results)
        return stacked, tree_map(lambda _: 0, stacked)

    operator.register_vmap(rule)


_one_by_one(_scan)
_one_by_one(_backward)


def _split(tensors: Sequence, counts: Sequence[int]) -> list[list]:
    """Lists of these lengths."""
    rest = iter(tensors)
    return [list(islice(rest, count)) for count in counts]


def _place(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _apart(tensors: Iterable[Tensor], given: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, contiguous, none in the memory of another one: a compiler may write into any."""
    taken, found = {t.untyped_storage().data_ptr() for t in given}, []
    for t in tensors:
        t = t.contiguous()
        if t.untyped_storage().data_ptr() in taken:
            t = t.clone()
        taken.add(t.untyped_storage().data_ptr())
        found.append(t)
    return found


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd on: an operator's own code runs below it."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for dispatched in _AUTOGRAD:
        exclude = exclude.remove(dispatched)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield
