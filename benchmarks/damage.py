"""Odd values, and damaged bytes, tensors and JSON, for `benchmarks.fuzz`."""

from __future__ import annotations

import json
import random
from typing import Any

ODD = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 1e308, -1e-300, float("nan"), float("inf"), "", "x", "é\0",
    "\ud800",
    "0", "nan", "inf", [], [[]], [1], {}, {"a": 1}, "selfmod", "../..", "a" * 5000,
]  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut off, put in or doubled."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        at = draw.randrange(len(data) + 1)
        how = draw.randrange(4)
        if how == 0 and at < len(data):
            data[at] = draw.randrange(256)
        elif how == 1:
            del data[at : at + draw.choice([1, 8, 1000, 10**9])]
        elif how == 2:
            data[at:at] = draw.randbytes(draw.choice([1, 8, 100]))
        else:
            data[at:at] = data[at : at + 64]
    return bytes(data)


def changed(tensors: dict[str, Any], draw: random.Random) -> None:
    """One tensor gone, or of another shape, type or content."""
    import torch

    if not tensors:
        return
    name = draw.choice(sorted(tensors))
    old = tensors[name]
    new = [
        lambda: old[..., :0], lambda: old.flatten(), lambda: old.double(), lambda: old.to(torch.int64),
        lambda: old * torch.nan, lambda: torch.zeros(3), lambda: old.bool(), lambda: old.unsqueeze(0),
    ]  # fmt: skip
    if draw.random() < 0.15:
        del tensors[name]
    else:
        tensors[name] = draw.choice(new)().contiguous().clone()


def odd_json(text: str, draw: random.Random) -> str:
    """The JSON with one value somewhere replaced, removed or added."""
    value = json.loads(text)
    inner, places = value, []
    for _ in range(8):
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        if not keys:
            break
        key = draw.choice(keys)
        places.append((inner, key))
        inner = inner[key]
    if not places:
        return json.dumps(draw.choice(ODD))
    where, key = draw.choice(places)
    if draw.random() < 0.2:
        del where[key]
    else:
        where[key] = draw.choice(ODD)
    return json.dumps(value)


def plain(draw: random.Random) -> str:
    """An odd value as a word of a command line."""
    value = draw.choice(ODD)
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\0", "")
