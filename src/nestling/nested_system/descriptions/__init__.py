"""Descriptions of the modules and optimisers that are known: importing this package registers them."""

from nestling.nested_system.descriptions import (
    continuum,
    huggingface,
    nestling_layers,
    nestling_optim,
    stacked,
    torch_modules,
    torch_optim,
)

__all__ = [
    "continuum", "huggingface", "nestling_layers", "nestling_optim", "stacked", "torch_modules", "torch_optim",
]  # fmt: skip
