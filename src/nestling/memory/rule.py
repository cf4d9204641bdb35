"""The inner learning rule of a stack of memories of one shape, written once for all of them.

Every token writes a rank-one term into each linear layer, with that layer's own input as its key (decision D2), so the
update of a layer over a chunk is the generalised delta rule. Gradients are taken at the weights of the chunk's start
(NL Eq. 90); decay, erase and momentum run token by token. Leading dimensions are [n, B, H]: memories, sequences, heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.memory.architectures import Architecture, plain, product
from nestling.memory.objectives import OBJECTIVES
from nestling.ops.chunk import Chunk, Decays, delta_chunk
from nestling.ops.states import bounded

STEPS = ("joint", "layer", "plain")
META_GRADS = ("full", "first_order", "none")
ERASE_LAYERS = ("first", "last")
TINY = 1e-6  # beside a square norm that is divided by


@dataclass(frozen=True)
class UpdateRule:
    """Choices of the inner optimiser.

    Attributes:
        objective: "l2" or "dot" (`memory.objectives`).
        dgd: erase along the key as Delta Gradient Descent does (NL Eqs. 57, 88); False is gradient descent.
        gated_erase: erase before the decay, W alpha (I - e k k^T), as Gated DeltaNet writes it.
        step: size of a write for a learning rate eta (decision D2): "joint" e = eta / (1 + eta kappa) with kappa the
            curvature along the error over all layers; "layer" e = eta / (1 + eta |x|^2) in each layer (decision D1);
            "plain" e = eta.
        self_targets: the target of a memory is its own output for the value (NL Eqs. 84-88), else the value.
        erase_gate: the main memory erases by a gate g of its own, apart from eta (decision D16): before the decay, by
            alpha r g / |x|^2 in one of its layers.
        erase_range: r, up to 2: the eigenvalue along a key reaches down to alpha (1 - r).
        erase_layer: which layer, "first" or "last".
        tied_write: g also multiplies the main memory's step e in every layer.
        relative: eta is the share, 0 to 1, of the full step: e = eta / kappa, or eta / |x|^2, where it would have been
            eta / (1 + eta kappa).
        meta_grad: how the outer loss is differentiated through the writes (decision D9): "full"; "first_order" takes
            the inner gradient as independent of the weights; "none" stops at each chunk's start.
    """

    objective: str = "l2"
    dgd: bool = True
    gated_erase: bool = False
    step: str = "joint"
    self_targets: bool = True
    meta_grad: str = "full"
    erase_gate: bool = False
    erase_range: float = 1.0
    erase_layer: str = "first"
    tied_write: bool = True
    relative: bool = False

    def __post_init__(self):
        choices = (
            ("objective", tuple(OBJECTIVES)), ("step", STEPS), ("meta_grad", META_GRADS), ("erase_layer", ERASE_LAYERS)
        )  # fmt: skip
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not 0 < self.erase_range <= 2:
            raise ValueError(f"erase_range must be above 0 and at most 2; got {self.erase_range!r}")
        if not self.erase_gate and (self.erase_range, self.erase_layer, self.tied_write) != (1, "first", True):
            raise ValueError("erase_range, erase_layer and tied_write have no effect without erase_gate=True")

    def without_gate(self) -> UpdateRule:
        """By which memories learn that have no erase gate: all but the main one."""
        return replace(self, erase_gate=False, erase_range=1.0, erase_layer="first", tied_write=True)


class FastWeights(NamedTuple):
    """Fast weights of a stack of memories; one tensor [n, B, H, o, i] per linear layer in each field."""

    start: tuple[Tensor, ...]  # at the open chunk's start: where forwards and gradients are taken
    now: tuple[Tensor, ...]  # after the last token
    velocity: tuple[Tensor, ...]  # empty without momentum


Anchor = tuple[Tensor, ...]  # weights that a decay returns to, one for each layer; empty for a decay to zero


class Context(NamedTuple):
    """What the tokens of a chunk, or of a part of one, say to every memory."""

    keys: Tensor  # [B, H, C, i]
    values: Tensor  # [B, H, C, i], or targets [B, H, C, o] if not self-generated
    rate: Tensor  # eta [B, H, C]
    decay: Tensor  # alpha [B, H, C]
    momentum: Tensor | None  # mu [B, H, C]
    decays: Decays | None  # tables of the two, [B, H, C + 1, C + 1]
    # of the main memory, which is then a stack of its own
    erase: Tensor | None = None  # gate g of the erase, [B, H, C]
    first_rate: Tensor | None = None  # a factor on the first layer's step, [H, 1]


class TokenFigures(NamedTuple):
    """Figures of each token, for plots: [n, B, H, C]."""

    loss: Tensor
    rate: Tensor


def advance(
    architecture: Architecture,
    rule: UpdateRule,
    fast: FastWeights,
    context: Context,
    *,
    fresh: bool,
    queries: Tensor | None = None,
    after: bool = False,
    anchor: Anchor = (),
) -> tuple[FastWeights, Tensor | None, TokenFigures]:
    """Write a chunk's tokens into the memories and read the last one's running state.

    Args:
        anchor: what the weights decay towards, [n, B, H, o, i] for each layer; empty is zero.
        fresh: `now` equals `start`, so the inner forward's products serve the recurrence too.
        queries: [B, H, C, i], read by the last memory of the stack: W_{t-1} (NL Eq. 86), or W_t if `after`.

    Returns:
        The weights with `now` and `velocity` advanced, the reads [B, H, C, o], and a report.
    """
    inner = fast.start if rule.meta_grad == "full" else tuple(w.detach() for w in fast.start)
    inputs, products, error, loss = _inner_gradient(architecture, rule, inner, context)
    errors = architecture.errors(inner, products, error)
    rates = rates_of(rule, context, inputs, errors)
    erases = erases_of(rule, rates, context, inputs)
    shrink = 1.0 if context.momentum is None else 1 - context.momentum  # momentum as an average keeps the step's size
    shared = fresh and rule.meta_grad == "full"
    memories = error.shape[0]
    decays = {
        name: None if t is None else _flat(t.expand(memories, *t.shape)) for name, t in context.decays._asdict().items()
    }
    now, velocity = [], []

    def write(layer: int, q: Tensor | None) -> Tensor | None:
        x, w = inputs[layer], fast.now[layer]
        s = fast.velocity[layer] if fast.velocity else None
        base, erase = None, erases[layer]
        if erase is not None:
            base = products[layer] if shared else product(w, x)
        writes = (-shrink * rates[layer]).unsqueeze(-1) * errors[layer]
        chunk = Chunk(
            weight=_flat(w), velocity=_flat(s), products=_flat(base), keys=_flat(x), writes=_flat(writes),
            erase=_flat(erase), queries=None if q is None else q.flatten(0, 1),
            anchor=_flat(anchor[layer]) if anchor else None, **decays,
        )  # fmt: skip
        out_w, out_s, reads = delta_chunk(chunk, after)
        now.append(out_w.view(w.shape))
        if s is not None:
            velocity.append(out_s.view(w.shape))
        return None if q is None else reads.view(*q.shape[:-1], -1)

    reads = None
    if queries is None:
        for layer in range(len(inputs)):
            write(layer, None)
    else:  # the read of layer l + 1 takes the read of layer l as its query
        reads = architecture.forward(queries, write)
    return FastWeights(fast.start, tuple(now), tuple(velocity)), reads, TokenFigures(loss, rates[-1].detach())


def _flat(t: Tensor | None) -> Tensor | None:
    """[n, B, H, ...] as one batch."""
    return None if t is None else t.flatten(0, 2)


def _inner_gradient(architecture, rule, weights, context):
    """Each layer's input and product for the keys, and the objective's error at the output."""
    tokens, memories = context.keys.shape[-2], weights[0].shape[0]
    rows = torch.cat([context.keys, context.values], -2) if rule.self_targets else context.keys
    rows = rows.expand(memories, *rows.shape).contiguous()
    inputs, products = [], []

    def record(layer, x):
        y = product(weights[layer], x)
        inputs.append(x[..., :tokens, :])
        products.append(y[..., :tokens, :])
        return y

    out = architecture.forward(rows, record)
    prediction = out[..., :tokens, :]
    target = out[..., tokens:, :] if rule.self_targets else context.values
    objective = OBJECTIVES[rule.objective]
    with torch.no_grad():
        loss = objective.loss(prediction, target)
    return inputs, products, objective.error(prediction, target).expand_as(prediction), loss


def rates_of(rule: UpdateRule, context: Context, inputs: list[Tensor], errors: list[Tensor]) -> list[Tensor]:
    """Step e of each layer for each token, [n, B, H, C]."""
    eta = context.rate
    if rule.step == "plain":
        rates = [eta.expand(x.shape[:-1]) for x in inputs]
    else:
        sizes = [x.square().sum(-1) for x in inputs]
        if rule.step == "layer":
            rates = [_step(eta, size, rule.relative) for size in sizes]
        else:
            rate, _ = joint_step(eta, sizes, [error.square().sum(-1) for error in errors], rule.relative)
            rates = [rate] * len(inputs)
    if context.first_rate is not None:
        rates[0] = rates[0] * context.first_rate
    if context.erase is not None and rule.tied_write:
        rates = [rate * context.erase for rate in rates]
    return rates


def erases_of(rule: UpdateRule, rates: list[Tensor], context: Context, inputs: list[Tensor]) -> list[Tensor | None]:
    """What each token takes from each layer along its key, [n, B, H, C]; None for nothing."""
    erases = [None] * len(rates)
    if rule.dgd or rule.gated_erase:
        erases = [rate * context.decay if rule.gated_erase else rate for rate in rates]
    if context.erase is not None:
        at = 0 if rule.erase_layer == "first" else len(rates) - 1
        size = inputs[at].square().sum(-1) + TINY
        erases[at] = rule.erase_range * context.erase * context.decay / size
    return erases


def _step(eta: Tensor, kappa: Tensor, relative: bool) -> Tensor:
    return eta / (kappa + TINY) if relative else eta / (1 + eta * kappa)


def joint_step(
    eta: Tensor, inputs: list[Tensor], errors: list[Tensor], relative: bool = False
) -> tuple[Tensor, Tensor]:
    """e = eta / (1 + eta kappa) for squared norms of each layer's input and error; also the last error's, guarded.

    kappa is the Rayleigh quotient of the memory's tangent kernel along its own error, sum_l |x_l|^2 |d_l|^2 / |d|^2.
    The 1 beside the ratio keeps e |x_l|^2 < 1: every layer's erase contracts, even where no error reaches the layer.
    """
    kappa, total = inputs[-1], errors[-1] + TINY
    for size, error in zip(inputs[:-1], errors[:-1], strict=True):
        kappa = kappa + size * (1 + error / total)
    return _step(eta, kappa, relative), total


def close_chunk(
    fast: FastWeights, closed: Tensor | None, limits: tuple[float, ...], meta_grad: str = "full"
) -> FastWeights:
    """Begin the next chunk: `start` becomes `now`, its norm bounded so that no input can make a memory overflow.

    Args:
        closed: [B] bool, the sequences whose chunk is complete; None is all of them.
        limits: bound on the Frobenius norm of each layer's weights.
    """
    now = tuple(bounded(w, limit) for w, limit in zip(fast.now, limits, strict=True))
    velocity = fast.velocity
    if meta_grad == "none":
        now, velocity = tuple(w.detach() for w in now), tuple(s.detach() for s in velocity)
    if closed is None:
        return FastWeights(now, now, velocity)
    pick = closed.view(1, -1, 1, 1, 1)
    start = tuple(torch.where(pick, w, old) for w, old in zip(now, fast.start, strict=True))
    kept = tuple(torch.where(pick, w, old) for w, old in zip(now, fast.now, strict=True))
    return FastWeights(start, kept, velocity)


def forward(architecture: Architecture, weights: tuple[Tensor, ...], z: Tensor) -> Tensor:
    """A memory's output for inputs z [..., C, i] at fixed weights."""
    return architecture.forward(z, plain(list(weights)))
