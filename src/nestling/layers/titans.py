"""Self-modifying Titans: a sequence layer whose projections, learning rate and decay are memories too (NL Sec. 8).

The same layer with other settings is linear attention, RetNet, DeltaNet, Gated DeltaNet, TTT and Titans: see
`nestling.layers.mixers`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestling.layers.segments import Segment, segments
from nestling.layers.titans_state import ADAPTIVE, MemoryGroup, TitansState, check_call, check_settings, state_dtype
from nestling.memory.architectures import LinearMemory, MLPMemory
from nestling.memory.fused import fused_advance, is_fused
from nestling.memory.project import project
from nestling.memory.rule import Context, FastWeights, UpdateRule, advance, close_chunk, forward
from nestling.ops.chunk import decay_table
from nestling.ops.conv import short_convolution
from nestling.ops.padding import pack, unpack


class SelfModifyingTitans(nn.Module):
    """Self-modifying Titans (NL Eqs. 83-93), and by its settings the linear-attention family.

    Args:
        dim: width D of the input and output.
        num_heads: heads H; each has its own memories (decision D7).
        head_dim: width p of a head, dim // num_heads if None.
        expansion: hidden width of an MLP memory over p.
        chunk_size: tokens between two updates of the weights the projections are read from.
        memory_chunk_size: the same for the main memory; `chunk_size` if None.
        adaptive: which of k, v, q, eta, alpha are memories updated in-context; the others are static projections.
        architecture: of the memories, "mlp" (NL Eq. 89) or "linear".
        gates: architecture of the eta and alpha memories, "mlp" or "linear".
        objective, dgd, gated_erase, step, meta_grad: see `nestling.memory.rule.UpdateRule`.
        self_targets: memories generate their own targets M(v); if False the target is v.
        momentum: a data-dependent momentum mu in (0, 1) of the writes (decision D5).
        decay: "learned" (alpha from the data), "fixed" (one per head, as RetNet), or "none" (alpha = 1).
        rate: "learned" (eta from the data) or "one" (eta = 1).
        initial_rate: a learned eta before training.
        retain: what the decay returns a memory to: "initial", its learned initial state, or "zero" (NL Eq. 88 read
            literally; both layers of a deep memory then fade together and it stops learning for good).
        horizon: tokens a learned decay remembers before training, from the first head to the last.
        read: "before" reads W_{t-1} (NL Eq. 86), "after" W_t, "chunk" the weights of the chunk's start (NL Eq. 90).
        normalize_values: L2-normalise v like k and q; without it self-generated targets feed back and diverge.
        conv_size: width of the causal convolution of the input, 0 for none.
        output_gate: gate the output by silu of a projection of the input.
        segment_size: calls longer than this are recomputed piece by piece in the backward pass, so that only the states
            between pieces are kept; 0 keeps everything.

    Call: `layer(x, state=None, mask=None) -> (y, state)`, x and y [B, T, D], mask [B, T] True at real tokens. The state
    is a value: splitting a sequence anywhere and carrying it gives the result of one pass.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        head_dim: int | None = None,
        expansion: int = 1,
        chunk_size: int = 64,
        memory_chunk_size: int | None = None,
        adaptive: tuple[str, ...] = ("k", "v", "eta", "alpha"),
        architecture: str = "mlp",
        gates: str = "linear",
        objective: str = "l2",
        dgd: bool = True,
        gated_erase: bool = False,
        step: str = "joint",
        self_targets: bool = True,
        momentum: bool = True,
        decay: str = "learned",
        rate: str = "learned",
        initial_rate: float = 0.02,
        retain: str = "initial",
        horizon: tuple[float, float] = (128.0, 2048.0),
        read: str = "before",
        normalize_values: bool = True,
        conv_size: int = 4,
        output_gate: bool = True,
        meta_grad: str = "full",
        segment_size: int = 512,
        norm_limit: float = 8.0,
    ):
        super().__init__()
        check_settings(locals())
        self.dim, self.num_heads = dim, num_heads
        self.head_dim = head_dim or dim // num_heads
        self.adaptive = tuple(name for name in ADAPTIVE if name in adaptive)
        self.momentum, self.decay, self.rate = momentum, decay, rate
        self.read, self.normalize_values, self.initial_rate = read, normalize_values, initial_rate
        self.horizon, self.retain = horizon, retain
        self.segment_size, self.norm_limit = segment_size, norm_limit
        self.rule = UpdateRule(objective, dgd, gated_erase, step, self_targets, meta_grad)
        self.groups = self._plan(architecture, gates, expansion, chunk_size, memory_chunk_size or chunk_size)

        inner = num_heads * self.head_dim
        widths = {"x": inner} if self.adaptive else {}
        widths |= {name: inner for name in ("q", "k", "v") if name not in self.adaptive}
        widths |= {"gate": inner} if output_gate else {}
        if rate == "learned" and "eta" not in self.adaptive:
            widths["eta"] = num_heads
        if decay == "learned" and "alpha" not in self.adaptive:
            widths["alpha"] = num_heads
        if momentum:
            widths["mu"] = num_heads
        self.widths = widths
        self.in_proj = nn.Linear(dim, sum(widths.values()), bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(self.head_dim))
        self.conv_weight = nn.Parameter(torch.empty(dim, conv_size)) if conv_size else None
        self.eta_bias = nn.Parameter(torch.empty(num_heads)) if rate == "learned" else None
        self.alpha_bias = nn.Parameter(torch.empty(num_heads)) if decay == "learned" else None
        self.mu_bias = nn.Parameter(torch.empty(num_heads)) if momentum else None
        # initial states: what every sequence starts from, learned by the outer loop
        self.initial = nn.ModuleList(
            nn.ParameterList(torch.empty(len(g.names), num_heads, *shape) for shape in g.architecture.shapes())
            for g in self.groups
        )
        self.reset_parameters()

    def _plan(self, architecture, gates, expansion, chunk_size, memory_chunk_size) -> tuple[MemoryGroup, ...]:
        p, hidden = self.head_dim, expansion * self.head_dim
        full = MLPMemory(p, p, hidden) if architecture == "mlp" else LinearMemory(p, p)
        gate = MLPMemory(p, 1, hidden, residual=False) if gates == "mlp" else LinearMemory(p, 1)
        projections = tuple(name for name in ("k", "v", "q") if name in self.adaptive)
        gate_names = tuple(name for name in ("eta", "alpha") if name in self.adaptive)
        groups = []
        if projections and memory_chunk_size != chunk_size:
            groups.append(MemoryGroup(projections, full, chunk_size))
            projections = ()
        # the main memory last: it is the one that is read
        groups.append(MemoryGroup((*projections, "memory"), full, memory_chunk_size))
        if gate_names:
            groups.append(MemoryGroup(gate_names, gate, chunk_size))
        return tuple(groups)

    @torch.no_grad()
    def reset_parameters(self):
        """Initial values: small projections, decays that remember for 128 to 2048 tokens, a convolution that passes."""
        nn.init.normal_(self.in_proj.weight, std=self.dim**-0.5)
        nn.init.normal_(self.out_proj.weight, std=(self.num_heads * self.head_dim) ** -0.5)
        nn.init.ones_(self.norm_weight)
        if self.conv_weight is not None:
            nn.init.uniform_(self.conv_weight, -0.5, 0.5)
        if self.eta_bias is not None:
            nn.init.constant_(self.eta_bias, math.log(math.expm1(self.initial_rate)))  # softplus of it
        if self.alpha_bias is not None:
            span = torch.logspace(math.log10(self.horizon[0]), math.log10(self.horizon[1]), self.num_heads)
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
        if self.retain == "zero" or self.decay == "none":
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
            velocity = tuple(torch.zeros_like(w) for w in start) if self.momentum else ()
            memories.append(FastWeights(start, start, velocity))
        size = 0 if self.conv_weight is None else self.conv_weight.shape[1] - 1
        conv = self.in_proj.weight.new_zeros(batch_size, size, self.dim)
        return TitansState(torch.zeros(batch_size, dtype=torch.int64), conv, tuple(memories))

    def forward(
        self, x: Tensor, state: TitansState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, TitansState]:
        y, state, _ = self._run(x, state, mask)
        return y, state

    def _run(self, x: Tensor, state: TitansState | None, mask: Tensor | None, inspect: bool = False):
        check_call(self, x, state, mask)
        batch, tokens, _ = x.shape
        state = self.initial_state(batch) if state is None else state
        lengths, order = [tokens] * batch, None
        if mask is not None and not bool(mask.all()):
            x, order, count = pack(x, mask)
            lengths = count.tolist()
        features, conv = self._features(x, state.conv, None if order is None else lengths)
        if max(lengths) == 0:  # nothing but padding
            return torch.zeros_like(x), state, []
        with torch.autocast(x.device.type, enabled=False):
            y, memories, report = self._scan(features, state, lengths, inspect)
        y = y.transpose(1, 2)  # [B, T, H, p]
        y = F.rms_norm(y, (self.head_dim,), self.norm_weight.to(y.dtype), 1e-6).flatten(2).to(x.dtype)
        if "gate" in features:
            y = y * F.silu(features["gate"])
        y = self.out_proj(y)
        position = state.position + torch.tensor(lengths, device=state.position.device)
        return (y if order is None else unpack(y, order)), TitansState(position, conv, memories), report

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
                raw = name == "v" and not self.normalize_values
                parts[name] = heads if raw else _unit(heads)
            elif name in ("eta", "alpha", "mu"):
                parts[name] = state_dtype(part.transpose(1, 2))
        return parts, conv

    def _scan(self, features, state, lengths, inspect):
        """Run the memories over the sequence: reads [B, H, T, p], the memories after it, figures for plots."""
        positions = state.position.tolist()
        plan = segments(positions, lengths, [g.chunk_size for g in self.groups])
        tensors = {name: f for name, f in features.items() if name != "gate"}
        pieces = [plan]
        if self.segment_size and torch.is_grad_enabled() and max(lengths) > self.segment_size and not inspect:
            pieces = _pieces(plan, self.segment_size)
        memories, outputs, report = _swap(state.memories), [], []
        anchors = self._anchors(len(lengths))
        for piece in pieces:
            args = (piece, memories, anchors, tensors, report if inspect else None)
            if len(pieces) > 1:
                y, memories = checkpoint(self._scan_piece, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                y, memories = self._scan_piece(*args)
            outputs.append(y)
        missing = next(iter(tensors.values())).shape[2] - max(lengths)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        return (F.pad(y, (0, 0, 0, missing)) if missing else y), _swap(memories), report

    def _scan_piece(self, plan: list[Segment], memories, anchors, tensors, report):
        reads = []
        # split at once: a slice's gradient would fill the whole length for every segment
        sizes, begin, end = [s.stop - s.start for s in plan], plan[0].start, plan[-1].stop
        parts = {name: f[:, :, begin:end].split(sizes, 2) for name, f in tensors.items()}
        for i, segment in enumerate(plan):
            part = {name: pieces[i] for name, pieces in parts.items()}
            y, memories = self._step(part, memories, anchors, segment, report)
            reads.append(y)
        return torch.cat(reads, 2), memories

    def _step(self, part: dict[str, Tensor], memories: tuple[FastWeights, ...], anchors, segment: Segment, report):
        """One segment: project with the chunk's first weights, write to every memory, read the main one."""
        part = self._project(part, memories)
        eta, alpha, mu = self._gates(part)
        context = Context(part["k"], part["v"], eta, alpha, mu, decay_table(alpha, mu))
        q, updated, y = part["q"], [], None
        for i, (group, fast) in enumerate(zip(self.groups, memories, strict=True)):
            main = group.names[-1] == "memory"
            running = main and self.read != "chunk"
            if main and not running:
                y = forward(group.architecture, tuple(w[-1] for w in fast.start), q)
            new, reads, figures = self._advance(
                group, fast, context, segment.fresh[i], q if running else None, anchors[i], report
            )
            y = reads if running else y
            updated.append(self._close(new, fast, segment, i))
            if report is not None and main:
                report.append(self._figures(figures, new, eta, alpha, mu))
        return y, tuple(updated)

    def _advance(
        self, group: MemoryGroup, fast: FastWeights, context: Context, fresh: bool, q: Tensor | None, anchor, report
    ):
        """Write one segment, by the hand-differentiated step where it applies."""
        reading = dict(queries=q, after=self.read == "after", anchor=anchor)
        if fresh and report is None and is_fused(group.architecture, self.rule):
            return fused_advance(group.architecture, self.rule, fast, context, **reading)
        return advance(group.architecture, self.rule, fast, context, fresh=fresh, **reading)

    def _close(self, new: FastWeights, old: FastWeights, segment: Segment, i: int) -> FastWeights:
        """Open the next chunk where this one is complete; keep the state of sequences that have ended."""
        device = new.now[0].device
        if segment.active is not None:
            on = segment.active.to(device).view(1, -1, 1, 1, 1)
            now = tuple(torch.where(on, a, b) for a, b in zip(new.now, old.now, strict=True))
            velocity = tuple(torch.where(on, a, b) for a, b in zip(new.velocity, old.velocity, strict=True))
            new = FastWeights(new.start, now, velocity)
        closes = segment.closes[i]
        if closes is False:
            return new
        limit = [self.norm_limit * math.sqrt(w.shape[-2] * w.shape[-1]) for w in new.now]
        return close_chunk(new, None if closes is True else closes.to(device), tuple(limit), self.rule.meta_grad)

    def _project(self, part: dict[str, Tensor], memories) -> dict[str, Tensor]:
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
                    raw = name == "v" and not self.normalize_values
                    part[name] = out if raw else _unit(out)
        return part

    def _gates(self, part: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Learning rate eta > 0, decay alpha in (0, 1], momentum mu in (0, 1): [B, H, C] (decisions D5, D7)."""
        k = part["k"]
        eta, alpha, mu = k.new_ones(k.shape[:-1]), k.new_ones(k.shape[:-1]), None
        if self.rate == "learned":
            eta = F.softplus(part["eta"] + self.eta_bias.to(k.dtype)[:, None])
        if self.decay == "learned":
            alpha = torch.sigmoid(part["alpha"] + self.alpha_bias.to(k.dtype)[:, None])
        elif self.decay == "fixed":
            heads = torch.arange(self.num_heads, device=k.device, dtype=k.dtype)
            alpha = (1 - 2 ** (-5 - heads))[:, None] * alpha
        if self.momentum:
            mu = torch.sigmoid(part["mu"] + self.mu_bias.to(k.dtype)[:, None])
        return eta, alpha, mu

    def _figures(self, figures, new, eta, alpha, mu) -> dict[str, Tensor]:
        norm = sum(w[-1].detach().square().sum((-1, -2)) for w in new.now).sqrt()
        values = dict(loss=figures.loss[-1], step=figures.rate[-1], eta=eta, alpha=alpha)
        values["momentum"] = torch.zeros_like(eta) if mu is None else mu
        values["norm"] = norm.unsqueeze(-1).expand_as(eta)
        return {name: value.detach() for name, value in values.items()}

    @torch.no_grad()
    def inspect(self, x: Tensor, state: TitansState | None = None) -> dict[str, Tensor]:
        """The main memory over a text: inner loss, eta, step, decay, momentum, weight norm, each [B, H, T]."""
        _, _, report = self._run(x, state, None, inspect=True)
        return {name: torch.cat([r[name] for r in report], -1) for name in report[0]}


def _pieces(plan: list[Segment], size: int) -> list[list[Segment]]:
    """MemoryGroup segments into pieces of about `size` tokens."""
    pieces, begin = [], None
    for segment in plan:
        if begin is None or segment.stop - begin > size:
            pieces.append([])
            begin = segment.start
        pieces[-1].append(segment)
    return pieces


def _swap(memories: tuple[FastWeights, ...]) -> tuple[FastWeights, ...]:
    """Between the state's layout [B, n, H, ...] and the scan's [n, B, H, ...], by views."""
    return tuple(FastWeights(*(tuple(w.transpose(0, 1) for w in part) for part in fast)) for fast in memories)


def _unit(x: Tensor) -> Tensor:
    """x / |x|, smooth at zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
