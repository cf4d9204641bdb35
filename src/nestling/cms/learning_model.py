"""What a model with levels does beyond its own forward: read streams, be used as it has become, be merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestling.cms.cache import LevelsCache, fill
from nestling.cms.fast_linear import applied
from nestling.cms.learner import Learner
from nestling.cms.state import level_bytes


class LearningMixin:
    """Mixed into a causal language model with a `learner`: its forward reads streams and lets the levels learn.

    Attributes:
        learning: False reads as the model itself would, and learns nothing.
    """

    learner: Learner
    learning: bool = True

    @property
    def reads(self) -> bool:
        """Whether levels learn from what the model reads now."""
        return self.learning and bool(self.learner.fast)

    def read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        next_tokens: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """A forward that learns from `input_ids` [B, T], B streams; the cache carries them.

        Args:
            next_tokens: [B, 1], those that follow, if they are known: a chunk that ends here is then learned at once,
                and not read again with the next call, which must begin with them.

        Raises:
            ValueError: padding, or inputs that are not token ids: a level learns from the tokens it reads.
        """
        self._check_read(input_ids, attention_mask, past_key_values)
        if next_tokens is not None and tuple(next_tokens.shape) != (input_ids.shape[0], 1):
            raise ValueError(f"next_tokens must be [{input_ids.shape[0]}, 1], one token for each row of input_ids; "
                             f"got {tuple(next_tokens.shape)}")  # fmt: skip
        cache = self._new_cache() if past_key_values is None else past_key_values
        if not isinstance(cache, LevelsCache):
            cache.__class__ = LevelsCache  # what generate() made: it carries levels from here on
        fill(cache, self.learner.backbone.blocks)
        asked = any(getattr(block, "gradient_checkpointing", False) for block in self.model.layers)
        keep = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        logits, cache.layers, cache.levels = self.learner.read(
            input_ids, cache.layers, cache.levels, keep, next_tokens, recompute=asked and self.training
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = None if use_cache is False and past_key_values is None else cache
        return CausalLMOutputWithPast(loss=loss, logits=logits[:, wanted], past_key_values=kept)

    def _new_cache(self) -> LevelsCache:
        return LevelsCache()

    def _check_read(self, input_ids: Tensor | None, mask: Tensor | None, cache: Any) -> None:
        if input_ids is None:
            raise ValueError("a model with levels reads input_ids: it learns from the tokens")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.shape[0] == 0:
            raise ValueError(f"input_ids must be [B, T] with B and T of at least 1; got {tuple(input_ids.shape)}")
        if mask is not None and not bool(mask.to(torch.bool).all()):
            raise ValueError(
                "attention_mask has padding, and a level would learn from it: read texts of other lengths one by one, "
                "or without learning (model.adapted(cache))"
            )
        if cache is not None and not isinstance(cache, DynamicCache):
            raise TypeError(f"past_key_values must be what a call of this model returned; got {type(cache).__name__}")
        if isinstance(cache, LevelsCache) and cache.levels is not None:
            self.check_streams(cache)
            batch = cache.levels.tokens.shape[0]
            if batch != input_ids.shape[0]:
                raise ValueError(f"past_key_values holds {batch} streams, but input_ids has {input_ids.shape[0]}")
        elif cache is not None and cache.get_seq_length():
            raise ValueError("past_key_values was filled without levels: begin with past_key_values=None")

    def check_streams(self, cache: Any) -> None:
        """Raise ValueError unless what is in a cache was learned by levels of this model's kind and sizes."""
        if not isinstance(cache, LevelsCache):
            raise TypeError(f"expected the cache that reading with this model returned; got {type(cache).__name__}")
        state = cache.levels
        if state is None:
            return
        theirs = [None if s is None else [tuple(d.shape[1:]) for d in s.deltas] for s in state.levels]
        ours = [[tuple(m.weight.shape) for m in modules] for modules in self.learner.modules]
        fits = len(theirs) == len(ours) and all(t is None or t == o for t, o in zip(theirs, ours))
        if not fits:
            raise ValueError(
                f"the cache was made by a model with other levels ({len(theirs)} levels; this one has {len(ours)}: "
                f"{self.learner.levels}): begin with past_key_values=None"
            )

    @contextmanager
    def adapted(self, cache: LevelsCache) -> Iterator[None]:
        """Inside, the model is what it has become by reading, and learns nothing more.

        It is called like the plain model: any batch, padding, generate(), caches of its own. If `cache` holds one
        stream, all rows of a batch are answered by it; else row b by stream b.

        Raises:
            ValueError: the cache of another model.
        """
        self.check_streams(cache)
        modules, deltas = self.learner.adapted(cache.levels)
        cast = [None if d is None else d.to(m.weight.dtype) for m, d in zip(modules, deltas)]
        before, self.learning = self.learning, False
        try:
            with applied(modules, cast):
                yield
        finally:
            self.learning = before

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes of the levels' state of `batch` streams, known before anything is read."""
        learner = self.learner
        return sum(level_bytes(learner.levels[i], learner.modules[i], batch, learner.chunk_size) for i in learner.fast)


@torch.no_grad()
def merge(model: LearningMixin, cache: LevelsCache, *, stream: int = 0, levels: Iterable[int] | None = None) -> None:
    """Consolidate what a stream has learned into the shared weights; in the cache those levels begin anew.

    The model then computes for everybody what it computed for that stream; other streams' states, made with the old
    weights, no longer fit it.

    Args:
        stream: which of the cache's streams.  levels: indices (0 is the fastest), None for all.

    Raises:
        ValueError: the cache of another model, no such stream or level.
    """
    model.check_streams(cache)
    state = cache.levels
    chosen = model.learner.fast if levels is None else list(levels)
    if wrong := [i for i in chosen if i not in model.learner.fast]:
        raise ValueError(f"levels names level {wrong[0]}, but those that learn in a context are {model.learner.fast}")
    if state is None:
        return
    if not 0 <= stream < state.tokens.shape[0]:
        raise ValueError(f"stream {stream} is not in the cache, which holds {state.tokens.shape[0]}")
    for i in chosen:
        if state.levels[i] is not None:
            for module, delta in zip(model.learner.modules[i], state.levels[i].deltas, strict=True):
                module.weight.copy_(module.weight.to(delta.dtype) + delta[stream])
    cache.reset(chosen)
