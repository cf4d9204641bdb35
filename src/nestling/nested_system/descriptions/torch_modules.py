"""Modules of torch as memories."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nestling.nested_system.describe import Place, describes, describes_if, transparent
from nestling.nested_system.formalism import AssociativeMemory, Cost, Solver, Transfer
from nestling.nested_system.frequency import ALWAYS, EVERY_STEP, EVERY_TOKEN, NEVER

Parts = Iterator[AssociativeMemory | Transfer]


@describes(nn.Linear, nn.Bilinear)
def linear(module: nn.Module, place: Place) -> Parts:
    """y = W x: keys are the layer's inputs, values its local errors (NL Eqs. 8, 9)."""
    yield place.weights("linear map", retrieval="y = W x", macs=module.weight.numel())


@describes(nn.Embedding, nn.EmbeddingBag)
def embedding(module: nn.Module, place: Place) -> Parts:
    """A linear map of one-hot tokens: reading is a look-up."""
    row = module.embedding_dim * module.weight.element_size()
    yield place.weights("embedding", retrieval="y = W e(x)", macs=0, read_bytes=row, keys="x, a token")


@describes(nn.modules.conv._ConvNd)
def convolution(module: nn.Module, place: Place) -> Parts:
    """A linear map of windows; costs are per output position (input position where transposed)."""
    yield place.weights("convolution", retrieval="y = W ∗ x", macs=module.weight.numel(), keys="windows of the input")


@describes(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
def norm(module: nn.Module, place: Place) -> Parts:
    """A diagonal memory after a normalisation."""
    if next(module.parameters(), None) is not None:
        yield gain(place, module.weight.numel())


def gain(place: Place, size: int, names: tuple[str, ...] = (), name: str = "") -> AssociativeMemory:
    """The gains (and biases) of a normalisation."""
    return place.weights("norm", names, retrieval="y = w ⊙ x / |x|", macs=size, name=name)


@describes(nn.modules.batchnorm._BatchNorm, nn.modules.batchnorm._NormBase)
def batch_norm(module: nn.Module, place: Place) -> Parts:
    """Gains that the outer loop trains, and running statistics that each training batch is written into."""
    if module.affine:
        yield gain(place, module.num_features, ("weight", "bias"))
    if not module.track_running_stats:
        return
    tensors = place.tensors("running_mean", "running_var", "num_batches_tracked")
    rate = "1 / batches seen" if module.momentum is None else f"{module.momentum:g}"
    size = sum(t.bytes for t in tensors)
    yield AssociativeMemory(
        place.path("running"), "running statistics", "—", "mean and variance of a batch", "½ |μ − mean(x)|²",
        retrieval="(x − μ) / σ when the model is evaluated", update="μ ← (1 − λ) μ + λ mean(x)",
        solver=Solver("gradient", "gradient descent, one step", f"λ = {rate}"),
        frequency=EVERY_STEP if module.training else NEVER, context="training data", tensors=tensors,
        cost=Cost(0, size, module.num_features, size, module.num_features, 0, 2 * module.num_features, 2 * size),
        note="updated by the forward pass in training mode, without an optimiser",
    )  # fmt: skip


@describes(nn.PReLU)
def prelu(module: nn.Module, place: Place) -> Parts:
    """A learned slope."""
    yield place.weights("slope", retrieval="y = max(0, x) + a min(0, x)", macs=module.weight.numel())


def attention(
    place: Place, heads: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype, window: int | None = None,
    sources: tuple[str, ...] = (), outputs: tuple[str, ...] = (), name: str = "attention", causal: bool = True,
) -> Parts:  # fmt: skip
    """Softmax attention: the non-parametric solution of a regression on all keys (NL Eqs. 62, 63).

    Args:
        sources: memories (relative names) that generate queries, keys and values.  outputs: those that read it.
        window: tokens a query sees; None is all.
    """
    seen = min(place.context_length, window or place.context_length)
    cache = [place.state(f"{name}.{which}", (seen, kv_heads, head_dim), dtype) for which in ("keys", "values")]
    size, row = sum(t.bytes for t in cache), 2 * kv_heads * head_dim * dtype.itemsize
    macs = 2 * seen * heads * head_dim
    own = place.path(name)
    yield AssociativeMemory(
        own,
        "softmax attention",
        "k, the keys of the context",
        "v, their values",
        "Σᵢ exp(q·kᵢ) |vᵢ − y|²  (NL Eq. 62)",
        retrieval="y = Σᵢ softmax(q·kᵢ) vᵢ",
        update="kₜ, vₜ are kept" if causal else "all keys and values are read at once",
        solver=Solver("non-parametric", "Nadaraya-Watson"),
        frequency=ALWAYS,
        context="sequence",
        feasible=f"functions of {'all of the context' if window is None else f'the last {window} tokens'}",
        tensors=tuple(cache),
        lifetime="context",
        cost=Cost(0, size, macs, size, 2 * macs, row),
    )
    for source in sources:
        yield Transfer(place.path(source), own, "generation", "queries, keys, values")
        yield Transfer(own, place.path(source), "backpropagation", "gradient through the attention")
    for output in outputs:
        yield Transfer(own, place.path(output), "non-parametric", "y, its answer")


@describes(nn.MultiheadAttention)
def multihead(module: nn.MultiheadAttention, place: Place) -> Parts:
    """Projections, and the attention they feed."""
    names = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v")
    weights = module.in_proj_weight
    macs = sum(p.numel() for p in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if p is not None)
    macs = weights.numel() if weights is not None else macs
    yield place.weights("linear map", names, retrieval="q, k, v = W x", macs=macs, name="in_proj")
    dtype = module.out_proj.weight.dtype
    yield from attention(
        place, module.num_heads, module.num_heads, module.head_dim, dtype=dtype, sources=("in_proj",),
        outputs=("out_proj",), causal=False,
    )  # fmt: skip


_GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
_UPDATES = {
    "RNN": "h ← σ(W x + U h)",
    "LSTM": "c ← f ⊙ c + i ⊙ g,  h = o ⊙ tanh(c)",
    "GRU": "h ← (1 − z) ⊙ n + z ⊙ h",
}


@describes(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
def recurrent(module: nn.RNNBase, place: Place) -> Parts:
    """Recurrent maps that the outer loop trains, and a state that every token is written into."""
    family = next(
        k.__name__.removesuffix("Cell") for k in type(module).__mro__ if k.__name__.removesuffix("Cell") in _GATES
    )
    layers, ways = getattr(module, "num_layers", 1), 1 + getattr(module, "bidirectional", False)
    macs = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 2)
    yield place.weights("recurrent map", retrieval="gates = W x + U h", macs=macs, name="weights")
    dtype, width = next(module.parameters()).dtype, module.hidden_size
    parts = [place.state("state.h", (layers * ways, getattr(module, "proj_size", 0) or width), dtype)]
    if family == "LSTM":
        parts.append(place.state("state.c", (layers * ways, width), dtype))
    size = sum(t.bytes for t in parts)
    work = _GATES[family] * width * layers * ways
    own, weights = place.path("state"), place.path("weights")
    yield AssociativeMemory(
        own, "recurrent state", "—" if family == "RNN" else "i, the input gate", "g, the candidate of a token",
        "−⟨c, i ⊙ g⟩ + ½ |c − f ⊙ cₜ|²" if family == "LSTM" else "½ |h − n|², gated",
        retrieval="h", update=_UPDATES[family], solver=Solver("gradient", "gated descent, one step"),
        frequency=EVERY_TOKEN, context="sequence", feasible=f"ℝ^{layers * ways}×{width}", tensors=tuple(parts),
        lifetime="context", cost=Cost(0, size, 0, size, work, 2 * size),
    )  # fmt: skip
    yield Transfer(weights, own, "generation", "gates and candidates")
    yield Transfer(own, weights, "parametric", "h, taken in with the next token")
    yield Transfer(own, weights, "backpropagation", "gradient through time")


@describes("torch.nn.modules.container.ParameterList", "torch.nn.modules.container.ParameterDict")
def loose(module: nn.Module, place: Place) -> Parts:
    """Parameters whose use only their owner knows: unknown, unless the owner's description claims them."""
    yield from ()


_FUNCTIONS = (
    "activation",
    "dropout",
    "pooling",
    "padding",
    "flatten",
    "container",
    "transformer",
    "loss",
    "upsampling",
    "fold",
    "pixelshuffle",
    "channelshuffle",
    "distance",
    "instancenorm",
)


@describes_if(lambda module: type(module).__module__.removeprefix("torch.nn.modules.") in _FUNCTIONS)
def function(module: nn.Module, place: Place) -> Parts:
    """Functions and containers of torch hold nothing themselves."""
    return transparent(module, place)


describes(nn.Identity)(transparent)
