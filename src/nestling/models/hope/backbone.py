"""A Hope model in the parts that reading with levels needs (`nestling.cms.learner`)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.cms.backbones import Backbone, HiddenStates, Layers, run_block
from nestling.cms.learner import Learner
from nestling.models.hope.cache import HopeCacheLayer

LONG_CONTEXT = 8192  # tokens of a context where the configuration sets no limit


class HopeBackbone(Backbone):
    """Decoder layers whose state is a value in their cache layer; that value is its own mark."""

    def run(self, hidden: Tensor, layers: Layers, start: int, stop: int, kept: HiddenStates | None = None) -> Tensor:
        tokens, signature = hidden.shape[1], self.model.model.signature
        cached: HopeCacheLayer
        for index, cached in enumerate(layers[start:stop], start):
            if kept is not None and index > start:
                kept[index].append(hidden)
            block = self.model.model.layers[index]
            hidden, state = run_block(block, hidden, cached.state, None)
            cached.store(state, tokens, signature)
        return hidden

    def mark(self, layer: HopeCacheLayer) -> tuple[Any, int]:
        return layer.state, layer.tokens

    def state_like(self, index: int, state: Any, batch: int) -> Any:
        mixed = state[0] if isinstance(state, tuple) and state else None
        return self.model.model.layers[index].mixer.state_like(mixed, batch), ()

    def mark_like(self, index: int, mark: Any, batch: int) -> tuple[Any, int]:
        state = mark[0] if isinstance(mark, tuple) and mark else None
        return None if state is None else self.state_like(index, state, batch), 0

    def restored(self, layer: HopeCacheLayer, mark: tuple[Any, int] | None) -> HopeCacheLayer:
        fresh = copy.copy(layer)
        fresh.reset()
        if mark is not None and mark[0] is not None:
            fresh.store(*mark, self.model.model.signature)
        return fresh

    def detach(self, layer: HopeCacheLayer) -> None:
        layer.detach()


def make_learner(model: PreTrainedModel) -> Learner:
    """The learner of a HopeForCausalLM's continuum memory: level i is block i of the chosen layers."""
    config = model.config
    chosen = range(config.num_hidden_layers) if config.cms_layers is None else config.cms_layers
    memories = [model.model.layers[i].memory for i in chosen]
    limit = config.context_length or config.max_position_embeddings or LONG_CONTEXT
    modules = tuple(
        tuple(m for memory in memories for m in memory.blocks[i].modules() if isinstance(m, nn.Linear))
        for i in range(len(config.levels))
    )
    return Learner(
        config.levels, modules, HopeBackbone(model), chosen[0], config.cms_variant, config.cms_meta_grad,
        context_length=limit,
    )  # fmt: skip
