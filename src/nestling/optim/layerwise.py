"""Optimisers that need to see what a model's layers saw: hooks for as long as they live (decision D14)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from nestling.optim.base import MemoryOptimizer, move
from nestling.optim.layer_inputs import LayerInputs
from nestling.optim.sharding import is_sharded


class LayerwiseOptimizer(MemoryOptimizer, ABC):
    """Keeps hooks on a model, asks `slope` for what takes the place of each gradient, and forgets inputs at each step.

    Inputs come from passes that were followed by a backward pass; several of them before a step are averaged, as is a
    layer that is called twice. Parameters whose inputs are not seen (embeddings, norms, weights used by functions) take
    plain gradient descent. What was seen is not part of `state_dict`, as gradients are not: save after a step. A copy
    or pickle of the model carries no live hooks; the optimiser itself cannot be copied. One process.
    """

    def _attach(self, model: nn.Module, params, defaults: dict, nonfinite: str, collector=LayerInputs, **options):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, whose layers' inputs are watched, not {type(model).__name__}"
            )
        self._setup(
            [p for p in model.named_parameters() if p[1].requires_grad] if params is None else params,
            defaults,
            nonfinite,
        )
        ours = {p for group in self.param_groups for p in group["params"]}
        self._inputs = collector(model, ours, **options)
        self._weights = {bias: weight for weight, bias in self._inputs.biases.items() if bias is not None}
        self._solved: dict[Tensor, Tensor] = {}

    @abstractmethod
    def slope(self, parameter: Tensor, weight: Tensor, seen, group: dict) -> Tensor:
        """(W_t - W_{t+1}) / lr for a parameter, the weight or bias of a layer whose weight saw `seen`."""

    @torch.no_grad()
    def step(self, closure=None):
        """One step; what the layers saw before it is forgotten, whether it was taken or skipped."""
        if self._inputs.closed:
            raise RuntimeError("this optimizer was closed and sees no inputs; make a new one and load its state_dict")
        if any(is_sharded(p) for group in self.param_groups for p in group["params"]):
            raise TypeError(f"{type(self).__name__} sees layers of one process: use it without fully_shard, or take M3")
        try:
            return self._step(closure)
        finally:
            self._inputs.clear()
            self._solved.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and what the layers saw."""
        super().zero_grad(set_to_none)
        self._inputs.clear()

    def close(self) -> None:
        """Remove the hooks from the model; `with ... as optimizer:` does it at the end."""
        self._inputs.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __getstate__(self):
        raise TypeError("this optimizer is tied to its model by hooks: make a new one and load the state_dict")

    def _update(self, parameter, memory, group):
        weight = self._weights.get(parameter, parameter)
        seen = self._inputs.sums.get(weight)
        slope = parameter.grad if seen is None else self.slope(parameter, weight, seen, group)
        if memory.decay:
            self._remember(parameter, slope, memory, group)
        else:
            move(parameter, slope, -group["lr"], -group["weight_decay"])
