"""The pre-trained model that the experiments with continual learners start from."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from nestling.cms.pretrained import find_pretrained, load_pretrained


@functools.lru_cache(maxsize=2)
def pretrained(name: str, dtype: str = "bfloat16") -> tuple[nn.Module, Any]:
    """The pre-trained model of that name (or folder, or file) and its tokenizer, loaded once per process."""
    model, tokenizer = load_pretrained(find_pretrained(name))
    return model.to(getattr(torch, dtype)).requires_grad_(False), tokenizer
