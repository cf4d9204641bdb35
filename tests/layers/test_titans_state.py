"""The state of self-modifying Titans and its relatives: cut anywhere, padded anywhere, never shared, never changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

from nestling.layers.mixers import MIXERS, build_mixer
from nestling.layers.titans import SelfModifyingTitans
from slowly import examples
from titans import close, in_pieces

DIM = 8
OPTIONS = {
    "default": {},
    "slow_memory": dict(memory_chunk_size=10),
    "slow_projections": dict(chunk_size=10, memory_chunk_size=5),
    "read_chunk": dict(read="chunk"),
    "all_adaptive": dict(adaptive=("k", "v", "q", "eta", "alpha"), gates="mlp", momentum=False),
    "linear_layer_step": dict(architecture="linear", step="layer", read="after", conv_size=0),
    "no_dgd": dict(dgd=False, norm_limit=0.5),
    "erase_gate": dict(erase_gate=True, erase_range=2.0),
    "tracking": dict(
        erase_gate=True, erase_range=2.0, architecture="linear", objective="dot", momentum=False, conv_size=0
    ),
    "qkv_conv": dict(qkv_conv=4, conv_for="gates", skip="inner", first_rate=0.1, rate="gate"),
}


def build(seed=0, **options):
    torch.manual_seed(seed)
    layer = SelfModifyingTitans(DIM, 2, **({"chunk_size": 5} | options)).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer


def tokens(*shape):
    return torch.randn(*shape, DIM, dtype=torch.float64)


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=examples(8))
@given(cuts=st.lists(st.integers(1, 27), max_size=4), seed=st.integers(0, 99))
def test_any_split_is_one_pass(name, cuts, seed):
    layer = build(seed, **OPTIONS[name])
    x = tokens(2, 28)
    with torch.no_grad():
        close(in_pieces(layer, x, cuts), layer(x))


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_token_by_token_is_one_pass(name):
    layer = build(**OPTIONS[name])
    x = tokens(2, 13)
    close(in_pieces(layer, x, range(13)), layer(x))


@pytest.mark.parametrize(
    "name", ["deltanet", "gated_deltanet", "linear_attention", "retnet", "ttt", "titans", "titans_linear"]
)
@torch.no_grad()
def test_any_split_of_a_baseline(name):
    torch.manual_seed(0)
    layer = build_mixer(name, DIM, 2, chunk_size=5).double()
    x = tokens(2, 23)
    close(in_pieces(layer, x, [3, 4, 15]), layer(x))


def test_gradients_pass_through_a_carried_state():
    layer, x = build(memory_chunk_size=10), tokens(2, 17)
    grads = []
    for cuts in ([], [3, 8, 16]):
        y, state = in_pieces(layer, x, cuts)
        loss = y.square().sum() + sum(w.sum() for fast in state.memories for w in fast.now)
        grads.append(torch.autograd.grad(loss, list(layer.parameters())))
    close(*grads, 1e-8)


def masked(batch, columns, lengths, seed):
    """A mask with `lengths` real tokens per row at random columns."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, columns, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, torch.randperm(columns, generator=g)[:length]] = True
    return mask


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=examples(6))
@given(lengths=st.lists(st.integers(0, 19), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_padding_anywhere_counts_for_nothing(name, lengths, seed):
    """Padding between, before and after the real tokens, with any content: every row as if alone without it."""
    layer = build(seed, **OPTIONS[name])
    mask = masked(3, 19, lengths, seed)
    x = torch.where(mask[..., None], tokens(3, 19), 1e6)
    with torch.no_grad():
        y, state = layer(x, mask=mask)
        assert y.isfinite().all()
        for row, length in enumerate(lengths):
            if length == 0:
                alone = layer.initial_state(1)
                close(tree_map(lambda leaf, row=row: leaf[row : row + 1], state).memories, alone.memories)
                continue
            want, alone = layer(x[row : row + 1, mask[row]])
            close(y[row : row + 1, mask[row]], want)
            close(tree_map(lambda leaf, row=row: leaf[row : row + 1], state), alone)


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=examples(6))
@given(
    lengths=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=4),
    seed=st.integers(0, 99),
)
def test_sequences_at_different_places_of_their_chunks(name, lengths, seed):
    """Several padded calls leave each row at its own place in its chunks; each stays one pass over its own tokens."""
    layer = build(seed, **OPTIONS[name])
    seen, state, outputs = [[], [], []], None, [[], [], []]
    with torch.no_grad():
        for call, rows in enumerate(lengths):
            mask = masked(3, 9, rows, seed + call)
            x = tokens(3, 9)
            y, state = layer(x, state, mask)
            for row in range(3):
                seen[row].append(x[row, mask[row]])
                outputs[row].append(y[row, mask[row]])
        assert state.position.tolist() == [sum(rows) for rows in zip(*lengths, strict=True)]
        for row in range(3):
            x = torch.cat(seen[row])[None]
            if x.shape[1]:
                want, alone = layer(x)
                close(torch.cat(outputs[row])[None], want)
                close(tree_map(lambda leaf, row=row: leaf[row : row + 1], state), alone)


def test_gradients_with_padding():
    layer = build(memory_chunk_size=10)
    x, mask = tokens(2, 14), masked(2, 14, [14, 9], 1)
    y, _ = layer(x, mask=mask)
    got = torch.autograd.grad(y[mask].square().sum(), list(layer.parameters()))
    alone = sum(layer(x[row : row + 1, mask[row]])[0].square().sum() for row in range(2))
    close(got, torch.autograd.grad(alone, list(layer.parameters())), 1e-8)


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_rows_never_mix(name):
    """Nothing written by one sequence is readable by another (decision D8)."""
    layer = build(**OPTIONS[name])
    x = tokens(3, 12)
    y, state = layer(x)
    other = x.clone()
    other[1] = tokens(12) * 50
    z, after = layer(other)
    for row in (0, 2):
        assert torch.equal(y[row], z[row])
        for a, b in zip(tree_leaves(state), tree_leaves(after), strict=True):
            assert torch.equal(a[row], b[row])
    close(layer(x[1:2])[0], y[1:2])


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_a_state_is_a_value(name):
    """Going on from a state changes neither the state nor the input, twice the same gives twice the same."""
    torch.manual_seed(0)
    layer = build_mixer(name, DIM, 2).double()
    _, state = layer(tokens(2, 7))
    leaves = tree_leaves(state)
    assert all(leaf.shape[0] == 2 for leaf in leaves)
    before = [leaf.clone() for leaf in leaves]
    x = tokens(2, 70)
    kept = x.clone()
    mask = masked(2, 70, [70, 31], 0)
    first, second = layer(x, state), layer(x, state)
    layer(x, state, mask)
    close(first, second, 0.0)
    assert torch.equal(x, kept)
    for leaf, old in zip(leaves, before, strict=True):
        assert torch.equal(leaf, old)


@torch.no_grad()
def test_a_state_travels(tmp_path):
    """Through torch.save and through a reordered, repeated batch."""
    layer = build()
    x, later = tokens(2, 8), tokens(2, 9)
    _, state = layer(x)
    torch.save(state, tmp_path / "state.pt")
    close(layer(later, torch.load(tmp_path / "state.pt", weights_only=False)), layer(later, state), 0.0)
    pick = torch.tensor([1, 1, 0])
    y, _ = layer(later[pick], tree_map(lambda leaf: leaf[pick], state))
    close(y, layer(later, state)[0][pick])


@torch.no_grad()
def test_only_padding_changes_nothing():
    layer = build()
    _, state = layer(tokens(2, 7))
    y, after = layer(tokens(2, 3), state, torch.zeros(2, 3, dtype=torch.bool))
    assert y.isfinite().all()
    close(after, state, 0.0)
