"""What a run asks of a model's levels before its optimiser is made: their schedule, and which weights move at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from nestling.layers.attention import Attention
from nestling.layers.titans import SelfModifyingTitans
from nestling.schedule import Schedule
from nestling.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_schedule(model: PreTrainedModel, config: TrainConfig) -> Schedule | None:
    """Which level of the model is updated when, in a run; the model is told its context length."""
    levels = getattr(model.config, "levels", None)
    if not levels or not hasattr(model, "level_parameters"):  # a stacked model has no levels in its config
        return None
    total = config.tokens_per_step * config.steps
    schedule = Schedule(levels, config.data.seq_len, config.tokens_per_step, total)
    if hasattr(model, "set_context_length"):
        model.set_context_length(config.data.seq_len)
    elif schedule.fast:
        raise ValueError(
            f"levels {', '.join(map(str, schedule.fast))} would be updated inside a context of "
            f"{config.data.seq_len} tokens, which a {type(model).__name__} does not do"
        )
    return schedule


def freeze(model: nn.Module, schedule: Schedule | None, trained: str = "all") -> None:
    """Take frozen levels from the optimiser, and with `trained` "levels" all but where the levels of a stream begin."""
    if schedule is not None and schedule.frozen:
        levels: dict[int, list[nn.Parameter]] = model.level_parameters()  # type: ignore[operator]
        for index in schedule.frozen:
            for parameter in levels.get(index, ()):
                parameter.requires_grad_(False)
    if trained != "levels":
        return
    learner = getattr(model, "learner", None)
    if learner is None or not learner.fast:
        raise ValueError(
            f'trained "levels" needs a model with levels that learn in a context, and this {type(model).__name__} has '
            "none: convert one first (nestling convert), or train all"
        )
    if learner.meta_grad == "none":
        raise ValueError('trained "levels" needs their meta-gradients, but meta_grad is "none": use "first_order"')
    chosen = {m.weight for i in learner.fast for m in learner.modules[i]}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in chosen)


def memories(model: nn.Module) -> list[SelfModifyingTitans]:
    """The layers whose memories write chunk by chunk."""
    return [module for module in model.modules() if isinstance(module, SelfModifyingTitans)]


@contextmanager
def longer_chunks(model: nn.Module, factor: int) -> Iterator[None]:
    """Inside, all memories of the model write once for so many times their chunk."""
    with ExitStack() as stack:
        for layer in memories(model) if factor > 1 else ():
            stack.enter_context(layer.longer_chunks(factor))
        yield


def check_factor(model: nn.Module, factor: int, window: int) -> None:
    """Raise ValueError where `schedule.chunk_factor` would have no effect, or leave nothing to read."""
    chunks = [group.chunk_size for layer in memories(model) for group in layer.groups]
    if factor > 1 and not chunks:
        raise ValueError(
            f"schedule.chunk_factor {factor} makes the chunks of memories longer, and this {type(model).__name__} has "
            "none: leave it out"
        )
    if factor > 1 and window <= factor * max(chunks):
        raise ValueError(
            f"schedule.chunk_factor {factor} makes a chunk of {factor * max(chunks)} tokens, and a window of {window} "
            "has no second one in which a memory would be read: take a smaller factor, or a larger seq_len"
        )


def chunk_warnings(model: nn.Module, window: int) -> list[str]:
    """Memories whose chunk is not shorter than a training window: reading never begins a second chunk there, or a
    second stretch, so that kept memories are never read."""
    chunks = [group.chunk_size for layer in memories(model) for group in layer.groups]
    kept = [layer.config.cache_every for layer in memories(model) if layer.config.cache_every is not None]
    found = []
    if window <= max(chunks, default=0):
        found.append(
            f"a training window of {window} tokens is not longer than a memory's chunk of {max(chunks)}: what the "
            "model does with a second chunk stays untrained. Take a larger seq_len, or a smaller chunk_size of the "
            "mixer"
        )
    if window <= max(kept, default=0):
        found.append(
            f"a training window of {window} tokens is not longer than a stretch of {max(kept)} that a memory keeps: "
            "what the model does with kept memories stays untrained. Take a larger seq_len, or a smaller cache_every"
        )
    return found


@contextmanager
def shorter_windows(model: nn.Module, limit: int | None) -> Iterator[None]:
    """Inside, no attention of the model sees more than `limit` tokens: for whole sequences, forward and backward."""
    if limit is None:
        yield
        return
    layers = attentions(model)
    own = [layer.window for layer in layers]
    try:
        for layer in layers:
            layer.window = min(limit, layer.window or limit)
        yield
    finally:
        for layer, window in zip(layers, own):
            layer.window = window


def attentions(model: nn.Module) -> list[Attention]:
    """The layers of softmax attention."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def check_short_window(model: nn.Module, limit: int | None) -> None:
    """Raise ValueError where `schedule.short_window` would have no effect, or leave nothing that sees further."""
    if limit is None:
        return
    windows = [layer.window for layer in attentions(model)]
    if not any(window is None or window > limit for window in windows):
        held = f"windows of {', '.join(map(str, sorted({w for w in windows if w})))}" if windows else "no attention"
        raise ValueError(f"schedule.short_window {limit} shortens no window: this {type(model).__name__} has {held}")
    if not memories(model):
        raise ValueError(
            f"schedule.short_window {limit} leaves what is further back to memories, and this {type(model).__name__} "
            "has none: leave it out"
        )
