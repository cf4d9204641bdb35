"""Self-modifying Titans against their definition, token by token; meta-gradients against finite differences."""

import pytest
import torch

from nestling.layers.titans import SelfModifyingTitans
from nestling.layers.titans_reference import self_modifying_titans_reference
from titans import DIM, HEADS, SETTINGS, build


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
