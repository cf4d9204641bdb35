"""Kept memories (`cache_every`): their definition, any cut, any padding, what they are, what they do not go with."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map_only

from nestling.layers.mixers import build_mixer
from nestling.layers.titans import SelfModifyingTitans
from nestling.layers.titans_reference import self_modifying_titans_reference
from nestling.layers.titans_state import TitansState
from nestling.ops import compiled
from nestling.utils.likeness import check_like
from slowly import examples
from titans import close, in_pieces

DIM = 8
TWO_KINDS = dict(tied_write=False, erase_heads="half")
LAYERS = {
    "two kinds": ("hope_memory", TWO_KINDS),
    "hope_memory": ("hope_memory", {}),
    "linear_attention": ("linear_attention", {}),
    "retnet": ("retnet", {}),
    "gated_deltanet": ("gated_deltanet", {}),
    "deltanet": ("deltanet", {}),
    "l2": ("hope_memory", dict(objective="l2", erase_range=1.0, read="chunk", norm_limit=0.3)),
}


def build(name="two kinds", seed=0, **options):
    torch.manual_seed(seed)
    mixer, own = LAYERS[name]
    layer = build_mixer(mixer, DIM, 2, **({"chunk_size": 3, "cache_every": 6} | own | options)).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
        if layer.alpha_bias is not None:
            layer.alpha_bias.sub_(5.0)  # decays that matter within a few tokens
    return layer


def tokens(*shape):
    return torch.randn(*shape, DIM, dtype=torch.float64)


drawn = dict(
    name=st.sampled_from([*LAYERS]),
    every=st.integers(1, 8),
    most=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 99),
)


@settings(deadline=None, max_examples=examples(40))
@given(**drawn, count=st.integers(1, 26), chunk=st.integers(1, 6), native=st.booleans())
def test_the_layer_is_its_definition(name, every, most, seed, count, chunk, native):
    layer = build(name, seed, cache_every=every, cache_max=most, chunk_size=chunk)
    x = tokens(2, count).requires_grad_()
    leaves = [x, *layer.parameters()]

    def outcome(y):
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        loss = (y * weights).sum()
        return [y, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]

    with nullcontext() if native else compiled.disabled():
        close(outcome(layer(x)[0]), outcome(self_modifying_titans_reference(layer, x)), 1e-8)


@settings(deadline=None, max_examples=examples(30))
@given(**drawn, cuts=st.lists(st.integers(1, 27), max_size=4))
@torch.no_grad()
def test_any_split_is_one_pass(name, every, most, seed, cuts):
    layer = build(name, seed, cache_every=every, cache_max=most)
    x = tokens(2, 28)
    close(in_pieces(layer, x, cuts), layer(x))


@torch.no_grad()
def test_token_by_token_is_one_pass():
    layer = build()
    x = tokens(2, 21)
    close(in_pieces(layer, x, range(21)), layer(x))


@settings(deadline=None, max_examples=examples(20))
@given(**drawn, lengths=st.lists(st.integers(0, 20), min_size=3, max_size=3), cut=st.integers(1, 19))
@torch.no_grad()
def test_sequences_of_other_lengths_do_not_see_each_other(name, every, most, seed, lengths, cut):
    """Padding in front, two calls: every sequence as if it had been alone, its state too."""
    layer = build(name, seed, cache_every=every, cache_max=most)
    x = tokens(3, 20)
    mask = torch.arange(20) >= 20 - torch.tensor(lengths)[:, None]
    y, state = layer(x[:, :cut], mask=mask[:, :cut])
    rest, state = layer(x[:, cut:], state, mask=mask[:, cut:])
    y = torch.cat([y, rest], 1)
    for row, length in enumerate(lengths):
        if length == 0:
            continue
        alone, own = layer(x[row : row + 1, 20 - length :])
        close(y[row : row + 1, 20 - length :], alone)
        there = state.cached.numbers[row] >= 0
        close(state.cached.memories[row : row + 1, :, there], own.cached.memories)
        close(state.cached.numbers[row : row + 1, there], own.cached.numbers)


@torch.no_grad()
def test_of_heads_that_add_a_kept_memory_is_one_begun_anew():
    layer = build("linear_attention", conv_size=0)
    layer.initial[0][0].zero_()
    x = tokens(1, 18)
    kept = layer(x)[1].cached.memories
    assert kept.shape[2] == 3
    for n in range(3):
        close(kept[:, :, n], layer(x[:, 6 * n : 6 * n + 6])[1].cached.memories[:, :, 0])


@torch.no_grad()
def test_the_state_grows_by_a_memory_a_stretch_or_up_to_the_most():
    def held(layer, count):
        state = layer(tokens(2, count))[1]
        check_like(state, layer.state_like(state, 2), "state")
        return state.cached.memories.shape[2]

    assert [held(build(), n) for n in (5, 6, 11, 12, 60)] == [0, 1, 1, 2, 10]
    assert [held(build(cache_max=3), n) for n in (5, 6, 60)] == [0, 1, 3]


@torch.no_grad()
def test_far_back_is_found_where_the_running_memory_has_forgotten():
    """A pair in the first stretch, much else after it: the gate finds it by its key."""
    layer = build("linear_attention", cache_every=4, chunk_size=4, conv_size=0, output_gate=False)
    p = layer.head_dim
    layer.initial[0][0].zero_()
    layer.in_proj.weight.copy_(torch.eye(DIM, dtype=torch.float64).repeat(3, 1))
    layer.out_proj.weight.copy_(torch.eye(DIM, dtype=torch.float64))
    layer.norm_weight.fill_(1)
    layer.log_cache_scale.fill_(5.0)
    first, noise = torch.eye(p, dtype=torch.float64)[0], torch.eye(p, dtype=torch.float64)[1]
    x = torch.stack([first] * 4 + [noise + 0.1 * first] * 60 + [first]).repeat(1, 2)[None]
    want, plain = first / first.square().mean().sqrt(), build("linear_attention", cache_every=None, conv_size=0)
    y = layer(x)[0][0, -1, :p]
    torch.testing.assert_close(y, want, rtol=0, atol=0.05)
    assert plain.log_cache_scale is None and plain.cache_bias is None


def test_without_the_option_nothing_is_added():
    plain, caching = build(cache_every=None), build()
    assert {*caching.state_dict()} - {*plain.state_dict()} == {"log_cache_scale", "cache_bias"}
    _, state = plain(tokens(1, 9))
    assert state.cached == ()
    older = TitansState(*tuple(state)[:4])  # of a file from before there were kept memories
    with torch.no_grad():
        close(plain(tokens(1, 2), older)[1].position, torch.tensor([11]))


def test_inside_the_first_stretch_it_is_the_layer_without():
    plain, caching = build(cache_every=None), build(cache_every=50)
    caching.load_state_dict(plain.state_dict(), strict=False)
    x = tokens(2, 20)
    assert torch.equal(plain(x)[0], caching(x)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(cache_every=0), "cache_every must be an integer of at least 1"),
        (dict(cache_every=4, cache_max=1.5), "cache_max"),
        (dict(cache_every=4, cache_scale=0.0), "cache_scale"),
        (dict(cache_every=None, cache_max=1), "cache_max=1 is of kept memories"),
        (dict(architecture="mlp"), "architecture='linear'"),
        (dict(adaptive=("k",)), r"adaptive=\(\)"),
        (dict(momentum=True), "momentum=False"),
        (dict(retain="initial"), "retain='zero'"),
    ],
)
def test_what_it_does_not_go_with_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        build_mixer("hope_memory", DIM, 2, **({"cache_every": 4} | options))


def test_the_papers_layer_is_refused():
    with pytest.raises(ValueError, match="cache_every=64 keeps what a stretch wrote to a matrix"):
        SelfModifyingTitans(DIM, 2, cache_every=64)


def test_states_of_layers_with_and_without_it_are_refused():
    plain, caching = build(cache_every=None), build()
    with pytest.raises(ValueError, match="keeps memories, this one does not"):
        plain(tokens(1, 2), caching(tokens(1, 2))[1])
    with pytest.raises(ValueError, match="does not keep memories, this one does"):
        caching(tokens(1, 2), plain(tokens(1, 2))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_texts_stay_finite(dtype):
    layer = build_mixer("hope_memory", 16, 2, **TWO_KINDS, chunk_size=16, cache_every=16).to(dtype)
    x = torch.randn(2, 400, 16, dtype=dtype, requires_grad=True)
    y, state = layer(x)
    y.float().square().mean().backward()
    found = [y, x.grad, *(p.grad for p in layer.parameters()), *tree_leaves(state)]
    assert all(torch.isfinite(t).all() for t in found)
    assert y.dtype == dtype and state.cached.memories.dtype == torch.float32


def test_a_detached_state_goes_on():
    layer = build()
    _, state = layer(tokens(2, 13))
    state = tree_map_only(torch.Tensor, torch.Tensor.detach, state)
    layer(tokens(2, 9), state)[0].sum().backward()
    assert layer.log_cache_scale.grad.abs().min() > 0 and layer.cache_bias.grad.abs().min() > 0


def test_a_compiler_leaves_it_to_python_and_torch_func_is_refused():
    layer = build()
    x = tokens(1, 15)
    with torch.no_grad():
        close(torch.compile(layer, backend="eager")(x)[0], layer(x)[0])
    with pytest.raises(ValueError, match="does not go with torch.func"):
        torch.func.grad(lambda part: layer(part)[0].sum())(x)
