"""What the levels of a model hold of its streams, predicted from their settings: a state must be made of that."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from nestling.cms.learner import Learner
from nestling.cms.state import LevelState, StreamState, blank_level
from nestling.schedule import Level
from nestling.utils.likeness import Like, activations, check_like, columns, likeness


def check_stream(learner: Learner, state: Any, batch: int) -> None:
    """Raise ValueError unless `state` is what this learner's levels hold of `batch` streams at one place.

    Names, shapes and types of all tensors are compared, with no look at values. It takes milliseconds where a model has
    many levels' layers, so it is for states that come from outside; `LearningMixin.check_streams` is for each call.
    """
    theirs = getattr(state, "levels", None)
    if not isinstance(state, StreamState) or not isinstance(theirs, tuple) or len(theirs) != len(learner.levels):
        count = f"{len(theirs)} levels" if isinstance(theirs, tuple) else f"a {type(state).__name__}"
        raise ValueError(f"the state was made by a model with other levels: {count}; this one has "
                         f"{len(learner.levels)}: {learner.levels}")  # fmt: skip
    levels = tuple(
        None if held is None or i not in learner.fast else _expected(learner, i, batch) for i, held in enumerate(theirs)
    )
    count, hidden, start, model = columns(state.tokens, 1), None, None, learner.backbone.model
    if count:
        above = learner.backbone.blocks - learner.first
        marks = state.start if isinstance(state.start, tuple) and len(state.start) == above else (None,) * above
        hidden = Like((batch, count, model.config.hidden_size), activations(model.lm_head.weight.dtype))
        if len({mark for mark in marks if isinstance(mark, int)}) > 1:
            raise ValueError(f"learned.start holds lengths {marks}: blocks that began their chunk at different places")
        start = tuple(learner.backbone.mark_like(learner.first + n, mark, batch) for n, mark in enumerate(marks))
    if (
        type(state.dropped) is type(state.position) is int and -state.position <= state.dropped < 0
    ):  # after chunks that ended early
        state = replace(state, dropped=0)
    check_like(state, StreamState(levels, Like((batch, count), (torch.int64,)), hidden, start), "learned")
    if count > learner.chunk_size or (state.position - count) % learner.chunk_size:
        raise ValueError(f"learned.tokens has {count} tokens of an open chunk at position {state.position}, but chunks "
                         f"of this model have {learner.chunk_size} and end at multiples of it")  # fmt: skip


def check_values(learner: Learner, state: StreamState) -> None:
    """Raise ValueError for what reading never leaves: NaN in what was learned, tokens outside the vocabulary."""
    for path, leaf in tree_flatten_with_path(state.levels)[0]:
        name = keystr(path)
        if isinstance(leaf, Tensor) and not name.endswith(".written") and bool(leaf.isnan().any()):
            raise ValueError(f"learned.levels{name} holds NaN, which no update leaves")
    vocab = learner.backbone.model.config.vocab_size
    if bool(((state.tokens < 0) | (state.tokens >= vocab)).any()):
        raise ValueError(f"learned.tokens has an id outside the vocabulary of {vocab} tokens")


def _expected(learner: Learner, index: int, batch: int) -> LevelState:
    sizes = tuple((m.out_features, m.in_features, m.weight.dtype) for m in learner.modules[index])
    return _level_like(learner.levels[index], sizes, batch, learner.chunk_size)


@lru_cache(maxsize=64)
def _level_like(level: Level, sizes: tuple, batch: int, chunk_size: int) -> LevelState:
    return likeness(blank_level(level, sizes, batch, chunk_size))
