"""The memories of a self-modifying Titans layer, and what they say of a chunk's tokens: projections and gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.layers.titans_config import PATHS, TitansConfig
from nestling.memory.architectures import LinearMemory, MLPMemory
from nestling.memory.project import project
from nestling.memory.rule import FastWeights
from nestling.ops.unit import unit


class MemoryGroup(NamedTuple):
    """Memories of one shape and one chunk size, updated as one stack."""

    names: tuple[str, ...]
    architecture: LinearMemory | MLPMemory
    chunk_size: int


class Gates(NamedTuple):
    """Learning rate, decay, momentum and the main memory's erase of every token, [B, H, C]."""

    eta: Tensor
    alpha: Tensor
    mu: Tensor | None
    erase: Tensor | None = None


class Numbers(NamedTuple):
    """The layer's learned numbers, one a head, [H]: biases of the gates, and logarithms of factors on rates."""

    eta: Tensor | None
    alpha: Tensor | None
    mu: Tensor | None
    erase: Tensor | None
    log_first_rate: Tensor | None
    log_projection_rate: Tensor | None


@cache
def groups_of(config: TitansConfig) -> tuple[MemoryGroup, ...]:
    """The memories, those of one shape and chunk size together; the main memory last of its group: it is read."""
    p, hidden = config.head_width, config.expansion * config.head_width
    full = MLPMemory(p, p, hidden) if config.architecture == "mlp" else LinearMemory(p, p)
    main = MLPMemory(p, p, hidden, residual=False, inner=True) if config.skip == "inner" else full
    gate = MLPMemory(p, 1, hidden, residual=False) if config.gates == "mlp" else LinearMemory(p, 1)
    projections = tuple(name for name in ("k", "v", "q") if name in config.adaptive)
    gates = tuple(name for name in ("eta", "alpha") if name in config.adaptive)
    groups = []
    alone = config.main_chunk_size != config.chunk_size or main != full
    apart = config.erase_gate or config.first_rate is not None or config.projection_rate is not None
    if projections and (alone or apart):
        groups.append(MemoryGroup(projections, full, config.chunk_size))
        projections = ()
    groups.append(MemoryGroup((*projections, "memory"), main, config.main_chunk_size))
    if gates:
        groups.append(MemoryGroup(gates, gate, config.chunk_size))
    return tuple(groups)


def feature_names(config: TitansConfig) -> list[str]:
    """What the memories take of the static projections: all but the output's gate."""
    paths = (f"x_{name}" for name in PATHS if config.qkv_conv and name in config.adaptive)
    return [name for name in (*config.widths(), *paths) if name != "gate"]


def number_names(config: TitansConfig) -> list[str]:
    """Which of `Numbers` there are."""
    there = dict(
        eta=config.rate != "one", alpha=config.decay == "learned", mu=config.momentum, erase=config.erase_gate,
        log_first_rate=config.first_rate is not None, log_projection_rate=config.projection_rate is not None,
    )  # fmt: skip
    return [name for name, given in there.items() if given]


def projected(config: TitansConfig, part: Mapping[str, Tensor], memories: Sequence[FastWeights]) -> dict[str, Tensor]:
    """With what the projection memories say of x, by their weights at the chunk's start (NL Eqs. 83-85, 90)."""
    part = dict(part)
    for group, fast in zip(groups_of(config), memories, strict=True):
        names = [name for name in group.names if name != "memory"]
        if not names:
            continue
        x = part["x"]
        if config.qkv_conv:
            x = torch.stack([part.get(f"x_{name}", x) for name in names])
        for name, out in zip(names, project(group.architecture, fast.start, x, len(names)), strict=True):
            if name in ("eta", "alpha"):
                part[name] = out.squeeze(-1)
            else:
                part[name] = out if name == "v" and not config.normalize_values else unit(out)
    return part


def gates_of(config: TitansConfig, part: Mapping[str, Tensor], numbers: Numbers) -> Gates:
    """Learning rate eta > 0, decay alpha in (0, 1], momentum mu in (0, 1), erase gate: [B, H, C] (D5, D7, D16)."""
    k = part["k"]
    eta, alpha, mu, erase = k.new_ones(k.shape[:-1]), k.new_ones(k.shape[:-1]), None, None

    def logits(name: str) -> Tensor:
        return part[name] + getattr(numbers, name).to(k.dtype)[:, None]

    if config.rate != "one":
        eta = gate(logits("eta")) if config.rate == "gate" else F.softplus(logits("eta"))
    if config.decay == "learned":
        alpha = torch.sigmoid(logits("alpha"))
    elif config.decay == "fixed":
        heads = torch.arange(config.num_heads, device=k.device, dtype=k.dtype)
        alpha = (1 - 2 ** (-5 - heads))[:, None] * alpha
    if config.momentum:
        mu = torch.sigmoid(logits("mu"))
    if config.erase_gate:
        erase = gate(logits("erase"))
        if config.erasing < config.num_heads:
            erase = erase * (torch.arange(config.num_heads, device=k.device) < config.erasing)[:, None]
    return Gates(eta, alpha, mu, erase)


def gate(logits: Tensor) -> Tensor:
    """A sigmoid stretched over its ends and clamped, so that exactly 0 and exactly 1 are reached (decision D16)."""
    return (1.1 * torch.sigmoid(logits) - 0.05).clamp(0, 1)


def gate_logit(value: float) -> float:
    """Where `gate` is `value`, between 0 and 1."""
    share = (value + 0.05) / 1.1
    return math.log(share / (1 - share))
