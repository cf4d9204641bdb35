"""Levels learn in float32: under autocast, and from weights held in a smaller type."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestling.cms.learner import META_GRADS
from nestling.layers.mixers import MIXERS
from slowly import ASKED

LEVELS = [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": None}]
FAST = [Level(4, lr=0.5), Level(8, lr=0.2)]
LOW = [torch.bfloat16, torch.float16]


@pytest.fixture
def ids():
    return torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))


def hope(mixer="selfmod", **changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, cms_levels=LEVELS)
    return HopeForCausalLM(HopeConfig(mixer=mixer, **(sizes | changes)))


def stacked(placement="depth", meta_grad="full", levels=None, **options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = stack_levels(LlamaForCausalLM(LlamaConfig(**sizes)), levels or FAST, placement, **options)
    model.learner.meta_grad = meta_grad
    return model


def results(model, ids, low=None, inside=False):
    """Loss, logits and all gradients as one vector; `inside`: the backward pass is under autocast too."""
    model.zero_grad()
    with torch.autocast("cpu", low) if low else nullcontext():
        out = model(ids, labels=ids, use_cache=False)
        if inside:
            out.loss.backward()
    if not inside:
        out.loss.backward()
    found = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return out.loss.detach().double(), out.logits.detach().double(), torch.cat(found)


def gaps(got, want):
    return [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_autocast_gives_what_float32_gives(ids, form, mixer):
    """Gradients too: a training step under autocast goes where float32's goes."""
    for meta_grad in META_GRADS if ASKED or mixer == "selfmod" else ("full",):
        model = hope(mixer, cms_meta_grad=meta_grad)
        want = results(model, ids)
        for low in LOW if meta_grad == "full" and (ASKED or mixer in ("selfmod", "attention")) else LOW[:1]:
            loss, logits, gradients = gaps(results(model, ids, low), want)
            assert loss <= 1e-5 and logits <= 1e-4 and gradients <= 1e-3, (meta_grad, low, loss, logits, gradients)


@pytest.mark.parametrize("placement", ["depth", "width"])
def test_autocast_of_a_stacked_model(ids, placement):
    for meta_grad in META_GRADS:
        model = stacked(placement, meta_grad)
        want = results(model, ids)
        for low in LOW:
            assert max(gaps(results(model, ids, low), want)) <= 1e-5, (meta_grad, low)


def test_blocks_below_all_levels_keep_autocasts_rounding_and_no_more(ids):
    """Learning does not enlarge it: the plain model under autocast is as far off."""
    model = stacked(blocks=[-1], levels=[Level(4, lr=0.5)])
    errors = []
    for model.learning in (True, False):
        want = results(model, ids)
        errors.append(gaps(results(model, ids, torch.bfloat16), want))
    learned, plain = errors
    assert plain[1] > 1e-4 and all(a <= 2 * b for a, b in zip(learned[1:], plain[1:], strict=True)), errors


@pytest.mark.parametrize("mixer", ["selfmod", "gated_deltanet", "attention"])
def test_a_backward_pass_inside_autocast(ids, form, mixer):
    """Not what torch advises, but nobody's error: with levels and without."""
    for model in (hope(mixer), hope(mixer, cms_levels=None)):
        want = results(model, ids)
        assert max(gaps(results(model, ids, torch.bfloat16, inside=True), want)) <= 5e-2


def stacked_kinds():
    yield "depth", lambda meta_grad: stacked("depth", meta_grad)
    yield "width", lambda meta_grad: stacked("width", meta_grad)
    yield "last block", lambda meta_grad: stacked(meta_grad=meta_grad, blocks=[-1], levels=[Level(4, lr=0.5)])


HELD = dict(stacked_kinds()) | {
    mixer: lambda meta_grad, mixer=mixer: hope(mixer, cms_meta_grad=meta_grad)
    for mixer in ("selfmod", "gated_deltanet_conv", "attention", "window_attention")
}


@pytest.mark.parametrize("kind", HELD)
def test_weights_held_in_low_precision_learn_as_float32_ones_of_the_same_values(ids, form, kind):
    """Bit for bit forwards; gradients are rounded once, when they reach the weights."""
    for meta_grad in META_GRADS if ASKED or kind in ("selfmod", "depth") else ("full",):
        for low in LOW[:1] if meta_grad == "none" else LOW:
            held = HELD[kind](meta_grad).to(low)
            want, got = results(copy.deepcopy(held).float(), ids), results(held, ids)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
            assert gaps(got, want)[2] <= 4e-3, (meta_grad, low)
            assert {p.grad.dtype for p in held.parameters() if p.grad is not None} == {low}


def test_weights_of_two_types_padding_and_recomputing(ids):
    model, mask = hope("attention", num_hidden_layers=2), torch.ones_like(ids)
    model.lm_head.bfloat16()
    mask[0, :3] = 0
    wide = copy.deepcopy(model).float()
    for changed in (model, wide):
        changed.train().activation_checkpointing_enable()
    with torch.no_grad():
        assert torch.equal(*(m(ids, attention_mask=mask).logits for m in (model, wide)))
    want = results(wide, ids)
    for low in (None, torch.bfloat16):
        assert max(gaps(results(model, ids, low), want)) <= 4e-3


def test_nothing_is_written_to_a_model_that_is_held_in_low_precision(ids):
    """Also where its calls are accelerate's: it computes in its own type then."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = stacked().bfloat16()
    before = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.float32
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is t and torch.equal(t, kept) for name, (t, kept) in before.items())
    add_hook_to_module(model.lm_head, ModelHook())
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
