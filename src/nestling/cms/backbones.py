"""What the engine needs of a model: embedding, blocks one after another with their state, head.

A mark is the state of one block's sequence layer at some moment, as a value: a key-value cache is marked by its length
(keys and values are never written into), a recurrent state by itself.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.masking_utils import create_causal_mask

from nestling.cms.attention_maps import keeping, keeping_block
from nestling.utils.likeness import Like, activations, columns

Layers = list[CacheLayerMixin]


class HiddenStates(list[list[Tensor]]):
    """Of each decoder block's input and of the last one's normed output, the parts [B, n, D] of a text, in order.

    Attributes:
        maps: the same of each block's attention, [B, heads, n, keys]; None where nobody asks.
    """

    def __init__(self, blocks: int, maps: bool = False) -> None:
        super().__init__([] for _ in range(blocks + 1))
        self.maps: list[list[Tensor]] | None = [[] for _ in range(blocks)] if maps else None

    def detach_last(self) -> None:
        """Cut the graph at the part that was added last."""
        for parts in (*self, *(self.maps or ())):
            parts[-1] = parts[-1].detach()


class Backbone(ABC):
    """A causal language model in parts, with the names that Llama gave them.

    Attributes:
        has_maps: whether its sequence layers have attention maps.
    """

    has_maps = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.model.model.layers)

    def embed(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        """ids [B, T] -> hidden [B, T, D]: what was given in place of their embeddings, if anything."""
        table = self.model.model.embed_tokens
        return table(ids) if given is None else given.to(table.weight.dtype)

    def head(self, hidden: Tensor, kept: HiddenStates | None = None) -> Tensor:
        """hidden [B, T, D] -> logits [B, T, V]; `kept` gets the normed hidden state."""
        hidden = self.model.model.norm(hidden)
        if kept is not None:
            kept[-1].append(hidden)
        return self.model.lm_head(hidden)

    @abstractmethod
    def run(self, hidden: Tensor, layers: Layers, start: int, stop: int, kept: HiddenStates | None = None) -> Tensor:
        """Through the blocks start..stop; `layers`, the cache's of all blocks, go on in place.

        `kept` gets what goes into each block but the first of these.
        """

    @abstractmethod
    def mark(self, layer: CacheLayerMixin) -> Any:
        """The state of a block's sequence layer now."""

    @abstractmethod
    def state_like(self, index: int, state: Any, batch: int) -> Any:
        """What block `index` holds of `batch` streams, as a Like for each tensor, as many columns as `state` has."""

    def mark_like(self, index: int, mark: Any, batch: int) -> Any:
        """The same of a mark."""
        return 0

    @abstractmethod
    def restored(self, layer: CacheLayerMixin, mark: Any) -> CacheLayerMixin:
        """A cache layer as it was at a mark, None for before the first token; `layer` stays."""

    @abstractmethod
    def detach(self, layer: CacheLayerMixin) -> None:
        """Cut the graph at a block's state."""


def run_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a decoder block, hooks and all, but let the library not recompute it by itself: that drops its cache.

    One that was compiled by itself runs as it was before: levels take gradients that compiled blocks do not have.
    """
    block = block._modules.get("_orig_mod") or block
    if block._compiled_call_impl is not None or getattr(block, "gradient_checkpointing", False):
        block = copy.copy(block)  # of the same parts and uncompiled: nothing is written to what others may be calling
        block.gradient_checkpointing = False
    return block(*args, **kwargs)


class LlamaBackbone(Backbone):
    """A Llama-family model: `model.model.layers` with a rotary embedding outside, and `lm_head`."""

    has_maps = True

    def run(self, hidden: Tensor, layers: Layers, start: int, stop: int, kept: HiddenStates | None = None) -> Tensor:
        if start == stop:
            return hidden
        inner, seen = self.model.model, layers[start].get_seq_length()
        cache = DynamicCache()
        cache.layers = [layers[start]] * start + layers[start:]  # where the library looks for the length is block 0
        places = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        maps = None if kept is None else kept.maps
        config = inner.config if maps is None else keeping(inner.config)
        mask = create_causal_mask(
            config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=cache, position_ids=places
        )
        rotary = inner.rotary_emb(hidden, position_ids=places)
        for index in range(start, stop):
            if kept is not None and index > start:
                kept[index].append(hidden)
            block = inner.layers[index]
            if maps is not None:
                block = keeping_block(block, config, maps[index])
            hidden = run_block(
                block, hidden, attention_mask=mask, position_ids=places, past_key_values=cache,
                use_cache=True, position_embeddings=rotary,
            )  # fmt: skip
        return hidden

    def mark(self, layer: CacheLayerMixin) -> int:
        return layer.get_seq_length()

    def state_like(self, index: int, state: Any, batch: int) -> tuple[Like, Like]:
        return keys_like(self.model, index, state, batch)

    def restored(self, layer: CacheLayerMixin, mark: int | None) -> CacheLayerMixin:
        fresh = DynamicLayer()
        if mark:
            fresh.update(layer.keys[..., :mark, :], layer.values[..., :mark, :])
        return fresh

    def detach(self, layer: CacheLayerMixin) -> None:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def expected_layer(model: Any, index: int, state: Any, batch: int) -> Any:
    """What block `index` of a model holds of `batch` streams, as many columns as `state` has."""
    learner = getattr(model, "learner", None)
    return (keys_like(model, index, state, batch) if learner is None
            else learner.backbone.state_like(index, state, batch))  # fmt: skip


def keys_like(model: Any, index: int, state: Any, batch: int) -> tuple[Like, Like]:
    """Keys and values [B, heads, T, size] of a block; any heads where the model's attention is not like Llama's."""
    keys = state[0] if isinstance(state, tuple) and state else None
    blocks = getattr(getattr(model, "model", None), "layers", None)
    attention = None if blocks is None else getattr(blocks[index], "self_attn", None)
    size = getattr(attention, "head_dim", None) if hasattr(attention, "k_proj") else None
    heads = None if size is None else model.config.num_key_value_heads
    like = Like((batch, heads, columns(keys, 2), size), activations(next(model.parameters()).dtype))
    return like, like
