"""A pre-trained model made a continual learner (decision D15): its MLPs become levels, or get levels added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestling.continuum.engine import META_GRADS, VARIANTS, Learner, plan
from nestling.continuum.state import StreamState, level_bytes
from nestling.continuum.weights import FastLinear, make_fast
from nestling.levels.schedule import Level, check_order

PLACEMENTS = ("depth", "width")


class LevelsCache(DynamicCache):
    """A key-value cache that also carries what the streams' levels have learned (`levels`)."""

    levels: StreamState | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the keys, values and levels of the beam it continues."""
        super().reorder_cache(beam_idx)
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these streams."""
        super().batch_select_indices(indices)
        self._change(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each stream."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Forget keys, values and what was learned."""
        super().reset()
        self.levels = None

    def crop(self, max_length: int) -> None:
        """What was learned cannot be unlearned token by token: only a crop that changes nothing is possible."""
        if max_length < 0 or max_length < self.get_seq_length():
            raise ValueError("a cache with levels cannot be cropped: keep a copy from before those tokens")

    def fork(self) -> LevelsCache:
        """A copy that goes its own way; tensors are shared, since none is ever written into."""
        copy = LevelsCache([(layer.keys, layer.values) for layer in self.layers]) if self.layers else LevelsCache()
        copy.levels = self.levels
        return copy

    def _change(self, change) -> None:
        if self.levels is not None:
            self.levels = self.levels.map(change)


class AddedBlock(nn.Module):
    """A level added behind an MLP: x + down(silu(up(x))), with down at zero, so that at first it adds nothing."""

    def __init__(self, dim: int, width: int, like: Tensor) -> None:
        super().__init__()
        options = dict(bias=False, device=like.device, dtype=like.dtype)
        self.up_proj, self.down_proj = nn.Linear(dim, width, **options), nn.Linear(width, dim, **options)
        nn.init.normal_(self.up_proj.weight, std=dim**-0.5)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return x + self.down_proj(nn.functional.silu(self.up_proj(x)))


class Chain(nn.Module):
    """The MLP of a pre-trained block as the slowest level, the added ones behind it (NL Eq. 70)."""

    def __init__(self, mlp: nn.Module, added: Sequence[AddedBlock]) -> None:
        super().__init__()
        self.mlp, self.added = mlp, nn.ModuleList(added)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        y = self.mlp(x)
        for block in self.added:
            y = block(y)
        return y


class Stacked:
    """What `stack_levels` mixes into a model's class: its forward reads streams and lets the levels learn."""

    learner: Learner
    recipe: dict[str, Any]  # the arguments of `stack_levels`
    learning: bool = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """As the model's own forward; levels learn from `input_ids` while it reads, and the cache carries them.

        Raises:
            ValueError: padding, or inputs that are not token ids: a level learns from the tokens it reads.
        """
        if not self.learner.fast or not self.learning:
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, labels=labels,
                use_cache=use_cache, logits_to_keep=logits_to_keep, **options,
            )  # fmt: skip
        self._check_input(input_ids, attention_mask, past_key_values)
        cache = LevelsCache() if past_key_values is None else past_key_values
        if not isinstance(cache, LevelsCache):
            cache.__class__ = LevelsCache  # what generate() made: it carries levels from here on

        def run(tokens: Tensor, cache: DynamicCache) -> Tensor:
            return super(Stacked, self).forward(input_ids=tokens, past_key_values=cache, use_cache=True).logits

        logits, cache.levels = self.learner.read(self, run, input_ids, cache, cache.levels)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = None if use_cache is False and past_key_values is None else cache
        return CausalLMOutputWithPast(loss=loss, logits=logits[:, keep], past_key_values=kept)

    def _check_input(self, input_ids: Tensor | None, mask: Tensor | None, cache: Any) -> None:
        if input_ids is None:
            raise ValueError("a model with levels reads input_ids: it learns from the tokens")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be [B, T] with T of at least 1; got {tuple(input_ids.shape)}")
        if mask is not None and not bool(mask.to(torch.bool).all()):
            raise ValueError(
                "attention_mask has padding, and a level would learn from it: read texts of other lengths one by one"
            )
        if cache is not None and not isinstance(cache, DynamicCache):
            raise TypeError(f"past_key_values must be what a call of this model returned; got {type(cache).__name__}")
        if isinstance(cache, LevelsCache) and cache.levels is not None:
            batch = cache.levels.tokens.shape[0]
            if batch != input_ids.shape[0]:
                raise ValueError(f"past_key_values holds {batch} streams, but input_ids has {input_ids.shape[0]}")
        elif cache is not None and cache.get_seq_length():
            raise ValueError("past_key_values was filled without levels: begin with past_key_values=None")

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes of the levels' state of `batch` streams, known before anything is read."""
        levels, modules, fast = self.learner.levels, self.learner.modules, self.learner.fast
        return sum(level_bytes(levels[i], modules[i], batch, n == 0) for n, i in enumerate(fast))


def stack_levels(
    model: PreTrainedModel,
    levels: Sequence[Level | dict[str, Any]],
    placement: str = "depth",
    *,
    blocks: Sequence[int] | None = None,
    width: int | None = None,
    variant: str = "sequential",
    meta_grad: str = "first_order",
) -> PreTrainedModel:
    """Turn a Llama-family model into a continual learner, in place; at first it computes exactly what it did.

    Args:
        model: a causal language model whose decoder blocks have an `mlp` of linear layers (Llama, Mistral, Qwen,
            SmolLM).
        levels: Levels, fastest first.
        placement: "depth" shares the blocks' MLPs out over the levels, the fastest in the last blocks; "width" leaves
            every MLP as the slowest level and adds a small block behind it for each level, the fastest last.
        blocks: indices of the decoder blocks that take part, None for all (negative ones count from the end).
        width: hidden width of an added block, None for a sixteenth of the model's width.
        variant: "sequential" or "nested" (decision D12).  meta_grad: "full" or "first_order" (decision D9).

    Returns:
        The same object, of a subclass of its class. It is called as before; `past_key_values` carries what it learned.

    Raises:
        TypeError: not such a model.  ValueError: levels, placement or blocks that do not fit it.
    """
    for name, value, known in (
        ("placement", placement, PLACEMENTS), ("variant", variant, VARIANTS), ("meta_grad", meta_grad, META_GRADS)
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    if isinstance(model, Stacked):
        raise ValueError("the model has levels already: stack them once, on the model as it was loaded")
    levels = check_order(levels)
    layers = _decoder_blocks(model)
    chosen = list(range(len(layers))) if blocks is None else sorted({_index(i, len(layers)) for i in blocks})
    if not chosen:
        raise ValueError("blocks is empty: name at least one decoder block, or None for all")
    if placement == "depth":
        if len(chosen) < len(levels):
            raise ValueError(f"{len(levels)} levels cannot share {len(chosen)} blocks: fewer levels or more blocks")
        members = [[layers[chosen[n]].mlp for n in share] for share in plan(levels, len(chosen))]
    else:
        members = _add_blocks([layers[i] for i in chosen], len(levels), width)
    modules = tuple(
        tuple(make_fast(m) for part in level for m in part.modules() if isinstance(m, nn.Linear)) for level in members
    )
    for level, parts in zip(levels, modules):
        for part in parts if level.frozen else ():
            part.weight.requires_grad_(False)  # no outer optimiser either
    model.__class__ = type(f"Stacked{type(model).__name__}", (Stacked, type(model)), {})
    model.learner = Learner(levels, modules, variant, meta_grad)
    model.recipe = dict(levels=[level.to_dict() for level in levels], placement=placement, blocks=chosen, width=width)
    model.recipe |= dict(variant=variant, meta_grad=meta_grad)
    return model


def _decoder_blocks(model: Any) -> nn.ModuleList:
    layers = getattr(getattr(model, "model", None), "layers", None)
    found = isinstance(model, PreTrainedModel) and isinstance(layers, nn.ModuleList) and hasattr(model, "lm_head")
    linear = found and all(
        isinstance(getattr(block, "mlp", None), nn.Module)
        and any(isinstance(m, nn.Linear) for m in block.mlp.modules())
        and hasattr(block, "self_attn")
        for block in layers
    )
    if not linear:
        raise TypeError(
            f"{type(model).__name__} is not a Llama-family language model: stack_levels needs decoder blocks "
            "model.layers[i] with self_attn and an mlp of linear layers, and a head lm_head"
        )
    if getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
        raise TypeError(f"{type(model).__name__} has a sliding window, whose cache cannot go back to a chunk's start")
    return layers


def _index(i: int, count: int) -> int:
    if not -count <= i < count:
        raise ValueError(f"blocks names block {i}, but the model has {count}")
    return i % count


def _add_blocks(layers: list[nn.Module], count: int, width: int | None) -> list[list[FastLinear]]:
    """Chains in place of the MLPs; the added blocks of each level, fastest level first."""
    members: list[list[nn.Module]] = [[] for _ in range(count)]
    for block in layers:
        like = next(block.mlp.parameters())
        dim = next(m for m in block.mlp.modules() if isinstance(m, nn.Linear)).in_features
        added = [AddedBlock(dim, width or max(1, dim // 16), like) for _ in range(count)]
        for level, part in zip(members, reversed(added)):  # the fastest last in the chain
            level.append(part)
        block.mlp = Chain(block.mlp, added)
    return members
