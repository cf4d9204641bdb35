"""Architectures of a memory: forward and error signals against autograd."""

import pytest
import torch

from nestling.memory import OBJECTIVES, LinearMemory, MLPMemory
from nestling.memory.architectures import plain, silu, silu_slope
from nestling.memory.rule import forward

KINDS = [LinearMemory(4, 3), MLPMemory(4, 4, 6), MLPMemory(4, 1, 6, residual=False)]


def weights(architecture, lead=(2, 3)):
    return [torch.randn(*lead, *shape, dtype=torch.float64) for shape in architecture.shapes()]


@pytest.mark.parametrize("architecture", KINDS)
def test_errors_are_gradients_at_every_product(architecture):
    w, z = weights(architecture), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    products, linear = [], plain(w)

    def record(layer, x):
        products.append(linear(layer, x).requires_grad_())
        return products[-1]

    out = architecture.forward(z, record)
    error = torch.randn_like(out)
    want = torch.autograd.grad((out * error).sum(), products)
    got = architecture.errors(w, [p.detach() for p in products], error)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.expand_as(b), b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", KINDS)
def test_forward_is_its_formula(architecture):
    w, z = weights(architecture, ()), torch.randn(5, 4, dtype=torch.float64)
    want = z @ w[0].T
    if len(w) == 2:
        want = torch.nn.functional.silu(want) @ w[1].T
        want = want + z if architecture.residual else want
    torch.testing.assert_close(forward(architecture, tuple(w), z), want)


def test_silu_slope_and_its_gradient():
    a = torch.linspace(-30, 30, 41, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(silu(a).sum(), a)
    torch.testing.assert_close(silu_slope(a), slope)
    assert torch.autograd.gradcheck(silu_slope, a)
    assert silu_slope(torch.tensor([-1e30, 0.0, 1e30])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_error_is_the_gradient_of_the_loss(name):
    prediction, target = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 3).double()
    (want,) = torch.autograd.grad(OBJECTIVES[name].loss(prediction, target).sum(), prediction)
    torch.testing.assert_close(OBJECTIVES[name].error(prediction, target).expand_as(want), want)


def test_a_new_architecture_needs_only_its_own_class():
    """A three-layer memory, written here, learns by the same rule; its update is the gradient's step."""
    from nestling.memory.rule import Context, FastWeights, UpdateRule, advance
    from nestling.ops.chunk import decay_table

    class Deep(MLPMemory):
        def shapes(self):
            return [(self.hidden, self.inputs), (self.hidden, self.hidden), (self.outputs, self.hidden)]

        def forward(self, z, linear):
            return linear(2, silu(linear(1, silu(linear(0, z)))))

        def errors(self, weights, products, error):
            second = (error @ weights[2]) * silu_slope(products[1])
            return [(second @ weights[1]) * silu_slope(products[0]), second, error]

    deep, tokens = Deep(3, 3, 5), 4
    w = [torch.randn(1, 1, 1, *s, dtype=torch.float64, requires_grad=True) for s in deep.shapes()]
    k, v = torch.randn(2, 1, 1, tokens, 3, dtype=torch.float64)
    eta, alpha = torch.rand(1, 1, tokens, dtype=torch.float64), torch.ones(1, 1, tokens, dtype=torch.float64)
    fast = FastWeights(tuple(w), tuple(w), ())
    rule = UpdateRule(dgd=False, step="plain", self_targets=False)
    new, _, _ = advance(deep, rule, fast, Context(k, v, eta, alpha, None, decay_table(alpha, None)), fresh=True)
    losses = 0.5 * (forward(deep, tuple(w), k.unsqueeze(0)) - v).square().sum(-1)
    grads = torch.autograd.grad((losses * eta).sum(), w)
    for after, before, g in zip(new.now, w, grads, strict=True):
        torch.testing.assert_close(after, before - g, rtol=1e-10, atol=1e-10)
