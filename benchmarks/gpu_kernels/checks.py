"""The kernels against float64: a step of a memory, and a whole layer."""

from __future__ import annotations

import contextlib

import torch

from benchmarks.gpu_kernels.inputs import DEVICE, WIDTH, by_kernels, error, loss_of, prepare, use
from nestling.layers.titans import SelfModifyingTitans
from nestling.memory.fused import by_rule
from nestling.memory.fused_linear import linear_by_rule
from nestling.ops import triton as kernels


def check(kind, tokens, precision, warps=None, sides=(WIDTH,)) -> dict:
    use(precision, warps)
    want_step = prepare(kind, tokens, torch.float64, "cpu", sides[0])
    reference = linear_by_rule if kind == "linear" else by_rule
    want = [o for o in reference(want_step, False) if o is not None]
    loss_of(want).backward()
    step = prepare(kind, tokens, torch.float32, DEVICE, sides[0])
    got = [o for o in by_kernels(kind)(step, False) if o is not None]
    found = {f"output {i}": error(g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))}
    loss_of(got).backward()
    for name, a, b in zip(step._fields, step, want_step, strict=True):
        if a is not None:
            triangle = name in ("decay", "mixed", "momentum")
            found[name] = error(a.grad.tril() if triangle else a.grad, b.grad.tril() if triangle else b.grad)
    return dict(worst=max(found.values()), errors=found)


def layers_agree(chunk=64, tokens=300) -> dict:
    """A whole layer in float32 by the kernels and by PyTorch, against float64 by PyTorch on this GPU."""
    use("tf32x3", None)
    made = {}
    for name, dtype, on in (
        ("float64", torch.float64, False),
        ("plain", torch.float32, False),
        ("kernels", torch.float32, True),
    ):
        torch.manual_seed(0)
        layer = SelfModifyingTitans(4 * WIDTH, 4, chunk_size=chunk).cuda().to(dtype)
        x = torch.randn(2, tokens, 4 * WIDTH).cuda().to(dtype).requires_grad_()
        with contextlib.nullcontext() if on else kernels.disabled():
            y, _ = layer(x)
            made[name] = [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]
    return {
        name: max(error(g, w.cpu()) for g, w in zip(made[name], made["float64"], strict=True))
        for name in ("plain", "kernels")
    }
