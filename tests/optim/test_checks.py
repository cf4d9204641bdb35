"""The checks all optimisers share: what they let through, what they refuse and what they call it."""

import math

import pytest
import torch
from torch import nn

from nestling.optim import checks


@pytest.mark.parametrize("lr", [0.0, 1e-3, 1, torch.tensor(0.1), torch.tensor([0.1])])
def test_learning_rates(lr):
    checks.check_lr(lr)


@pytest.mark.parametrize(
    ("lr", "kind"),
    [
        (-1e-9, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("0.1", TypeError),
        (True, TypeError),
        (None, TypeError),
        (torch.tensor(-0.1), ValueError),
        (torch.tensor([0.1, 0.2]), ValueError),
        (torch.tensor(1), TypeError),
    ],
)
def test_bad_learning_rates(lr, kind):
    with pytest.raises(kind, match="lr"):
        checks.check_lr(lr)


def test_numbers_fractions_and_whole_numbers():
    checks.check_number("x", 0.0)
    checks.check_fraction("x", 0.0)
    checks.check_whole("x", 1)
    checks.check_choice("x", "a", ["a", "b"])
    for check, arguments in (
        (checks.check_number, ("gain", 0.0, 0.0)),
        (checks.check_fraction, ("gain", 1.0)),
        (checks.check_whole, ("gain", 0)),
        (checks.check_choice, ("gain", "c", ["a", "b"])),
    ):
        options = {"above": True} if check is checks.check_number else {}
        with pytest.raises(ValueError, match="gain"):
            check(*arguments, **options)
    for value in (1.5, True):
        with pytest.raises(TypeError, match="gain"):
            checks.check_whole("gain", value)


def test_periods():
    assert checks.check_periods([1, 4, 64]) == (1, 4, 64)
    assert checks.check_periods((1,)) == (1,)
    for periods in ((), (0,), (2,), (1, 1), (1, 8, 4), (1, -4)):
        with pytest.raises((ValueError, TypeError), match="periods"):
            checks.check_periods(periods)
    for periods in (16, "16", (1, 2.0), None):
        with pytest.raises(TypeError, match="periods"):
            checks.check_periods(periods)


def test_parameters_and_gradients():
    parameter = nn.Parameter(torch.ones(2, 3))
    checks.check_parameter(parameter)
    parameter.grad = torch.ones(2, 3)
    checks.check_gradient(parameter)
    with pytest.raises(TypeError, match=r"w \[2\].*complex64"):
        checks.check_parameter(torch.ones(2, dtype=torch.complex64), "w ")
    parameter.grad = torch.ones(2, 3).to_sparse()
    with pytest.raises(ValueError, match="SparseAdam"):
        checks.check_gradient(parameter)
    parameter.grad = torch.ones(2, 3)
    parameter.data = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"\[2, 3\].*zero_grad"):
        checks.check_gradient(parameter)
    parameter.data = torch.ones(2, 3, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"float32.*float16"):
        checks.check_gradient(parameter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 7, 99])
def test_non_finite_gradients_are_found(dtype, bad, place):
    good, damaged = torch.ones(3, dtype=torch.float32), torch.ones(100, dtype=dtype)
    assert checks.finite([good, damaged, torch.zeros(0)])
    damaged[place] = bad
    assert not checks.finite([good, damaged])
    assert checks.finite([good, damaged], "ignore")
    with pytest.raises(FloatingPointError, match="NaN"):
        checks.finite([good, damaged], "raise")


def test_gradients_whose_squares_do_not_fit():
    assert checks.finite([torch.full((3,), 0.5 * checks.LARGEST)])
    assert not checks.finite([torch.full((3,), 1.1 * checks.LARGEST)])
    assert checks.finite([torch.full((3,), 65504.0, dtype=torch.float16)])
    assert checks.finite([])
