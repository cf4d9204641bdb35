"""The inverse of unit-lower-triangular matrices by products against a solve."""

import pytest
import torch

from nestling.ops.triangular import unit_inverse, unit_inverse_reference


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 64])
def test_by_blocks_is_a_solve(size):
    torch.manual_seed(size)
    low = torch.randn(3, size, size, dtype=torch.float64).mul_(0.3).requires_grad_()  # above the diagonal too: ignored
    got, want = unit_inverse(low), unit_inverse_reference(low)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), low) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_second_derivatives():
    low = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(unit_inverse, [low])


def test_keys_that_are_alike_stay_finite():
    low = torch.full((1, 64, 64), 1.9)  # |(I + L)^-1| stays small while L's powers reach 1e30
    assert unit_inverse(low).isfinite().all()
    torch.testing.assert_close(unit_inverse(low), unit_inverse_reference(low), rtol=1e-4, atol=1e-4)
