"""Self-modifying Titans: a sequence layer whose projections, learning rate and decay are memories too (NL Sec. 8).

The layer token by token, as the paper writes it, is `layers/titans_reference.py`; a test ties the two. The same layer
with other settings is linear attention, RetNet, DeltaNet, Gated DeltaNet, TTT and Titans: see `nestling.layers.mixers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nestling.layers.one_token import may_step, memory_plan, memory_step
from nestling.layers.titans_cache import CachedMemories, CachedScan
from nestling.layers.titans_config import PATHS, TitansConfig
from nestling.layers.titans_groups import Gates, Numbers, gate_logit, groups_of
from nestling.layers.titans_operator import key_of, scan
from nestling.layers.titans_scan import MemoryScan, Observer, swap
from nestling.layers.titans_state import TitansState, check_call, state_dtype
from nestling.memory.rule import FastWeights, TokenFigures
from nestling.ops.conv import short_convolution
from nestling.ops.padding import pack, unpack
from nestling.ops.unit import unit
from nestling.utils.likeness import Like, activations, columns
from nestling.utils.transforms import is_transformed


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
        config = TitansConfig(dim, num_heads, **options)
        self.num_heads, self.head_dim = config.num_heads, config.head_width
        self.rule, self.widths = config.rule, config.widths()
        self._take(config)
        self.in_proj = nn.Linear(dim, sum(self.widths.values()), bias=False)
        self.out_proj = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(self.head_dim))
        self.conv_weight = nn.Parameter(torch.empty(dim, config.conv_size)) if config.conv_size else None
        # after the projections, a path each (an adaptive one's is its memory's input)
        paths = (name for name in PATHS if config.qkv_conv)
        inner = num_heads * self.head_dim
        self.path_convs = nn.ParameterDict({name: torch.empty(inner, config.qkv_conv) for name in paths})
        self.path_order = tuple(self.path_convs)  # in the state, which is not that of PATHS
        self.eta_bias = nn.Parameter(torch.empty(num_heads)) if config.rate != "one" else None
        self.alpha_bias = nn.Parameter(torch.empty(num_heads)) if config.decay == "learned" else None
        self.mu_bias = nn.Parameter(torch.empty(num_heads)) if config.momentum else None
        self.erase_bias = nn.Parameter(torch.empty(num_heads)) if config.erase_gate else None
        self.log_first_rate = nn.Parameter(torch.empty(num_heads)) if config.first_rate is not None else None
        adapts = config.projection_rate is not None
        self.log_projection_rate = nn.Parameter(torch.empty(num_heads)) if adapts else None
        keeps = config.cache_every is not None  # the gate over kept memories
        self.log_cache_scale = nn.Parameter(torch.empty(num_heads)) if keeps else None
        self.cache_bias = nn.Parameter(torch.empty(num_heads)) if keeps else None
        # initial states: what every sequence starts from, learned by the outer loop
        self.initial = nn.ModuleList(
            nn.ParameterList(torch.empty(len(g.names), num_heads, *shape) for shape in g.architecture.shapes())
            for g in self.groups
        )
        self.reset_parameters()

    def _take(self, config: TitansConfig) -> None:
        """Everything that depends on the chunk sizes."""
        self.config, self.groups = config, groups_of(config)
        self.key, self.one_token = key_of(config), memory_plan(config)

    @contextmanager
    def longer_chunks(self, factor: int) -> Iterator[None]:
        """Inside, memories write once for so many times their chunk: for whole sequences, forward and backward, as a
        state from outside counts other chunks."""
        config, own = self.config, self.config.memory_chunk_size
        main = None if own is None else own * factor
        self._take(replace(config, chunk_size=config.chunk_size * factor, memory_chunk_size=main))
        try:
            yield
        finally:
            self._take(config)

    @torch.no_grad()
    def reset_parameters(self):
        """Initial values: small projections, decays that remember for 128 to 2048 tokens, a convolution that passes."""
        nn.init.normal_(self.in_proj.weight, std=self.config.dim**-0.5)
        nn.init.normal_(self.out_proj.weight, std=(self.num_heads * self.head_dim) ** -0.5)
        nn.init.ones_(self.norm_weight)
        begin = self.config.conv_init
        convs = [(taps, self.config.qkv_conv_init or begin) for taps in self.path_convs.values()]
        for taps, begins in [*([] if self.conv_weight is None else [(self.conv_weight, begin)]), *convs]:
            nn.init.uniform_(taps, -0.5, 0.5)
            if begins == "last":
                taps.mul_(0.5)[:, -1] += 1
        if self.eta_bias is not None:
            rate = self.config.initial_rate
            gate = gate_logit(rate / (1 + rate)) if self.config.rate == "gate" else math.log(math.expm1(rate))
            nn.init.constant_(self.eta_bias, gate)
        if self.alpha_bias is not None:
            span = torch.logspace(
                math.log10(self.config.horizon[0]), math.log10(self.config.horizon[1]), self.num_heads
            )
            self.alpha_bias.copy_(torch.log(span - 1))  # sigmoid = 1 - 1 / span
        if self.mu_bias is not None:
            nn.init.zeros_(self.mu_bias)
        if self.erase_bias is not None:
            nn.init.constant_(self.erase_bias, gate_logit(self.config.initial_erase))
        if self.log_first_rate is not None:
            nn.init.constant_(self.log_first_rate, math.log(self.config.first_rate))
        if self.log_projection_rate is not None:
            nn.init.constant_(self.log_projection_rate, math.log(self.config.projection_rate))
        if self.log_cache_scale is not None:
            nn.init.constant_(self.log_cache_scale, math.log(self.config.cache_scale))
            nn.init.zeros_(self.cache_bias)
        for group, weights in zip(self.groups, self.initial, strict=True):
            for weight, std in zip(weights, group.architecture.initial(), strict=True):
                nn.init.normal_(weight, std=std)
            if self.config.projection_init == "identity":
                for i in (i for i, name in enumerate(group.names) if name in PATHS):
                    last = weights[-1][i]  # of a deep memory, which adds to its input
                    last.copy_(torch.eye(self.head_dim) if len(weights) == 1 else torch.zeros_like(last))
            if group.names[-1] == "memory":
                weights[-1][-1].mul_(self.config.initial_scale)

    def _start(self, batch_size: int) -> list[tuple[Tensor, ...]]:
        """The learned initial weights of every group for each sequence, [n, B, H, o, i]."""
        return [
            tuple(state_dtype(w).unsqueeze(1).expand(-1, batch_size, -1, -1, -1).contiguous() for w in weights)
            for weights in cast("list[nn.ParameterList]", self.initial)
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
        paths = tuple(
            state_dtype(taps).new_zeros(batch_size, taps.shape[1] - 1, taps.shape[0])
            for taps in self.path_convs.values()
        )
        keeps = self.config.cache_every is not None
        cached = CachedMemories.begin(memories[-1].now[0][:, -1]) if keeps else ()
        return TitansState(torch.zeros(batch_size, dtype=torch.int64), conv, tuple(memories), paths, cached)

    @torch.no_grad()
    def state_like(self, state: Any, batch_size: int) -> TitansState:
        """What the state of so many streams is made of, a Like in place of every tensor; as many memories are kept as
        in `state`."""
        first = tree_map_only(Tensor, lambda t: Like((batch_size, *t.shape[1:]), (t.dtype,)), self.initial_state(1))
        if first.cached:
            count = columns(getattr(getattr(state, "cached", None), "numbers", None), 1)
            first = first._replace(cached=first.cached.like(count))
        return first._replace(conv=replace(first.conv, dtypes=activations(self.in_proj.weight.dtype)))

    def forward(
        self, x: Tensor, state: TitansState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, TitansState]:
        if self.config.cache_every is None and may_step(x):
            started = self.initial_state(x.shape[0]) if state is None else state
            if (found := memory_step(self, x, started, mask)) is not None:
                return found
        return self._run(x, state, mask)

    def _run(self, x: Tensor, state: TitansState | None, mask: Tensor | None, observe: Observer | None = None):
        check_call(self, x, state, mask)
        batch, tokens, _ = x.shape
        state = self.initial_state(batch) if state is None else state
        as_operator = is_transformed()
        count, order = None, None
        if mask is not None and (as_operator or not bool(mask.all())):
            x, order, count = pack(x, mask)
        features, conv, paths = self._features(x, state.conv, state.paths, count)
        gate = features.pop("gate", None)
        numbers, anchors, memories = self.numbers(), self._anchors(batch), swap(state.memories)
        cached = state.cached
        if self.config.cache_every is not None:
            y, memories, cached = self._with_cached(features, memories, cached, state.position, count, observe)
        elif as_operator:
            y, memories = scan(self.config, self.key, numbers, anchors, features, memories, state.position, count)
        else:
            lengths = [tokens] * batch if count is None else count.tolist()
            whole = MemoryScan(self.config, numbers, anchors, observe)
            with torch.autocast(x.device.type, enabled=False):
                y, memories = whole.run(features, memories, state.position.tolist(), lengths)
        y = y.transpose(1, 2)  # [B, T, H, p]
        y = F.rms_norm(y, (self.head_dim,), self.norm_weight.to(y.dtype), 1e-6).flatten(2).to(x.dtype)
        if gate is not None:
            y = y * F.silu(gate)
        y = self.out_proj(y)
        position = state.position + (tokens if count is None else count.to(state.position.device))
        return (y if order is None else unpack(y, order)), TitansState(position, conv, swap(memories), paths, cached)

    @torch.compiler.disable
    def _with_cached(
        self, features: dict[str, Tensor], memories: tuple[FastWeights, ...], cached: CachedMemories, position: Tensor,
        count: Tensor | None, observe: Observer | None,
    ) -> tuple[Tensor, tuple[FastWeights, ...], CachedMemories]:  # fmt: skip
        """The scan of a layer that keeps memories: how many depends on positions, so a compiler leaves it to Python."""
        if is_transformed():
            raise ValueError("a layer with cache_every does not go with torch.func and torch.export: call it as it is")
        tokens, batch = features["q"].shape[2], len(position)
        lengths = [tokens] * batch if count is None else count.tolist()
        scale = state_dtype(self.log_cache_scale).exp() * self.config.cache_every**0.5
        scan_ = MemoryScan(self.config, self.numbers(), self._anchors(batch), observe)
        whole = CachedScan(scan_, scale, state_dtype(self.cache_bias))
        with torch.autocast(features["q"].device.type, enabled=False):
            return whole.run(features, memories, cached, position.tolist(), lengths)

    def _features(
        self, x: Tensor, conv: Tensor, paths: tuple[Tensor, ...], lengths: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, ...]]:
        """Static projections of the input and what the convolutions carry over.

        Heads [B, H, T, p] and gates [B, H, T], in the state's dtype; with convolutions after the projections, `x_k` is
        what the memory of an adaptive k takes.
        """
        mask = None
        if lengths is not None and (self.conv_weight is not None or self.path_convs):
            mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        mixed = x
        if self.conv_weight is not None:
            mixed, conv = short_convolution(x, self.conv_weight, None, conv, mask)
        parts, paths = self._projected(x, mixed), list(paths)
        for i, (name, taps) in enumerate(self.path_convs.items()):
            path, out = ("x", f"x_{name}") if name in self.config.adaptive else (name, name)
            y, paths[i] = short_convolution(state_dtype(parts[path]), state_dtype(taps), None, paths[i], mask)
            parts[out] = F.silu(y)
        for name, part in parts.items():
            if name[0] in "xqkv":
                heads = state_dtype(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
                raw = name == "v" and not self.config.normalize_values
                parts[name] = heads if raw else unit(heads)
            elif name != "gate":
                parts[name] = state_dtype(part.transpose(1, 2))
        return parts, conv, tuple(paths)

    def _projected(self, x: Tensor, mixed: Tensor) -> dict[str, Tensor]:
        """The input projection's parts, each of the input or of the convolved input."""
        sizes = list(self.widths.values())
        if mixed is x or set(self.widths) <= self.config.convolved:
            return dict(zip(self.widths, self.in_proj(mixed).split(sizes, -1), strict=True))
        # parts in a row that see the same input in one product, but for the paths, which go on alone
        parts, at = {}, 0
        runs: list[tuple[bool, list[str]]] = []  # not itertools.groupby, which torch.compile does not trace
        for name in self.widths:
            convolved = name in self.config.convolved
            if runs and runs[-1][0] == convolved and not {name, runs[-1][1][-1]} & set(PATHS):
                runs[-1][1].append(name)
            else:
                runs.append((convolved, [name]))
        for convolved, names in runs:
            counts = [self.widths[name] for name in names]
            product = F.linear(mixed if convolved else x, self.in_proj.weight[at : at + sum(counts)])
            parts |= zip(names, product.split(counts, -1), strict=True)
            at += sum(counts)
        return parts

    def numbers(self) -> Numbers:
        """What the layer has learned beside its matrices and initial states."""
        return Numbers(
            self.eta_bias, self.alpha_bias, self.mu_bias, self.erase_bias, self.log_first_rate, self.log_projection_rate
        )

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
            } | ({} if gates.erase is None else {"erase": gates.erase}))  # fmt: skip

        self._run(x, state, None, observe)
        return {name: torch.cat([part[name] for part in seen], -1) for name in seen[0]}
