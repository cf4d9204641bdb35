"""No input makes a memory overflow; low precision works."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from nestling.layers import SelfModifyingTitans
from nestling.layers.mixers import MIXERS, build_mixer
from slowly import ASKED, some

DIM, HEADS = 8, 2
LONG, CHUNK = (20_000, 128) if ASKED else (8_000, 64)  # tokens of a long text: 125 chunks or more
ATTENTION = ("attention", "window_attention")  # their state is keys and values


def build(name, **options):
    torch.manual_seed(0)
    return build_mixer(name, DIM, HEADS, **options)


def finite(*trees):
    return all(leaf.isfinite().all() for leaf in tree_leaves(trees) if leaf is not None)


def memories(state):
    """Of a memory, or of one beside attention."""
    return getattr(state, "memory", state).memories


def shape(kind, tokens):
    x = torch.randn(1, tokens, DIM)
    return {"zero": 0 * x, "huge": 1e4 * x, "constant": x[:, :1].expand_as(x), "random": x, "tiny": 1e-20 * x}[kind]


@pytest.mark.parametrize("kind", ["zero", "huge", "constant", "tiny"])
@pytest.mark.parametrize("name", MIXERS)
def test_finite_values_and_gradients(name, kind):
    layer = build(name)
    x = shape(kind, 300).clone().requires_grad_()
    y, state = layer(x)
    y.sum().backward()
    assert finite(y, state, x.grad, [p.grad for p in layer.parameters()])


MEMORIES = [name for name in MIXERS if name not in ATTENTION]


@some(
    "name, kind", [(n, "random") for n in MEMORIES] + [("selfmod", "constant"), ("hope_memory", "constant")],
    MEMORIES, ("random", "constant"),
)  # fmt: skip
def test_finite_over_a_long_text(name, kind):
    """In training, the loss at the end of a long text: values, state, and gradients through all of its chunks."""
    layer = build(name, chunk_size=CHUNK)
    x = shape(kind, LONG)
    y, state = layer(x)
    assert finite(y, state)
    if name in ("selfmod", "titans", "gated_deltanet") and kind == "random":
        y[:, -1000:].square().mean().backward()
        assert finite([p.grad for p in layer.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        dict(dgd=False),
        dict(normalize_values=False),
        dict(step="layer"),
        dict(step="layer", dgd=False),
        dict(expansion=4),
        dict(architecture="linear"),
        dict(memory_chunk_size=4 * CHUNK),
    ],
)
@torch.no_grad()
def test_finite_over_a_long_text_without_what_steadies_the_default(options):
    y, state = build("selfmod", chunk_size=CHUNK, **options)(shape("random", LONG))
    assert finite(y, state)


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_parameters(name):
    """State in float32 whatever the parameters' dtype; the result is near that of float32."""
    layer, low = build(name), build(name).bfloat16()
    x = torch.randn(2, 70, DIM)
    want, _ = layer(x)
    y, state = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    if name not in ATTENTION:
        assert all(
            w.dtype == torch.float32 for fast in memories(state) for w in (*fast.now, *fast.start, *fast.velocity)
        )
    assert (y.float() - want).norm() < 0.1 * want.norm()
    y.float().square().mean().backward()
    assert finite([p.grad for p in low.parameters()])
    assert finite(low(x[:, :3].bfloat16(), state))


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_autocast(name):
    layer = build(name)
    x = torch.randn(2, 70, DIM)
    want, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        first, state = layer(x[:, :33])
        second, state = layer(x[:, 33:], state)
    y = torch.cat([first, second], 1).float()
    assert (y - want).norm() < 0.1 * want.norm()
    y.square().mean().backward()
    assert finite([p.grad for p in layer.parameters()])
    if name not in ATTENTION:
        assert all(w.dtype == torch.float32 for fast in memories(state) for w in fast.now)


def test_training_at_a_high_learning_rate_stays_finite():
    """50 outer steps at 1e-2 on random sequences, float32."""
    layer = build("selfmod", chunk_size=8, expansion=4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(50):
        x = torch.randn(2, 24, DIM)
        y, _ = layer(x)
        loss = (y[:, 1:] - x[:, :-1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        assert loss.isfinite()
    assert finite(list(layer.parameters()))


def test_memories_stay_alive_over_a_long_stream():
    """A decay to the learned initial state keeps weights and inner loss; the literal decay to zero loses both."""
    found = {}
    for retain in ("initial", "zero"):
        torch.manual_seed(0)
        layer = SelfModifyingTitans(16, num_heads=1, retain=retain, horizon=(64.0, 64.0))
        figures = layer.inspect(torch.randn(1, 4096, 16))
        norm, loss = figures["norm"][0, 0], figures["loss"][0, 0]
        found[retain] = (norm[-1] / norm[0]).item(), (loss[-512:].mean() / loss[:512].mean()).item()
    assert found["initial"][0] > 0.5 and found["initial"][1] > 0.05, found
    assert found["zero"][0] < 0.01 and found["zero"][1] < 0.01, found
