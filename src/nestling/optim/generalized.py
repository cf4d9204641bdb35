"""Generalised gradient descent: a step as the minimiser of a loss and of what holds the past (NL Def. 5, Eqs. 59, 60).

    W_{t+1} = argmin_W  L(W x, u) + Ret(W; W_t, W_{t-1}, ..., W_{t-c+1}),      u = -dL/dy, made by W_t itself

Gradient descent is the dot product with a proximal retention, Delta Gradient Descent is L2 regression with it. On a
momentum (W = m, x = the gradient's rows, u = -P) the same form is generalised momentum: momentum and Delta Momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.optim.checks import check_number, check_whole


@dataclass(frozen=True)
class Loss:
    """erase/2 mean |W x|^2 - mean <W x, u>: `erase=0` is the dot product, 1 is 1/2 |W x - u|^2 but for a constant."""

    erase: float = 0.0

    def __post_init__(self) -> None:
        check_number("erase", self.erase)

    def __call__(self, weight: Tensor, x: Tensor, u: Tensor) -> Tensor:
        """weight [o, i], x [N, i], u [N, o] to a number."""
        y = x @ weight.mT
        return (self.erase / 2 * y.square() - y * u).sum() / len(x)


@dataclass(frozen=True)
class Retention:
    """sum_j 1/(2 eta_j) |W - decay_j W_{t-j}|^2: how near to each of the last c states the next one stays.

    Attributes:
        rates: eta_0, eta_1, ... for W_t, W_{t-1}, ...; one number is the proximal term of gradient descent.
        decays: of each state, 1 if not given; a decay of the only state is momentum's alpha.
        extra: a further penalty, any differentiable function of W (it has no closed form), or None.
    """

    rates: tuple[float, ...] = (1.0,)
    decays: tuple[float, ...] = ()
    extra: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.rates or (self.decays and len(self.decays) != len(self.rates)):
            raise ValueError(f"rates needs a number for each state and decays as many; got {self.rates}, {self.decays}")
        for rate in self.rates:
            check_number("rates", rate, above=True)

    def scaled(self, lr: float) -> Retention:
        """The same with every rate times lr."""
        return replace(self, rates=tuple(lr * rate for rate in self.rates))

    def centre(self, history: Sequence[Tensor]) -> tuple[Tensor, float]:
        """The quadratic part as one: its minimiser, and the eta of 1/(2 eta) |W - centre|^2."""
        decays = self.decays or (1.0,) * len(self.rates)
        weights = [1 / rate for rate in self.rates]
        total = sum(w * d * past for w, d, past in zip(weights, decays, history))
        return total / sum(weights), 1 / sum(weights)

    def __call__(self, weight: Tensor, history: Sequence[Tensor]) -> Tensor:
        """The penalty; history is W_t, W_{t-1}, ... ."""
        decays = self.decays or (1.0,) * len(self.rates)
        terms = ((weight - d * past).square().sum() / (2 * r) for r, d, past in zip(self.rates, decays, history))
        return sum(terms) + (self.extra(weight) if self.extra else 0)


def generalized_step(
    history: Sequence[Tensor],
    x: Tensor,
    u: Tensor,
    loss: Loss | Callable[[Tensor, Tensor, Tensor], Tensor],
    retention: Retention,
    *,
    steps: int | None = None,
) -> Tensor:
    """The next state of a memory W [o, i].

    Args:
        history: its last states, W_t first, one for each of the retention's rates; fewer at the start count W_t again.
        x: inputs [N, i].  u: targets [N, o], the negative error signal at the outputs.
        loss: `Loss`, or any differentiable function (W, x, u) to a number.
        retention: what holds the past.
        steps: None solves in closed form where there is one (`Loss` and no extra penalty) and takes 100 inner gradient
            steps otherwise; a number takes that many.

    Returns:
        W_{t+1} [o, i]. Inner gradient steps shrink until the objective falls (Armijo), so none makes it worse.
    """
    weight = history[0]
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or u.shape != (len(x), weight.shape[0]):
        raise ValueError(
            f"x must be [N, i] and u [N, o] for W {list(weight.shape)}; got {list(x.shape)} and {list(u.shape)}"
        )
    history = [*history, *[weight] * len(retention.rates)][: len(retention.rates)]
    if steps is None and isinstance(loss, Loss) and retention.extra is None:
        centre, rate = retention.centre(history)
        target = centre + rate / len(x) * u.mT @ x
        if not loss.erase:
            return target
        system = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) + rate * loss.erase / len(x) * x.mT @ x
        return torch.linalg.solve(system, target, left=False)
    check_whole("steps", 100 if steps is None else steps)
    return _descend(weight, lambda w: loss(w, x, u) + retention(w, history), 100 if steps is None else steps)


def _descend(weight: Tensor, objective: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Gradient descent with a step that doubles after each success and halves until the objective falls enough."""
    rate = 1.0
    for _ in range(steps):
        with torch.enable_grad():
            at = weight.detach().requires_grad_()
            value = objective(at)
            (slope,) = torch.autograd.grad(value, at)
        norm = slope.square().sum()
        for _ in range(60):
            new = weight - rate * slope
            if objective(new) <= value - 0.5 * rate * norm:
                weight, rate = new, 2 * rate
                break
            rate /= 2
        else:
            return weight
    return weight
