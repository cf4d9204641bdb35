"""The hand-differentiated chunk step against the rule's definition: values, gradients, second derivatives."""

import pytest
import torch

from nestling.layers import titans_scan
from nestling.layers.titans import SelfModifyingTitans
from nestling.memory import LinearMemory, MLPMemory, UpdateRule
from nestling.memory.fused import is_fused

pytestmark = pytest.mark.usefixtures("form")

SETTINGS = {
    "default": {},
    "no_momentum": dict(momentum=False),
    "after": dict(read="after"),
    "chunk": dict(read="chunk"),
    "adaptive_q": dict(adaptive=("k", "v", "q", "eta", "alpha"), gates="linear"),
    "two_chunk_sizes": dict(memory_chunk_size=12),
    "fixed_decay": dict(decay="fixed", adaptive=("k", "v")),
    "linear": dict(architecture="linear"),
    "linear_after": dict(architecture="linear", read="after", retain="zero"),
    "rate_one": dict(rate="one", decay="none", adaptive=("k",), momentum=False),
}


def run(options, fused, tokens=17, dim=6, dtype=torch.float64):
    """Outputs of the same layer with the step by hand, or by the rule."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(dim, 2, **({"chunk_size": 6} | options)).to(dtype)
    x = torch.randn(2, tokens, dim, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    used = []

    def chosen(architecture, rule):
        used.append(is_fused(architecture, rule))
        return used[-1] and fused

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(titans_scan, "is_fused", chosen)
        y, state = layer(x)
    assert any(used), "the step by hand was never considered"
    return layer, x, y, state


def gradients(layer, x, y, state, create_graph=False):
    """Of the outputs and the state after the last token."""
    leaves = [w for fast in state.memories for w in (*fast.now, *fast.velocity)]
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + sum(w.sin().sum() for w in leaves)
    return torch.autograd.grad(loss, [x, *layer.parameters()], create_graph=create_graph, allow_unused=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_equal_the_rule(name):
    by_hand, by_rule = (run(SETTINGS[name], fused) for fused in (True, False))
    torch.testing.assert_close(by_hand[2], by_rule[2], rtol=1e-10, atol=1e-10)
    for a, b in zip(by_hand[3].memories, by_rule[3].memories, strict=True):
        for s, t in zip((*a.now, *a.velocity), (*b.now, *b.velocity), strict=True):
            torch.testing.assert_close(s, t, rtol=1e-10, atol=1e-10)
    names = ["x", *(n for n, _ in by_hand[0].named_parameters())]
    for n, a, b in zip(names, gradients(*by_hand), gradients(*by_rule), strict=True):
        if a is None or b is None:
            assert not any(g is not None and g.any() for g in (a, b)), n
            continue
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", ["default", "no_momentum", "chunk"])
def test_second_derivatives_equal_the_rule(name):
    found = []
    for fused in (True, False):
        layer, x, y, state = run(SETTINGS[name], fused, tokens=8)
        first = gradients(layer, x, y, state, create_graph=True)
        size = sum(g.square().sum() for g in first if g is not None)
        found.append(torch.autograd.grad(size, [x, *layer.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fused", [True, False])
def test_second_derivative_equals_finite_differences(fused):
    layer, x, *_ = run({}, True, tokens=8)
    way = torch.nn.functional.normalize(torch.randn(x.numel(), dtype=x.dtype), dim=0).view_as(x)

    def slope(at, create_graph=False):
        return (gradients(layer, at, *layer(at), create_graph)[0] * way).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(titans_scan, "is_fused", lambda a, r: fused and is_fused(a, r))
        (second,) = torch.autograd.grad(slope(x, True), x)
        ends = [slope((x + shift * way).detach().requires_grad_()) for shift in (1e-5, -1e-5)]
    torch.testing.assert_close((second * way).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, dict(step="layer"), dict(architecture="linear")])
def test_asking_for_second_derivatives_leaves_the_first_as_they_are(options):
    torch.manual_seed(0)
    layer = SelfModifyingTitans(6, 2, chunk_size=6, **options).double()
    x = torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    want = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    got = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_edges_stay_finite_and_equal(scale):
    """Zero keys and values, and very large input: float32 by hand against the rule."""
    grads = []
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(titans_scan, "is_fused", lambda a, r, fused=fused: fused and is_fused(a, r))
            torch.manual_seed(0)
            layer = SelfModifyingTitans(8, 2, chunk_size=8)
            x = (scale * torch.randn(2, 20, 8)).requires_grad_()
            y, _ = layer(x)
            grads.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
        assert all(g.isfinite().all() for g in grads[-1])
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


def test_when_the_step_by_hand_applies():
    memory = MLPMemory(4, 4, 8)
    assert is_fused(memory, UpdateRule())
    assert is_fused(LinearMemory(4, 4), UpdateRule())
    assert not is_fused(MLPMemory(4, 1, 8, residual=False), UpdateRule())
    for change in (dict(dgd=False), dict(step="layer"), dict(meta_grad="first_order"), dict(self_targets=False),
                   dict(objective="dot"), dict(gated_erase=True)):  # fmt: skip
        assert not is_fused(memory, UpdateRule(**change)), change
