"""The engine: which settings are which optimiser, and that each write is the gradient of the objective it names."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz

from nestling.ops.orthogonalize import orthogonalize
from nestling.optim.base import MemoryOptimizer
from nestling.optim.closed_forms import elementwise_memory, matrix_power, outer_memory
from nestling.optim.memories import L2, DotProduct, GradientMemory, Matrix, as_rows, recall
from nestling.optim.preconditioners import Map
from slowly import examples

SHAPES = [(5,), (4, 3), (3, 2, 2, 2), ()]


def pair(shapes=SHAPES, dtype=torch.float64):
    """The same parameters twice."""
    first = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    return first, [nn.Parameter(p.detach().clone()) for p in first]


def drive(optimizers, parameters, steps=6):
    """Same random gradients to each optimiser's parameters."""
    for _ in range(steps):
        for same in zip(*parameters):
            gradient = torch.randn_like(same[0])
            for p in same:
                p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_plain_memory_is_sgd_with_momentum_bit_for_bit(nesterov, dtype):
    ours, theirs = pair(dtype=dtype)
    memory = GradientMemory(decay=0.9, nesterov=nesterov)
    drive(
        [MemoryOptimizer(ours, 0.1, memory), torch.optim.SGD(theirs, 0.1, momentum=0.9, nesterov=nesterov)],
        [ours, theirs],
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_the_rate_of_a_write_is_one_minus_dampening():
    ours, theirs = pair()
    optimizer = MemoryOptimizer(ours, 0.1, GradientMemory(decay=0.9, rate=1 - 0.3))
    reference = torch.optim.SGD(theirs, 0.1, momentum=0.9, dampening=0.3)
    for p, q in zip(ours, theirs):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        # torch starts its buffer at the undamped first gradient: give our memory the same start
        optimizer.state[p]["momentum"] = -0.3 / 0.9 * p.grad
    optimizer.step()
    reference.step()
    drive([optimizer, reference], [ours, theirs])
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(ours, theirs))


def muon_scale(matrix):
    return math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))


@pytest.mark.parametrize("shape", [(6, 4), (4, 9)])
def test_an_orthogonalised_output_is_muon(shape):
    """With torch's bfloat16 iteration as output, torch.optim.Muon step for step; with ours, to bfloat16's accuracy."""
    parameters = [[nn.Parameter(torch.ones(shape))] for _ in range(3)]
    choices = dict(decay=0.95, rate=0.05, nesterov=True)

    def torchs(m):
        return torch_newton_schulz(m, (3.4445, -4.7750, 2.0315), 5, 1e-7).float() * muon_scale(m)

    def mine(m):
        return orthogonalize(m, dtype=torch.bfloat16) * muon_scale(m)

    optimizers = [
        MemoryOptimizer(parameters[0], 0.02, GradientMemory(**choices, output=torchs), weight_decay=0.1),
        MemoryOptimizer(parameters[1], 0.02, GradientMemory(**choices, output=mine), weight_decay=0.1),
        torch.optim.Muon(parameters[2], lr=0.02, weight_decay=0.1, momentum=0.95),
    ]
    for _ in range(5):
        drive(optimizers, parameters, 1)
        torchs_, mine_, muon = (p[0].detach() for p in parameters)
        assert (torchs_ - muon).abs().max() <= 0.02 * 2**-8  # a bfloat16 ulp of a step's entries
        assert (mine_ - muon).abs().max() < 5 * 0.02 * 0.05
    assert (muon - 1).abs().max() > 0.02


def test_muon_written_out_in_float64():
    (p,), (q,) = pair([(4, 6)])
    optimizer = MemoryOptimizer([p], 0.02, GradientMemory(decay=0.95, rate=0.05, nesterov=True, output=orthogonalize))
    momentum = torch.zeros_like(q)
    for _ in range(5):
        g = p.grad = torch.randn_like(p)
        momentum = 0.95 * momentum + 0.05 * g
        x = 0.05 * g + 0.95 * momentum
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        q = q - 0.02 * x
        optimizer.step()
    assert torch.allclose(p, q, atol=1e-13)


def test_keys_and_values_are_settings():
    """NL Eqs. 47, 51: signs as keys without memory are sign descent; a map of gradients is applied before the write."""
    (p,), (q,) = pair([(4, 3)])
    drive([MemoryOptimizer([p], 0.1, GradientMemory(decay=0.0, features=torch.sign))], [[p], [q]], 1)
    assert torch.allclose(p, q - 0.1 * q.grad.sign())
    mapped, momentum = torch.randn(4, 4, dtype=torch.float64), torch.zeros_like(q)
    optimizer = MemoryOptimizer([p], 0.1, GradientMemory(preconditioner=Map(lambda g: mapped @ g)))
    expected = p.detach().clone()
    for _ in range(4):
        drive([optimizer], [[p]], 1)
        momentum = 0.9 * momentum - mapped @ p.grad
        expected += 0.1 * momentum
    assert torch.allclose(p, expected)


@settings(max_examples=examples(30))
@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.sampled_from(["identity", "unit"]))
def test_a_write_is_a_gradient_step_on_the_written_objective(rows, columns, l2, features):
    """m <- alpha m - grad L for a matrix memory whose rows of keys are stored under the unit vectors."""
    objective = L2(0.3, literal=True) if l2 else DotProduct()
    memory = GradientMemory(decay=0.8, objective=objective, features=features)
    state = {"momentum": torch.randn(rows, columns, dtype=torch.float64)}
    gradient = torch.randn(rows, columns, dtype=torch.float64)
    m = state["momentum"].clone().requires_grad_()
    size = gradient.norm() if features == "unit" else 1.0
    key, values = gradient / size, size * torch.eye(rows, dtype=torch.float64)
    loss = (m @ key.T * values).sum() + objective.erase / 2 * (m @ key.T).square().sum()
    expected = 0.8 * m - torch.autograd.grad(loss, m)[0]
    assert torch.allclose(memory.step(state, gradient), expected)
    assert torch.allclose(state["momentum"], expected)


@given(st.integers(1, 5), st.integers(1, 5), st.floats(-6, 6), st.floats(0.01, 100))
def test_the_step_of_l2_is_exact_for_one_key_and_never_expands(rows, columns, size, erase):
    g = torch.randn(rows, columns, dtype=torch.float64) * 10.0**size
    state = {"momentum": torch.randn(rows, columns, dtype=torch.float64)}
    before = state["momentum"].clone()
    Matrix().write(state, g, g, L2(erase), 1.0, 1.0)
    if rows == 1:  # the minimiser of erase/2 (m g + 1/erase)^2 + 1/2 |m - before|^2
        system = torch.eye(columns, dtype=torch.float64) + erase * g.T @ g
        exact = torch.linalg.solve(system, (before - g).T).T
        assert torch.allclose(state["momentum"], exact, rtol=1e-6)
    erased = {"momentum": before.clone()}
    Matrix().write(erased, g, torch.zeros_like(g), L2(erase), 1.0, 1.0)
    assert erased["momentum"].norm() <= before.norm() * (1 + 1e-12)


def test_recall_takes_the_smaller_side_to_the_same_end():
    for shape in ((2, 5), (5, 2)):
        m, k = torch.randn(2, *shape, dtype=torch.float64)
        assert torch.allclose(recall(m, k), m @ (k.T @ k))


def test_gradients_of_any_shape_are_rows():
    shapes = {(): (1, 1), (5,): (1, 5), (4, 3): (4, 3), (4, 3, 2, 2): (4, 12), (0, 3): (1, 0)}
    assert {s: tuple(as_rows(torch.zeros(s)).shape) for s in shapes} == shapes


@pytest.mark.parametrize(
    "setting", [dict(decay=1.0), dict(decay=-0.1), dict(rate=0.0), dict(features="nothing"), dict(decay=math.nan)]
)
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        GradientMemory(**setting)
    with pytest.raises(ValueError, match="erase"):
        L2(0.0)


# App. B: closed forms


def sums(gradients):
    return gradients.sum(0), gradients.square().sum(0)


def test_the_elementwise_memory_minimises_its_objective():
    gradients, target = torch.randn(7, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    m = elementwise_memory(*sums(gradients), target, ridge=0.3).requires_grad_()
    loss = (m * gradients - target).square().sum() + 0.3 * m.square().sum()
    assert torch.autograd.grad(loss, m)[0].abs().max() < 1e-12


def test_the_outer_memory_minimises_its_objective():
    gradients, values = torch.randn(7, 3, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    gram = (gradients.mT @ gradients).sum(0)
    m = outer_memory(gradients.sum(0), gram, values, ridge=0.3).requires_grad_()
    answers = sum(0.5 * (m @ g.T).square().sum() - (m * (g @ values)).sum() for g in gradients)
    assert torch.autograd.grad(answers + 0.15 * m.square().sum(), m)[0].abs().max() < 1e-11


def test_with_root_squares_as_values_it_is_adams_step():
    """NL Eqs. 101-105, with bias-corrected averages in place of sums; P = H is momentum."""
    p = nn.Parameter(torch.randn(6, dtype=torch.float64))
    adam = torch.optim.Adam([p], lr=0.1, betas=(0.9, 0.99), eps=0.0)
    mean, square = torch.zeros(2, 6, dtype=torch.float64)
    for t in range(1, 6):
        p.grad = torch.randn_like(p)
        mean, square = 0.9 * mean + 0.1 * p.grad, 0.99 * square + 0.01 * p.grad**2
        m, h = mean / (1 - 0.9**t), square / (1 - 0.99**t)
        before = p.detach().clone()
        adam.step()
        assert torch.allclose(before - p, 0.1 * elementwise_memory(m, h, h.sqrt()), rtol=1e-10)
        assert torch.allclose(elementwise_memory(m, h, h), m)


def test_with_sums_it_is_adagrads_step():
    p = nn.Parameter(torch.randn(6, dtype=torch.float64))
    adagrad, square = torch.optim.Adagrad([p], lr=0.1, eps=0.0), torch.zeros(6, dtype=torch.float64)
    for _ in range(5):
        p.grad = torch.randn_like(p)
        square = square + p.grad**2
        before = p.detach().clone()
        adagrad.step()
        assert torch.allclose(before - p, 0.1 * elementwise_memory(p.grad, square, square.sqrt()), rtol=1e-10)


def test_the_outer_version_is_full_matrix_adagrad_and_for_one_gradient_its_polar_factor():
    """NL Eqs. 106-111 with P = H^(1/2)."""
    gradients = torch.randn(9, 1, 4, dtype=torch.float64)  # of a vector: one row
    gram = (gradients.mT @ gradients).sum(0)
    got = outer_memory(gradients[-1], gram, matrix_power(gram, 0.5))
    values, vectors = torch.linalg.eigh(gram)
    assert torch.allclose(got, gradients[-1] @ vectors @ torch.diag(values**-0.5) @ vectors.T)
    g = torch.randn(6, 4, dtype=torch.float64)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert torch.allclose(outer_memory(g, g.T @ g, matrix_power(g.T @ g, 0.5)), u @ v)


def test_an_element_that_saw_nothing_stays_at_zero():
    zero = torch.zeros(2)
    assert torch.equal(elementwise_memory(zero, zero, zero), zero)


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "memory_view.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code, scope)
    assert scope["optimizer"].state[scope["model"].weight]["momentum"].abs().max() > 0
