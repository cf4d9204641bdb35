"""Self-modifying Titans against their definition, token by token; meta-gradients against finite differences."""

import pytest
import torch

from nestling.layers.titans import SelfModifyingTitans
from nestling.layers.titans_reference import self_modifying_titans_reference

DIM, HEADS = 6, 2

SETTINGS = {
    "default": {},
    "wide": dict(expansion=3, head_dim=4),
    "one_head": dict(num_heads=1),
    "linear": dict(architecture="linear"),
    "no_momentum": dict(momentum=False),
    "no_dgd": dict(dgd=False),
    "linear_no_dgd": dict(architecture="linear", dgd=False),
    "gated_erase": dict(gated_erase=True),
    "step_layer": dict(step="layer"),
    "step_plain": dict(step="plain", momentum=False),
    "read_after": dict(read="after"),
    "read_chunk": dict(read="chunk"),
    "slow_memory": dict(memory_chunk_size=8),
    "slow_projections": dict(chunk_size=8, memory_chunk_size=2),
    "slow_memory_read_chunk": dict(memory_chunk_size=8, read="chunk"),
    "chunk_1": dict(chunk_size=1),
    "one_chunk": dict(chunk_size=64),
    "adaptive_q": dict(adaptive=("k", "v", "q", "eta", "alpha")),
    "adaptive_some": dict(adaptive=("q", "alpha")),
    "adaptive_gates": dict(adaptive=("eta", "alpha"), memory_chunk_size=8),
    "static": dict(adaptive=()),
    "mlp_gates": dict(gates="mlp"),
    "mlp_gates_linear_memory": dict(gates="mlp", architecture="linear", memory_chunk_size=8),
    "targets_are_values": dict(adaptive=("k", "v", "q"), self_targets=False),
    "dot": dict(objective="dot", read="after"),
    "no_decay": dict(decay="none", adaptive=("k", "v", "eta")),
    "fixed_decay": dict(decay="fixed", adaptive=("k", "v", "eta")),
    "rate_one": dict(rate="one", adaptive=("k", "v", "alpha")),
    "raw_values": dict(normalize_values=False),
    "bare": dict(conv_size=0, output_gate=False),
    "norm_limit": dict(norm_limit=0.3),
    "retain_zero": dict(retain="zero"),
    "retain_zero_linear": dict(retain="zero", architecture="linear"),
    "erase_gate": dict(erase_gate=True),
    "erase_gate_alone": dict(erase_gate=True, dgd=False, momentum=False, tied_write=False),
    "erase_gate_first_of_two": dict(erase_gate=True, erase_range=2.0),
    "erase_gate_last_of_two": dict(
        erase_gate=True, erase_range=2.0, erase_layer="last", objective="dot", gated_erase=True, read="after"
    ),
    "tracking": dict(
        erase_gate=True, erase_range=2.0, architecture="linear", objective="dot", momentum=False, conv_size=0
    ),
    "rate_gate": dict(rate="gate", step="layer", architecture="linear", memory_chunk_size=8),
    "rate_gate_joint": dict(rate="gate", initial_rate=1.0),
    "rate_gate_plain": dict(rate="gate", step="plain", adaptive=("k",)),
    "qkv_conv": dict(qkv_conv=3),
    "qkv_conv_static": dict(qkv_conv=4, conv_for="gates", adaptive=(), normalize_values=False),
    "qkv_conv_some": dict(qkv_conv=2, adaptive=("v", "q", "alpha"), conv_for=("eta", "gate", "x")),
    "conv_for_gates": dict(conv_for="gates", erase_gate=True),
    "projection_rate": dict(projection_rate=0.3),
    "projection_rate_static_gates": dict(
        projection_rate=0.1, adaptive=("k", "v"), architecture="linear", objective="dot", self_targets=False,
        rate="gate", step="layer", erase_gate=True, erase_range=2.0, tied_write=False, momentum=False, qkv_conv=4,
    ),
    "inner_skip": dict(skip="inner", first_rate=0.1),
    "inner_skip_all": dict(
        skip="inner", first_rate=0.02, adaptive=(), objective="dot", self_targets=False, rate="gate", step="layer",
        erase_gate=True, erase_range=2.0, erase_layer="last", tied_write=False, gated_erase=True, momentum=False,
        qkv_conv=4, conv_for="gates", read="after",
    ),
}  # fmt: skip


def build(**options):
    """A small layer in float64 whose parameters all differ from their initial values."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(DIM, **({"num_heads": HEADS, "chunk_size": 4} | options)).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        if layer.alpha_bias is not None:
            layer.alpha_bias.sub_(3.0)  # decays that matter within a few tokens
    return layer


def inputs(tokens, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, DIM, generator=g, dtype=torch.float64, requires_grad=True)


def gradients(layer, y, x):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()], allow_unused=True)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_meta_gradients_equal_the_definition(name):
    layer = build(**SETTINGS[name])
    x = inputs(18 if 8 in SETTINGS[name].values() else 11)  # two whole chunks of all memories, and one that is open
    y, definition = layer(x)[0], self_modifying_titans_reference(layer, x)
    close(y, definition)
    got, want = gradients(layer, y, x), gradients(layer, definition, x)
    names = ["x", *(n for n, _ in layer.named_parameters())]
    for n, a, b in zip(names, got, want, strict=True):
        if b is None:  # the last chunk's gates reach no output
            assert a is None or not a.any(), n
            continue
        assert a is not None, n
        close(a, b, 1e-8)


def test_the_norm_limit_is_at_work():
    x = inputs(21)
    a, b = (build(norm_limit=limit)(x)[0] for limit in (0.3, 8.0))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(gates="mlp", memory_chunk_size=8, adaptive=("k", "v", "q", "eta", "alpha")),
        dict(erase_gate=True, erase_range=2.0, qkv_conv=3, conv_for="gates", skip="inner", first_rate=0.1),
    ],
)
def test_meta_gradients_equal_finite_differences(options):
    layer = build(**options)
    x = inputs(14).detach()
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)

    def loss():
        return (layer(x)[0] * weights).sum()

    grads = torch.autograd.grad(loss(), list(layer.parameters()))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for (name, p), grad in zip(layer.named_parameters(), grads, strict=True):
            way, old, ends = torch.randn(p.shape, generator=g, dtype=p.dtype), p.clone(), []
            for shift in (1e-5, -1e-5):
                p.copy_(old + shift * way)
                ends.append(loss())
            p.copy_(old)
            difference = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(
                (grad * way).sum(), difference, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n} {m}"
            )


def test_meta_grad_changes_gradients_not_values():
    x = inputs(14)
    layers = {kind: build(meta_grad=kind) for kind in ("full", "first_order", "none")}
    results = {kind: layer(x)[0] for kind, layer in layers.items()}
    close(results["first_order"], results["full"], 1e-12)
    close(results["none"], results["full"], 1e-12)
    grads = {kind: gradients(layers[kind], y, x) for kind, y in results.items()}
    at = 1 + [n for n, _ in layers["full"].named_parameters()].index("initial.0.0")
    for a, b in (("full", "first_order"), ("full", "none"), ("first_order", "none")):
        assert (grads[a][at] - grads[b][at]).abs().max() > 1e-6, (a, b)


def test_meta_grad_none_stops_at_the_chunk():
    """A later chunk's loss reaches no initial state; with the others it does."""
    for kind, reaches in (("full", True), ("first_order", True), ("none", False)):
        layer = build(meta_grad=kind, chunk_size=4)
        layer(inputs(12))[0][:, 8:].sum().backward()
        grads = [p.grad for p in layer.initial.parameters()]
        assert any(g is not None and g.any() for g in grads) == reaches, kind


def test_first_order_holds_the_inner_gradient_fixed():
    """One chunk, linear memory, plain step, no erase: dW_C/dW_0 is the decay alone, however long the chunk."""
    layer = build(
        architecture="linear",
        adaptive=(),
        dgd=False,
        step="plain",
        momentum=False,
        meta_grad="first_order",
        retain="zero",
        chunk_size=16,
    )
    x = inputs(8)
    _, state = layer(x)
    parts, _, _ = layer._features(x, x.new_zeros(2, 3, DIM), (), None)
    alpha = torch.sigmoid(parts["alpha"] + layer.alpha_bias[:, None])
    (now,) = state.memories[0].now
    (grad,) = torch.autograd.grad(now.sum(), list(layer.initial.parameters()))
    close(grad, alpha.prod(-1).sum(0)[None, :, None, None].expand_as(grad))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(gates="mlp"),
        dict(adaptive=("k", "v", "q", "eta", "alpha"), memory_chunk_size=8),
        dict(architecture="linear", read="after"),
        dict(read="chunk"),
    ],
)
def test_every_parameter_and_initial_state_learns(options):
    """Each memory, each of its layers, each head: a non-zero gradient at the default initialisation."""
    layer = SelfModifyingTitans(16, 2, chunk_size=4, **options)
    layer(torch.randn(2, 24, 16))[0].square().mean().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name
    for group, weights in zip(layer.groups, layer.initial, strict=True):
        for weight in weights:
            size = weight.grad.abs().amax((-1, -2))  # [memories, heads]
            assert (size > 0).all(), f"{group.names}: {size}"


@pytest.mark.parametrize("segment_size", [8, 12, 5, 0])
@pytest.mark.parametrize("options", [{}, dict(memory_chunk_size=8), dict(architecture="linear", read="after")])
def test_recomputation_changes_nothing(options, segment_size):
    x = inputs(27)
    whole = build(segment_size=1000, **options)
    pieces = build(segment_size=segment_size, **options)
    a, b = whole(x), pieces(x)
    close(a[0], b[0], 1e-12)
    for s, t in zip(gradients(whole, a[0], x), gradients(pieces, b[0], x), strict=True):
        close(s, t, 1e-11)


@pytest.mark.parametrize("architecture", ["linear", "mlp"])
@pytest.mark.parametrize("name", ["k", "v", "q"])
def test_from_the_identity_a_layer_begins_as_one_of_static_projections(architecture, name):
    """Until the first chunk ends, when what its memories learned is read for the first time."""
    options = dict(architecture=architecture, self_targets=False, qkv_conv=2, chunk_size=4)
    static = build(adaptive=(), **options)
    layer = SelfModifyingTitans(
        DIM, HEADS, adaptive=(name,), projection_init="identity", **(dict(chunk_size=4) | options)
    ).double()
    own = dict(static.named_parameters())
    rows = dict(zip(static.widths, own["in_proj.weight"].split([*static.widths.values()])))
    rows["x"] = rows[name]
    layer.load_state_dict(
        {n: p for n, p in own.items() if not n.startswith(("initial", "in_proj"))}
        | {"in_proj.weight": torch.cat([rows[part] for part in layer.widths])}
        | {n: p for n, p in layer.state_dict().items() if n.startswith("initial")}
    )  # fmt: skip
    with torch.no_grad():
        for theirs, ours in zip(layer.initial[-1], static.initial[-1], strict=True):
            theirs[-1].copy_(ours[-1])
    x = inputs(11)
    apart = (layer(x)[0] - static(x)[0]).abs()
    first, later = apart[:, :4].max(), apart[:, 4:].max()
    assert first < 1e-3  # made a unit vector twice, with the 1e-6 of `unit` in it
    assert later > 5 * first


def test_inspect_tells_what_the_layer_did():
    layer = build()
    x = inputs(11)
    figures = layer.inspect(x)
    assert set(figures) == {"loss", "step", "eta", "alpha", "momentum", "norm"}
    for name, value in figures.items():
        assert value.shape == (2, HEADS, 11), name
        assert value.isfinite().all(), name
        assert not value.requires_grad, name
    assert (figures["alpha"] < 1).all()
    assert (figures["eta"] > 0).all()
    assert (figures["loss"] >= 0).all()
    state = layer(x[:, :6])[1]
    later = layer.inspect(x[:, 6:], state)
    close(later["loss"], figures["loss"][:, :, 6:])
