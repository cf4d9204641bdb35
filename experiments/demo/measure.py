"""What the demo measures of a trained model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.demo.text import excerpt
from nestling.training.batches import spread, windows
from nestling.training.data import Tokens
from nestling.training.evaluation import token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

AT_ONCE = 4096  # tokens of one forward pass
FIGURES = ("loss", "eta", "alpha", "norm")


@torch.no_grad()
def window_bits(model: PreTrainedModel, tokens: Tokens, length: int, count: int) -> Tensor:
    """Bits of every byte in `count` held-out windows spread over a stream, each read afresh: [windows, length]."""
    length = min(length, len(tokens) - 1)
    starts = spread(tokens, length, count)
    size = max(1, AT_ONCE // length)
    was_training = model.training
    model.eval()
    try:
        rows = [token_losses(model, windows(tokens, starts[i : i + size], length)) for i in range(0, len(starts), size)]
    finally:
        model.train(was_training)
    return torch.cat(rows).double() / math.log(2)


def by_position(model: PreTrainedModel, tokens: Tokens, length: int, count: int, first: int) -> dict[str, Any]:
    """The loss by position in the context.

    Returns:
        `edges` [n + 1] of the bins, and `windows` [count, n]: the mean bits per byte of each window in each bin.
    """
    bits = window_bits(model, tokens, length, count)
    edges, last = [0], bits.shape[1]
    while edges[-1] < last:
        edges.append(min(last, 2 * edges[-1] or first))
    bins = [bits[:, a:b].mean(1) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return {"edges": edges, "windows": torch.stack(bins, 1).tolist()}


@torch.no_grad()
def state_sizes(model: PreTrainedModel, ids: np.ndarray, context: int, every: int) -> list[dict[str, int]]:
    """Read a text in pieces, carrying the state, and note its bytes: `{"tokens", "bytes"}` per piece."""
    from nestling.models.hope.cache import cache_bytes

    text = torch.from_numpy(np.resize(np.asarray(ids[:context], dtype=np.int64), context))
    state, sizes = None, []
    for start in range(0, context, every):
        piece = text[None, start : start + every]
        state = model(input_ids=piece, past_key_values=state, use_cache=True, logits_to_keep=1).past_key_values
        sizes.append({"tokens": start + piece.shape[1], "bytes": cache_bytes(state)})
    return sizes


@torch.no_grad()
def memory_over_text(model: PreTrainedModel, ids: np.ndarray, length: int) -> dict[str, Any]:
    """One held-out text and what happens inside while it is read.

    Returns:
        `text` [T] byte values, `bits` [T] the model's loss at each byte (the first is None: nothing precedes it), and
        `layers`: of each decoder layer with a memory to inspect its number `layer`, from 1, and the inner `loss`,
        learning rate `eta`, decay `alpha` and weight `norm`, each [T], averaged over heads.
    """
    piece = excerpt(np.asarray(ids), length)
    window = torch.from_numpy(piece)[None]
    inputs: dict[int, Tensor] = {}
    mixers = [layer.mixer for layer in model.model.layers]
    hooks = [
        mixer.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0]))
        for i, mixer in enumerate(mixers)
    ]
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=window, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="none") / math.log(2)
    layers = []
    for i, mixer in enumerate(mixers):
        memory = getattr(mixer, "memory", mixer)  # it may stand beside attention
        if hasattr(memory, "inspect"):
            seen = memory.inspect(inputs[i])
            layers.append({"layer": i + 1} | {name: _rounded(seen[name][0].mean(0)) for name in FIGURES})
    return {"text": piece.tolist(), "bits": [None, *_rounded(losses)], "layers": layers}


def prompts_from(ids: np.ndarray, length: int, count: int = 2) -> list[str]:
    """Beginnings of lines from a token stream, for samples that go on from them."""
    ids = np.asarray(ids)
    raw = bytes(ids[ids < 256].astype(np.uint8))
    prompts = []
    for part in range(count):
        start = raw.find(b"\n", len(raw) * (2 * part + 1) // (2 * count)) + 1
        text = raw[start : start + 4 * length].decode("utf-8", "ignore").lstrip()[:length].rstrip()
        prompts.append(text or "The ")
    return prompts


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, length: int, temperature: float, seed: int
) -> str:
    """`length` bytes written by the model after a prompt."""
    from nestling.generation import Sampling, TextGenerator

    was_training = model.training
    try:
        generator = TextGenerator(model, tokenizer, seed=seed)
        return "".join(generator.stream(prompt, length, Sampling(temperature)))
    finally:
        model.train(was_training)


def _rounded(values: Tensor, digits: int = 5) -> list[float]:
    return [float(f"{v:.{digits}g}") for v in values.tolist()]
