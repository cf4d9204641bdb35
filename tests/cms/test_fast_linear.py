"""A linear layer with differences: the same numbers whichever way it multiplies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nestling.cms.fast_linear import JOIN, FastLinear, applied
from slowly import examples


@settings(max_examples=examples(25), deadline=None)
@given(
    batch=st.integers(1, 3), tokens=st.sampled_from([1, JOIN - 1, JOIN, 40]), own=st.booleans(), fixed=st.booleans(),
    watched=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_sum_of_weights(batch, tokens, own, fixed, watched, bias):
    torch.manual_seed(0)
    layer = FastLinear.of(nn.Linear(5, 3, bias=bias)).double()
    x = torch.randn(batch, tokens, 5, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(batch if own else 1, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.detach().requires_grad_()
    want = torch.einsum("bti,boi->bto", x, (weight + delta).expand(batch, -1, -1)) + (layer.bias if bias else 0)
    with applied([layer], [delta], fixed=fixed, watched=watched):
        got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    way = torch.randn_like(want)
    theirs = torch.autograd.grad(want, [x, delta, weight], way)
    ours = torch.autograd.grad(got, [x, delta, layer.weight], way, allow_unused=True)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-12, atol=1e-12)
    assert ours[2] is None if fixed else torch.allclose(ours[2], theirs[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_difference_of_a_bf16_weight_is_not_rounded_away(autocast):
    layer = FastLinear.of(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        layer.weight.fill_(1.0)
    if not autocast:
        layer.bfloat16()
    x = torch.zeros(1, 2 * JOIN, 8, dtype=layer.weight.dtype)
    x[..., 0], x[..., 1] = 1, -1
    delta = torch.zeros(1, 1, 8)
    delta[..., 0] = 1e-3  # under half a unit in the last place of 1
    with applied([layer], [delta]), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert layer(x).float().mean().item() == pytest.approx(1e-3, rel=1e-2)
