"""nestling's own layers as memories: self-modifying Titans and its settings, attention, the continuum memory, Hope."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nestling.layers.attention import Attention
from nestling.layers.convolution import ShortConvolution
from nestling.layers.titans import SelfModifyingTitans
from nestling.layers.titans_groups import MemoryGroup
from nestling.nested_system.describe import Place, describes, transparent
from nestling.nested_system.descriptions.torch_modules import Parts, attention
from nestling.nested_system.formalism import AssociativeMemory, Cost, Solver, Transfer
from nestling.nested_system.frequency import EVERY_TOKEN, Frequency

describes(
    "nestling.models.hope.modeling.HopeForCausalLM",
    "nestling.models.hope.modeling.HopeModel",
    "nestling.models.hope.modeling.HopeDecoderLayer",
    "nestling.layers.beside.MemoryBesideAttention",
)(transparent)


@describes(ShortConvolution)
def short_convolution(module: ShortConvolution, place: Place) -> Parts:
    """The last tokens through one filter per channel."""
    yield place.weights("convolution", retrieval="y = w ∗ x", macs=module.weight.numel(), keys="the last tokens")


@describes(Attention)
def softmax_attention(module: Attention, place: Place) -> Parts:
    """Softmax attention; its projections are read as what they are."""
    return attention(
        place, module.num_heads, module.num_kv_heads, module.head_dim, dtype=module.q_proj.weight.dtype,
        window=module.window, sources=("q_proj", "k_proj", "v_proj"), outputs=("out_proj",),
    )  # fmt: skip


@describes(SelfModifyingTitans)
def self_modifying_titans(module: SelfModifyingTitans, place: Place) -> Parts:
    """A memory for every adaptive projection and the main one, each with its momentum and learned initial state."""
    yield place.weights("norm", ("norm_weight",), retrieval="y = w ⊙ x / |x|", macs=module.head_dim, name="norm")
    if module.conv_weight is not None:
        yield place.weights(
            "convolution", ("conv_weight",), retrieval="y = w ∗ x", macs=module.conv_weight.numel(), name="conv",
            keys="the last tokens",
        )  # fmt: skip
    for name in module.path_convs:
        yield place.weights(
            "convolution", (f"path_convs.{name}",), retrieval="y = silu(w ∗ x)", name=f"conv of {name}",
            macs=module.path_convs[name].numel(), keys="the last tokens",
        )  # fmt: skip
    names = ("eta_bias", "alpha_bias", "mu_bias", "erase_bias", "log_first_rate", "log_projection_rate")
    biases = tuple(n for n in names if getattr(module, n) is not None)
    if biases:
        yield place.weights(
            "gates", biases, retrieval="η = softplus(· + b), α, μ = σ(· + b)", macs=0, name="gates", keys="—"
        )
        for memory in _names(module):
            yield Transfer(place.path("gates"), place.path(memory), "generation", "learning rate, decay, momentum")
    for index, group in enumerate(module.groups):
        names = tuple(f"initial.{index}.{layer}" for layer in range(len(group.architecture.shapes())))
        yield place.weights(
            "initial state", names, retrieval="W₀ of every sequence", macs=0, name=initial(group),
            keys="start of a sequence", values="meta-gradient, ∂L/∂W₀",
            objective="the outer loss, over all sequences (NL Eq. 28)",
            note=f"where {', '.join(group.names)} begin{'s' * (len(group.names) == 1)} in every sequence",
        )  # fmt: skip
        for name in group.names:
            yield from _in_context(module, place, group, name)
    if module.config.cache_every is not None:
        yield from _kept(module, place, module.config.cache_every)
    yield from _teaching(module, place)


def _names(module: SelfModifyingTitans) -> list[str]:
    return [name for group in module.groups for name in group.names]


def initial(group: MemoryGroup) -> str:
    """Name of the learned initial states of a group of memories."""
    return "initial." + "+".join(group.names)


def _in_context(module: SelfModifyingTitans, place: Place, group: MemoryGroup, name: str) -> Parts:
    """One fast memory of the layer and its momentum (NL Eqs. 83-93)."""
    rule, shapes, heads = module.rule, group.architecture.shapes(), module.num_heads
    running = name == "memory" and module.config.read != "chunk"
    frequency = EVERY_TOKEN if running else Frequency.every(group.chunk_size)
    dtype = torch.float64 if module.in_proj.weight.dtype == torch.float64 else torch.float32
    kept = [(part, i, shape) for part in ("start", "now") for i, shape in enumerate(shapes)]
    tensors = tuple(place.state(f"{name}.{part}.{i}", (heads, *shape), dtype) for part, i, shape in kept)
    one = heads * sum(o * i for o, i in shapes)
    size = one * dtype.itemsize
    own, needs = place.path(name), place.path(f"{name}.momentum")
    yield AssociativeMemory(
        own,
        _KINDS.get(name, "in-context projection"),
        "k",
        "M(v), generated by itself" if rule.self_targets else "v",
        _objective(rule),
        retrieval=_RETRIEVALS[name],
        update=_update(module, name),
        context="sequence",
        solver=Solver(
            "gradient", "delta gradient descent" if rule.dgd or rule.gated_erase else "gradient descent", _rate(module)
        ),
        frequency=frequency,
        feasible=f"{heads} heads of " + ", ".join(f"ℝ^{o}×{i}" for o, i in shapes),
        tensors=tensors,
        needs=(needs,) if module.config.momentum and running else (),
        lifetime="context",
        cost=Cost(0, sum(t.bytes for t in tensors), one, size, _write_macs(module, shapes, heads), 2 * size),
        note="written with every token, its gradient taken at the start of the chunk"
        + ("" if running else ", where it is read too")
        + f" ({group.chunk_size} tokens)",
    )
    yield Transfer(place.path(initial(group)), own, "initialization", "W₀" + _anchored(module))
    if rule.meta_grad != "none":
        how = "through every write" if rule.meta_grad == "full" else "first order"
        yield Transfer(own, place.path(initial(group)), "backpropagation", f"meta-gradient, {how}")
        yield Transfer(own, place.path("in_proj"), "backpropagation", f"meta-gradient, {how}")
    if module.config.momentum:
        velocity = tuple(place.state(f"{name}.velocity.{i}", (heads, *shape), dtype) for i, shape in enumerate(shapes))
        yield AssociativeMemory(
            needs,
            "in-context momentum",
            "—",
            f"surprise of {name}, −∂ℓ/∂W",
            "−⟨S, −∂ℓ/∂W⟩ (NL Eq. 33)",
            retrieval="S",
            update="S ← μ S − (1 − μ) e ∂ℓ/∂W",
            solver=Solver("gradient", "gradient descent, one step", "μ from the data"),
            frequency=EVERY_TOKEN,
            context="surprise in context",
            feasible=f"{heads} heads of the memory's shapes",
            tensors=velocity,
            lifetime="context",
            cost=Cost(0, size, 0, 0, 2 * one, 2 * size),
        )
        yield Transfer(own, needs, "generation", "its surprise")
        yield Transfer(needs, own, "parametric", "S, added with every token")


def _kept(module: SelfModifyingTitans, place: Place, every: int) -> Parts:
    """What stretches of the text wrote, and the gate that reads it (decision D38)."""
    heads, p, dtype = module.num_heads, module.head_dim, torch.float32
    if module.in_proj.weight.dtype == torch.float64:
        dtype = torch.float64
    count = min(place.context_length // every, module.config.cache_max or place.context_length)
    tensors = (
        place.state("kept.memories", (heads, count, p, p), dtype), place.state("kept.keys", (heads, count, p), dtype),
        place.state("kept.numbers", (count,), torch.int64),
    )  # fmt: skip
    size, macs, own = sum(t.bytes for t in tensors), count * heads * (p * p + p), place.path("kept")
    yield place.weights(
        "gate", ("log_cache_scale", "cache_bias"), retrieval="g = softmax(b, s √S q·mₙ)", macs=0, name="kept.gate",
        keys="—",
    )  # fmt: skip
    yield AssociativeMemory(
        own,
        "kept memories",
        "m, the mean key of a stretch",
        "C, what the stretch wrote to the memory",
        "Σₙ exp(s √S q·mₙ) |Cₙ q − y|²",
        retrieval="y = Σₙ gₙ Cₙ q",
        update="Cₙ = W − (Π α) W at the stretch's start is kept",
        solver=Solver("non-parametric", "Nadaraya-Watson over stretches"),
        frequency=Frequency.every(every),
        context="sequence",
        feasible=f"functions of {'all' if module.config.cache_max is None else f'the last {count}'} stretches",
        tensors=tensors,
        lifetime="context",
        cost=Cost(0, size, macs, size, heads * p * p // every, heads * p * p * dtype.itemsize // every),
        note=f"grows by one with every {every} tokens",
    )
    yield Transfer(place.path("memory"), own, "parametric", "C, copied")
    yield Transfer(place.path("kept.gate"), own, "generation", "the share of each")
    yield Transfer(place.path("in_proj"), own, "generation", "queries and keys")
    yield Transfer(own, place.path("out_proj"), "non-parametric", "its part of y")


_KINDS = {"memory": "in-context memory", "eta": "in-context gate", "alpha": "in-context gate"}
_RETRIEVALS = {
    "memory": "y = M(q)", "k": "k = M(x) / |M(x)|", "v": "v = M(x)", "q": "q = M(x) / |M(x)|",
    "eta": "η = softplus(M(x))", "alpha": "α = σ(M(x))",
}  # fmt: skip


def _objective(rule) -> str:
    target = "M(v)" if rule.self_targets else "v"
    return f"½ |M(k) − {target}|²  (NL Eq. 88)" if rule.objective == "l2" else f"−⟨M(k), {target}⟩  (NL Eq. 64)"


def _rate(module: SelfModifyingTitans) -> str:
    source = (
        "1" if module.config.rate == "one" else "from a memory" if "eta" in module.config.adaptive else "from the data"
    )
    form = {"joint": "e = η / (1 + η κ)", "layer": "e = η / (1 + η |k|²)", "plain": "e = η"}[module.rule.step]
    if module.rule.relative:
        form = form.replace("1 + η ", "").replace("(", "").replace(")", "")
    return f"{form}, η {source}"


def _update(module: SelfModifyingTitans, name: str) -> str:
    decay = {"learned": "α", "fixed": "γ", "none": ""}[module.config.decay]
    erase = "− e k kᵀ" if module.rule.dgd or module.rule.gated_erase else ""
    if module.rule.erase_gate and name == "memory":
        erase = f"− {module.rule.erase_range:g} g k kᵀ / |k|²"
    old = f"W ({decay or ''}{'I' if erase else ''} {erase})" if erase else f"{decay} W".strip()
    old = old.replace("(I", "(I").replace("αI", "α I").replace("γI", "γ I")
    write = "+ S" if module.config.momentum else "− e ∂ℓ/∂W"
    adds = module.config.num_heads - module.config.erasing if module.rule.erase_gate and name == "memory" else 0
    heads = f", g = 0 in {adds} of {module.config.num_heads} heads" if adds else ""
    return f"W ← {old} {write}{heads}" + (", decaying to W₀" if _anchored(module) else "")


def _anchored(module: SelfModifyingTitans) -> str:
    return ", and where it decays to" if module.config.retain == "initial" and module.config.decay != "none" else ""


def _write_macs(module: SelfModifyingTitans, shapes: list[tuple[int, int]], heads: int) -> int:
    """One token: forwards for key and target, the error pulled back, decay, erase and write of every layer."""
    rule, total = module.rule, 0
    for layer, (o, i) in enumerate(shapes):
        forwards = (rule.objective == "l2" or len(shapes) > 1 or rule.dgd) + rule.self_targets
        erase = rule.dgd or rule.gated_erase
        total += o * i * (forwards + (layer > 0) + 1 + erase + (module.config.decay != "none"))
    return heads * total


def _teaching(module: SelfModifyingTitans, place: Place) -> Iterator[Transfer]:
    """Who generates whose context, and who reads the main memory."""
    static = [n for n in ("k", "v", "q") if n not in module.config.adaptive]
    given = ", ".join(static) or "their inputs"
    what = {"k": "keys", "v": "values", "q": "queries", "eta": "learning rate", "alpha": "decay"}
    for name in _names(module):
        yield Transfer(
            place.path("in_proj"), place.path(name), "generation", given if name == "memory" or static else "x"
        )
        for teacher in module.config.adaptive:
            if teacher != name and (teacher != "q" or name == "memory"):
                yield Transfer(place.path(teacher), place.path(name), "generation", what[teacher])
    yield Transfer(place.path("memory"), place.path("out_proj"), "parametric", "y, its answer")
