"""What a nest of tensors should be made of, and the check that one is: by name, shape and type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_map_only

LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Like:
    """A tensor that is to come: its shape, None for any size, and the types it may have."""

    shape: tuple[int | None, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """One of the same shape and type."""
        return cls(tuple(tensor.shape), (tensor.dtype,))

    def fits(self, found: Any) -> bool:
        """Whether `found` is such a tensor."""
        return (
            isinstance(found, Tensor) and found.dtype in self.dtypes and found.dim() == len(self.shape)
            and all(own in (None, size) for own, size in zip(self.shape, found.shape))
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{' or '.join(str(d).removeprefix('torch.') for d in self.dtypes)} {list(self.shape)}"


def likeness(tensors: Any) -> Any:
    """The nest with a Like in place of every tensor."""
    return tree_map_only(Tensor, Like.of, tensors)


def columns(tensor: Any, dim: int) -> int:
    """The size of a dimension, 0 where there is no tensor of that many."""
    return tensor.shape[dim] if isinstance(tensor, Tensor) and tensor.dim() > dim else 0


def activations(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Types in which a model with weights of `dtype` may compute: its own; under autocast, or to be exact, another."""
    return (dtype,) if dtype == torch.float64 else (dtype, *(d for d in (torch.float32, *LOW) if d != dtype))


def check_like(found: Any, expected: Any, what: str) -> None:
    """Raise ValueError unless `found` is the nest `expected`: a Like stands for a tensor, another leaf for its type.

    Whole numbers must not be negative. The error names the first part that differs, by its path below `what`.
    """
    (leaves, spec), (wanted, wanted_spec) = tree_flatten(found), tree_flatten(expected)
    if spec == wanted_spec and all(map(_fits, wanted, leaves)):
        return
    named, wanted_named = ({keystr(p): leaf for p, leaf in tree_flatten_with_path(n)[0]} for n in (found, expected))
    for path in [*wanted_named, *(p for p in named if p not in wanted_named)]:
        if path not in named:
            raise ValueError(f"{what}{path} is missing; it should be {_said(wanted_named[path])}")
        if path not in wanted_named:
            raise ValueError(f"{what}{path} is {_said(named[path])}, but there should be none")
        if not _fits(wanted_named[path], named[path]):
            raise ValueError(f"{what}{path} is {_said(named[path])}; it should be {_said(wanted_named[path])}")
    raise ValueError(f"{what} is made of other parts than it should be: {spec} in place of {wanted_spec}")


def _fits(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, Like):
        return wanted.fits(found)
    return type(found) is type(wanted) and not (isinstance(found, int) and found < 0)


def _said(leaf: Any) -> str:
    if isinstance(leaf, Like):
        return str(leaf)
    if isinstance(leaf, Tensor):
        return str(Like.of(leaf))
    return "none" if leaf is None else f"a {type(leaf).__name__} ({leaf!r:.40})"
