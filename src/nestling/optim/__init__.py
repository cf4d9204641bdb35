"""Optimisers of Nested Learning, as ordinary torch optimisers."""

import importlib

_HOMES = {
    "DGD": "dgd",
    "DeepMomentum": "deep_momentum",
    "DeltaMomentum": "delta_momentum",
    "M3": "m3",
    "PreconditionedMomentum": "preconditioned",
    "split_parameters": "parameters",
}

__all__ = ["DGD", "M3", "DeepMomentum", "DeltaMomentum", "PreconditionedMomentum", "split_parameters"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
