"""Self-modifying Titans: a sequence layer whose projections, learning rate and decay are memories too (NL Sec. 8).

The layer token by token, as the paper writes it, is `layers/titans_reference.py`; a test ties the two. The same layer
with other settings is linear attention, RetNet, DeltaNet, Gated DeltaNet, TTT and Titans: see `nestling.layers.mixers`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.layers.titans_config import TitansConfig
from nestling.layers.titans_scan import Gates, MemoryScan, Observer
from nestling.layers.titans_state import MemoryGroup, TitansState, check_call, state_dtype
from nestling.memory.architectures import LinearMemory, MLPMemory
from nestling.memory.project import project
from nestling.memory.rule import FastWeights, TokenFigures
from nestling.ops.conv import short_convolution
from nestling.ops.padding import pack, unpack


class SelfModifyingTitans(nn.Module):
    """Self-modifying Titans (NL Eqs. 83-93), and by its settings the linear-attention family.

    Args:
        dim, num_heads, options: the fields of `TitansConfig`, where each has its meaning; `layer.config` holds them.

    Call: `layer(x, state=None, mask=None) -> (y, state)`, x and y [B, T, D], mask [B, T] True at real tokens. The state
    is a value: splitting a sequence anywhere and carrying it gives the result of one pass.

    Raises:
        ValueError: a setting that is wrong, an input, mask or state that does not fit.  TypeError: a dtype.
    """

    def __init__(self, dim: int, num_heads: int = 4, **options):
        super().__init__()
        self.config = config = TitansConfig(dim, num_heads, **options)
        self.num_heads, self.head_dim = config.num_heads, config.head_width
        self.rule, self.widths, self.groups = config.rule, config.widths(), _plan(config)
        self.in_proj = nn.Linear(dim, sum(self.widths.values()), bias=False)
        self.out_proj = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(self.head_dim))
        self.conv_weight = nn.Parameter(torch.empty(dim, config.conv_size)) if config.conv_size else None
        self.eta_bias = nn.Parameter(torch.empty(num_heads)) if config.rate == "learned" else None
        self.alpha_bias = nn.Parameter(torch.empty(num_heads)) if config.decay == "learned" else None
        self.mu_bias = nn.Parameter(torch.empty(num_heads)) if config.momentum else None
        # initial states: what every sequence starts from, learned by the outer loop
        self.initial = nn.ModuleList(
            nn.ParameterList(torch.empty(len(g.names), num_heads, *shape) for shape in g.architecture.shapes())
            for g in self.groups
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Initial values: small projections, decays that remember for 128 to 2048 tokens, a convolution that passes."""
        nn.init.normal_(self.in_proj.weight, std=self.config.dim**-0.5)
        nn.init.normal_(self.out_proj.weight, std=(self.num_heads * self.head_dim) ** -0.5)
        nn.init.ones_(self.norm_weight)
        if self.conv_weight is not None:
            nn.init.uniform_(self.conv_weight, -0.5, 0.5)
        if self.eta_bias is not None:
            nn.init.constant_(self.eta_bias, math.log(math.expm1(self.config.initial_rate)))  # softplus of it
        if self.alpha_bias is not None:
            span = torch.logspace(
                math.log10(self.config.horizon[0]), math.log10(self.config.horizon[1]), self.num_heads
            )
            self.alpha_bias.copy_(torch.log(span - 1))  # sigmoid = 1 - 1 / span
        if self.mu_bias is not None:
            nn.init.zeros_(self.mu_bias)
        for group, weights in zip(self.groups, self.initial, strict=True):
            for weight, std in zip(weights, group.architecture.initial(), strict=True):
                nn.init.normal_(weight, std=std)

    def _start(self, batch_size: int) -> list[tuple[Tensor, ...]]:
        """The learned initial weights of every group for each sequence, [n, B, H, o, i]."""
        return [
            tuple(state_dtype(w).unsqueeze(1).expand(-1, batch_size, -1, -1, -1).contiguous() for w in weights)
            for weights in self.initial
        ]

    def _anchors(self, batch_size: int) -> list[tuple[Tensor, ...]]:
        """What the weights of every group decay towards."""
        if self.config.retain == "zero" or self.config.decay == "none":
            return [()] * len(self.groups)
        anchors = self._start(batch_size)
        if self.rule.meta_grad == "none":
            anchors = [tuple(w.detach() for w in weights) for weights in anchors]
        return anchors

    def initial_state(self, batch_size: int) -> TitansState:
        """The learned state that every one of `batch_size` streams begins with."""
        memories = []
        for weights in self._start(batch_size):
            start = tuple(w.transpose(0, 1) for w in weights)  # laid out as the scan wants it, seen as the state does
            velocity = tuple(torch.zeros_like(w) for w in start) if self.config.momentum else ()
            memories.append(FastWeights(start, start, velocity))
        size = 0 if self.conv_weight is None else self.conv_weight.shape[1] - 1
        conv = self.in_proj.weight.new_zeros(batch_size, size, self.config.dim)
        return TitansState(torch.zeros(batch_size, dtype=torch.int64), conv, tuple(memories))

    def forward(
        self, x: Tensor, state: TitansState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, TitansState]:
        return self._run(x, state, mask)

    def _run(self, x: Tensor, state: TitansState | None, mask: Tensor | None, observe: Observer | None = None):
        check_call(self, x, state, mask)
        batch, tokens, _ = x.shape
        state = self.initial_state(batch) if state is None else state
        lengths, order = [tokens] * batch, None
        if mask is not None and not bool(mask.all()):
            x, order, count = pack(x, mask)
            lengths = count.tolist()
        features, conv = self._features(x, state.conv, None if order is None else lengths)
        if max(lengths) == 0:  # nothing but padding
            return torch.zeros_like(x), state
        with torch.autocast(x.device.type, enabled=False):
            y, memories = MemoryScan(self, self._anchors(batch), observe).run(features, state, lengths)
        y = y.transpose(1, 2)  # [B, T, H, p]
        y = F.rms_norm(y, (self.head_dim,), self.norm_weight.to(y.dtype), 1e-6).flatten(2).to(x.dtype)
        if "gate" in features:
            y = y * F.silu(features["gate"])
        y = self.out_proj(y)
        position = state.position + torch.tensor(lengths, device=state.position.device)
        return (y if order is None else unpack(y, order)), TitansState(position, conv, memories)

    def _features(self, x: Tensor, conv: Tensor, lengths: list[int] | None) -> tuple[dict[str, Tensor], Tensor]:
        """Static projections of the convolved input: heads [B, H, T, p] and gates [B, H, T], in the state's dtype."""
        if self.conv_weight is not None:
            mask = None
            if lengths is not None:
                mask = torch.arange(x.shape[1], device=x.device) < torch.tensor(lengths, device=x.device)[:, None]
            x, conv = short_convolution(x, self.conv_weight, None, conv, mask)
        parts = dict(zip(self.widths, self.in_proj(x).split(list(self.widths.values()), -1), strict=True))
        for name, part in parts.items():
            if name in ("x", "q", "k", "v"):
                heads = state_dtype(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
                raw = name == "v" and not self.config.normalize_values
                parts[name] = heads if raw else _unit(heads)
            elif name in ("eta", "alpha", "mu"):
                parts[name] = state_dtype(part.transpose(1, 2))
        return parts, conv

    def project(self, part: dict[str, Tensor], memories) -> dict[str, Tensor]:
        """Outputs of the projection memories for x, from the weights at the chunk's start (NL Eqs. 83-85, 90)."""
        part = dict(part)
        for group, fast in zip(self.groups, memories, strict=True):
            names = [name for name in group.names if name != "memory"]
            if not names:
                continue
            for name, out in zip(names, project(group.architecture, fast.start, part["x"], len(names)), strict=True):
                if name in ("eta", "alpha"):
                    part[name] = out.squeeze(-1)
                else:
                    raw = name == "v" and not self.config.normalize_values
                    part[name] = out if raw else _unit(out)
        return part

    def gates(self, part: dict[str, Tensor]) -> Gates:
        """Learning rate eta > 0, decay alpha in (0, 1], momentum mu in (0, 1): [B, H, C] (decisions D5, D7)."""
        k = part["k"]
        eta, alpha, mu = k.new_ones(k.shape[:-1]), k.new_ones(k.shape[:-1]), None
        if self.config.rate == "learned":
            eta = F.softplus(part["eta"] + self.eta_bias.to(k.dtype)[:, None])
        if self.config.decay == "learned":
            alpha = torch.sigmoid(part["alpha"] + self.alpha_bias.to(k.dtype)[:, None])
        elif self.config.decay == "fixed":
            heads = torch.arange(self.num_heads, device=k.device, dtype=k.dtype)
            alpha = (1 - 2 ** (-5 - heads))[:, None] * alpha
        if self.config.momentum:
            mu = torch.sigmoid(part["mu"] + self.mu_bias.to(k.dtype)[:, None])
        return Gates(eta, alpha, mu)

    @torch.no_grad()
    def inspect(self, x: Tensor, state: TitansState | None = None) -> dict[str, Tensor]:
        """The main memory over a text: inner loss, eta, step, decay, momentum, weight norm, each [B, H, T]."""
        seen: list[dict[str, Tensor]] = []

        def observe(figures: TokenFigures, memory: FastWeights, gates: Gates) -> None:
            norm = sum(w[-1].square().sum((-1, -2)) for w in memory.now).sqrt()
            none = torch.zeros_like(gates.eta)
            seen.append({
                "loss": figures.loss[-1], "step": figures.rate[-1], "eta": gates.eta, "alpha": gates.alpha,
                "momentum": none if gates.mu is None else gates.mu, "norm": norm.unsqueeze(-1).expand_as(none),
            })  # fmt: skip

        self._run(x, state, None, observe)
        return {name: torch.cat([part[name] for part in seen], -1) for name in seen[0]}


def _plan(config: TitansConfig) -> tuple[MemoryGroup, ...]:
    """The memories, those of one shape and chunk size together; the main memory last of its group: it is read."""
    p, hidden = config.head_width, config.expansion * config.head_width
    full = MLPMemory(p, p, hidden) if config.architecture == "mlp" else LinearMemory(p, p)
    gate = MLPMemory(p, 1, hidden, residual=False) if config.gates == "mlp" else LinearMemory(p, 1)
    projections = tuple(name for name in ("k", "v", "q") if name in config.adaptive)
    gates = tuple(name for name in ("eta", "alpha") if name in config.adaptive)
    groups = []
    if projections and config.main_chunk_size != config.chunk_size:
        groups.append(MemoryGroup(projections, full, config.chunk_size))
        projections = ()
    groups.append(MemoryGroup((*projections, "memory"), full, config.main_chunk_size))
    if gates:
        groups.append(MemoryGroup(gates, gate, config.chunk_size))
    return tuple(groups)


def _unit(x: Tensor) -> Tensor:
    """x / |x|, smooth at zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
