"""A nest of tensors, numbers and named tuples as JSON that says which tensor goes where."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

# the types in older files: as module:name, what they are called now
MOVED = {
    "nestling.cms.surprise:Pace": "nestling.cms.surprise:Surprise",
    "nestling.continuum.pace:Pace": "nestling.cms.surprise:Surprise",
    "nestling.continuum.state:LevelState": "nestling.cms.state:LevelState",
    "nestling.continuum.state:StreamState": "nestling.cms.state:StreamState",
}


def to_json(value: Any, tensors: list[Tensor], compact: bool = False) -> Any:
    """A nest of tensors, numbers and named tuples as JSON; tensors go to the list."""
    if isinstance(value, Tensor):
        factors = low_rank(value) if compact else None
        tensors += [value] if factors is None else factors
        return {"tensor": len(tensors) - 1} if factors is None else {"factors": [len(tensors) - 2, len(tensors) - 1]}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"named": kind, "items": [to_json(item, tensors, compact) for item in value]}
    if is_dataclass(value) and not isinstance(value, type):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        items = [getattr(value, field.name) for field in fields(value)]
        return {"named": kind, "items": [to_json(item, tensors, compact) for item in items]}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [to_json(item, tensors, compact) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[key, to_json(item, tensors, compact)] for key, item in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise ValueError(f"a state holds a {type(value).__name__}, which cannot be kept on disk")


def from_json(content: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "tensor" in content:
        return _named(tensors, content["tensor"])
    if "factors" in content:
        left, right = (_named(tensors, number) for number in content["factors"])
        return (left.double() @ right.double()).to(left.dtype)
    if "named" in content:
        return _known(content["named"])(*(from_json(item, tensors) for item in content["items"]))
    for kind, make in (("list", list), ("tuple", tuple)):
        if kind in content:
            return make(from_json(item, tensors) for item in content[kind])
    if "dict" in content:
        return {key: from_json(item, tensors) for key, item in content["dict"]}
    return content["value"]


def _named(tensors: dict[str, Tensor], number: int) -> Tensor:
    if f"t{number}" not in tensors:
        raise ValueError(f"tensor t{number} of its description is missing")
    return tensors[f"t{number}"]


def _known(kind: str) -> type:
    """A named tuple or dataclass of this package by its name; a file can name nothing else."""
    module, _, name = MOVED.get(kind, kind).partition(":")
    if module.split(".")[0] == "nestling":
        found = getattr(importlib.import_module(module), name, None)
        if isinstance(found, type) and (is_dataclass(found) or hasattr(found, "_fields")):
            return found
    raise ValueError(f"the state holds a {kind}, which this version does not know")


def low_rank(value: Tensor) -> list[Tensor] | None:
    """Factors [B, o, r], [B, r, i] of matrices [B, o, i] in float32, where they are smaller and rounding is all that is
    lost; else None."""
    if value.dim() != 3 or value.dtype != torch.float32 or min(value.shape[1:]) < 8 or not value.isfinite().all():
        return None
    left, size, right = torch.linalg.svd(value.double(), full_matrices=False)
    rank = max(1, int((size > 1e-7 * size.amax(-1, keepdim=True)).sum(-1).max()))
    if rank * sum(value.shape[1:]) >= value[0].numel():
        return None
    factors = [(left[..., :rank] * size[:, None, :rank]).float(), right[:, :rank].float()]
    rebuilt = (factors[0].double() @ factors[1].double()).float()
    close = (rebuilt - value).abs().max() <= 1e-6 * value.abs().max()
    return factors if bool(close) else None


def tensors_of(content: Any) -> Iterator[str]:
    """The names of all tensors in a description."""
    if isinstance(content, dict):
        numbers = [content["tensor"]] if "tensor" in content else content.get("factors", ())
        yield from (f"t{n}" for n in numbers)
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from tensors_of(part)
