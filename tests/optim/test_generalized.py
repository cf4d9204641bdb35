import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nestling.optim import DGD, DeltaMomentum
from nestling.optim.generalized import Loss, Retention, generalized_step
from nestling.optim.generalized_gd import GeneralizedGD
from slowly import examples


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def problem(samples=6, inputs=4, outputs=3):
    return torch.randn(outputs, inputs), torch.randn(samples, inputs), torch.randn(samples, outputs)


def test_the_dot_product_is_gradient_descent():
    w, x, u = problem()
    p = nn.Parameter(w.clone())
    p.grad = -u.T @ x / len(x)
    torch.optim.SGD([p], 0.3).step()
    assert torch.allclose(generalized_step([w], x, u, Loss(0.0), Retention((0.3,))), p)


def test_l2_is_decision_d1():
    w, x, u = problem(samples=1)
    e = 0.3 / (1 + 0.3 * x.square().sum())
    d1 = w @ (torch.eye(4) - e * x.T @ x) + e * u.T @ x
    assert torch.allclose(generalized_step([w], x, u, Loss(1.0), Retention((0.3,))), d1)


def test_the_same_form_on_a_momentum_is_momentum_and_delta_momentum():
    """W = m, x = the rows of the gradient, u = -P's: the dot product with a decayed state, and L2 with one key."""
    m, g = torch.randn(3, 4), torch.randn(3, 4)
    retention = Retention((3.0,), (0.9,))  # the loss is a mean over the three rows
    got = generalized_step([m], g, -torch.eye(3), Loss(0.0), retention)
    assert torch.allclose(got, 0.9 * m - g)
    p = nn.Parameter(torch.zeros(4))
    optimizer = DeltaMomentum([p], 1.0, 1 - 1e-16, erase=1.0, form="raw")
    memory = torch.zeros(1, 4)
    for _ in range(4):
        p.grad = torch.randn(4)
        optimizer.step()
        memory = generalized_step([memory], p.grad.view(1, 4), -torch.ones(1, 1), Loss(1.0), Retention((1.0,)))
    assert torch.allclose(optimizer.state[p]["momentum"], memory[0])


@settings(max_examples=examples(8))
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.floats(0, 2))
def test_the_closed_form_is_the_minimum_and_the_inner_steps_find_it(samples, inputs, outputs, states, erase):
    torch.set_default_dtype(torch.float64)
    w, x, u = problem(samples, inputs, outputs)
    history = [w, *torch.randn(states - 1, outputs, inputs)]
    retention = Retention(tuple(torch.rand(states).add(0.1).tolist()), tuple(torch.rand(states).tolist()))
    loss = Loss(erase)
    closed = generalized_step(history, x, u, loss, retention).requires_grad_()
    slope = torch.autograd.grad(loss(closed, x, u) + retention(closed, history), closed)[0]
    assert slope.abs().max() < 1e-10 * (1 + closed.abs().max().item())
    stepped = generalized_step(history, x, u, loss, retention, steps=100)
    assert torch.allclose(stepped, closed, atol=1e-4)


def test_a_penalty_without_closed_form_is_descended():
    """A retention with |W|_4: no inner step makes the objective worse, and the last ones hardly move."""
    w, x, u = problem()
    retention = Retention((0.5,), extra=lambda w: w.pow(4).sum())

    def objective(w):
        return (Loss(1.0)(w, x, u) + retention(w, [w0])).item()

    w0, values = w, []
    for steps in (1, 5, 25, 125):
        values.append(objective(generalized_step([w], x, u, Loss(1.0), retention, steps=steps)))
    assert objective(w) > values[0] > values[1] > values[2] >= values[3] > values[2] - 1e-6
    assert generalized_step([w], x, u, Loss(1.0), retention).isfinite().all()


def test_any_loss_may_be_given():
    w, x, u = problem()
    absolute = lambda w, x, u: (x @ w.T - u).abs().sqrt().sum()  # noqa: E731
    new = generalized_step([w], x, u, absolute, Retention((0.01,)), steps=20)
    assert absolute(new, x, u) < absolute(w, x, u)


def test_fewer_states_than_rates_count_the_first_again():
    w, x, u = problem()
    three = Retention((0.3, 0.3, 0.3))
    assert torch.allclose(
        generalized_step([w], x, u, Loss(1.0), three), generalized_step([w], x, u, Loss(1.0), Retention((0.1,)))
    )


def test_settings_out_of_range_are_named():
    w, x, u = problem()
    for build in (lambda: Retention(()), lambda: Retention((1.0, 0.0)), lambda: Retention((1.0,), (1.0, 1.0))):
        with pytest.raises(ValueError, match="rates"):
            build()
    with pytest.raises(ValueError, match=r"\[5, 3\]"):
        generalized_step([w], x, u[:5], Loss(), Retention())
    with pytest.raises(ValueError, match="steps"):
        generalized_step([w], x, u, Loss(), Retention(), steps=0)


def network():
    return nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


def train(models, optimizers, steps=3):
    """The same batches; every layer's signal a mean over its own positions would need one loss each: Linear's is."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(5, 4, 4, generator=generator)
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            model(x).square().sum(1).mean().backward()
            optimizer.step()


@pytest.mark.parametrize("loss", [0.0, 1.0])
def test_in_a_network_its_members_are_gradient_descent_and_dgd(loss):
    a = network()
    b = copy.deepcopy(a)
    ours = GeneralizedGD(a, 0.2, loss=Loss(loss), weight_decay=0.1)
    train([a, b], [ours, DGD(b, 0.2, erase=loss, exact=True, weight_decay=0.1)])
    assert all(torch.allclose(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_past_weights_are_kept_and_saved():
    """A second state pulls the weights back; training goes on bit for bit from a state dict."""
    a = network()
    b = copy.deepcopy(a)
    retention = Retention((1.0, 0.5))
    ours = GeneralizedGD(a, 0.2, retention=retention)
    train([a], [ours])
    twin = copy.deepcopy(a)
    resumed = GeneralizedGD(twin, 0.2, retention=retention)
    resumed.load_state_dict(ours.state_dict())
    train([a, twin], [ours, resumed])
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), twin.parameters()))
    train([b], [GeneralizedGD(b, 0.2)], 6)
    assert not torch.allclose(a[3].weight, b[3].weight, atol=1e-3)
