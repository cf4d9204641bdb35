"""Models with levels: equal to the original at first, one boundary by hand, streams that neither mix nor mind cuts."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nestling import Level, stack_levels
from nestling.cms.inner_optimizers import OPTIMIZERS
from slowly import examples
from streams import read

TWO = [Level(4, lr=0.5), Level(8, lr=0.25)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("placement", ["depth", "width"])
def test_at_first_it_is_the_original(make, ids, family, placement):
    original = make(family, torch.float32)
    want = original(ids).logits
    stacked = stack_levels(copy.deepcopy(original), [Level(64), Level(512)], placement)
    assert torch.equal(read(stacked, ids)[0], want)  # the first chunk is still open


@pytest.mark.parametrize("levels", [[Level(4, lr=0)], [Level(math.inf)], [Level(4, lr=0), Level(8, lr=0)]])
def test_without_a_rate_nothing_changes_bit_for_bit(make, ids, levels):
    original = make(dtype=torch.float32)
    want = original(ids).logits
    assert torch.equal(read(stack_levels(original, levels), ids)[0], want)


def mlp_layers(model):
    return [m for b in model.model.layers for m in (b.mlp.gate_proj, b.mlp.up_proj, b.mlp.down_proj)]


def test_one_boundary_is_a_step_by_hand(make, ids):
    """Logits of the second chunk are those of the stepped model reading on after the keys of the first one."""
    original, one = make(), ids[:1, :9]
    loss = F.cross_entropy(original(one[:, :5]).logits[0], one[0, 1:6])
    grads = torch.autograd.grad(loss, [m.weight for m in mlp_layers(original)])
    got, cache = read(stack_levels(copy.deepcopy(original), [Level(5, lr=0.5)]), one)
    for delta, g in zip(cache.levels.levels[0].deltas, grads, strict=True):
        torch.testing.assert_close(delta[0], -0.5 * g, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        first = original(one[:, :5], use_cache=True)
        for module, g in zip(mlp_layers(original), grads, strict=True):
            module.weight -= 0.5 * g
        second = original(one[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(got, torch.cat([first.logits, second.logits], 1), rtol=1e-10, atol=1e-12)


@settings(max_examples=examples(15), deadline=None)
@given(
    cuts=st.lists(st.integers(1, 40), max_size=5, unique=True),
    placement=st.sampled_from(["depth", "width"]),
    variant=st.sampled_from(["sequential", "nested"]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    ahead=st.booleans(),
)
def test_cuts_change_nothing(made, cuts, placement, variant, optimizer, ahead):
    model, ids = made
    levels = [Level(4, lr=0.1, optimizer=optimizer, clip=1.0), Level(8, lr=0.05, optimizer=optimizer, decay=0.1)]
    stacked = stack_levels(copy.deepcopy(model), levels, placement, variant=variant)
    want, whole = read(stacked, ids)
    got, parts = read(stacked, ids, sorted(cuts), ahead)
    close = 1e-6 if optimizer == "adamw" else 1e-9  # it divides gradients near zero by their own size
    torch.testing.assert_close(got, want, rtol=close, atol=close)
    for a, b in zip(whole.levels.levels, parts.levels.levels, strict=True):
        assert (a.updates, a.count) == (b.updates, b.count) and a.updates > 0
        torch.testing.assert_close(a.deltas, b.deltas, rtol=close, atol=close)


def test_a_known_next_token_closes_a_chunk_at_once(made):
    model, ids = made
    stacked = stack_levels(copy.deepcopy(model), TWO)
    cache = stacked(ids[:, :8], use_cache=True, next_tokens=ids[:, 8:9]).past_key_values
    assert cache.levels.tokens.shape[1] == 0 and [s.updates for s in cache.levels.levels] == [2, 1]
    with pytest.raises(ValueError, match=r"next_tokens must be \[2, 1\]"):
        stacked(ids[:, :8], next_tokens=ids[:, 8:10])


def test_streams_do_not_mix(make, ids):
    stacked = stack_levels(make(), TWO)
    both, cache = read(stacked, ids)
    for b in range(2):
        alone, own = read(stacked, ids[b : b + 1])
        torch.testing.assert_close(alone[0], both[b], rtol=1e-9, atol=1e-11)
        for x, y in zip(own.levels.levels, cache.levels.levels, strict=True):
            torch.testing.assert_close([d[0] for d in x.deltas], [d[b] for d in y.deltas], rtol=1e-9, atol=1e-12)


def test_boundaries_are_counted_in_the_stream(make, ids):
    stacked = stack_levels(make(), TWO)
    for length, updates in ((4, (0, 0)), (5, (1, 0)), (9, (2, 1)), (40, (9, 4)), (41, (10, 5))):
        levels = read(stacked, ids[:, :length])[1].levels.levels
        assert tuple(0 if s is None else s.updates for s in levels) == updates, length


def test_nested_levels_begin_anew_after_the_slower_one(make, ids):
    stacked = stack_levels(make(), TWO, variant="nested")
    fast, slow = read(stacked, ids[:, :9])[1].levels.levels
    assert not any(d.any() for d in fast.deltas)
    assert all(d.any() for d in slow.deltas)
    assert any(d.any() for d in read(stacked, ids[:, :13])[1].levels.levels[0].deltas)


def test_learning_lowers_the_loss_on_a_repeated_text(make):
    stacked = stack_levels(make(), [Level(8, lr=1.0)])
    ids = torch.randint(31, (1, 8), generator=torch.Generator().manual_seed(3)).repeat(1, 12)
    logits, _ = read(stacked, ids)
    losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    assert losses[-16:].mean() < losses[:16].mean() - 0.2


def test_a_stream_whose_gradient_is_not_finite_is_refused_alone(make, ids):
    stacked = stack_levels(make(), [Level(4, lr=0.5)])
    with torch.no_grad():
        cache = stacked(ids[:, :9]).past_key_values
        before = [d.clone() for d in cache.levels.levels[0].deltas]
        for layer in cache.layers:
            layer.keys[0] = math.nan
        cache = stacked(ids[:, 9:14], past_key_values=cache).past_key_values
    state = cache.levels.levels[0]
    assert state.written[0].isnan() and state.written[1] > 0
    assert all(torch.equal(d[0], b[0]) and not torch.equal(d[1], b[1]) for d, b in zip(state.deltas, before))


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3), dict(do_sample=True)])
def test_generate(make, ids, options):
    stacked = stack_levels(make(), TWO)
    out = stacked.generate(ids[:, :11], max_new_tokens=12, pad_token_id=0, **options)
    assert out.shape == (2, 23) and torch.equal(out[:, :11], ids[:, :11])


def test_greedy_text_is_what_the_forward_says(make, ids):
    stacked = stack_levels(make(), TWO)
    out = stacked.generate(ids[:, :11], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(read(stacked, out)[0][:, 10:-1].argmax(-1), out[:, 11:])


def test_what_takes_tokens_back_is_refused_while_levels_learn(make, ids):
    stacked = stack_levels(make(), TWO)
    options = dict(max_new_tokens=3, pad_token_id=0, do_sample=False, attention_mask=torch.ones(1, 11))
    for changes, word in (
        (dict(prompt_lookup_num_tokens=2), "stateful"),
        (dict(cache_implementation="static"), "read"),
    ):
        with pytest.raises(ValueError, match=word):
            stacked.generate(ids[:1, :11], **options, **changes)
        stacked.learning = False
        assert stacked.generate(ids[:1, :11], **options, **changes).shape == (1, 14)
        stacked.learning = True
    assert not stacked._can_compile_fullgraph


def test_a_fork_goes_its_own_way_and_copies_nothing(make, ids):
    stacked = stack_levels(make(), TWO)
    _, cache = read(stacked, ids[:, :20])
    fork = cache.fork()
    assert all(a is b for s, t in zip(cache.levels.levels, fork.levels.levels) for a, b in zip(s.deltas, t.deltas))
    with torch.no_grad():
        stacked(ids[:, 20:], past_key_values=fork)
        got = stacked(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(got, read(stacked, ids)[0][:, 20:], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("placement", ["depth", "width"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_the_size_of_a_state_is_known_in_advance(make, ids, placement, optimizer):
    stacked = stack_levels(make(), [Level(4, optimizer=optimizer), Level(8)], placement, blocks=[-1, -2], width=3)
    assert read(stacked, ids)[1].levels.nbytes == stacked.state_bytes(2)


@pytest.mark.parametrize("meta_grad", ["full", "first_order"])
def test_outer_gradients(make, ids, meta_grad):
    """Exact through the updates (finite differences), or at the adapted weights only."""
    stacked = stack_levels(make(), [Level(6, lr=0.7)], meta_grad=meta_grad)
    weight, short = stacked.model.layers[1].mlp.up_proj.weight, ids[:, :20]

    def loss():
        return F.cross_entropy(stacked(short).logits[:, :-1].flatten(0, 1), short[:, 1:].flatten())

    (slope,) = torch.autograd.grad(loss(), weight)
    way = torch.randn_like(weight)
    with torch.no_grad():
        ends = []
        for shift in (1e-6, -2e-6):
            weight += shift * way
            ends.append(loss())
        weight += 1e-6 * way
    difference = (ends[0] - ends[1]) / 2e-6
    exact = torch.isclose((slope * way).sum(), difference, rtol=1e-5)
    assert bool(exact) == (meta_grad == "full")


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda m, ids: stack_levels(m, []), "levels is empty"),
        (lambda m, ids: stack_levels(m, [Level(4), Level(4)]), "one frequency"),
        (lambda m, ids: stack_levels(m, [Level(4), Level(6)]), "multiple"),
        (lambda m, ids: stack_levels(m, TWO, "sideways"), "placement"),
        (lambda m, ids: stack_levels(m, TWO, blocks=[0]), "share 1 blocks"),
        (lambda m, ids: stack_levels(m, TWO, blocks=[9]), "block 9"),
        (lambda m, ids: stack_levels(stack_levels(m, TWO), TWO), "already"),
        (lambda m, ids: (stack_levels(m, TWO), stack_levels(m, TWO)), "already"),
        (lambda m, ids: stack_levels(torch.compile(m), TWO), "the model is compiled already"),
        (lambda m, ids: (m.compile(), stack_levels(m, TWO)), "the model is compiled already"),
        (lambda m, ids: (m.model.layers[0].mlp.compile(), stack_levels(m, TWO)), "model.layers.0.mlp of the model is"),
        (lambda m, ids: stack_levels(m, TWO)(ids[:, :0]), "input_ids"),
        (lambda m, ids: (s := stack_levels(m, TWO))(ids[:1], past_key_values=read(s, ids)[1]), "holds 2 streams"),
    ],
)
def test_bad_input_is_named(make, ids, call, word):
    with pytest.raises((ValueError, TypeError), match=word):
        call(make(), ids)


def test_an_unsupported_model_is_named():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11))
    with pytest.raises(TypeError, match="GPT2LMHeadModel is not a Llama-family"):
        stack_levels(model, [Level(4)])
