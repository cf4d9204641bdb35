import pytest
import torch
from torch import nn

from nestling.optim import DeltaMomentum


def run(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.fixture(params=[(4, 3), (6,), (), (2, 3, 2, 2)])
def problem(request):
    p = nn.Parameter(torch.randn(request.param, dtype=torch.float64))
    return p, torch.randn(5, *request.param, dtype=torch.float64)


def test_without_erasure_it_is_sgd_with_momentum(problem):
    p, gradients = problem
    q = nn.Parameter(p.detach().clone())
    ours = run(DeltaMomentum([p], 0.1, 0.9, erase=0.0), p, gradients)
    assert torch.allclose(ours, run(torch.optim.SGD([q], 0.1, momentum=0.9), q, gradients), atol=1e-14)


@pytest.mark.parametrize("form", ["unit", "raw", "literal"])
def test_it_is_equation_49_row_by_row(problem, form):
    """The written-out recurrence on the matrix [o, n], with the rows of g, or of g / |g|, as keys."""
    p, gradients = problem
    alpha, erase, lr = 0.8, 0.3, 0.1
    w = p.detach().clone().reshape(p.shape[0] if p.dim() > 1 else 1, -1)
    m, eye = torch.zeros_like(w), torch.eye(w.shape[1], dtype=w.dtype)
    for gradient in gradients:
        g = gradient.reshape(w.shape)
        k = g / g.norm() if form == "unit" else g
        e = erase if form == "literal" else erase / (1 + erase * k.norm() ** 2)
        m = m @ (alpha * eye - e * k.T @ k) - e / erase * g
        w = w + lr * m
    got = run(DeltaMomentum([p], lr, alpha, erase=erase, form=form), p, gradients)
    assert torch.allclose(got.reshape(w.shape), w, atol=1e-12)


def test_a_vector_forgets_along_the_gradient_and_only_there():
    """NL Eq. 49 for the 2-vector of Fig. 4: the share along g keeps alpha - e, what is orthogonal keeps alpha."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = DeltaMomentum([p], 1.0, 0.9, erase=1.0)
    run(optimizer, p, [torch.tensor([3.0, 4.0], dtype=torch.float64)])
    before = optimizer.state[p]["momentum"].clone()
    run(optimizer, p, [torch.tensor([2.0, 0.0], dtype=torch.float64)])
    after = optimizer.state[p]["momentum"]
    assert torch.allclose(after[1], 0.9 * before[1])
    assert torch.allclose(after[0], (0.9 - 0.5) * before[0] - 2.0 / 2)


def test_the_unit_form_scales_with_the_loss_and_the_raw_form_does_not():
    gradients = torch.randn(6, 4, 3, dtype=torch.float64)

    def moved(form, scale):
        p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        return run(DeltaMomentum([p], 1 / scale, form=form, erase=0.5), p, scale * gradients)

    assert torch.allclose(moved("unit", 1.0), moved("unit", 1e4))
    assert not torch.allclose(moved("raw", 1.0), moved("raw", 1e4), rtol=0.5)


def test_only_the_literal_form_diverges_on_large_gradients():
    gradients = 3 * torch.randn(200, 5, dtype=torch.float64)

    def size(form):
        p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        optimizer = DeltaMomentum([p], 0.1, 0.9, erase=1.0, form=form)
        run(optimizer, p, gradients)
        return optimizer.state[p]["momentum"].norm()

    assert size("unit") < 100
    assert size("raw") < 100
    assert not size("literal") < 1e10


@pytest.mark.parametrize(
    "options, name", [(dict(erase=-1.0), "erase"), (dict(form="other"), "form"), (dict(momentum=1.0), "momentum")]
)
def test_settings_out_of_range_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        DeltaMomentum([nn.Parameter(torch.zeros(2))], **options)
