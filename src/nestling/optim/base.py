"""What the optimisers made of a gradient memory share: the step, its checks, and a state that comes back as it was."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.optim.checks import (
    NONFINITE,
    check_choice,
    check_fraction,
    check_gradient,
    check_lr,
    check_number,
    check_parameter,
    finite,
    scalar,
)
from nestling.optim.memories import GradientMemory
from nestling.optim.sharding import is_sharded, local, shard_of, whole
from nestling.optim.states import Shapes, exact_loading

EXTRAS = ("_fixed", "_preconditioner", "_nonfinite")  # what a copy needs beside groups and state


class MemoryOptimizer(torch.optim.Optimizer):
    """W <- (1 - lr weight_decay) W + lr sigma(m(g)), for any choice of memory (`optim.memories.GradientMemory`).

    Args:
        params: parameters of any shape, named parameters, or groups of them.
        lr: learning rate, a number or a tensor of one.
        memory: what is remembered of the gradients and how it is read.
        weight_decay: decoupled, as in AdamW.
        nonfinite: what a NaN, an infinite or an absurdly large gradient does: "skip" leaves weights and memory of all
            parameters as they were, "raise" raises FloatingPointError, "ignore" does not look (and does not wait for a
            GPU).

    Raises:
        ValueError, TypeError: a setting out of range, a parameter that is not real floating point; at a step, before
            anything is changed, a sparse gradient or one that does not fit its parameter; on loading, a state of other
            shapes.
    """

    whole_state = True  # of a sharded parameter too, on every rank

    def __init__(self, params, lr=1e-3, memory: GradientMemory | None = None, *, weight_decay=0.0, nonfinite="skip"):
        self._fixed = memory
        self._setup(params, dict(lr=lr, weight_decay=weight_decay), nonfinite)

    def _setup(self, params, defaults: dict, nonfinite: str) -> None:
        check_choice("nonfinite", nonfinite, NONFINITE)
        self._nonfinite = nonfinite
        super().__init__(params, defaults)

    def memory(self, group: dict) -> GradientMemory:
        """The memory of a group's parameters."""
        return self._fixed or GradientMemory()

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters with their own settings."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_lr(group["lr"])
            check_number("weight_decay", group["weight_decay"])
            check_fraction("momentum", group.get("momentum", 0.0))
            self.memory(group)
            for parameter in group["params"]:
                check_parameter(parameter)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure=None):
        """One step. `closure` evaluates the loss again and returns it."""
        return self._step(closure)

    def _step(self, closure):
        """The step itself: a kind that adds to it calls this, as torch's hooks run around every `step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for parameters in ready:
            for parameter in parameters:
                check_gradient(parameter)
        if not finite([p.grad for parameters in ready for p in parameters], self._nonfinite):
            return loss
        for group, parameters in zip(self.param_groups, ready):
            memory = self.memory(group)
            for parameter in parameters:
                self._update(parameter, memory, group)
        return loss

    def _update(self, parameter: Tensor, memory: GradientMemory, group: dict) -> None:
        self._remember(parameter, parameter.grad, memory, group)

    def _remember(self, parameter: Tensor, gradient: Tensor, memory: GradientMemory, group: dict) -> None:
        """Write a gradient into the parameter's memory and move the parameter by what is read."""
        state = self.state[parameter]
        if not state:
            state.update(_start(memory, parameter))
            if not float(group["lr"]) and not whole(gradient).any():
                return  # how torch creates the state for a distributed checkpoint; there is nothing to remember
        direction = memory.step(state, whole(gradient))  # a sharded parameter's memory is whole on every rank
        if is_sharded(parameter):
            parameter, direction = local(parameter), shard_of(direction, parameter)
        move(parameter, direction, group["lr"], group["weight_decay"])

    def __getstate__(self) -> dict:
        return super().__getstate__() | {name: self.__dict__[name] for name in EXTRAS if name in self.__dict__}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a saved state, bit for bit; ValueError, before any change, if it belongs to something else."""
        with exact_loading(self, self._state_shapes):
            super().load_state_dict(state_dict)

    def _state_shapes(self, parameter: Tensor, group: dict, index: int) -> Shapes | None:
        empty = self.memory(group).start(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
        return {name: value.shape for name, value in empty.items()}


@torch.compiler.disable
def _start(memory: GradientMemory, parameter: Tensor) -> dict[str, Tensor]:
    """An empty memory; made once, so not worth compiling."""
    if is_sharded(parameter):
        parameter = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    return memory.start(parameter)


def move(parameter: Tensor, direction: Tensor, lr: float | Tensor, weight_decay: float) -> None:
    """W <- (1 - lr weight_decay) W + lr direction, in place."""
    lr = scalar(lr)
    if weight_decay:
        parameter.mul_(1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        parameter.add_((direction * lr.to(direction)).to(parameter.dtype))
    else:
        parameter.add_(direction.to(parameter.dtype), alpha=lr)
