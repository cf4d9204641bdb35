"""The optimisers of a level: equal to those of ordinary networks, stream by stream."""

import pytest
import torch
from torch import nn

from nestling import Level
from nestling.cms import inner_optimizers
from nestling.cms.inner_optimizers import OPTIMIZERS, begin, update
from nestling.optim import DGD, M3

ALGORITHM = {"betas": (0.95, 0.999, 0.9), "second_moment": "gradient"}  # of levels of M3


def gradients(steps, streams=2, shape=(6, 4)):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, streams, *shape, generator=generator, dtype=torch.float64)


def run(level, grads, count=5.0):
    """The differences after each gradient, [steps, B, o, i]; sums of `count` tokens go in."""
    deltas, slots, found = [torch.zeros_like(grads[0])], begin(level, [torch.zeros_like(grads[0])]), []
    for g in grads:
        tokens = torch.full((len(g),), count, dtype=g.dtype)
        deltas, slots, _ = update(level, deltas, [count * g], slots, tokens)
        found.append(deltas[0])
    return torch.stack(found)


@pytest.mark.parametrize(
    "level, make",
    [
        (Level(4, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (Level(4, lr=0.1, optimizer="momentum"), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (
            Level(4, lr=0.1, optimizer="adamw"),
            lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0),
        ),
        (Level(4, lr=0.1, optimizer="m3", momentum=0.95), lambda p: M3(p, 0.1, **ALGORITHM)),
    ],
)
def test_a_level_steps_as_the_optimiser_does(level, make):
    grads = gradients(35)  # beyond two periods of M3's slow memory
    got = run(level, grads)
    for stream in range(grads.shape[1]):
        weight = nn.Parameter(torch.zeros(grads.shape[2:], dtype=torch.float64))
        optimizer = make([weight])
        for step, g in enumerate(grads[:, stream]):
            weight.grad = g.clone()
            optimizer.step()
            # Adam adds its eps outside the root
            torch.testing.assert_close(got[step, stream], weight.detach(), rtol=1e-5, atol=1e-7)


def test_dgd_is_delta_gradient_descent():
    """On what was learned alone (W = 0) a step is that of `nestling.optim.DGD`, D1 with e = lr / (1 + lr |x|^2)."""
    level, layer = Level(4, lr=0.3, optimizer="dgd"), nn.Linear(4, 6, bias=False).double()
    start, x = layer.weight.detach().clone(), torch.randn(5, 4, dtype=torch.float64)
    target = torch.randn(5, 6, dtype=torch.float64)
    optimizer = DGD(layer, lr=0.3)
    loss = (layer(x) - target).square().sum(-1).mean() / 2
    loss.backward()
    grad = layer.weight.grad.clone()
    optimizer.step()
    sums = 5 * grad + level.erase * (start @ x.mT) @ x
    norms = [x.square().sum()[None]]
    (moved,), _, _ = update(level, [start[None]], [sums[None]], {}, torch.tensor([5.0]).double(), norms)
    torch.testing.assert_close(moved[0], layer.weight.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_streams_do_not_mix_and_a_bad_one_is_refused_alone(optimizer):
    level = Level(4, lr=0.1, optimizer=optimizer, clip=0.5, decay=0.1)
    grads = gradients(3, streams=3)
    norms = [torch.ones(3, dtype=torch.float64)]
    weights = [torch.randn(3, 6, 4, dtype=torch.float64)]
    bad = grads[0].clone()
    bad[1, 2, 2] = torch.inf
    count = torch.ones(3, dtype=torch.float64)
    moved, slots, written = update(level, weights, [bad], begin(level, weights), count, norms)
    assert torch.equal(moved[0][1], weights[0][1]) and written[1].isnan()
    own = [weights[0][2:]]
    alone, _, w = update(level, own, [grads[0][2:]], begin(level, own), count[2:], [norms[0][2:]])
    torch.testing.assert_close(alone[0][0], moved[0][2], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(w[0], written[2])
    assert all(s.isfinite().all() for tensors in slots.values() for s in tensors)


def test_clip_and_decay_and_what_is_not_due():
    weights, g = [torch.randn(2, 6, 4, dtype=torch.float64)], gradients(1)[0]
    count = torch.full((2,), 4.0, dtype=torch.float64)
    due = torch.tensor([True, False])
    moved, _, written = update(Level(4, lr=1.0, clip=0.1, decay=0.25), weights, [4 * g], {}, count, due=due)
    want = 0.75 * weights[0][0] - 0.1 * g[0] / g[0].norm()
    torch.testing.assert_close(moved[0][0], want)
    torch.testing.assert_close(written, torch.stack([(want - weights[0][0]).norm(), torch.zeros(()).double()]))
    assert torch.equal(moved[0][1], weights[0][1])


def test_levels_orthogonalise_in_their_own_type_on_every_device(monkeypatch):
    """An accelerator's default is bfloat16, whose rounding would grow from chunk to chunk."""
    asked = []

    def orthogonalize(matrix, **options):
        asked.append(options["dtype"])
        return matrix

    monkeypatch.setattr(inner_optimizers, "orthogonalize", orthogonalize)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        inner_optimizers.spectral(Level(4, lr=0.1, optimizer="spectral"), [torch.ones(1, 3, 2, dtype=dtype)], {})
        asked.append(inner_optimizers.m3_settings(torch.Size([3, 2]), 0.9, dtype).ns_dtype)
    assert asked == [torch.float32, torch.float32, torch.float64, torch.float64, torch.float32, torch.float32]
