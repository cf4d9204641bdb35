"""Muon as in torch.optim, with matrices of one shape orthogonalised in one product, in a type that suits the device."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from nestling.ops.orthogonalize import orthogonalize


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with batched products, in float32 on a CPU (where torch's bfloat16 is slow). Options and
    state are torch's."""

    @torch.no_grad()
    def step(self, closure=None):
        """One step: momentum, orthogonalisation per shape, decoupled weight decay, update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            same_shape: dict[tuple, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[(parameter.shape, parameter.device, parameter.dtype)].append(parameter)
            for parameters in same_shape.values():
                self._step_shape(parameters, group)
        return loss

    def _step_shape(self, parameters: list[Tensor], group: dict) -> None:
        momentum, rows, columns = group["momentum"], *parameters[0].shape
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(average, momentum) if group["nesterov"] else average)
        directions = orthogonalize(
            torch.stack(updates), group["ns_steps"], coefficients=group["ns_coefficients"], eps=group["eps"]
        )
        if group["adjust_lr_fn"] == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(rows, columns))
        else:
            scale = math.sqrt(max(1, rows / columns))
        for parameter, direction in zip(parameters, directions):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"] * scale)
