"""Fast forms against their definitions. Where one fails, no figure is worth printing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestling.layers.mixers import MIXERS, build_mixer
from nestling.layers.titans_reference import self_modifying_titans_reference
from nestling.ops import delta_rule, delta_rule_reference
from nestling.ops.orthogonalize import orthogonalize, orthogonalize_reference
from nestling.optim import M3

SHAPES = ((256, 320), (8, 24), (24, 8), (8, 8))
TOLERANCE = 1e-8  # float64, relative to the largest value


def check(device: str = "cpu") -> list[str]:
    """Run every check in float64; what failed, in words. An empty list is a green light."""
    failures = []
    for name, run in comparisons(device).items():
        try:
            error = run()
        except Exception as problem:  # a check that cannot run has failed
            failures.append(f"{name}: {type(problem).__name__}: {problem}")
            continue
        if not error <= TOLERANCE:  # NaN fails too
            failures.append(f"{name}: off by {error:.1e}, allowed {TOLERANCE:.0e}")
    return failures


def comparisons(device: str = "cpu") -> dict[str, Callable[[], float]]:
    """Every check by its name; called, it gives the largest difference, relative to the largest value or to 1."""
    checks: dict[str, Callable[[], float]] = {}
    for read in ("before", "after"):
        for momentum in (True, False):
            name = f"chunk form of the delta rule, read {read}, {'with' if momentum else 'without'} momentum"
            checks[name] = lambda r=read, m=momentum: _operator(r, m, device)
    for name in MIXERS:
        checks[f"{name}: a sequence cut in pieces is one pass"] = lambda n=name: _pieces(n, (1, 30, 64), device)
    checks |= {f"{form} form of Newton-Schulz": lambda f=form: _newton_schulz(f, device) for form in ("plain", "gram")}
    checks["M3's batched step"] = lambda: _m3(device)
    checks["selfmod: token by token is one pass"] = lambda: _pieces("selfmod", range(70), device)
    return checks


@torch.no_grad()
def _distance(got: list[Tensor | None], want: list[Tensor | None]) -> float:
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            worst = max([worst, *(float(t.abs().max()) for t in (a, b) if t is not None)])
            continue
        gap = float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
        worst = gap if gap != gap else max(worst, gap)
    return worst


def _gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum() for y in outputs)
    return list(torch.autograd.grad(loss, inputs, allow_unused=True))


def _operator(read: str, momentum: bool, device: str) -> float:
    """Values, final state and every gradient against the token loop, at a length that is no multiple of the chunk."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int, unit: bool = False) -> Tensor:
        x = (torch.rand if unit else torch.randn)(*shape, generator=g, dtype=torch.float64)
        return x.to(device).requires_grad_()

    tokens = 37
    args = {"weight": random(2, 5, 4), "keys": random(2, tokens, 4), "writes": random(2, tokens, 5)}
    with torch.no_grad():
        args["keys"].div_(args["keys"].norm(dim=-1, keepdim=True))
    args |= {name: random(2, tokens, unit=True) for name in ("decay", "erase")} | {"queries": random(2, tokens, 4)}
    if momentum:
        args |= {"momentum": random(2, tokens, unit=True), "velocity": random(2, 5, 4)}
    results = []
    for form in (delta_rule_reference, lambda **a: delta_rule(**a, chunk_size=16)):
        outputs = [y for y in form(**args, read=read) if y is not None]
        results.append([*outputs, *_gradients(outputs, list(args.values()))])
    return _distance(results[1], results[0])


def definition(dtype: torch.dtype, device: str = "cpu", width: int = 8, tokens: int = 71) -> float:
    """Outputs and parameter gradients of self-modifying Titans against their token loop in float64."""
    torch.manual_seed(0)
    layer = build_mixer("selfmod", width, 2).double()
    x = torch.randn(1, tokens, width, dtype=torch.float64)
    want = self_modifying_titans_reference(layer, x)
    wanted = _gradients([want], list(layer.parameters()))
    layer = layer.to(device, dtype)
    got, _ = layer(x.to(device, dtype))
    found = [got, *_gradients([got], list(layer.parameters()))]
    return _distance([None if t is None else t.double().cpu() for t in found], [want, *wanted])


def _newton_schulz(form: str, device: str) -> float:
    """Wide, tall and square matrices, with symmetric products in row blocks where they are large enough."""
    g = torch.Generator().manual_seed(0)
    matrices = [torch.randn(2, *shape, generator=g, dtype=torch.float64).to(device) for shape in SHAPES]
    got = [orthogonalize(x, form=form, dtype=torch.float64) for x in matrices]
    return _distance(got, [orthogonalize_reference(x) for x in matrices])


def _m3(device: str) -> float:
    """Weights after two slow periods, batched against one by one."""
    results = []
    for foreach in (True, False):
        g = torch.Generator().manual_seed(0)
        weights = [torch.randn(s, generator=g, dtype=torch.float64).to(device) for s in SHAPES[1:] * 2]
        optimizer = M3(weights, lr=0.01, periods=(1, 3), weight_decay=0.1, foreach=foreach, ns_dtype=torch.float64)
        for _ in range(6):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=g, dtype=torch.float64).to(device)
            optimizer.step()
        results.append(weights)
    return _distance(*results)


def _pieces(name: str, cuts, device: str) -> float:
    """Outputs and parameter gradients of one pass against a carried state."""
    torch.manual_seed(0)
    layer = build_mixer(name, 8, 2).double().to(device)
    x = torch.randn(2, 71, 8, dtype=torch.float64).to(device)
    whole, _ = layer(x)
    outputs, state, start = [], None, 0
    for stop in [*(c for c in cuts if c), x.shape[1]]:
        y, state = layer(x[:, start:stop], state)
        outputs.append(y)
        start = stop
    split, parameters = torch.cat(outputs, 1), list(layer.parameters())
    return _distance([split, *_gradients([split], parameters)], [whole, *_gradients([whole], parameters)])
