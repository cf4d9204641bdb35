"""Sequence layers and operators on the device against float64 on the CPU: values and every gradient."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.clock import autocast, device, set_tf32
from benchmarks.gpu.compare import check, distance, verdict, weigh
from benchmarks.gpu.record import Record
from nestling.layers import MIXERS, build_mixer
from nestling.ops import delta_rule, delta_rule_reference, orthogonalize

DIM, HEADS, BATCH, TOKENS, CHUNK = 64, 2, 2, 67, 16
SHAPES = ((256, 320), (96, 32), (32, 96), (64, 64))
VARIANTS = {
    "memory_chunk_size 16 in chunks of 64": dict(chunk_size=64, memory_chunk_size=16),
    "chunk 128": dict(chunk_size=128),
    "pieces of 32 tokens recomputed": dict(chunk_size=16, segment_size=32),
    "gates as MLPs": dict(chunk_size=16, gates="mlp"),
    "all adaptive, expansion 2": dict(chunk_size=16, adaptive=("k", "v", "q", "eta", "alpha"), expansion=2),
    "first order": dict(chunk_size=16, meta_grad="first_order"),
    "read after": dict(chunk_size=16, read="after"),
}


def run(record: Record, options: dict[str, Any]) -> None:
    set_tf32("float32")
    for precision in ("float32", "bf16"):
        for name in MIXERS:
            chunks = {} if "attention" in name and name != "linear_attention" else dict(chunk_size=CHUNK)
            check(record, f"{name}, {precision}", partial(layer, name, precision, **chunks))
    for read in ("before", "after"):
        for momentum in (True, False):
            for precision in ("float32", "bf16"):
                what = f"delta rule, read {read}, {'with' if momentum else 'no'} momentum, {precision}"
                check(record, what, partial(operator, read, momentum, precision))
    for what, changes in VARIANTS.items():
        check(record, f"selfmod, {what}, float32", partial(layer, "selfmod", "float32", **changes))
    check(record, "selfmod, tf32", partial(layer, "selfmod", "tf32", chunk_size=CHUNK))
    check(record, "gated_deltanet, tf32", partial(layer, "gated_deltanet", "tf32", chunk_size=CHUNK))
    for name in ("selfmod", "gated_deltanet", "attention"):
        check(record, f"{name}, state carried over cuts", partial(cuts, name))
        check(record, f"{name}, padding of both sides", partial(padding, name))
    check(record, "orthogonalize, float32", partial(orthogonal, torch.float32, "float32"))
    check(record, "orthogonalize, the device's own type", partial(orthogonal, None, "bf16"))


def _layer(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_mixer(name, DIM, HEADS, **options)


def _results(module: nn.Module, x: Tensor, precision: str) -> tuple[dict, dict]:
    """The output, and gradients of the input and all weights, on x's device."""
    x = x.detach().requires_grad_()
    context = autocast(precision) if x.device.type == device() and x.dtype == torch.float32 else autocast("float32")
    with context:
        y, _ = module(x)
    weigh(y.to(x.dtype)).backward()
    return {"y": y}, {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def layer(name: str, precision: str, **options: Any) -> dict[str, Any]:
    reference = _layer(name, **options)
    module, x = copy.deepcopy(reference).to(device()), torch.randn(BATCH, TOKENS, DIM)
    want, want_gradients = _results(reference.double(), x.double(), "float32")
    set_tf32(precision)
    try:
        got, got_gradients = _results(module, x.to(device()), precision)
    finally:
        set_tf32("float32")
    return verdict(distance(got, want), distance(got_gradients, want_gradients, precision), precision)


def operator(read: str, momentum: bool, precision: str) -> dict[str, Any]:
    """`delta_rule` against the definition token by token, some decays exactly zero."""
    g, kind = torch.Generator().manual_seed(0), torch.float32 if precision == "float32" else torch.bfloat16
    random = partial(torch.randn, generator=g)
    args = {"weight": random(2, 3, 24, 16) / 4, "writes": random(2, 3, TOKENS, 24)}
    args |= {name: nn.functional.normalize(random(2, 3, TOKENS, 16), dim=-1) for name in ("keys", "queries")}
    args |= {name: torch.rand(2, 3, TOKENS, generator=g) for name in ("decay", "erase")}
    args["decay"][..., ::13] = 0
    if momentum:
        args |= {"momentum": torch.rand(2, 3, TOKENS, generator=g) * 0.9, "velocity": random(2, 3, 24, 16) / 4}
    args = {name: value.to(kind) for name, value in args.items()}  # both sides read the same rounded inputs

    def results(form, where: str, dtype: torch.dtype) -> tuple[dict, dict]:
        given = {name: value.to(where, dtype).requires_grad_() for name, value in args.items()}
        out = form(**given, read=read)
        parts = {name: t for name, t in out._asdict().items() if t is not None}
        sum(weigh(t.double()) for t in parts.values()).backward()
        return parts, {name: t.grad for name, t in given.items()}

    want, want_gradients = results(delta_rule_reference, "cpu", torch.float64)
    got, got_gradients = results(partial(delta_rule, chunk_size=CHUNK), device(), kind)
    return verdict(distance(got, want), distance(got_gradients, want_gradients, precision), precision)


def cuts(name: str) -> dict[str, Any]:
    """A sequence read in pieces with its state is the sequence read at once."""
    module, x = _layer(name).to(device()), torch.randn(BATCH, 150, DIM).to(device())
    with torch.no_grad():
        whole, _ = module(x)
        state, parts, begin = None, [], 0
        for stop in (1, 40, 64, 65, 150):
            y, state = module(x[:, begin:stop], state)
            parts.append(y)
            begin = stop
    return verdict(distance({"y": torch.cat(parts, 1)}, {"y": whole}), None, "float32")


def padding(name: str) -> dict[str, Any]:
    """Rows padded on the left or on the right are the rows alone."""
    module, x = _layer(name).to(device()), torch.randn(3, 80, DIM).to(device())
    mask = torch.ones(3, 80, dtype=torch.bool, device=x.device)
    mask[0, :23], mask[1, 60:] = False, False
    got, want = {}, {}
    with torch.no_grad():
        y, _ = module(x, None, mask)
        for row in range(3):
            got[f"row {row}"] = y[row, mask[row]]
            want[f"row {row}"] = module(x[row : row + 1, mask[row]])[0][0]
    return verdict(distance(got, want), None, "float32")


def orthogonal(kind: torch.dtype | None, precision: str) -> dict[str, Any]:
    """Well-conditioned matrices: rounding shows most where a matrix is nearly singular, whatever the device."""
    got, want, spread = {}, {}, []
    for shape in SHAPES:
        torch.manual_seed(0)
        u, _, v = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
        x = (u * torch.linspace(0.2, 1, min(shape), dtype=torch.float64)) @ v
        want[str(shape)] = orthogonalize(x, dtype=torch.float64, form="plain")
        got[str(shape)] = orthogonalize(x.float().to(device()), dtype=kind)
        spread.append(torch.linalg.svdvals(got[str(shape)].double().cpu()))
    values = torch.cat([s.flatten() for s in spread])
    row = verdict(distance(got, want), None, precision)
    return row | {"singular values": [float(values.min()), float(values.max())]}
