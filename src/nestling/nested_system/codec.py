"""Dataclasses of nested tuples to JSON types and back, by their annotations."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints


def encode(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists; a class with `to_json` and no `from_dict` converts itself."""
    if is_dataclass(value):
        if _converts_itself(type(value)):
            return value.to_json()
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def _converts_itself(kind: type) -> bool:
    return hasattr(kind, "from_json") and not hasattr(kind, "from_dict")


def decode(kind: Any, value: Any) -> Any:
    """The value of type `kind` that `encode` wrote.

    Raises:
        ValueError: a field that is unknown or missing.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return decode(next(a for a in get_args(kind) if a is not type(None)), value)
    if origin is tuple:
        inner = get_args(kind)
        each = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(decode(k, v) for k, v in zip(each, value, strict=True))
    if not is_dataclass(kind):
        return value
    if _converts_itself(kind):
        return kind.from_json(value)
    hints = _hints(kind)
    if wrong := sorted(set(value) ^ set(hints)):
        raise ValueError(f"{kind.__name__} has the fields {', '.join(hints)}; {', '.join(wrong)} does not fit")
    return kind(**{name: decode(hints[name], item) for name, item in value.items()})


@cache
def _hints(kind: type) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {name: hint for name, hint in get_type_hints(kind).items() if name in names}
