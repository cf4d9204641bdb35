"""Generalised gradient descent for networks of linear and convolutional layers (NL Def. 5, Eqs. 59, 60)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestling.optim.generalized import Loss, Retention, generalized_step
from nestling.optim.layer_inputs import LayerSamples, pack, unpack
from nestling.optim.layerwise import LayerwiseOptimizer
from nestling.optim.memories import GradientMemory


class GeneralizedGD(LayerwiseOptimizer):
    """Each layer's next weights are the minimiser of a loss of its own and of what holds its past (`generalized_step`).

        V_{t+1} = argmin_V  L(V z, u) + Ret(V; V_t, ..., V_{t-c+1}),    V = [W b],  z = (x, 1),  u = -dL/dy

    `Loss(0)` with one retained state is gradient descent, `Loss(1)` is `DGD(exact=True)`. Inputs and error signals of
    the whole batch are kept until the step: it is made for trying rules, not for speed. The loss of the network should
    be a mean over the layers' positions; u is taken times their number.

    Args:
        model: the network.
        lr: multiplies the retention's rates.
        loss, retention, inner_steps: as `loss`, `retention`, `steps` of `generalized_step`.
        weight_decay, params, nonfinite: as for `DGD`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr=1e-1,
        *,
        loss=None,
        retention: Retention | None = None,
        inner_steps: int | None = None,
        weight_decay: float = 0.0,
        params=None,
        nonfinite: str = "skip",
    ):
        self._loss, self._retention, self._inner_steps = loss or Loss(1.0), retention or Retention(), inner_steps
        self._attach(model, params, dict(lr=lr, weight_decay=weight_decay), nonfinite, LayerSamples, gram=True)

    def memory(self, group):
        return GradientMemory(decay=0.0)

    def _state_shapes(self, parameter, group, index):
        return None  # past weights, packed by layer

    def slope(self, parameter, weight, seen, group):
        lr = float(group["lr"])
        if not lr:
            return parameter.grad
        if parameter not in self._solved:
            self._solved |= self._solve(weight, seen, lr)
        return self._solved.pop(parameter)

    def _solve(self, weight: Tensor, seen: list[tuple[Tensor, Tensor]], lr: float) -> dict[Tensor, Tensor]:
        x, u = (torch.cat(parts, 1) for parts in zip(*seen))
        bias, flip = self._inputs.biases[weight], weight in self._inputs.transposed
        bias = bias if bias is not None and bias.requires_grad else None
        now = pack(weight, bias, len(x), flip).to(x.dtype)
        past = self.state[weight].get("past", now.unsqueeze(0)[:0])
        history, u = torch.cat([now.unsqueeze(0), past]), u * x.shape[1]
        rule = (self._loss, self._retention.scaled(lr))
        new = torch.stack(
            [
                generalized_step(list(history[:, group]), x[group], u[group], *rule, steps=self._inner_steps)
                for group in range(len(x))
            ]
        )
        if len(self._retention.rates) > 1:
            self.state[weight]["past"] = history[: len(self._retention.rates) - 1]
        return unpack((now - new) / lr, weight, bias, flip)
