"""The short convolution and the rows of unit length against their definitions, in both forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.ops.conv import short_convolution, taps_reference
from nestling.ops.unit import unit, unit_reference
from slowly import examples

pytestmark = pytest.mark.usefixtures("form")


def same(function, definition, args):
    got, want = function(*args), definition(*args)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), args) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=examples(20))
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 9), width=st.integers(1, 20), taps=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_taps_over_a_sequence(batch, tokens, width, taps, seed):
    torch.manual_seed(seed)
    history = torch.randn(batch, tokens + taps - 1, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, taps, dtype=torch.float64, requires_grad=True)
    same(
        lambda h, w: short_convolution(h[:, taps - 1 :], w, state=h[:, : taps - 1])[0],
        taps_reference,
        [history, weight],
    )


@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 3, 7), (0, 4)])
def test_rows_of_unit_length(shape):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    same(unit, unit_reference, [x])
    if x.dim() == 3:
        same(lambda t: unit(t.transpose(0, 1)), lambda t: unit_reference(t.transpose(0, 1)), [x])


def test_a_row_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    unit(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1e3))


def test_second_derivatives():
    torch.manual_seed(0)
    x, taps = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 4, 2), (2, 2)))
    assert torch.autograd.gradgradcheck(unit, [x])
    assert torch.autograd.gradgradcheck(lambda a, b: short_convolution(a, b)[0], [x, taps])
