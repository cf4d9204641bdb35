"""Levels that learn in low precision: under autocast they are float32's, in bf16 weights they have bf16's rounding."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestling.cms.learner import META_GRADS
from nestling.layers.mixers import MIXERS

LEVELS = [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": None}]
LOW = [torch.bfloat16, torch.float16]


@pytest.fixture
def ids():
    return torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))


def hope(mixer="selfmod", **changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, cms_levels=LEVELS)
    return HopeForCausalLM(HopeConfig(mixer=mixer, **(sizes | changes)))


def stacked(placement="depth", meta_grad="full"):
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = stack_levels(LlamaForCausalLM(LlamaConfig(**sizes)), [Level(4, lr=0.5), Level(8, lr=0.2)], placement)
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
    for meta_grad in META_GRADS:
        model = hope(mixer, cms_meta_grad=meta_grad)
        want = results(model, ids)
        for low in LOW if meta_grad == "full" else LOW[:1]:
            loss, logits, gradients = gaps(results(model, ids, low), want)
            assert loss <= 1e-5 and logits <= 1e-4 and gradients <= 1e-3, (meta_grad, low, loss, logits, gradients)


@pytest.mark.parametrize("placement", ["depth", "width"])
def test_autocast_of_a_stacked_model(ids, placement):
    for meta_grad in META_GRADS:
        model = stacked(placement, meta_grad)
        want = results(model, ids)
        for low in LOW:  # blocks below all levels are autocast's: its rounding stays
            assert max(gaps(results(model, ids, low), want)) <= 5e-2, (meta_grad, low)


@pytest.mark.parametrize("mixer", ["selfmod", "gated_deltanet", "attention"])
def test_a_backward_pass_inside_autocast(ids, form, mixer):
    """Not what torch advises, but nobody's error: with levels and without."""
    for model in (hope(mixer), hope(mixer, cms_levels=None)):
        want = results(model, ids)
        assert max(gaps(results(model, ids, torch.bfloat16, inside=True), want)) <= 5e-2


@pytest.mark.parametrize("low", LOW)
def test_weights_held_in_low_precision(ids, form, low):
    """Their own rounding, no more enlarged than learning enlarges float32's (within a factor of 4)."""
    for meta_grad in META_GRADS:
        errors = []
        for learning in (True, False):
            held = hope("attention", cms_meta_grad=meta_grad).to(low)
            held.learning = learning
            want = results(copy.deepcopy(held).double(), ids)
            got, single = results(held, ids), results(copy.deepcopy(held).float(), ids)
            assert all(part.isfinite().all() for part in got)
            assert gaps(got, want)[0] <= 1e-2
            errors.append((gaps(got, want)[2], gaps(single, want)[2]))
        (learned, learned32), (plain, plain32) = errors
        assert learned <= 4 * plain * max(1.0, learned32 / plain32), (meta_grad, errors)


def test_a_stacked_model_held_in_bf16_learns(ids):
    model = stacked().bfloat16()
    loss, logits, gradients = results(model, ids)
    want = results(copy.deepcopy(model).float(), ids)
    assert gradients.isfinite().all() and gaps((loss, logits), want[:2])[0] <= 1e-2


def test_weights_of_two_types_keep_autocast(ids):
    model = hope("attention")
    model.lm_head.bfloat16()
    loss, _, gradients = results(model, ids, torch.bfloat16)
    assert loss.isfinite() and gradients.isfinite().all()
