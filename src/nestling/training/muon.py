"""Muon as in torch.optim, with matrices of one shape orthogonalised in one product, in a type that suits the device."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nestling.ops.orthogonalize import multiply_adds, orthogonalize
from nestling.optim.division import Request, orthogonalized
from nestling.optim.sharding import is_sharded, local


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with batched products, in float32 on a CPU (where torch's bfloat16 is slow), and each matrix
    once where ranks share it. Options and state are torch's."""

    process_group: dist.ProcessGroup | None = None  # as M3's: set it to divide the work under DDP

    @torch.no_grad()
    def step(self, closure=None):
        """One step: momentum, orthogonalisation per shape, decoupled weight decay, update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work: list[tuple[list[Tensor], dict, Tensor]] = []
        for group in self.param_groups:
            same_shape: dict[tuple, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[(parameter.shape, parameter.device, parameter.dtype)].append(parameter)
            work += [(own, group, self._remember(own, group)) for own in same_shape.values()]
        for (parameters, group, _), directions in zip(work, self._directions(work)):
            rows, columns = parameters[0].shape
            if group["adjust_lr_fn"] == "match_rms_adamw":
                scale = 0.2 * math.sqrt(max(rows, columns))
            else:
                scale = math.sqrt(max(1, rows / columns))
            for parameter, direction in zip(map(local, parameters), directions):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"] * scale)
        return loss

    def _remember(self, parameters: list[Tensor], group: dict) -> Tensor:
        """Write the gradients of one shape into the momenta; returns what is to be orthogonalised, this rank's part."""
        momentum, updates = group["momentum"], []
        for parameter in parameters:
            state, gradient = self.state[parameter], local(parameter.grad)
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            average = local(state["momentum_buffer"]).lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(average, momentum) if group["nesterov"] else average)
        return torch.stack(updates)

    def _directions(self, work: list[tuple[list[Tensor], dict, Tensor]]) -> list[Tensor]:
        """Everything orthogonalised, each matrix once over all ranks that hold the parameters."""
        requests = []
        for parameters, group, updates in work:
            steps, shape = group["ns_steps"], parameters[0].shape
            options = {"coefficients": group["ns_coefficients"], "eps": group["eps"]}
            orthogonal = functools.partial(orthogonalize, steps=steps, **options)
            cost = multiply_adds(steps, *shape, coefficients=group["ns_coefficients"], dtype=updates.dtype)
            requests.append(Request(updates, shape, (1, *shape), orthogonal, cost))
        one: Any = work[0][0][0] if work else None
        sharded = is_sharded(one)
        ranks = one.device_mesh.get_group() if sharded else self.process_group
        if ranks is None:
            return [request.orthogonal(request.local) for request in requests]
        return orthogonalized(requests, ranks, sharded)
