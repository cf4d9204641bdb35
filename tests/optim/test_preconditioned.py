import pytest
import torch
from torch import nn

from nestling.optim import PreconditionedMomentum
from nestling.optim.preconditioners import Diagonal, Orthogonal, Outer


def run(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def pair(*shape):
    p = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
    return p, nn.Parameter(p.detach().clone()), torch.randn(6, *shape, dtype=torch.float64)


def test_the_diagonal_without_bias_correction_is_rmsprop_with_momentum():
    p, q, gradients = pair(4, 3)
    ours = PreconditionedMomentum([p], 0.01, preconditioner=Diagonal(0.99, corrected=False), dampening=0.0)
    theirs = torch.optim.RMSprop([q], 0.01, alpha=0.99, momentum=0.9)
    assert torch.allclose(run(ours, p, gradients), run(theirs, q, gradients), atol=1e-12)


def test_the_diagonal_without_momentum_is_adam_without_momentum():
    p, q, gradients = pair(4, 3)
    theirs = torch.optim.Adam([q], 0.01, betas=(0.0, 0.999))
    assert torch.allclose(
        run(PreconditionedMomentum([p], 0.01, 0.0), p, gradients), run(theirs, q, gradients), atol=1e-12
    )


@pytest.mark.parametrize("shape", [(4, 3), (3, 5), (6,)])
def test_the_outer_one_is_the_inverse_root_on_the_smaller_side(shape):
    p, q, gradients = pair(*shape)
    got = run(PreconditionedMomentum([p], 0.1, 0.8, preconditioner="outer", beta=0.9, dampening=0.0), p, gradients)
    w = q.detach().reshape(-1, shape[-1])
    wide, m, h = w.shape[0] <= w.shape[1], torch.zeros_like(w), 0.0
    for t, g in enumerate(gradients.reshape(-1, *w.shape), 1):
        h = 0.9 * h + 0.1 * (g @ g.T if wide else g.T @ g)
        values, vectors = torch.linalg.eigh(h / (1 - 0.9**t))
        root = vectors @ torch.diag(values.clamp(min=1e-8 * values[-1]) ** -0.5) @ vectors.T
        m = 0.8 * m - (root @ g if wide else g @ root)
        w = w + 0.1 * m
    assert torch.allclose(got.reshape(w.shape), w, atol=1e-10)


def test_the_orthogonal_one_maps_every_gradient_before_it_is_remembered():
    """NL Eqs. 42, 47: singular values near the root of the longer side, the gradient's own singular vectors."""
    g = torch.randn(4, 7, dtype=torch.float64)
    mapped = Orthogonal(steps=10).apply({}, g)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert (u.T @ mapped @ v.T).diag().sub(7**0.5).abs().max() < 0.35 * 7**0.5
    p, q, gradients = pair(4, 7)
    got = run(PreconditionedMomentum([p], 0.1, preconditioner="orthogonal", dampening=0.0), p, gradients)
    w, m = q.detach(), 0.0
    for gradient in gradients:
        m = 0.9 * m - Orthogonal().apply({}, gradient)
        w = w + 0.1 * m
    assert torch.allclose(got, w)


def test_dampening_is_the_momentum_unless_given():
    p, q, gradients = pair(4, 3)
    ours = run(PreconditionedMomentum([p], 0.1, 0.7), p, gradients)
    assert torch.allclose(ours, run(PreconditionedMomentum([q], 0.1, 0.7, dampening=0.7), q, gradients))


def test_any_function_of_a_gradient_will_do():
    p, q, gradients = pair(4, 3)
    ours = run(PreconditionedMomentum([p], 0.1, preconditioner=lambda g: 2 * g, dampening=0.0), p, gradients)
    assert torch.allclose(ours, run(torch.optim.SGD([q], 0.2, momentum=0.9), q, gradients))


def test_the_diagonal_keeps_small_squares_of_bfloat16_parameters():
    """In bfloat16 a running average with decay 0.999 would stand still."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = PreconditionedMomentum([p], 0.0)
    run(optimizer, p, [torch.ones(2, dtype=torch.bfloat16)] * 500)
    assert torch.allclose(optimizer.state[p]["square"], torch.tensor(1 - 0.999**500), rtol=1e-3)


def test_a_preconditioner_without_curvature_stays_finite():
    for preconditioner in (Diagonal(), Outer(), Orthogonal()):
        p = nn.Parameter(torch.ones(3, 3))
        run(PreconditionedMomentum([p], 0.1, preconditioner=preconditioner), p, [torch.zeros(3, 3)] * 2)
        assert torch.equal(p, torch.ones(3, 3))


@pytest.mark.parametrize(
    "options, name",
    [(dict(preconditioner="none"), "preconditioner"), (dict(beta=1.0), "beta"), (dict(dampening=1.0), "dampening")],
)
def test_settings_out_of_range_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        PreconditionedMomentum([nn.Parameter(torch.zeros(2))], **options)
