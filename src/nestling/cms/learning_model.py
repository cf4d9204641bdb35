"""What a model with levels does beyond its own forward: read streams, be used as it has become, be merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestling.cms.apart import read_apart
from nestling.cms.arguments import check_found, check_ids, check_options, check_whole, ids_of, scoring
from nestling.cms.attention_maps import whole_map
from nestling.cms.backbones import HiddenStates
from nestling.cms.cache import LevelsCache, fill
from nestling.cms.ending import finished
from nestling.cms.fast_linear import Delta, Factors, FastLinear, applied, untraced
from nestling.cms.learner import Learner
from nestling.cms.rows import rows_of
from nestling.cms.state import level_bytes, shapes
from nestling.cms.wide import widened
from nestling.utils.transforms import is_transformed

# the models that this thread or task uses as they have become
_ADAPTED: ContextVar[tuple[LearningMixin, ...]] = ContextVar("adapted", default=())


class LearningMixin:
    """Mixed into a causal language model with a `learner`: its forward reads streams and lets the levels learn.

    Attributes:
        learning: False reads as the model itself would, and learns nothing.
    """

    learner: Learner
    learning: bool = True
    if TYPE_CHECKING:  # what the model brings that this is mixed into
        model: Any
        config: Any
        training: bool
        parameters: Any
        get_input_embeddings: Any
        loss_function: Any
        _is_stateful: bool

    @property
    def reads(self) -> bool:
        """Whether levels learn from what the model reads now (not inside `adapted`)."""
        return self.learning and bool(self.learner.fast) and not self._adapted_now()

    @untraced
    def _adapted_now(self) -> bool:
        return any(m is self for m in _ADAPTED.get())

    @untraced
    def read(self, input_ids: Tensor | None, *, past_key_values: Any = None, **call: Any) -> CausalLMOutputWithPast:
        """A forward that learns from `input_ids` [B, T], B streams; the cache carries them.

        Keyword arguments are those of the model's forward; each has its effect, or is refused by name. Each row is read
        as it would be alone and without its padding (`nestling.cms.apart`); logits at padding are zeros. Where a row is
        packed, each text after the first is a stream of its own that begins anew, and the last one is carried on.

        Args:
            attention_mask, position_ids, cu_seq_lens_q, seq_idx: padding, and where texts begin (`nestling.cms.rows`).
            inputs_embeds: [B, T, D] in place of input_ids: the embeddings of tokens, which are found by them.
            next_tokens: [B, 1], those that follow, if they are known: a chunk that ends here is then learned at once,
                and not read again with the next call, which must begin with them.

        Raises:
            ValueError: inputs that are not tokens (a level learns from the tokens it reads), or do not fit; weights
                that are sharded.
            TypeError: an argument that no model has.
        """
        if is_transformed():
            raise ValueError("levels that learn in a context cannot be exported or go through torch.func, which must "
                             "not look at values: set model.learning = False")  # fmt: skip
        check_whole(self)
        if not torch.is_inference_mode_enabled():
            return self._read(input_ids, past_key_values, **call)
        with torch.inference_mode(False), torch.no_grad():  # levels need autograd, and what it saved
            cache = past_key_values
            self._own(cache)
            call, input_ids = _owned(call), _owned(input_ids)
            return self._read(input_ids, cache, **call)

    def _read(
        self,
        input_ids: Tensor | None,
        past_key_values: Any,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        next_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        attentions = check_options(self.config, kwargs, self.learner.backbone.has_maps)
        if input_ids is None:
            input_ids = ids_of(inputs_embeds, self.get_input_embeddings(), self.config.vocab_size)
        self._check_read(input_ids, past_key_values)
        (batch, tokens), vocab = input_ids.shape, self.config.vocab_size
        cache = self._cache_for(past_key_values)
        read = None if position_ids is None else cache.tokens_read(batch)
        rows = rows_of((batch, tokens), attention_mask, position_ids, kwargs, cache.get_seq_length(), read)
        if inputs_embeds is not None:
            input_ids = check_found(input_ids, None if rows is None else rows.real)
        input_ids, scored = check_ids(input_ids, vocab), scoring(labels, kwargs, (batch, tokens), vocab)
        if next_tokens is not None:
            if tuple(next_tokens.shape) != (batch, 1):
                raise ValueError(f"next_tokens must be [{batch}, 1], one token for each row of input_ids; "
                                 f"got {tuple(next_tokens.shape)}")  # fmt: skip
            next_tokens = check_ids(next_tokens, vocab, "next_tokens")
        fill(cache, self.learner.backbone.blocks)
        asked = any(getattr(block, "gradient_checkpointing", False) for block in self.model.layers)
        keep = logits_to_keep if isinstance(logits_to_keep, int) and scored is None else 0
        learner = widened(self.learner)
        count = learner.backbone.blocks + 1
        chosen = _chosen(kwargs.get("output_hidden_states", self.config.output_hidden_states), count)
        kept = HiddenStates(count - 1, attentions) if chosen or attentions else None
        how = (keep, next_tokens, asked and self.training, kept, inputs_embeds)
        if attentions and (rows is not None or cache.parts):
            raise ValueError(
                "output_attentions is of rows without padding that are read in step: give each its own call"
            )
        seen = cache.get_seq_length()
        if rows is None and not cache.parts:
            logits, cache.layers, cache.levels = learner.read(input_ids, cache.layers, cache.levels, *how)
        else:
            logits = read_apart(learner, cache, input_ids, rows, *how)
        cache.advance(tokens)
        if past_key_values is not None and cache is not past_key_values:
            # so that going on with it is refused, and not a new beginning
            past_key_values.layers = cache.places()[0].cache.layers
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None if scored is None else self.loss_function(logits=logits, **scored)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        carried = cache if use_cache or past_key_values is not None else None
        hidden = tuple(_whole(p) if n in chosen else None for n, p in enumerate(kept or ())) if chosen else None
        maps = tuple(whole_map(parts, seen) for parts in kept.maps) if attentions else None
        return CausalLMOutputWithPast(
            loss=loss, logits=logits[:, wanted], past_key_values=carried, hidden_states=hidden, attentions=maps
        )

    def _cache_for(self, cache: Any) -> LevelsCache:
        """The cache of this call: a fresh one in place of none, or of an empty one that cannot carry levels."""
        return cache if isinstance(cache, LevelsCache) else self._new_cache()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> Any:
        kinds = (None, "dynamic", "dynamic_full") if self.reads else (None, "dynamic", "dynamic_full", "offloaded")
        if self._is_stateful and generation_config.cache_implementation not in kinds:
            raise ValueError(
                f"cache_implementation {generation_config.cache_implementation!r} cannot hold what "
                f'{type(self).__name__} has read: leave it out, or use "dynamic"'
            )
        if self.reads and generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self._new_cache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)

    def _new_cache(self) -> LevelsCache:
        return LevelsCache()

    def _check_read(self, input_ids: Tensor, cache: Any) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.shape[0] == 0:
            raise ValueError(f"input_ids must be [B, T] with B and T of at least 1; got {tuple(input_ids.shape)}")
        if cache is not None and not isinstance(cache, DynamicCache):
            raise TypeError(f"past_key_values must be what a call of this model returned; got {type(cache).__name__}")
        if isinstance(cache, LevelsCache) and cache.streams:
            self.check_streams(cache)
            if cache.streams != input_ids.shape[0]:
                raise ValueError(
                    f"past_key_values holds {cache.streams} streams, but input_ids has {input_ids.shape[0]}"
                )
        elif cache is not None and DynamicCache.get_seq_length(cache):  # not of padding alone
            raise ValueError("past_key_values was filled without levels: begin with past_key_values=None")

    def check_streams(self, cache: Any) -> None:
        """Raise ValueError unless what is in a cache was learned by levels of this model's kind and sizes."""
        if not isinstance(cache, LevelsCache):
            raise TypeError(f"expected the cache that reading with this model returned; got {type(cache).__name__}")
        ours = [shapes(level, modules) for level, modules in zip(self.learner.levels, self.learner.modules)]
        for _, part in cache.places():
            if (state := part.levels) is None:
                continue
            theirs = [None if s is None else [tuple(d.shape[1:]) for d in s.deltas] for s in state.levels]
            if len(theirs) != len(ours) or any(t is not None and t != o for t, o in zip(theirs, ours)):
                raise ValueError(
                    f"the cache was made by a model with other levels ({len(theirs)} levels; this one has {len(ours)}: "
                    f"{self.learner.levels}): begin with past_key_values=None"
                )

    def finish(self, cache: LevelsCache, next_tokens: Tensor | None = None) -> None:
        """Learn what is left of a text at its end: the open chunk, as a shorter one; reading on is as it was.

        Each level steps by the share of its chunk that was read, so that a token weighs as much as any other, and what
        is read next opens a chunk. A stream without an open chunk stays as it is.

        Args:
            next_tokens: [B, 1], what follows, if it is known (an end-of-text token); else the last token is only a
                target. A single token without a target is not learned yet: its chunk stays open.

        Raises:
            ValueError: the cache of another model, or tokens that do not fit it.
        """
        self.check_streams(cache)
        check_whole(self)
        if next_tokens is not None:
            if tuple(next_tokens.shape) != (cache.streams, 1):
                raise ValueError(f"next_tokens must be [{cache.streams}, 1], one token for each stream of the cache; "
                                 f"got {tuple(next_tokens.shape)}")  # fmt: skip
            next_tokens = check_ids(next_tokens, self.config.vocab_size, "next_tokens")
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                self._own(cache)
                return self.finish(cache, _owned(next_tokens))
        learner = widened(self.learner)
        for rows, part in cache.places():
            if part.levels is not None:
                part.levels = finished(
                    learner, part.layers, part.levels, None if next_tokens is None else next_tokens[list(rows)]
                )

    def _own(self, cache: Any) -> None:
        """Let a cache that was filled in inference mode go through autograd.

        Raises:
            ValueError: the weights cannot.
        """
        if any(p.is_inference() for p in self.parameters()):
            raise ValueError("the weights were made inside torch.inference_mode: load the model outside it to learn")
        held = [place.cache for place in cache.places()] if isinstance(cache, LevelsCache) else [cache]
        for part in held:
            for layer in getattr(part, "layers", ()):
                vars(layer).update(_owned(vars(layer)))
            if getattr(part, "levels", None) is not None:
                part.levels = part.levels.map(_owned)

    @contextmanager
    def adapted(self, cache: LevelsCache) -> Iterator[None]:
        """Inside, the model is what it has become by reading, and learns nothing more.

        It is called like the plain model: any batch, padding, generate(), caches of its own. If `cache` holds one
        stream, all rows of a batch are answered by it; else row b by stream b.

        Raises:
            ValueError: the cache of another model.
        """
        self.check_streams(cache)
        modules, deltas = self._learned(cache)
        cast = [None if d is None else d.to(m.weight.dtype) for m, d in zip(modules, deltas)]
        token = _ADAPTED.set((*_ADAPTED.get(), self))
        try:
            with applied(modules, cast):
                yield
        finally:
            _ADAPTED.reset(token)

    def _learned(self, cache: LevelsCache) -> tuple[list[FastLinear], list[Delta | None]]:
        """The layers of the levels that learn, and what all streams of a cache have learned, row by row."""
        modules, deltas = self.learner.adapted(cache.levels)
        for rows, part in cache.parts:
            for n, own in enumerate(self.learner.adapted(part.levels)[1]):
                if own is None:
                    continue
                mine, held = (d.up if isinstance(d, Factors) else d for d in (own, deltas[n]))
                held = mine.new_zeros(cache.streams, *mine.shape[1:]) if held is None else held
                whole = held.index_copy(0, torch.tensor(rows, device=mine.device), mine)
                deltas[n] = own._replace(up=whole) if isinstance(own, Factors) else whole
        return modules, deltas

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes of the levels' state of `batch` streams, known before anything is read."""
        learner = self.learner
        return sum(level_bytes(learner.levels[i], learner.modules[i], batch, learner.chunk_size) for i in learner.fast)


def _chosen(asked: bool | Sequence[int] | None, count: int) -> set[int]:
    """Which of a model's hidden states are asked for: all, none, or those of a list, counted from either end.

    Raises:
        ValueError: one that the model does not have.
    """
    if asked is None or isinstance(asked, bool):
        return set(range(count)) if asked else set()
    if wrong := [n for n in asked if not -count <= n < count]:
        raise ValueError(f"output_hidden_states names {wrong[0]}, but the model has {count} hidden states")
    return {n % count for n in asked}


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # a single one stays the one in the graph


def _owned(value: Any) -> Any:
    """With every tensor that autograd could not save (made in inference mode) copied."""
    return tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, value)


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
    chosen = model.learner.fast if levels is None else list(levels)
    if wrong := [i for i in chosen if i not in model.learner.fast]:
        raise ValueError(f"levels names level {wrong[0]}, but those that learn in a context are {model.learner.fast}")
    if not cache.streams:
        return
    if not 0 <= stream < cache.streams:
        raise ValueError(f"stream {stream} is not in the cache, which holds {cache.streams}")
    if any(module.weight.is_meta for i in chosen for module in model.learner.modules[i]):
        raise ValueError("the weights are offloaded (accelerate): take the hooks off the model to merge into it")
    state = cache.taken([stream]).levels
    for i in chosen if state is not None else ():
        if state.levels[i] is not None:
            own = model.learner.differences(i, state.levels[i].deltas)
            for module, delta in zip(model.learner.modules[i], own, strict=True):
                delta = delta.product[0] if isinstance(delta, Factors) else delta[0]
                module.weight.copy_(module.weight.to(delta.dtype) + delta)
    cache.reset(chosen)
