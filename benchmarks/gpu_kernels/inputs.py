"""The steps that the kernels are tried on: their arguments, their settings, how far a result is off."""

from __future__ import annotations

import torch

from nestling.memory.fused import MLPStep
from nestling.ops.chunk import decay_table
from nestling.ops.compiled.linear import LinearStep

HEADS, STACK, WIDTH = 64, 3, 64  # 4 sequences of 16 heads; memories of k, v and the main one
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tables(groups, tokens):
    kind = dict(dtype=torch.float64)
    return decay_table(torch.rand(groups, tokens, **kind) * 0.1 + 0.9, torch.rand(groups, tokens, **kind) * 0.9)


def mlp_arguments(tokens, n=STACK, groups=HEADS, p=WIDTH):
    torch.manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    def unit(*shape):
        return torch.nn.functional.normalize(rand(*shape), dim=-1)

    total, row = n * groups, (groups, tokens, p)
    return MLPStep(
        w2=rand(total, p, p) * p**-0.5 * 3, w1=rand(total, p, p) * p**-0.5, s2=rand(total, p, p) * 0.01,
        s1=rand(total, p, p) * 0.01, keys=unit(*row), values=unit(*row), queries=unit(*row),
        eta=torch.rand(groups, tokens, dtype=torch.float64), mu=torch.rand(groups, tokens, dtype=torch.float64),
        **tables(groups, tokens)._asdict(), anchor2=rand(total, p, p) * 0.1, anchor1=rand(total, p, p) * 0.1,
    )  # fmt: skip


def gate_arguments(tokens, n=2, groups=HEADS, outs=1, ins=WIDTH):
    torch.manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    keys, values = (torch.nn.functional.normalize(rand(groups, tokens, ins), dim=-1) for _ in range(2))
    total = n * groups
    return LinearStep(
        weight=rand(total, outs, ins), velocity=rand(total, outs, ins), keys=keys, values=values, queries=None,
        eta=torch.rand(groups, tokens, dtype=torch.float64), mu=torch.rand(groups, tokens, dtype=torch.float64),
        **tables(groups, tokens)._asdict(), anchor=rand(total, outs, ins),
    )  # fmt: skip


def by_kernels(kind):
    from nestling.memory.fused_kernels import linear_step, mlp_step, mlp_whole_step

    return {"mlp": mlp_step, "whole": mlp_whole_step, "linear": linear_step}[kind]


def prepare(kind, tokens, dtype, device, p=WIDTH):
    made = gate_arguments(tokens) if kind == "linear" else mlp_arguments(tokens, p=p)
    return type(made)(*(None if t is None else t.to(device, dtype).requires_grad_() for t in made))


def loss_of(outputs):
    return sum(
        (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view_as(o)).sum()
        for o in outputs
        if o is not None
    )


def use(precision, warps):
    from nestling.ops.triton import launch

    torch.set_float32_matmul_precision("highest" if precision == "tf32x3" else "high")
    launch.WARPS = warps


def error(got, want):
    return ((got.double().cpu() - want).norm() / want.norm().clamp_min(1e-12)).item()
