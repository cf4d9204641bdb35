"""Attention maps, also of a model whose kernel keeps none: a call that asks for them runs copies with eager attention.

The copies share every part with the model; nothing is written to those that others may be calling.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EAGER = "eager"


def keeping(config: Any) -> Any:
    """A model's configuration with attention that keeps its maps; itself where it has that already."""
    if config._attn_implementation == EAGER:
        return config
    config = copy.copy(config)
    config._attn_implementation_internal = EAGER
    return config


def keeping_block(block: nn.Module, config: Any, maps: list[Tensor] | None = None) -> nn.Module:
    """A decoder block with a configuration of `keeping`; `maps` gets those of its next call, [B, heads, n, keys]."""
    attention = _own(block.self_attn)
    attention.config = config
    if maps is not None:
        attention.register_forward_hook(lambda module, given, out: maps.append(out[1]))
    return _own(block, self_attn=attention)


def keeping_model(model: Any) -> Any:
    """A model of the Llama family whose next call may return its maps."""
    config = keeping(model.config)
    if config is model.config:
        return model
    layers = nn.ModuleList([keeping_block(block, config) for block in model.model.layers])
    inner = _own(model.model, layers=layers)
    twin = _own(model, model=inner)
    twin.config = inner.config = config
    return twin


def whole_map(parts: Sequence[Tensor], seen: int) -> Tensor:
    """Maps [B, heads, n, keys] of the parts of a call as one, over all `seen` + T tokens; zeros at what comes later."""
    total, rows = seen + sum(part.shape[2] for part in parts), []
    for part in parts:
        seen += part.shape[2]
        rows.append(F.pad(part, (seen - part.shape[3], total - seen)))  # a context begun anew sees none before it
    return torch.cat(rows, 2)


def _own(module: nn.Module, **parts: nn.Module) -> Any:
    """A module of the same parts but these, with hooks of its own."""
    module = copy.copy(module)
    object.__setattr__(module, "_modules", {**module._modules, **parts})
    object.__setattr__(module, "_forward_hooks", copy.copy(module._forward_hooks))
    return module
