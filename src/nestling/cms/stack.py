"""A pre-trained model made a continual learner (decision D15): its MLPs become levels, or get levels added."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestling.cms.backbones import LlamaBackbone
from nestling.cms.fast_linear import make_fast
from nestling.cms.learner import META_GRADS, VARIANTS, Learner, plan
from nestling.cms.learning_model import LearningMixin
from nestling.schedule import Level, check_order
from nestling.utils.files import write_text

PLACEMENTS = ("depth", "width")
RECIPE, FORMAT = "levels.json", "nestling-levels-1"


class AddedBlock(nn.Module):
    """A level added after an MLP: x + down(silu(up(x))), with down at zero, so that at first it adds nothing."""

    def __init__(self, dim: int, width: int, like: Tensor) -> None:
        super().__init__()
        options = dict(bias=False, device=like.device, dtype=like.dtype)
        self.up_proj, self.down_proj = nn.Linear(dim, width, **options), nn.Linear(width, dim, **options)
        nn.init.normal_(self.up_proj.weight, std=dim**-0.5)
        nn.init.zeros_(self.down_proj.weight)

    def change(self, x: Tensor) -> Tensor:
        """What the level adds to x [B, T, D]."""
        return self.down_proj(nn.functional.silu(self.up_proj(x)))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return x + self.change(x)


class Chain(nn.Module):
    """The MLP of a pre-trained block as the slowest level, the added ones after it, one after the other (NL Eq. 70) or,
    independent, side by side (Eq. 74)."""

    def __init__(self, mlp: nn.Module, added: Sequence[AddedBlock], independent: bool = False) -> None:
        super().__init__()
        self.mlp, self.added, self.independent = mlp, nn.ModuleList(added), independent

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        first = y = self.mlp(x)
        for block in self.added:
            y = y + block.change(first if self.independent else y)
        return y


class Stacked(LearningMixin):
    """What `stack_levels` mixes into a model's class: its forward reads streams and lets the levels learn."""

    recipe: dict[str, Any]  # the arguments of `stack_levels`

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As Hugging Face saves a model, with the recipe of its levels beside it (`nestling.cms.files`)."""
        super().save_pretrained(save_directory, **options)
        write_text(Path(save_directory) / RECIPE, json.dumps({"format": FORMAT, **self.recipe}, indent=2) + "\n")

    def level_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Each level's shared weights: where every stream's level begins."""
        return {i: [m.weight for m in modules] for i, modules in enumerate(self.learner.modules)}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        next_tokens: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """As the model's own forward; levels learn from `input_ids` while it reads, and the cache carries them.

        next_tokens: see `LearningMixin.read`.
        """
        if self.reads:
            return self.read(input_ids, attention_mask, past_key_values, labels, use_cache, logits_to_keep, next_tokens)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, labels=labels,
            use_cache=use_cache, logits_to_keep=logits_to_keep, **options,
        )  # fmt: skip


def stack_levels(
    model: PreTrainedModel,
    levels: Sequence[Level | dict[str, Any]],
    placement: str = "depth",
    *,
    blocks: Sequence[int] | None = None,
    width: int | None = None,
    target_modules: Sequence[str] | str | None = None,
    variant: str = "sequential",
    meta_grad: str = "first_order",
    context: int | None = None,
) -> PreTrainedModel:
    """Turn a Llama-family model into a continual learner, in place; at first it computes exactly what it did.

    Args:
        model: a causal language model whose decoder blocks have an `mlp` of linear layers (Llama, Mistral, Qwen,
            SmolLM).
        levels: Levels, fastest first.
        placement: "depth" shares the blocks' MLPs out over the levels, the fastest in the last blocks; "width" leaves
            every MLP as the slowest level and adds a small block after it for each level, the fastest last.
        blocks: indices of the decoder blocks that take part, None for all (negative ones count from the end).
        width: hidden width of an added block, None for a sixteenth of the model's width.
        target_modules: which linear layers of a chosen block learn (placement "depth"), as PEFT names them: ends of
            their names, such as ["down_proj"], or a regular expression for the whole name. None for the MLP's.
        variant: "sequential", "nested" (decision D12), or "independent": added blocks side by side, in place of one
            after the other ("width" only).
        meta_grad: how an outer loss is differentiated: "full", "first_order" or "none" (decision D9).
        context: tokens after which attention begins anew, so that a stream of any length takes bounded memory; what
            the levels learned stays. A multiple of the fastest chunk_size, or a part of it. None keeps every key and
            value.

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
    if placement == "depth" and variant == "independent":
        raise ValueError('variant "independent" sets blocks side by side, which needs placement "width"')
    if placement == "width" and target_modules is not None:
        raise ValueError('target_modules chooses among the model\'s own layers, which needs placement "depth"')
    levels = check_order(levels)
    if all(level.chunk_size is None for level in levels):
        raise ValueError("levels hold none that could ever be updated while reading: give one a chunk_size in tokens")
    layers = _decoder_blocks(model)
    chosen = list(range(len(layers))) if blocks is None else sorted({_index(i, len(layers)) for i in blocks})
    if not chosen:
        raise ValueError("blocks is empty: name at least one decoder block, or None for all")
    if placement == "depth":
        if len(chosen) < len(levels):
            raise ValueError(f"{len(levels)} levels cannot share {len(chosen)} blocks: fewer levels or more blocks")
        members = [[layers[chosen[n]] for n in share] for share in plan(levels, len(chosen))]
        members = [[m for block in share for m in _targets(block, target_modules)] for share in members]
    else:
        _check_width(width)
        members = _add_blocks([layers[i] for i in chosen], len(levels), width, variant == "independent")
    modules = tuple(tuple(make_fast(m) for m in level) for level in members)
    for level, parts in zip(levels, modules):
        for part in parts if level.frozen else ():
            part.weight.requires_grad_(False)  # no outer optimiser either
    model.__class__ = type(f"Stacked{type(model).__name__}", (Stacked, type(model)), {})
    model.learner = Learner(
        levels, modules, LlamaBackbone(model), chosen[0], variant, meta_grad, _check_context(context, levels)
    )
    model.recipe = dict(levels=[level.to_dict() for level in levels], placement=placement, blocks=chosen, width=width)
    model.recipe |= dict(target_modules=target_modules if isinstance(target_modules, str | None) else [*target_modules])
    model.recipe |= dict(variant=variant, meta_grad=meta_grad, context=context)
    return model


def _check_width(width: int | None) -> None:
    if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
        raise ValueError(f"width must be a positive whole number, or None; got {width!r}")


def _check_context(context: int | None, levels: Sequence[Level]) -> int | None:
    if context is None:
        return None
    size = next((level.chunk_size for level in levels if not level.frozen), 1)
    if isinstance(context, bool) or not isinstance(context, int) or context < 1 or (context % size and size % context):
        raise ValueError(
            f"context must be a multiple of the fastest level's chunk_size {size}, or divide it; got {context!r}"
        )
    return context


def _targets(block: nn.Module, wanted: Sequence[str] | str | None) -> list[nn.Linear]:
    """The linear layers of a decoder block that are to learn."""
    if wanted is None:
        return [m for m in block.mlp.modules() if isinstance(m, nn.Linear)]
    linear = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    if isinstance(wanted, str):
        found = {name: m for name, m in linear.items() if re.fullmatch(wanted, name)}
    else:
        found = {n: m for n, m in linear.items() if any(n == w or n.endswith(f".{w}") for w in wanted)}
    if not found:
        raise ValueError(f"target_modules {wanted!r} names no linear layer of a block, whose are: {', '.join(linear)}")
    return list(found.values())


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


def _add_blocks(layers: list[nn.Module], count: int, width: int | None, independent: bool) -> list[list[nn.Linear]]:
    """Chains in place of the MLPs; the added layers of each level, fastest level first."""
    members: list[list[nn.Linear]] = [[] for _ in range(count)]
    for block in layers:
        like = next(block.mlp.parameters())
        dim = next(m for m in block.mlp.modules() if isinstance(m, nn.Linear)).in_features
        added = [AddedBlock(dim, width or max(1, dim // 16), like) for _ in range(count)]
        for level, part in zip(members, reversed(added)):  # the fastest last in the chain
            level += [part.up_proj, part.down_proj]
        block.mlp = Chain(block.mlp, added, independent)
    return members
