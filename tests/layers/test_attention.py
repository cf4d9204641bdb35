"""Softmax attention: against its written-out definition, cut anywhere, padded anywhere."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from nestling.layers.attention import Attention
from nestling.layers.convolution import ShortConvolution
from slowly import examples


def layer(**options):
    return Attention(16, 4, **{"num_kv_heads": 2, "head_dim": 6, **options}).double()


def definition(attention, x):
    """One sequence, token by token, head by head; rotation as a product of complex numbers."""
    tokens, half = x.shape[0], attention.head_dim // 2
    if attention.conv is not None:
        taps = attention.conv.weight
        before = torch.cat([x.new_zeros(taps.shape[1] - 1, x.shape[1]), x])
        x = torch.stack([(before[t : t + taps.shape[1]].T * taps).sum(1) for t in range(tokens)])

    def heads(projection, norm):
        out = projection(x).unflatten(-1, (-1, attention.head_dim))
        return out if norm is None else out * (out.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight

    def turn(z, t):
        pairs = [complex(a, b) for a, b in zip(z[:half].tolist(), z[half:].tolist())]
        turned = [p * cmath.exp(1j * t * attention.rope_theta ** (-i / half)) for i, p in enumerate(pairs)]
        return torch.tensor([p.real for p in turned] + [p.imag for p in turned], dtype=torch.float64)

    q, k = heads(attention.q_proj, attention.q_norm), heads(attention.k_proj, attention.k_norm)
    v = heads(attention.v_proj, None)
    rows = []
    for t in range(tokens):
        first = 0 if attention.window is None else max(0, t - attention.window + 1)
        row = []
        for h in range(attention.num_heads):
            g = h // (attention.num_heads // attention.num_kv_heads)
            scores = [turn(q[t, h], t) @ turn(k[s, g], s) / math.sqrt(2 * half) for s in range(first, t + 1)]
            weights = torch.stack(scores).softmax(0)
            row.append(sum(w * v[s, g] for w, s in zip(weights, range(first, t + 1))))
        rows.append(torch.cat(row))
    y = torch.stack(rows)
    if attention.gate_proj is not None:
        z = attention.gate_proj(x)
        y = y * z * torch.sigmoid(z)
    return attention.out_proj(y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"window": 1, "output_gate": False},
        {"conv_size": 0, "rope_theta": 100.0},
        {"qk_norm": True, "num_kv_heads": 4},
        {"num_kv_heads": 1, "head_dim": None, "output_gate": False},
    ],
)
@torch.no_grad()
def test_equals_the_definition(options):
    attention = layer(**options)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, _ = attention(x)
    for row, out in zip(x, y):
        torch.testing.assert_close(out, definition(attention, row), rtol=1e-9, atol=1e-12)


@settings(max_examples=examples(25))
@given(data=st.data(), window=st.sampled_from([None, 1, 4, 20]), conv_size=st.sampled_from([0, 1, 4]))
@torch.no_grad()
def test_padding_and_cuts_anywhere_change_nothing(data, window, conv_size):
    """Texts of unequal length, padding strewn between their tokens, fed in pieces: as each text alone at once."""
    attention = layer(window=window, conv_size=conv_size)
    tokens = data.draw(st.integers(1, 12))
    mask = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=2, max_size=3))
    )
    x = torch.randn(*mask.shape, 16, dtype=torch.float64)
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens), max_size=3)) | {tokens})
    pieces, state, start = [], None, 0
    for cut in cuts:
        y, state = attention(x[:, start:cut], state, mask[:, start:cut])
        pieces.append(y)
        start = cut
    y = torch.cat(pieces, 1)
    assert y.isfinite().all()
    assert state.tokens.tolist() == mask.sum(1).tolist()
    for row in range(len(mask)):
        if mask[row].any():
            alone, _ = attention(x[row : row + 1, mask[row]])
            torch.testing.assert_close(y[row, mask[row]], alone[0], rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("past", [0, 2, 50])
def test_a_window_is_computed_in_blocks(past):
    """Texts of several blocks, with and without a state before them: as by one mask over everything."""
    attention = layer(window=9)
    x = torch.randn(2, past + 300, 16, dtype=torch.float64)
    whole, _ = attention(x, None, torch.ones(2, past + 300, dtype=torch.bool))
    state = attention(x[:, :past])[1] if past else None
    torch.testing.assert_close(attention(x[:, past:], state)[0], whole[:, past:], rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("window, tokens, kv_heads", [(3, 7, 2), (3, 300, 2), (130, 131, 1), (150, 460, 1)])
def test_the_blocks_of_a_window_in_one_call(window, tokens, kv_heads):
    torch.manual_seed(0)
    attention = Attention(8, 2, window=window, num_kv_heads=kv_heads)
    q, k, v = (torch.randn(2, heads, tokens, 4, dtype=torch.float64) for heads in (2, kv_heads, kv_heads))
    at = torch.arange(tokens)
    seen = (at[:, None] >= at) & (at[:, None] - at < window)
    wide = [t.repeat_interleave(2 // kv_heads, 1) for t in (k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=seen)
    torch.testing.assert_close(attention._windows(q, k, v), want)


def test_state_of_a_window_is_bounded_and_a_value():
    attention = layer(window=5)
    _, first = attention(torch.randn(2, 3, 16, dtype=torch.float64))
    kept = [leaf.clone() for leaf in tree_leaves(first)]
    state = first
    for size in (1, 7, 4, 30):
        _, state = attention(torch.randn(2, size, 16, dtype=torch.float64), state)
        assert state.keys.shape[1] <= 4
    assert all(leaf.shape[0] == 2 for leaf in tree_leaves(state))
    assert all(torch.equal(a, b) for a, b in zip(kept, tree_leaves(first)))


def test_gradients_are_finite_with_padding_and_reach_every_parameter():
    attention = layer(window=4, qk_norm=True)
    x = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False] * 6 + [True] * 2, [True] * 8])
    y, _ = attention(x, None, mask)
    y[mask].square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~mask] == 0).all()
    for name, parameter in attention.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_bfloat16_autocast_carries_its_state():
    attention = Attention(16, 2)
    x = torch.randn(1, 10, 16)
    whole, _ = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        first, state = attention(x[:, :4])
        second, _ = attention(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1).float(), whole, rtol=0.1, atol=0.05)
    with pytest.raises(ValueError, match="state is torch"):
        attention(x[:, 4:], state)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_kv_heads": 3}, "must divide num_heads"),
        ({"head_dim": 5}, "even"),
        ({"window": 0}, "window"),
        ({"conv_size": -1}, "conv_size"),
    ],
)
def test_sizes_that_do_not_fit(options, says):
    with pytest.raises(ValueError, match=says):
        layer(**options)
    with pytest.raises(ValueError, match="must divide dim"):
        Attention(18, 4)


@torch.no_grad()
def test_input_and_state_that_do_not_fit():
    attention, x = layer(window=4), torch.randn(2, 5, 16, dtype=torch.float64)
    _, state = attention(x)
    for call, says in [
        (lambda: attention(x[..., :8]), "x must be"),
        (lambda: attention(x, None, torch.ones(2, 4, dtype=torch.bool)), "mask must be bool"),
        (lambda: attention(x, None, torch.ones(2, 5)), "mask must be bool"),
        (lambda: attention(x[:1], state), "batch of 2"),
        (lambda: attention(x, tuple(state)), "AttentionState"),
        (lambda: layer(num_kv_heads=1)(x, state), "another configuration"),
        (lambda: layer(conv_size=0)(x, state), "another configuration"),
        (lambda: layer(window=2)(x, state), "another configuration"),
        (lambda: layer().float()(x.float(), state), "state is torch.float64"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_short_convolution_carries_its_state():
    convolution = ShortConvolution(6, 4, activation="silu").double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    whole, _ = convolution(x)
    first, state = convolution(x[:, :2])
    second, _ = convolution(x[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    inputs = torch.nn.functional.pad(x, (0, 0, 3, 0)).transpose(1, 2)
    conv = torch.nn.functional.conv1d(inputs, convolution.weight[:, None], groups=6).transpose(1, 2)
    torch.testing.assert_close(whole, torch.nn.functional.silu(conv), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="size"):
        ShortConvolution(6, 0)
    with pytest.raises(ValueError, match="activation"):
        ShortConvolution(6, 4, activation="relu6")
