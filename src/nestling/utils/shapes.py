"""Modules of which only the shapes are wanted: nothing is allocated, and nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWN = {
    "normal_",
    "uniform_",
    "kaiming_uniform_",
}  # on the meta device each goes through Python, most of the time of building a model


class _NothingDrawn(TorchFunctionMode):
    def __torch_function__(self, call: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if call.__name__ in DRAWN:
            return args[0] if args else kwargs["tensor"]
        return call(*args, **kwargs)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Inside, tensors are made on the meta device and random initial values are left out."""
    with torch.device("meta"), _NothingDrawn():
        yield
