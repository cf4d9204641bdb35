"""The inner learning rule on its own: steps that contract, exact minimisers, chunks that close."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.memory import FastWeights, LinearMemory, MLPMemory, UpdateRule
from nestling.memory.rule import Context, advance, close_chunk, forward, joint_step
from nestling.ops.chunk import decay_table


def context(keys, values, eta, alpha=None, mu=None):
    alpha = torch.ones_like(eta) if alpha is None else alpha
    return Context(keys, values, eta, alpha, mu, decay_table(alpha, mu))


def one_token(dim, scale=1.0, dtype=torch.float64):
    k, v = scale * torch.randn(1, 1, 1, dim, dtype=dtype), torch.randn(1, 1, 1, dim, dtype=dtype)
    return k, v, torch.rand(1, 1, 1, dtype=dtype) * 3


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_dgd_is_the_exact_minimiser(scale):
    """NL Eq. 56: 1/2 |W x - u|^2 + 1/(2 eta) |W - W_t|^2, u = -dL/dy, has gradient zero at the new weights."""
    memory, dim = LinearMemory(4, 4), 4
    w = torch.randn(1, 1, 1, dim, dim, dtype=torch.float64)
    x, target, eta = one_token(dim, scale)
    rule = UpdateRule(step="layer", self_targets=False)
    fast = FastWeights((w,), (w,), ())
    (new,) = advance(memory, rule, fast, context(x, target, eta), fresh=True)[0].now
    new = new.detach().requires_grad_()
    u = -(x @ w[0].mT - target)
    loss = 0.5 * (x @ new[0].mT - u).square().sum() + (new - w).square().sum() / (2 * eta.squeeze())
    (grad,) = torch.autograd.grad(loss, new)
    assert grad.abs().max() < 1e-10


@given(
    eta=st.floats(0, 1e6), sizes=st.lists(st.floats(0, 1e6), min_size=2, max_size=2),
    errors=st.lists(st.floats(0, 1e6), min_size=2, max_size=2),
)  # fmt: skip
def test_joint_step_contracts_every_layer(eta, sizes, errors):
    """0 <= e |x_l|^2 <= 1 for each layer, whatever the sizes; the erase never flips more than it removes."""
    as_tensors = [[torch.tensor(s, dtype=torch.float64) for s in group] for group in (sizes, errors)]
    rate, total = joint_step(torch.tensor(eta, dtype=torch.float64), *as_tensors)
    assert rate.isfinite()
    assert rate >= 0
    assert total > 0
    assert all(rate * size <= 1 + 1e-12 for size in as_tensors[0])


def test_joint_step_is_d1_for_one_layer():
    eta, size = torch.tensor(0.7), torch.tensor(2.5)
    rate, _ = joint_step(eta, [size], [torch.tensor(1.3)])
    torch.testing.assert_close(rate, eta / (1 + eta * size))


@pytest.mark.parametrize("momentum", [False, True])
def test_a_chunk_of_parts_is_a_chunk(momentum):
    """Written in parts, with gradients at the chunk's start, a chunk gives what it gives at once."""
    memory, tokens = MLPMemory(4, 4, 6), 7
    w = tuple(torch.randn(2, 1, 3, *s, dtype=torch.float64) for s in memory.shapes())
    s = tuple(torch.randn_like(x) for x in w) if momentum else ()
    k, v, q = torch.nn.functional.normalize(torch.randn(3, 1, 3, tokens, 4, dtype=torch.float64), dim=-1)
    eta, alpha, mu = torch.rand(3, 1, 3, tokens, dtype=torch.float64)
    mu = mu if momentum else None

    def part(fast, span, fresh):
        cut = context(
            k[..., span, :], v[..., span, :], eta[..., span], alpha[..., span], mu if mu is None else mu[..., span]
        )
        return advance(memory, UpdateRule(), fast, cut, fresh=fresh, queries=q[..., span, :])[:2]

    whole, reads = part(FastWeights(w, w, s), slice(0, 7), True)
    first, early = part(FastWeights(w, w, s), slice(0, 3), True)
    last, late = part(first, slice(3, 7), False)
    torch.testing.assert_close(torch.cat([early, late], -2), reads, rtol=1e-10, atol=1e-10)
    for a, b in zip((*last.now, *last.velocity), (*whole.now, *whole.velocity), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_settle_opens_only_the_chunks_that_are_complete():
    start, now = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    fast = FastWeights((start,), (now,), ())
    closed = torch.tensor([True, False, True])
    new = close_chunk(fast, closed, (1e9,))
    assert torch.equal(new.start[0][:, closed], now[:, closed])
    assert torch.equal(new.start[0][:, ~closed], start[:, ~closed])
    assert torch.equal(new.now[0], now)


@pytest.mark.parametrize("factor", [0.5, 2.0, 1e6])
def test_settle_bounds_the_norm(factor):
    now = torch.randn(1, 2, 1, 4, 4, dtype=torch.float64)
    now[:, 0] *= factor / now[:, 0].norm()
    now[:, 1] *= 0.1 / now[:, 1].norm()
    new = close_chunk(FastWeights((now,), (now,), ()), None, (1.0,))
    torch.testing.assert_close(new.start[0][:, 0].norm().item(), min(factor, 1.0))
    assert torch.equal(new.start[0][:, 1], now[:, 1])


def test_a_memory_learns_a_pair_it_is_shown():
    """Repeating one association drives the inner loss down, for both architectures and both rules."""
    for memory in (LinearMemory(8, 8), MLPMemory(8, 8, 16)):
        for dgd in (True, False):
            w = tuple(torch.randn(1, 1, 1, *s) * std for s, std in zip(memory.shapes(), memory.initial()))
            k, v = torch.nn.functional.normalize(torch.randn(2, 1, 1, 1, 8), dim=-1)
            fast, losses = FastWeights(w, w, ()), []
            rule = UpdateRule(dgd=dgd, self_targets=False)
            for _ in range(20):
                new, _, report = advance(memory, rule, fast, context(k, v, torch.ones(1, 1, 1)), fresh=True)
                fast = close_chunk(new, None, (1e9,) * len(w))
                losses.append(report.loss.item())
            # DGD forgets along the key as it learns: it settles near half of the target (NL Eq. 57)
            assert losses[-1] < (0.7 if dgd else 0.05) * losses[0], (memory, dgd, losses)
            assert forward(memory, tuple(x[0] for x in fast.now), k).isfinite().all()


@pytest.mark.parametrize("option", [dict(objective="l1"), dict(step="big"), dict(meta_grad="half")])
def test_unknown_choices_are_named(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        UpdateRule(**option)
