import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nestling.optim import DeepMomentum
from nestling.optim.deep_memory import MLP
from nestling.optim.memories import L2, DotProduct
from slowly import examples


def run(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("options", [dict(hidden=0), dict(memory_rate=0.0)])
def test_without_an_mlp_it_is_sgd_with_momentum(options):
    p, gradients = nn.Parameter(torch.randn(4, 3).double()), torch.randn(6, 4, 3).double()
    q = nn.Parameter(p.detach().clone())
    ours = run(DeepMomentum([p], 0.1, 0.9, **options), p, gradients)
    assert torch.allclose(ours, run(torch.optim.SGD([q], 0.1, momentum=0.9), q, gradients), atol=1e-13)


def test_with_an_mlp_it_is_not():
    p, gradients = nn.Parameter(torch.zeros(4, 3).double()), torch.randn(6, 4, 3).double()
    q = nn.Parameter(p.detach().clone())
    ours = run(DeepMomentum([p], 0.1, 0.9), p, gradients)
    assert (ours - run(torch.optim.SGD([q], 0.1, momentum=0.9), q, gradients)).norm() > 0.05 * ours.norm()


@settings(max_examples=examples(30))
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_a_write_is_a_gradient_step_on_the_written_objective(rows, columns, hidden, l2):
    """NL Eq. 50: all weights of m follow alpha m - rate * gradient, W1 and W2 counted from their start, by autograd."""
    architecture, objective = MLP(hidden, rate=0.7), L2(0.4, literal=True) if l2 else DotProduct()
    state = architecture.start(torch.zeros(rows, columns, dtype=torch.float64))
    state |= {name: torch.randn_like(state[name]) for name in ("momentum", "in", "out")}
    before = {name: value.clone().requires_grad_() for name, value in state.items()}
    u = torch.randn(rows, columns, dtype=torch.float64)
    scale = u.square().sum(1).mean().sqrt()

    def answer():
        """m(u) / s, with rows of root mean square norm 1 in and out."""
        mlp = torch.tanh(u / scale @ before["in"].T) / hidden**0.5 @ before["out"].T
        return before["momentum"] / scale, mlp

    def loss(y):
        return (y * u / scale).sum() + objective.erase / 2 * y.square().sum()

    bias, mlp = answer()
    total = loss(bias + mlp)
    into, out = torch.autograd.grad(total / rows, [before["in"], before["out"]], retain_graph=True)
    error = torch.autograd.grad(total, bias)[0]  # of B, in units of the gradient
    architecture.write(state, u, u, objective, 0.8, 0.5)
    assert torch.allclose(state["momentum"], 0.8 * before["momentum"] - 0.5 * scale * error)
    assert torch.allclose(state["out"], 0.8 * before["out"] - 0.35 * out)
    start = before["initial"]
    assert torch.allclose(state["in"], start + 0.8 * (before["in"] - start) - 0.35 * into)
    with torch.no_grad():
        before |= state
        assert torch.allclose(architecture.read(state, u, u), scale * sum(answer()))


def test_the_step_scales_with_the_loss():
    gradients = torch.randn(6, 4, 3).double()

    def moved(scale):
        p = nn.Parameter(torch.zeros(4, 3).double())
        return run(DeepMomentum([p], 1 / scale), p, scale * gradients)

    assert torch.allclose(moved(1.0), moved(1e5))


def test_it_answers_a_gradient_with_the_past_ones_that_resemble_it():
    """After gradients along one direction the MLP speaks up for it, and is silent for an orthogonal one."""
    architecture = MLP(64)
    state = architecture.start(torch.zeros(1, 8, dtype=torch.float64))
    first, second = torch.eye(8, dtype=torch.float64)[:2].unsqueeze(1)
    for _ in range(5):
        architecture.write(state, first, first, DotProduct(), 0.9, 1.0)
    state["momentum"].zero_()
    seen, unseen = (architecture.read(state, key, key) for key in (first, second))
    assert (seen * first).sum() < -0.5
    assert unseen.norm() < 0.5 * seen.norm()


def test_it_forgets_what_is_not_repeated():
    """W1 and W2 decay to their start, not to zero, where both would stay."""
    architecture = MLP(8)
    state = architecture.start(torch.zeros(3, 4))
    keys = torch.randn(2, 3, 4)
    architecture.write(state, keys[0], keys[0], DotProduct(), 0.9, 1.0)
    assert not torch.equal(state["out"], torch.zeros_like(state["out"]))
    for _ in range(300):
        architecture.write(state, torch.zeros(3, 4), torch.zeros(3, 4), DotProduct(), 0.9, 1.0)
    assert state["out"].abs().max() < 1e-6
    assert torch.allclose(state["in"], state["initial"], atol=1e-5)


def test_l2_stays_bounded_where_the_rate_is_large():
    p = nn.Parameter(torch.zeros(4, 3).double())
    optimizer = DeepMomentum([p], 1e-3, 0.99, erase=100.0, memory_rate=1.0)
    run(optimizer, p, torch.randn(300, 4, 3).double())
    assert all(value.norm() < 100 for value in optimizer.state[p].values())


def test_the_seed_decides_the_start_and_nothing_else():
    def start(seed):
        torch.manual_seed(torch.randint(1000, ()).item())
        return MLP(4, seed=seed).start(torch.zeros(3, 5))["in"]

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize(
    "options, name",
    [(dict(hidden=-1), "hidden"), (dict(memory_rate=-1.0), "memory_rate"), (dict(erase=-1.0), "erase")],
)
def test_settings_out_of_range_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        DeepMomentum([nn.Parameter(torch.zeros(2))], **options)
