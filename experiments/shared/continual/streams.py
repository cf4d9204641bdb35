"""What the experiments with continual learners do to a model: make it a learner, let it read, test it, fine-tune it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from experiments.shared.continual.study import LearnerContender
from nestling.cms import stack_levels

Ids = Sequence[int]


def learner(model: nn.Module, contender: LearnerContender) -> nn.Module:
    """A copy of the model with the contender's levels (without any, a plain copy)."""
    fresh = copy.deepcopy(model)
    return stack_levels(fresh, contender.levels, **contender.stack) if contender.levels else fresh


def owned(model: nn.Module) -> list[nn.Parameter]:
    """The weights that the levels of a learner change: what "equal parameters" means for fine-tuning."""
    return [module.weight for level in model.learner.modules for module in level]


@torch.no_grad()
def read(
    model: nn.Module, ids: Tensor, cache: Any = None, context: int | None = None, piece: int = 1024
) -> tuple[Tensor, Any]:
    """Let a model read streams [B, T]: the loss of each token in nats, and the cache to go on with.

    The losses are [B, T] when going on with the cache of an earlier call, else [B, T - 1]: the first token of a stream
    has no prediction.

    Args:
        context: of a model without levels, tokens after which attention begins anew (`stack_levels` has its own).
        piece: tokens of one forward call.
    """
    losses, plain = [], not hasattr(model, "learner")
    tail = getattr(cache, "tail", None)  # logits after the last token read [B, 1, V]
    at = 0
    while at < ids.shape[1]:
        if plain and context and cache is not None and cache.get_seq_length() >= context:
            cache = None
        size = min(piece, context - cache.get_seq_length() if cache else context) if plain and context else piece
        part = ids[:, at : at + size]
        out = model(part, past_key_values=cache, use_cache=True)
        logits = out.logits[:, :-1] if tail is None else torch.cat([tail, out.logits[:, :-1]], 1)
        targets = part[:, 1:] if tail is None else part
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none"))
        cache, tail, at = out.past_key_values, out.logits[:, -1:], at + part.shape[1]
        cache.tail = tail
    return torch.cat(losses, 1), cache


@contextmanager
def adapted(model: nn.Module, cache: Any) -> Iterator[nn.Module]:
    """Inside, the model knows what the stream(s) in `cache` learned and learns nothing more; gradients are off."""
    with torch.no_grad():
        if not hasattr(model, "learner"):
            yield model
        elif cache is None:
            learning, model.learning = model.learning, False
            try:
                yield model
            finally:
                model.learning = learning
        else:
            with model.adapted(cache):
                yield model


def pad_left(prompts: Sequence[Ids], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left: ids [B, T] and mask [B, T]."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def prefilled(model: nn.Module, context: Ids) -> DynamicCache | None:
    """The key-value cache of a context that prompts share (`decode`, `score`); None for an empty one."""
    return model(torch.tensor([list(context)]), use_cache=True).past_key_values if len(context) else None


def repeated(cache: DynamicCache | None, batch: int) -> DynamicCache | None:
    """A cache of one stream for `batch` rows; the original stays."""
    if cache is None:
        return None
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(batch)
    return cache


def next_logits(model: nn.Module, ids: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
    """Logits [B, V] after ids [B, T] that are padded on the left, and the cache; mask [B, seen + T]."""
    where = (mask.cumsum(1)[:, -ids.shape[1] :] - 1).clamp_min(0)
    out = model.base_model(ids, attention_mask=mask, position_ids=where, past_key_values=past, use_cache=True)
    # not logits_to_keep=1: of a view with gaps torch multiplies row by row, each with a copy of the matrix
    return model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values


@torch.no_grad()
def score(
    model: nn.Module, prompts: Sequence[Ids], targets: Sequence[Ids], context: DynamicCache | None = None,
    batch: int = 16,
) -> list[float]:  # fmt: skip
    """The loss in nats, summed, of each target after its prompt (and after the shared context)."""
    found = [0.0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(targets[i]))
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        rows = [[*prompts[i], *targets[i]] for i in part]
        width = max(len(r) for r in rows)
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])  # padding at the end: no mask is needed
        logits = model(ids[:, :-1], past_key_values=repeated(context, len(part)), use_cache=True).logits
        losses = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        for row, i in enumerate(part):
            found[i] = losses[row, len(prompts[i]) - 1 : len(rows[row]) - 1].sum().item()
    return found


@torch.no_grad()
def generate(
    model: nn.Module, prompts: Sequence[Ids], length: int, stop: int, batch: int = 16, context: Ids = ()
) -> list[list[int]]:
    """Greedy continuations of at most `length` tokens, up to the token `stop`; `context` comes before every prompt."""
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    shared = prefilled(model, context)
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        ids, mask = pad_left([prompts[i] for i in part], stop)
        past, mask = repeated(shared, len(part)), torch.cat([mask.new_ones(len(part), len(context)), mask], 1)
        open_ = torch.ones(len(part), dtype=torch.bool)
        for _ in range(length):
            logits, past = next_logits(model, ids, mask, past)
            ids = logits.argmax(-1, keepdim=True)
            open_ &= ids[:, 0] != stop
            if not open_.any():
                break
            for row, i in enumerate(part):
                if open_[row]:
                    found[i].append(ids[row, 0].item())
            mask = torch.cat([mask, mask.new_ones(len(part), 1)], 1)
    return found


def finetune(
    model: nn.Module,
    batches: Iterable[Tensor],
    lr: float,
    parameters: Iterable[nn.Parameter],
    penalty: Callable[[list[Tensor]], list[Tensor]] | None = None,
    replay: Callable[[Tensor], Tensor | None] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    decay: float = 0.0,
) -> tuple[list[float], torch.optim.Optimizer]:
    """One pass of AdamW over batches [B, n + 1], a step for each: their losses, and the optimiser to go on with.

    Args:
        parameters: what is trained; kept in float32 beside the model where it is of a smaller type.
        penalty: gradients of what is added to every loss, from the parameters in float32.
        replay: what is read besides a batch, [B', n' + 1], in the same step.
        optimizer: of an earlier call on the same parameters.
        decay: weight decay.
    """
    tuned = list(parameters)
    if optimizer is None:
        exact = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in tuned]
        optimizer = torch.optim.AdamW(exact, lr, weight_decay=decay, fused=True)
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    with trained(model, tuned), torch.enable_grad():
        for batch in batches:
            loss = token_loss(model, batch)
            losses.append(loss.item())
            if replay is not None and (old := replay(batch)) is not None:
                loss = (loss + token_loss(model, old)) / 2
            for p, g in zip(masters, torch.autograd.grad(loss, tuned), strict=True):
                p.grad = g.to(p.dtype)
            for p, g in zip(masters, penalty(masters) if penalty is not None else ()):
                p.grad = p.grad + g.detach()
            optimizer.step()
            with torch.no_grad():
                for p, master in zip(tuned, masters, strict=True):
                    if p is not master:
                        p.copy_(master)
    optimizer.zero_grad()
    return losses, optimizer


def token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean next-token loss of [B, n + 1]."""
    logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@contextmanager
def trained(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, exactly these parameters ask for a gradient, and levels do not learn."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    learning = getattr(model, "learning", None)
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        if learning is not None:
            model.learning = False
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)
        if learning is not None:
            model.learning = learning


def pieces(ids: Tensor, size: int) -> list[Tensor]:
    """A stream [B, T] cut into [B, size + 1] with one token in common: every token but the first is a target once."""
    return [ids[:, at : at + size + 1] for at in range(0, ids.shape[1] - 1, size)]
