"""Hope models whose continuum memory learns while they read."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nestling import HopeConfig, HopeForCausalLM
from nestling.generation import load_state, save_state
from slowly import examples
from streams import read

LEVELS = [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": 8, "lr": 0.2}, {"chunk_size": None}]

HYBRID = [{"mixer": "selfmod", "qkv_conv": 2, "erase_gate": True}, {"mixer": "window_attention", "window": 6}]


def hope(levels=LEVELS, mixer="attention", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    which = {"mixers": HYBRID} if mixer == "hybrid" else {"mixer": mixer}
    config = HopeConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        cms_levels=levels, **which, **changes)  # fmt: skip
    return HopeForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("mixer", ["attention", "selfmod"])
@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_without_a_rate_it_is_the_model_without_fast_levels_bit_for_bit(ids, mixer, variant):
    still = [dict(level, lr=0) if level["chunk_size"] else level for level in LEVELS]
    model = hope(still, mixer, torch.float32, cms_variant=variant)
    plain = hope([{"chunk_size": 4, "lr": 0.5}, LEVELS[1], LEVELS[2]], mixer, torch.float32, cms_variant=variant)
    plain.learning = False
    with torch.no_grad():
        want = plain(ids).logits
    assert torch.equal(read(model, ids)[0], want)
    plain.learning = True
    assert not torch.equal(read(plain, ids)[0], want)


@settings(max_examples=examples(12), deadline=None)
@given(
    cuts=st.lists(st.integers(1, 40), max_size=4, unique=True),
    mixer=st.sampled_from(["attention", "selfmod", "hybrid"]),
    variant=st.sampled_from(["sequential", "nested", "independent"]),
    optimizer=st.sampled_from(["gd", "momentum", "dgd"]),
)
def test_cuts_change_nothing(cuts, mixer, variant, optimizer):
    ids = torch.randint(31, (2, 41), generator=torch.Generator().manual_seed(1))
    levels = [dict(level, optimizer=optimizer) if level["chunk_size"] else level for level in LEVELS]
    model = hope(levels, mixer, cms_variant=variant)
    want, whole = read(model, ids)
    got, parts = read(model, ids, sorted(cuts))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert [s and s.updates for s in parts.levels.levels] == [10, 5, None]
    assert whole.nbytes == parts.nbytes == model.state_bytes(2)


def test_one_boundary_is_a_step_by_hand(ids):
    model = hope([{"chunk_size": 5, "lr": 0.5}, {"chunk_size": None}])
    one, plain = ids[:1, :9], copy.deepcopy(model)
    plain.learning = False
    blocks = [layer.memory.blocks[0] for layer in plain.model.layers]
    weights = [m.weight for block in blocks for m in (block.gate_proj, block.up_proj, block.down_proj)]
    loss = F.cross_entropy(plain(one[:, :5]).logits[0], one[0, 1:6])
    grads = torch.autograd.grad(loss, weights)
    got, _ = read(model, one)
    with torch.no_grad():
        first = plain(one[:, :5], use_cache=True)
        for weight, g in zip(weights, grads, strict=True):
            weight -= 0.5 * g
        second = plain(one[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(got, torch.cat([first.logits, second.logits], 1), rtol=1e-10, atol=1e-12)


def test_streams_do_not_mix(ids):
    model = hope(mixer="selfmod")
    both, _ = read(model, ids)
    other = ids.clone()
    other[1] = ids[1].flip(0)
    assert torch.equal(read(model, other)[0][0], both[0])


@pytest.mark.parametrize("meta_grad", ["full", "first_order", "none"])
@pytest.mark.parametrize("mixer", ["attention", "selfmod"])
def test_meta_gradients(ids, mixer, meta_grad):
    """Exact through the updates (finite differences), at the adapted weights, or none at all for initial states."""
    gentle = [dict(level, lr=0.1 * level["lr"]) if level["chunk_size"] else level for level in LEVELS]
    model, short = hope(gentle, mixer, cms_meta_grad=meta_grad), ids[:, :20]
    weight = model.model.layers[0].memory.blocks[0].up_proj.weight

    def outer():
        return F.cross_entropy(model(short).logits[:, :-1].flatten(0, 1), short[:, 1:].flatten())

    if meta_grad == "none":
        outer().backward()
        assert weight.grad is None and model.model.layers[0].memory.blocks[2].up_proj.weight.grad.any()
        assert model.model.embed_tokens.weight.grad.any()
        return
    (slope,) = torch.autograd.grad(outer(), weight)
    way, ends = torch.randn_like(weight), []
    with torch.no_grad():
        for shift in (1e-6, -2e-6):
            weight += shift * way
            ends.append(outer())
    difference = (ends[0] - ends[1]) / 2e-6
    exact = torch.isclose((slope * way).sum(), difference, rtol=1e-5)
    assert bool(exact) == (meta_grad == "full")


def test_every_initial_state_is_trained(ids):
    model = hope(mixer="selfmod")
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_training_from_scratch_teaches_levels_to_adapt():
    """On texts that repeat themselves, learning in the context lowers the loss of a model trained for it."""
    model = hope([{"chunk_size": 8, "lr": 0.3}, {"chunk_size": None}], dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(5)

    def batch():
        return torch.randint(31, (8, 8), generator=generator).repeat(1, 4)

    for _ in range(40):
        ids = batch()
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        ids = batch()
        learned = model(ids, labels=ids).loss
        model.learning = False
        assert learned < model(ids, labels=ids).loss - 0.05


@pytest.mark.parametrize("mixer", ["attention", "selfmod", "hybrid"])
def test_a_stream_from_disk_goes_on(ids, tmp_path, mixer):
    model = hope(mixer=mixer)
    want, _ = read(model, ids)
    _, cache = read(model, ids[:, :19])
    save_state(tmp_path / "a.state", cache, model)
    with torch.no_grad():
        got = model(ids[:, 19:], past_key_values=load_state(tmp_path / "a.state", model)).logits
    torch.testing.assert_close(got, want[:, 19:], rtol=1e-9, atol=1e-9)


def test_levels_as_long_as_a_context_do_not_learn_in_it(ids):
    model = hope(context_length=8)
    assert model.learner.fast == [0]
    model.set_context_length(4)
    assert model.learner.fast == [] and not model.reads
    assert hope([{"chunk_size": None}, {"chunk_size": 16}]).learner.fast == []  # after one the outer loop trains
    assert hope([{"chunk_size": 4, "lr": 0}, {"chunk_size": math.inf}]).learner.fast == []


def test_levels_learn_in_the_chosen_layers_only(ids):
    model = hope(cms_layers=[-1])
    assert model.learner.first == 1 and len(model.learner.modules[0]) == 3
    want, whole = read(model, ids)
    got, _ = read(model, ids, [7, 8, 30])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert whole.nbytes == model.state_bytes(2) < 0.51 * hope().state_bytes(2)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_save_and_load(ids, tmp_path):
    model = hope(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = HopeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(read(loaded, ids)[0], read(model, ids)[0])


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda m, ids: m(ids, attention_mask=ids * 0 + 2), "attention_mask holds 2"),
        (lambda m, ids: m(ids + 31), "vocabulary"),
        (lambda m, ids: m(inputs_embeds=torch.ones(1, 2, 16, dtype=torch.float64)), "no token's embedding"),
        (lambda m, ids: m(ids[:1], past_key_values=read(m, ids)[1]), "holds 2 streams"),
        (lambda m, ids: m(ids, past_key_values=read(hope(LEVELS[1:]), ids)[1]), "other levels"),
        (lambda m, ids: hope(cms_meta_grad="some"), "cms_meta_grad"),
        (lambda m, ids: hope(context_length=0), "context_length"),
        (lambda m, ids: hope(cms_layers=[2]), "cms_layers"),
    ],
)
def test_bad_input_is_named(ids, call, word):
    with pytest.raises(ValueError, match=word):
        call(hope(), ids)
