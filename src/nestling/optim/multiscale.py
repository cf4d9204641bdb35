"""The matrix step of M3 (`NL Alg. 1, Eq. 75`): `m3_reference` as it is written, `m3_batched` for whole batches.

With g the gradient of step t, NS Newton-Schulz and f the slow period, each step is

    M1 <- M1 + b1 g                      V <- V + b2 g^2                      O1 = NS(M1)
    W  <- W - lr (O1 + alpha O2) / (sqrt(V) + eps)
    M2 <- M2 + b3 g, and after every f-th step O2 = NS(M2)

or, with `moment` "direction", V <- V + b2 (O1 + alpha O2)^2, which evens out what is taken, not the gradients (where
AdaMuon has V; decision D34).

("sum", Algorithm 1: M2 holds whole periods whenever O2 is taken from it, so the sum of a period needs no buffer of its
own.) Scale j of more than two has its own M_j, O_j, b_j, alpha_j and period. The averages of "ema" are

    M1 <- b1 M1 + (1 - b1) g             V <- b2 V + (1 - b2) g^2             M2 <- b3 M2 + (1 - b3) mean of the period

Orthogonalisation forgets the scale of M1 and M2, so they need no bias correction. V does: an entry is replaced by
V + b2^t mean(V) / (1 - b2^t), its matrix's mean where it has not seen enough gradients yet. So the first steps are
Muon's, not divisions of O1 by single gradients. eps is relative to the matrix there, eps sqrt(mean(V) / (1 - b2^t)):
the step does not depend on the scale of the loss. Nesterov orthogonalises b1 M1 + (1 - b1) g in place of M1. With
`rms_match` one scalar per matrix then sets the root mean square of the step to lr times `RMS`, which is what an AdamW
step typically has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.ops.orthogonalize import orthogonalize

RMS = 0.2
CHUNK = 2**20  # elements that go through the whole batched step together on a CPU, so that they stay in its cache
TINY = 1e-30  # keeps 0 / 0 at 0

State = dict[str, Tensor]


@dataclass(frozen=True)
class M3Settings:
    """What the step of a matrix parameter depends on besides its state; the same at every step but for `lr`.

    Attributes:
        shape: the parameter as a batch of matrices, (b, m, n).
        betas, alphas, periods: of the scales, fastest first; alphas[0] is 1.
        moment: whose second moment V is, "gradient" or "direction"; None without one. beta_v: what it keeps.
        sizes, dim: parts the matrices are cut into along `dim` (-2: rows, -1: columns) before orthogonalisation.
    """

    shape: tuple[int, int, int]
    lr: float | Tensor
    weight_decay: float
    betas: tuple[float, ...]
    alphas: tuple[float, ...]
    periods: tuple[int, ...]
    moment: str | None
    beta_v: float
    eps: float
    ema: bool
    nesterov: bool
    rms_match: bool
    ns_steps: int
    coefficients: object
    ns_dtype: torch.dtype | None
    sizes: tuple[int, ...] = ()
    dim: int = -2

    def pieces(self, stacked: Tensor) -> Sequence[Tensor]:
        """[P, *parameter], contiguous -> the matrices to orthogonalise, each [P b, m', n']: views, to be written to."""
        matrices = stacked.view(-1, *self.shape[1:])
        return matrices.split(self.sizes, self.dim) if self.sizes else (matrices,)

    def joined(self, pieces: Sequence[Tensor], like: Tensor) -> Tensor:
        """The inverse of `pieces`."""
        return (torch.cat(list(pieces), self.dim) if len(pieces) > 1 else pieces[0].contiguous()).view(like.shape)

    @torch.compiler.disable
    def orthogonal(self, stacked: Tensor) -> Tensor:
        """NS of every piece."""
        options = {"coefficients": self.coefficients, "dtype": self.ns_dtype}
        pieces = self.pieces(stacked.contiguous())
        return self.joined([orthogonalize(x, self.ns_steps, **options) for x in pieces], stacked)

    def weights(self, scale: int) -> tuple[float, float]:
        """(keep, take) of M_scale: keep once per period, take of every gradient."""
        beta, period = self.betas[scale], self.periods[scale]
        return (beta, (1 - beta) / period) if self.ema else (1.0, beta)

    def root(self, v: Tensor, left: float | Tensor) -> Tensor:
        """What a matrix's direction is divided by, from its second moment v; left = b2^t. Its slope is finite at 0."""
        if not self.ema:
            return v.sqrt() + self.eps + TINY
        tiny = torch.finfo(v.dtype).tiny
        mean = v.mean((-2, -1), keepdim=True) / (1 - left)
        return (v + left * mean).clamp(min=tiny).sqrt() + self.eps * mean.clamp(min=tiny).sqrt() + TINY

    def weights_v(self) -> tuple[float, float]:
        """(keep, take) of V."""
        return (self.beta_v, 1 - self.beta_v) if self.ema else (1.0, self.beta_v)

    def slow(self) -> range:
        """The slow scales; M_(scale + 1) and O_(scale + 1) are theirs."""
        return range(1, len(self.periods))


def new_state(parameter: Tensor, scales: int, second_moment: bool, slow_dtype: torch.dtype | None) -> State:
    """Zero memories: m1, v, and m2, o2 (m3, o3, ...) of the slow scales; float32 or the parameter's type if wider.

    They are contiguous, however the parameter lies in memory: the batched step writes into views of them.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)

    def zeros(kind: torch.dtype) -> Tensor:
        return torch.zeros_like(parameter, dtype=kind, requires_grad=False, memory_format=torch.contiguous_format)

    state = {"step": torch.tensor(0.0), "m1": zeros(dtype)} | ({"v": zeros(dtype)} if second_moment else {})
    for scale in range(2, scales + 1):
        state |= {f"m{scale}": zeros(dtype), f"o{scale}": zeros(slow_dtype or dtype)}
    return state


def m3_reference(gradient: Tensor, state: State, settings: M3Settings, step: int | Tensor) -> tuple[Tensor, State]:
    """The definition of M3's step (`NL Alg. 1`), in the order of the module's equations; it changes none of its inputs.

    Args:
        gradient: [..., m, n], one parameter's. state: m1, v, m2, o2, ... of `new_state`.
        step: number of the step, from 1; a tensor that broadcasts over the matrices where they are at different steps.

    Returns:
        The direction D of W <- W - lr D, and the memories after the gradient.
    """
    m1, new = state["m1"], {}
    g = gradient.to(m1.dtype)
    keep, take = settings.weights(0)
    new["m1"] = keep * m1 + take * g
    direction = settings.orthogonal(keep * new["m1"] + take * g if settings.nesterov else new["m1"])
    for scale in settings.slow():
        direction = direction + settings.alphas[scale] * state[f"o{scale + 1}"].to(m1.dtype)
    if settings.moment:
        keep, take = settings.weights_v()
        new["v"] = keep * state["v"] + take * (g if settings.moment == "gradient" else direction) ** 2
        roots = [settings.root(x, settings.beta_v**step) for x in settings.pieces(new["v"].contiguous())]
        direction = direction / settings.joined(roots, direction)
    if settings.rms_match:
        pieces = settings.pieces(direction.contiguous())
        direction = settings.joined([x * RMS / rms(x) for x in pieces], direction)
    for scale in settings.slow():
        m, o, period = state[f"m{scale + 1}"], state[f"o{scale + 1}"], settings.periods[scale]
        keep, take = settings.weights(scale)
        m = _choose((step - 1) % period == 0, keep * m, m) + take * g
        if bool(torch.as_tensor(ends := step % period == 0).any()):
            o = _choose(ends, settings.orthogonal(m).to(o.dtype), o)
        new |= {f"m{scale + 1}": m, f"o{scale + 1}": o}
    return direction, new


def _choose(condition: bool | Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b


@torch.compiler.disable
def m3_single(parameter: Tensor, gradient: Tensor, state: State, settings: M3Settings, step: int) -> None:
    """The definition's step of one parameter, in place."""
    direction, new = m3_reference(gradient, state, settings, step)
    parameter.mul_(1 - settings.lr * settings.weight_decay)
    parameter.sub_(settings.lr * direction)
    for name, value in new.items():
        state[name].copy_(value)


@torch.compiler.disable(recursive=False)
def m3_batched(
    parameters: list[Tensor], gradients: list[Tensor], states: list[State], settings: M3Settings, step: int
) -> None:
    """The same step for parameters of one shape, type, device and phase."""
    count = max(1, CHUNK // parameters[0].numel()) if parameters[0].device.type == "cpu" else len(parameters)
    for start in range(0, len(parameters), count):
        part = slice(start, start + count)
        _batched(parameters[part], gradients[part], states[part], settings, step)


@torch.compiler.disable(recursive=False)
def _batched(
    parameters: list[Tensor], gradients: list[Tensor], states: list[State], settings: M3Settings, step: int
) -> None:
    fast = settings.orthogonal(remember(gradients, states, settings, [(step - 1) % f == 0 for f in settings.periods]))
    decay = torch.tensor(settings.beta_v**step, dtype=torch.float64)
    descend(parameters, fast, states, settings, decay)
    for scale in settings.slow():
        if step % settings.periods[scale] == 0:
            slow = settings.orthogonal(torch.stack([state[f"m{scale + 1}"] for state in states]))
            for state, direction in zip(states, slow.unbind()):
                state[f"o{scale + 1}"].copy_(direction)


def remember(gradients: list[Tensor], states: list[State], settings: M3Settings, opens: list[bool]) -> Tensor:
    """Write the gradients into every memory; returns what is to be orthogonalised, stacked."""
    g = [gradient.to(state["m1"].dtype) for gradient, state in zip(gradients, states)]
    for scale in range(len(settings.periods)):
        memory = [state[f"m{scale + 1}"] for state in states]
        keep, take = settings.weights(scale)
        if opens[scale] and keep != 1:
            torch._foreach_mul_(memory, keep)
        torch._foreach_add_(memory, g, alpha=take)
    if settings.moment == "gradient":
        remember_squares(g, states, settings)
    fast = torch.stack([state["m1"] for state in states])
    if settings.nesterov:
        keep, take = settings.weights(0)
        fast.mul_(keep).add_(torch.stack(g), alpha=take)
    return fast


def remember_squares(values: Sequence[Tensor], states: list[State], settings: M3Settings) -> None:
    """Write the squares of the gradients, or of the directions, into V."""
    v, (keep, take) = [state["v"] for state in states], settings.weights_v()
    if keep != 1:
        torch._foreach_mul_(v, keep)
    torch._foreach_addcmul_(v, list(values), list(values), value=take)


def direct(update: Tensor, states: list[State], settings: M3Settings) -> None:
    """O1 + alpha O2 + ..., in place of O1, given as `update`; V takes it in where it is the direction's."""
    for scale in settings.slow():
        slow = [state[f"o{scale + 1}"] for state in states]
        torch._foreach_add_(list(update.unbind()), slow, alpha=settings.alphas[scale])
    if settings.moment == "direction":
        remember_squares(update.unbind(), states, settings)


def descend(parameters: list[Tensor], update: Tensor, states: list[State], settings: M3Settings, decay: Tensor) -> None:
    """W <- W - lr (O1 + alpha O2) / (sqrt(V) + eps), O1 given as `update` (overwritten), decay = b2^t."""
    direct(update, states, settings)
    if settings.moment:
        root = torch.stack([state["v"] for state in states])
        for x in settings.pieces(root):
            if settings.ema:
                mean = x.mean((-2, -1), keepdim=True) / (1 - decay)
                x.add_(decay * mean).sqrt_().add_(settings.eps * mean.sqrt() + TINY)
            else:
                x.sqrt_().add_(settings.eps + TINY)
        update.div_(root)
    for x in settings.pieces(update):
        x.mul_(settings.lr * RMS / rms(x) if settings.rms_match else settings.lr)
    if settings.weight_decay:
        torch._foreach_mul_(parameters, 1 - settings.lr * settings.weight_decay)
    torch._foreach_sub_(parameters, list(update.unbind()))


def rms(x: Tensor) -> Tensor:
    """Root mean square of each matrix, [.., 1, 1], and a tiny number for a zero matrix."""
    size = math.sqrt(x.shape[-2] * x.shape[-1])
    return (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) / size).clamp(min=TINY)
