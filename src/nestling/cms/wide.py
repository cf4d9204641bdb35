"""A learner whose model computes in float32 from weights that are held in a smaller type (decision D22)."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nestling.cms.learner import Learner


def widened(learner: Learner) -> Learner:
    """The learner over float32 copies of all weights in a smaller type; itself where there are none.

    The copies are differentiable: gradients of all chunks are added up in float32, and reach the weights rounded once.
    Nothing is written to the model. It is left as it is where weights or calls are elsewhere (accelerate's hooks).
    """
    model = learner.backbone.model
    parts = {"model": model.model, "lm_head": model.lm_head}
    if not any(_small(p) for p in model.parameters()) or not all(_here(m) for p in parts.values() for m in p.modules()):
        return learner
    tensors: dict[int, Tensor] = {}
    modules: dict[int, nn.Module] = {}
    found = {name: _copy(part, tensors, modules) for name, part in parts.items()}
    backbone = copy.copy(learner.backbone)
    backbone.model = SimpleNamespace(
        **found,
        config=model.config,
        parameters=nn.ModuleDict(found).parameters,  # tied weights once
    )
    members = tuple(tuple(modules[id(m)] for m in level) for level in learner.modules)
    return replace(learner, modules=members, backbone=backbone)


def _small(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def _here(module: nn.Module) -> bool:
    return "forward" not in vars(module) and not any(p.is_meta for p in module.parameters(recurse=False))


def _copy(module: nn.Module, tensors: dict[int, Tensor], modules: dict[int, Any]) -> Any:
    """A module of the same parts; what is shared (tied weights) stays so."""
    if id(module) not in modules:
        modules[id(module)] = new = copy.copy(module)
        for kind in ("_parameters", "_buffers"):
            held = {name: _wide(t, tensors) for name, t in vars(module)[kind].items()}
            object.__setattr__(new, kind, held)
        object.__setattr__(new, "_modules", {
            name: None if part is None else _copy(part, tensors, modules) for name, part in module._modules.items()
        })  # fmt: skip
    return modules[id(module)]


def _wide(tensor: Tensor | None, tensors: dict[int, Tensor]) -> Tensor | None:
    if tensor is None or not _small(tensor):
        return tensor
    if id(tensor) not in tensors:
        tensors[id(tensor)] = tensor.to(torch.float32)
    return tensors[id(tensor)]
