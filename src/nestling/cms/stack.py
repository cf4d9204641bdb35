"""A pre-trained model made a continual learner (decision D15): its MLPs become levels, or get levels added."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.cms.backbones import LlamaBackbone
from nestling.cms.fast_linear import FastLinear, check_forward, check_uncompiled
from nestling.cms.learner import META_GRADS, VARIANTS, Learner
from nestling.cms.stacked_model import StackedForCausalLM
from nestling.schedule import Level, check_order

PLACEMENTS = ("depth", "width")


class AddedBlock(nn.Module):
    """A level added after an MLP: x + down(silu(up(x))), with down at zero, so that at first it adds nothing."""

    def __init__(self, dim: int, width: int, like: Tensor) -> None:
        super().__init__()
        options = dict(bias=False, device=like.device, dtype=like.dtype)
        self.up_proj, self.down_proj = FastLinear(dim, width, **options), FastLinear(width, dim, **options)
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
    """A Llama-family model made a continual learner; at first it computes exactly what the original did.

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
        A `StackedForCausalLM` that shares the model's parts: use it in place of the model, which by itself goes on
        computing what it did. It is called as before, and `past_key_values` carries what it learned.

    Raises:
        TypeError: not such a model, or one that was hooked (accelerate) or compiled already.
        ValueError: levels, placement or blocks that do not fit it.
    """
    for name, value, known in (
        ("placement", placement, PLACEMENTS), ("variant", variant, VARIANTS), ("meta_grad", meta_grad, META_GRADS)
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    if isinstance(model, nn.Module):
        check_uncompiled(model)
    if isinstance(model, StackedForCausalLM) or any(isinstance(m, FastLinear) for m in _modules(model)):
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
        members = [[m for block in share for m in _make_fast(block, target_modules)] for share in members]
    else:
        _check_width(width)
        members = _add_blocks([layers[i] for i in chosen], len(levels), width, variant == "independent")
    modules = tuple(tuple(level) for level in members)
    recipe = dict(levels=[level.to_dict() for level in levels], placement=placement, blocks=chosen, width=width)
    recipe |= dict(target_modules=target_modules if isinstance(target_modules, str | None) else [*target_modules])
    recipe |= dict(variant=variant, meta_grad=meta_grad, context=context)
    stacked = StackedForCausalLM(model, recipe)
    stacked.learner = Learner(
        levels, modules, LlamaBackbone(stacked), chosen[0], variant, meta_grad, _check_context(context, levels)
    )
    stacked.freeze_levels()
    return stacked


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


def _linear_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """Each linear layer below a module: its name, and the module and attribute that hold it.

    Of a layer that an adapter (PEFT) has wrapped only the base layer, under the wrapper's name.
    """
    for attribute, child in module.named_children():
        base = getattr(child, "base_layer", None)
        if base is not None:
            if isinstance(base, nn.Linear):
                yield prefix + attribute, child, "base_layer", base
        elif isinstance(child, nn.Linear):
            yield prefix + attribute, module, attribute, child
        else:
            yield from _linear_layers(child, f"{prefix}{attribute}.")


def _make_fast(block: nn.Module, wanted: Sequence[str] | str | None) -> list[FastLinear]:
    """Put fast layers in the place of those linear layers of a decoder block that are to learn."""
    linear = list(_linear_layers(block)) if wanted is not None else list(_linear_layers(block.mlp, "mlp."))
    names = [name for name, *_ in linear]
    if isinstance(wanted, str):
        linear = [part for part in linear if re.fullmatch(wanted, part[0])]
    elif wanted is not None:
        linear = [part for part in linear if any(part[0] == w or part[0].endswith(f".{w}") for w in wanted)]
    if not linear:
        raise ValueError(f"target_modules {wanted!r} names no linear layer of a block, whose are: {', '.join(names)}")
    found = []
    for _, parent, attribute, module in linear:
        found.append(FastLinear.of(module))
        setattr(parent, attribute, found[-1])
    return found


def _decoder_blocks(model: Any) -> nn.ModuleList:
    layers = getattr(getattr(model, "model", None), "layers", None)
    found = isinstance(model, PreTrainedModel) and isinstance(layers, nn.ModuleList) and hasattr(model, "lm_head")
    linear = found and all(
        isinstance(getattr(block, "mlp", None), nn.Module)
        and any(True for _ in _linear_layers(block.mlp))
        and hasattr(block, "self_attn")
        for block in layers
    )
    if not linear:
        raise TypeError(
            f"{type(model).__name__} is not a Llama-family language model: stack_levels needs decoder blocks "
            "model.layers[i] with self_attn and an mlp of linear layers, and a head lm_head"
        )
    check_forward(model, "the model")
    check_forward(model.model, "the model's decoder")
    if getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
        raise TypeError(f"{type(model).__name__} has a sliding window, whose cache cannot go back to a chunk's start")
    return layers


def _modules(model: Any) -> Iterator[nn.Module]:
    return model.modules() if isinstance(model, nn.Module) else iter(())


def _index(i: int, count: int) -> int:
    if not -count <= i < count:
        raise ValueError(f"blocks names block {i}, but the model has {count}")
    return i % count


def _add_blocks(layers: list[nn.Module], count: int, width: int | None, independent: bool) -> list[list[FastLinear]]:
    """Chains in place of the MLPs; the added layers of each level, fastest level first."""
    members: list[list[FastLinear]] = [[] for _ in range(count)]
    for block in layers:
        like = next(block.mlp.parameters())
        dim = next(linear for *_, linear in _linear_layers(block.mlp)).in_features
        added = [AddedBlock(dim, width or max(1, dim // 16), like) for _ in range(count)]
        for level, part in zip(members, reversed(added)):  # the fastest last in the chain
            level += [part.up_proj, part.down_proj]
        block.mlp = Chain(block.mlp, added, independent)
    return members


def plan(levels: Sequence[Level], blocks: int) -> list[list[int]]:
    """Which of `blocks` decoder blocks each level takes (placement "depth"): equal shares, the fastest level last."""
    share, rest = divmod(blocks, len(levels))
    sizes = [share + (n >= len(levels) - rest) for n in range(len(levels))]  # slowest first
    found, begin_at = [], 0
    for size in sizes:
        found.append(list(range(begin_at, begin_at + size)))
        begin_at += size
    return found[::-1]
