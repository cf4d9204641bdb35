"""M3's matrix rule: against Algorithm 1 written out, and the batched form against the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nestling.optim import M3
from nestling.training.muon import Muon
from slowly import examples

SHAPES = [(4, 6), (4, 6), (6, 4), (5, 5), (3, 4, 6), (4, 2, 3, 3), (7,), ()]


def make(shapes=SHAPES, dtype=torch.float64, seed=0, names=False, **options):
    g = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    return parameters, M3(named if names else parameters, **{"lr": 0.1, **options})


def gradient(parameter, step, index=0, scale=1.0):
    g = torch.Generator().manual_seed(1000 * index + step)
    return scale * torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(parameter.dtype)


def drive(parameters, optimizer, steps, start=0, scale=1.0):
    for step in range(start, start + steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient(parameter, step, index, scale)
        optimizer.step()


def newton_schulz(matrix, steps):
    """Muon's quintic on the Frobenius-normalised matrix, any number of matrices."""
    if matrix.ndim == 3:
        return torch.stack([newton_schulz(one, steps) for one in matrix])
    x = matrix / matrix.norm()
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


def algorithm_1(weight, gradients, lr, betas, alpha, period, ns_steps, eps):
    """The paper's two loops; returns the weight after every step."""
    b1, b2, b3 = betas
    m1, m2, v, seen, weights = 0.0, torch.zeros_like(weight), 0.0, [], []
    for k in range(math.ceil(len(gradients) / period)):
        if k:
            m2 = m2 + b3 * sum(seen[(k - 1) * period : k * period])
        o2 = newton_schulz(m2, ns_steps) if k else torch.zeros_like(weight)
        for t in range(k * period, min((k + 1) * period, len(gradients))):
            g = gradients[t]
            seen.append(g)
            m1 = m1 + b1 * g
            v = v + b2 * g**2
            weight = weight - lr * (newton_schulz(m1, ns_steps) + alpha * o2) / (v.sqrt() + eps)
            weights.append(weight)
    return weights


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("period", "ns_steps"), [(3, 5), (1 + 1, 3)])
def test_the_literal_form_is_algorithm_1_step_for_step(foreach, period, ns_steps):
    betas, alpha, eps, lr = (0.7, 0.4, 0.3), 0.6, 1e-3, 0.05
    parameters, optimizer = make(
        SHAPES[:6], lr=lr, betas=betas, alpha=alpha, periods=(1, period), ns_steps=ns_steps, eps=eps,
        accumulation="sum", rms_match=False, foreach=foreach,
    )  # fmt: skip
    flat = [(4, 18) if len(p.shape) == 4 else p.shape for p in parameters]  # a convolution is rows x the rest
    gradients = [[gradient(p, t, i).view(s) for t in range(8)] for i, (p, s) in enumerate(zip(parameters, flat))]
    want = [
        algorithm_1(p.detach().view(s), g, lr, betas, alpha, period, ns_steps, eps)
        for p, s, g in zip(parameters, flat, gradients)
    ]
    for t in range(8):
        drive(parameters, optimizer, 1, start=t)
        for parameter, weights in zip(parameters, want):
            assert torch.allclose(parameter.view(weights[t].shape), weights[t], atol=1e-10)


@pytest.mark.parametrize("moment", ["gradient", "direction"])
@pytest.mark.parametrize("foreach", [True, False])
def test_three_scales_of_averages(foreach, moment):
    """The EMA form of one matrix, written out with Nesterov's step ahead and the means of whole periods."""
    betas, alphas, periods, lr, eps = (0.8, 0.9, 0.5, 0.6), (0.3, 0.2), (1, 2, 4), 0.05, 0.02
    [p], optimizer = make(
        [(4, 6)], lr=lr, betas=betas, alpha=alphas, periods=periods, eps=eps, weight_decay=0.1, foreach=foreach,
        second_moment=moment,
    )  # fmt: skip
    weight = p.detach().clone()
    m, o, v = [torch.zeros_like(weight) for _ in range(3)], [torch.zeros_like(weight) for _ in range(3)], 0.0
    seen = []
    for t in range(1, 12):
        g = gradient(p, t - 1)
        seen.append(g)
        m[0] = 0.8 * m[0] + 0.2 * g
        update = newton_schulz(0.8 * m[0] + 0.2 * g, 5) + 0.3 * o[1] + 0.2 * o[2]
        v = 0.9 * v + 0.1 * (g if moment == "gradient" else update) ** 2
        seen_enough = 1 - 0.9**t
        mean = v.mean() / seen_enough
        root = (v + 0.9**t * mean).sqrt() + eps * mean.sqrt()
        update = update / root
        update = update * 0.2 / update.square().mean().sqrt()
        weight = weight * (1 - lr * 0.1) - lr * update
        for j, (period, beta) in enumerate(zip(periods, (0.8, 0.5, 0.6))):
            if j and t % period == 0:
                m[j] = beta * m[j] + (1 - beta) * sum(seen[-period:]) / period
                o[j] = newton_schulz(m[j], 5)
        drive([p], optimizer, 1, start=t - 1)
        assert torch.allclose(p, weight, atol=1e-9)


OPTIONS = st.fixed_dictionaries(
    {
        "accumulation": st.sampled_from(["ema", "sum"]),
        "periods": st.sampled_from([(1,), (1, 3), (1, 2, 3)]),
        "rms_match": st.booleans(),
        "nesterov": st.booleans(),
        "second_moment": st.sampled_from([None, "direction", "gradient", False]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "coefficients": st.sampled_from(["muon", "polar_express", (2.0, -1.5, 0.5)]),
        "split": st.sampled_from([{}, {"p0": 2}, {"p2": ("columns", [1, 3])}, {"p4": [1, 3]}]),
    }
)


@settings(max_examples=examples(25))
@given(options=OPTIONS)
def test_the_batched_form_is_the_definition(options):
    (ours, batched), (theirs, definition) = (make(names=True, foreach=f, **options) for f in (True, False))
    for pair in ((ours, batched), (theirs, definition)):
        drive(*pair, 4)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-7, rtol=1e-7)
    for a, b in zip(batched.state.values(), definition.state.values()):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.allclose(a[name], b[name], atol=1e-6, rtol=1e-6)


def test_groups_larger_than_the_cache_are_stepped_in_parts(monkeypatch):
    (ours, whole), (theirs, parts) = (make([(4, 6)] * 5) for _ in range(2))
    drive(ours, whole, 4)
    monkeypatch.setattr("nestling.optim.multiscale.CHUNK", 50)
    drive(theirs, parts, 4)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-12)


def test_without_slow_scale_and_second_moment_it_is_muon():
    """Square matrices, where Muon's scale is 1."""
    ours, m3 = make(
        [(6, 6)] * 2, torch.float32, periods=(1,), second_moment=False, rms_match=False, nesterov=True, weight_decay=0.1
    )
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon(theirs, lr=0.1, momentum=0.95, nesterov=True, weight_decay=0.1)
    drive(ours, m3, 5)
    drive(theirs, muon, 5)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("second_moment", ["direction", "gradient", False])
def test_every_step_has_the_size_of_an_adamw_step(scale, second_moment):
    """From the first step on, whatever the scale of the loss: root mean square 0.2 lr, matrix by matrix."""
    parameters, optimizer = make(SHAPES[:5], torch.float32, lr=0.01, periods=(1, 3), second_moment=second_moment)
    for step in range(8):
        before = [p.detach().clone() for p in parameters]
        drive(parameters, optimizer, 1, step, scale)
        for p, b in zip(parameters, before):
            rms = (p - b).square().mean((-2, -1)).sqrt()
            assert torch.allclose(rms, torch.tensor(0.002), rtol=1e-3)


def test_the_step_does_not_depend_on_the_scale_of_the_loss():
    (ours, a), (theirs, b) = make(SHAPES[:6]), make(SHAPES[:6])
    drive(ours, a, 6)
    drive(theirs, b, 6, scale=1e4)
    for x, y in zip(ours, theirs):
        assert torch.allclose(x, y, atol=1e-9)


@pytest.mark.parametrize("moment", ["gradient", "direction"])
def test_the_first_step_is_muons(moment):
    """No entry is divided by a single gradient: the first second moment is its matrix's mean nearly everywhere."""
    (ours, with_v), (theirs, without) = (
        make([(20, 30)], second_moment=s, betas=(0.95, 0.999, 0.9)) for s in (moment, False)
    )
    start = ours[0].detach().clone()
    drive(ours, with_v, 1)
    drive(theirs, without, 1)
    assert (ours[0] - theirs[0]).norm() < 0.01 * (theirs[0] - start).norm()


def test_an_entry_that_never_has_a_gradient_does_not_take_over():
    [p], optimizer = make([(20, 20)], torch.float32, betas=(0.9, 0.5, 0.9))
    for step in range(60):
        p.grad = gradient(p, step)
        p.grad[3, 4] = 0.0
        before = p.detach().clone()
        optimizer.step()
    moved = (p - before).abs()
    assert moved[3, 4] < 30 * moved.mean()


def test_vectors_and_flagged_groups_are_adamw():
    shapes = [(7,), (), (4, 6)]
    for foreach in (True, False):
        ours, theirs = ([nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(3))) for s in shapes]
                        for _ in range(2))  # fmt: skip
        m3 = M3([{"params": ours[:2]}, {"params": ours[2:], "rule": "adamw", "weight_decay": 0.3}], lr=0.02,
                weight_decay=0.1, adam_betas=(0.8, 0.99), adam_eps=1e-6, foreach=foreach)  # fmt: skip
        adamw = torch.optim.AdamW([{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.3}], lr=0.02,
                                  weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6)  # fmt: skip
        drive(ours, m3, 5)
        drive(theirs, adamw, 5)
        for a, b in zip(ours, theirs):
            assert torch.allclose(a, b, atol=1e-6)


def test_fused_matrices_are_orthogonalised_in_parts():
    """A fused qkv steps as its three parts do; so do the columns of a transposed one, and a batch of experts."""
    g = torch.Generator().manual_seed(0)
    fused = nn.Parameter(torch.randn(6, 5, generator=g, dtype=torch.float64))
    flipped = nn.Parameter(fused.detach().T.clone())
    batch = nn.Parameter(fused.detach().view(3, 2, 5).clone())
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split(2)]
    fused_m3 = M3([("attn.qkv.weight", fused), ("c_attn.weight", flipped)], lr=0.1, periods=(1, 2),
                  split={"qkv": 3, "c_attn": ("columns", [2, 2, 2])})  # fmt: skip
    others = M3([*parts, batch], lr=0.1, periods=(1, 2))
    for step in range(5):
        fused.grad = gradient(fused, step)
        flipped.grad, batch.grad = fused.grad.T.clone(), fused.grad.view(3, 2, 5).clone()
        for part, grad in zip(parts, fused.grad.split(2)):
            part.grad = grad.clone()
        fused_m3.step()
        others.step()
    for result in (fused, flipped.T, batch.view(6, 5)):
        assert torch.allclose(result, torch.cat(parts), atol=1e-9)


def test_views_of_more_than_two_dimensions():
    """A convolution is rows x the rest, three dimensions a batch of matrices, unless the group says otherwise."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(4, 2, 3, generator=g, dtype=torch.float64)
    flat, batch = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    convolution, matrix = nn.Parameter(start[..., None].clone()), nn.Parameter(start.flatten(1).clone())
    optimizer = M3([{"params": [flat], "view": "flatten"}, {"params": [batch, convolution, matrix]}], lr=0.1)
    for p in (flat, batch, convolution, matrix):
        p.grad = gradient(start, 0).view(p.shape)
    optimizer.step()
    assert torch.allclose(flat.flatten(1), matrix, atol=1e-12)
    assert torch.allclose(convolution.flatten(1), matrix, atol=1e-12)
    assert not torch.allclose(batch.flatten(1), matrix, atol=1e-2)


def test_other_memory_layouts():
    """Channels-last convolutions and transposed matrices are stepped as contiguous ones are."""
    start = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    plain, last = nn.Parameter(start.clone()), nn.Parameter(start.to(memory_format=torch.channels_last))
    matrix, turned = nn.Parameter(start.flatten(1).clone()), nn.Parameter(start.flatten(1).T.contiguous().T)
    for foreach in (True, False):
        optimizer = M3([plain, last, matrix, turned], lr=0.1, periods=(1, 2), foreach=foreach)
        for step in range(3):
            for p in (plain, last, matrix, turned):
                p.grad = gradient(start, step).view(p.shape)
                p.grad = p.grad.to(memory_format=torch.channels_last) if p is last else p.grad
            optimizer.step()
    assert torch.allclose(plain, last, atol=1e-9)
    assert torch.allclose(matrix, turned, atol=1e-9)
