"""The erase's own gate, the convolutions after the projections, and where memories begin (decisions D16, D17)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.layers.titans import SelfModifyingTitans
from nestling.layers.titans_groups import gate, gate_logit
from nestling.layers.titans_reference import self_modifying_titans_reference
from nestling.memory import FastWeights, LinearMemory, MLPMemory, UpdateRule
from nestling.memory.rule import Context, advance
from nestling.ops.chunk import decay_table
from slowly import examples
from titans import CHOICES, DIM, possible
from titans import build_drawn as build


@settings(max_examples=examples(25), deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_settings_equal_the_definition(data, seed):
    """Values, gradients and a split, of settings drawn at random."""
    layer = build(seed, **possible({name: data.draw(st.sampled_from(c), name) for name, c in CHOICES.items()}))
    x = torch.randn(2, 11, DIM, dtype=torch.float64, requires_grad=True)
    (y, _), want = layer(x), self_modifying_titans_reference(layer, x)
    torch.testing.assert_close(y, want, rtol=1e-8, atol=1e-8)
    leaves = [x, *layer.parameters()]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    grads = [torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True) for out in (y, want)]
    scale = max(g.abs().max() for g in grads[1] if g is not None)
    for a, b in zip(*grads, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        assert (a - b).abs().max() <= 1e-8 * scale
    first, state = layer(x[:, :6])
    torch.testing.assert_close(torch.cat([first, layer(x[:, 6:], state)[0]], 1), y, rtol=1e-8, atol=1e-8)


def test_the_gate_has_exact_ends():
    values = gate(torch.tensor([-9.0, -3.2, 0.0, 3.2, 9.0]))
    assert values.tolist() == [0, 0, 0.5, 1, 1]
    for share in (0.02, 0.5, 0.9):
        torch.testing.assert_close(gate(torch.tensor(gate_logit(share))).item(), share)


def written(gate, *, erase_range=2.0, memory=None, alpha=1.0, **rule):
    """A memory of one head after a token with key k, and k; nothing is written but by what the rule's step leaves."""
    memory = memory or LinearMemory(4, 4)
    g = torch.Generator().manual_seed(0)
    w = tuple(torch.randn(1, 1, 1, *s, generator=g, dtype=torch.float64) for s in memory.shapes())
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 4, generator=g, dtype=torch.float64), dim=-1)
    full = torch.ones(1, 1, 1, dtype=torch.float64)
    decay = alpha * full
    tokens = Context(k, 0 * k, full, decay, None, decay_table(decay, None), erase=gate * full)
    made = UpdateRule("dot", self_targets=False, erase_gate=True, erase_range=erase_range, **rule)
    return w, advance(memory, made, FastWeights(w, w, ()), tokens, fresh=True)[0].now, k[0, 0, 0]


@pytest.mark.parametrize(("gate", "factor"), [(0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (1.0, -1.0)])
def test_a_full_erase_of_range_2_turns_a_key_around(gate, factor):
    """W k becomes (1 - 2 g) alpha W k; what is orthogonal to k only decays."""
    (w,), (now,), k = written(gate, alpha=0.9)
    torch.testing.assert_close(now[0, 0, 0] @ k, 0.9 * factor * (w[0, 0, 0] @ k), rtol=3e-6, atol=3e-6)
    other = torch.linalg.svd(k[None]).Vh[1]
    torch.testing.assert_close(now[0, 0, 0] @ other, 0.9 * (w[0, 0, 0] @ other))


@pytest.mark.parametrize("layer", ["first", "last"])
def test_only_one_layer_of_a_deep_memory_is_gated(layer):
    """Without DGD and with a tied write, a token whose gate is open changes only the gated layer's erase."""
    memory = MLPMemory(4, 4, 4, residual=False, inner=True)
    w, now, _ = written(1.0, memory=memory, erase_layer=layer, dgd=False)
    changed = [not torch.allclose(a, b) for a, b in zip(w, now)]
    assert changed == [layer == "first", layer == "last"]  # the value is 0: nothing else is written
    w, now, _ = written(0.0, memory=memory, erase_layer=layer)
    assert all(torch.equal(a, b) for a, b in zip(w, now))


def test_projection_memories_keep_their_own_erase():
    """The gate is the main memory's alone."""
    layers = [build(adaptive=("k", "v"), **options) for options in ({}, dict(erase_gate=True))]
    with torch.no_grad():
        for name, p in layers[0].named_parameters():
            if not name.startswith(("initial", "in_proj")):
                layers[1].get_parameter(name).copy_(p)
        for both, own, main in zip(layers[0].initial[0], *layers[1].initial):
            own.copy_(both[:2]), main.copy_(both[2:])
        layers[1].in_proj.weight[: layers[0].in_proj.weight.shape[0]] = layers[0].in_proj.weight
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    (plain,), (own, main) = (layer(x)[1].memories for layer in layers)
    for a, k_and_v, memory in zip(
        (*plain.now, *plain.velocity), (*own.now, *own.velocity), (*main.now, *main.velocity)
    ):
        torch.testing.assert_close(a[:, :2], k_and_v)
        assert (a[:, 2:] - memory).abs().max() > 1e-6


@torch.no_grad()
def test_range_2_stays_bounded_and_the_refused_form_does_not():
    """A key that is turned around in every token, an odd number of times a chunk: why l2 is refused there."""
    k = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    full = torch.ones(1, 1, 1, dtype=torch.float64)
    tokens = Context(k, 0 * k, full, full, None, decay_table(full, None), erase=full)
    sizes = {}
    for objective in ("dot", "l2"):
        rule = UpdateRule(objective, self_targets=False, erase_gate=True, erase_range=2.0)
        w = (torch.eye(2, dtype=torch.float64).expand(1, 1, 1, 2, 2),)
        for _ in range(30):
            w = advance(LinearMemory(2, 2), rule, FastWeights(w, w, ()), tokens, fresh=True)[0].now
        sizes[objective] = w[0].norm().item()
    assert sizes["dot"] < 1.5
    assert sizes["l2"] > 1e4


def test_where_a_layer_begins():
    torch.manual_seed(0)
    plain = SelfModifyingTitans(32, 2, qkv_conv=4)
    torch.manual_seed(0)
    changed = SelfModifyingTitans(32, 2, qkv_conv=4, initial_scale=0.1, conv_init="last")
    for a, b in zip(plain.initial[0], changed.initial[0]):
        torch.testing.assert_close(b[:-1], a[:-1])  # of the projections
    torch.testing.assert_close(changed.initial[0][1][-1], 0.1 * plain.initial[0][1][-1])
    torch.testing.assert_close(changed.initial[0][0], plain.initial[0][0])
    for a, b in zip(
        (plain.conv_weight, *plain.path_convs.values()), (changed.conv_weight, *changed.path_convs.values())
    ):
        torch.testing.assert_close(b[:, :-1], 0.5 * a[:, :-1])
        torch.testing.assert_close(b[:, -1], 0.5 * a[:, -1] + 1)
    assert not SelfModifyingTitans(32, 2, initial_scale=0.0, architecture="linear", adaptive=()).initial[0][0].any()


def test_a_state_from_before_the_convolutions():
    """It is a state of three fields; a layer without them takes it, one with them names what is missing."""
    layer, x = SelfModifyingTitans(8, 2), torch.randn(1, 5, 8)
    _, state = layer(x)
    old = type(state)(state.position, state.conv, state.memories)
    assert torch.equal(layer(x, old)[0], layer(x, state)[0])
    with pytest.raises(ValueError, match="another qkv_conv"):
        SelfModifyingTitans(8, 2, qkv_conv=4)(x, old)


def test_the_erase_begins_where_it_is_said_to():
    layer = SelfModifyingTitans(
        32, 2, architecture="linear", objective="dot", adaptive=(), self_targets=False, erase_gate=True,
        erase_range=2.0, initial_erase=0.85,
    ).double()  # fmt: skip
    with torch.no_grad():
        layer.in_proj.weight.zero_()
    erase = layer.inspect(torch.randn(1, 5, 32, dtype=torch.float64))["erase"]
    torch.testing.assert_close(erase, torch.full_like(erase, 0.85))
