"""Copies of a model with all that trains it, so that trying something leaves the originals as they are."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass
class Copies:
    """A model, its optimisers, schedulers and average, all of one copy."""

    model: nn.Module
    optimizers: list[Any]
    schedulers: list[Any]
    average: nn.Module | None


def copies(model: nn.Module, optimizers: list[Any], schedulers: list[Any], average: nn.Module | None) -> Copies:
    """Deep copies that belong together.

    Hooks on an optimiser's step are left out: they may reach into the original's surroundings.

    Raises:
        ValueError: a model that cannot be copied.
    """
    memo: dict[int, Any] = {}
    try:
        twin = copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{type(model).__name__} cannot be copied to be measured: {error}") from error
    for parameter in twin.parameters():
        parameter.grad = None
    optimizer_copies = [_optimizer(one, twin, memo) for one in optimizers]
    scheduler_copies = []
    for scheduler in schedulers:
        made = object.__new__(type(scheduler))
        memo[id(scheduler)] = made
        made.__dict__.update(copy.deepcopy(scheduler.__dict__, memo))
        scheduler_copies.append(made)
    return Copies(twin, optimizer_copies, scheduler_copies, copy.deepcopy(average, memo))


def _optimizer(optimizer: Any, twin: nn.Module, memo: dict[int, Any]) -> Any:
    if not isinstance(optimizer, torch.optim.Optimizer):  # a run's LevelOptimizers
        made = copy.copy(optimizer)
        made.groups = [_group(group, twin, memo) for group in optimizer.groups]
        return made
    made = object.__new__(type(optimizer))
    memo[id(optimizer)] = made
    # not through __getstate__: torch's keeps three fields and forgets what a subclass added
    left_out = {"step", "_inputs", "_weights", "_solved"} | {n for n in optimizer.__dict__ if n.endswith("_hooks")}
    made.__dict__.update({n: copy.deepcopy(v, memo) for n, v in optimizer.__dict__.items() if n not in left_out})
    made.__dict__.update({n: OrderedDict() for n in optimizer.__dict__ if n.endswith("_hooks")})
    if "_inputs" in optimizer.__dict__:  # nestling's layer-wise optimisers watch the layers of their model
        watched = optimizer._inputs
        ours = {p for group in made.param_groups for p in group["params"]}
        made._inputs = type(watched)(twin, ours, gram=watched.gram)
        made._weights = {bias: weight for weight, bias in made._inputs.biases.items() if bias is not None}
        made._solved = {}
    return made


def _group(group: Any, twin: nn.Module, memo: dict[int, Any]) -> Any:
    made = copy.copy(group)
    made.params = [memo[id(p)] for p in group.params]
    made.optimizers = [_optimizer(one, twin, memo) for one in group.optimizers]
    made.sums = copy.deepcopy(group.sums, memo)
    return made


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Whatever is drawn inside, every generator goes on as if it had not been."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - libraries draw from the global generator
    devices = (
        list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    )
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
