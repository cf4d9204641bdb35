"""Every keyword of a forward has its effect or is refused by name: stacked models and Hope, learning and not."""

import inspect

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.utils import TransformersKwargs

from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels

KINDS = ("stacked", "stacked, off", "hope", "hope with levels", "hope with levels, off")
SIZES = [9, 1, 11]


def build(kind, make):
    torch.manual_seed(0)
    if kind.startswith("stacked"):
        model = stack_levels(make(num_hidden_layers=2), [Level(4, lr=0.5), Level(8, lr=0.25)])
    else:
        levels = [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": None}] if "levels" in kind else None
        sizes = dict(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        config = HopeConfig(**sizes, cms_levels=levels, mixer="attention" if levels else "selfmod")
        model = HopeForCausalLM(config).double().eval()
    model.learning = "off" not in kind
    return model


@pytest.fixture(params=KINDS)
def model(request, make):
    return build(request.param, make)


@pytest.fixture
def ids():
    return torch.randint(31, (2, 21), generator=torch.Generator().manual_seed(3))


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def refused(model, ids, word, error=ValueError, **given):
    with pytest.raises(error, match=word):
        model(ids, **given)


def input_ids(model, ids):
    for dtype in (torch.int32, torch.uint8):
        same(model(ids.to(dtype), labels=ids.to(dtype)).loss, model(ids, labels=ids).loss)
    for wrong in (31, 70, -1):
        bad = ids.clone()
        bad[1, 3] = wrong
        refused(model, bad, rf"input_ids has the id {wrong}, but the vocabulary has 31")
        refused(model, ids, rf"labels has the id {wrong}, but the vocabulary has 31", labels=bad)
    refused(model, ids.double(), "whole numbers")


def attention_mask(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for given in (mask, mask.bool(), mask.double(), torch.where(mask.bool(), 0.0, -torch.inf), (mask - 1) * 1e9):
        got = model(ids, attention_mask=given).logits
        same(got[1, 6:], model(ids[1:, 6:]).logits[0])
        same(got[0], model(ids[:1]).logits[0])
    for wrong in (mask[:, 1:], mask[:1], mask * 3, mask * 0.0, mask * 0.5):
        refused(model, ids, "attention_mask", attention_mask=wrong)
    if model.reads or isinstance(model, HopeForCausalLM):
        refused(model, ids, "attention_mask", attention_mask=torch.ones(2, 1, 21, 21))


def packed(model, ids, **given):
    got = model(ids, **given).logits
    same(got, torch.cat([model(text).logits for text in ids.split(SIZES, 1)], 1))


POSITIONS = torch.cat([torch.arange(n) for n in SIZES])[None]
ENDS = torch.tensor([0, 9, 10, 21])


def position_ids(model, ids):
    packed(model, ids, position_ids=POSITIONS)
    packed(model, ids, position_ids=POSITIONS, attention_mask=torch.ones_like(ids))
    if model.reads or isinstance(model, HopeForCausalLM):  # else they turn the rotary embedding, as in the original
        refused(model, ids, "position_ids", position_ids=torch.arange(21)[None] * 2)
        refused(model, ids, "position_ids", position_ids=torch.arange(21)[None] + 3)
    refused(model, ids, "position_ids", position_ids=torch.arange(20)[None])


def cu_seq_lens(model, ids):
    packed(model, ids[:1], cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS, max_length_q=11, max_length_k=11)
    packed(model, ids[:1], cu_seq_lens_q=ENDS, position_ids=POSITIONS)
    refused(model, ids, "cu_seq_lens_q", cu_seq_lens_q=ENDS)
    refused(model, ids[:1], "cu_seq_lens_k", cu_seq_lens_k=ENDS + 1)
    refused(model, ids, "cu_seq_lens_q must say", max_length_q=11)


def seq_idx(model, ids):
    packed(model, ids, seq_idx=(POSITIONS == 0).cumsum(1).int().expand(2, -1))


def past_key_values(model, ids):
    cache = model(ids[:, :10], use_cache=True).past_key_values
    same(model(ids[:, 10:], past_key_values=cache).logits, model(ids).logits[:, 10:])
    with pytest.raises((TypeError, ValueError, AttributeError)):
        model(ids, past_key_values=((ids, ids),))


def inputs_embeds(model, ids):
    embeds = model.get_input_embeddings()(ids)
    same(model(inputs_embeds=embeds).logits, model(ids).logits)
    first = model(inputs_embeds=embeds[:, :11], use_cache=True)
    same(model(inputs_embeds=embeds[:, 11:], past_key_values=first.past_key_values).logits, model(ids).logits[:, 11:])
    refused(model, ids, "input", inputs_embeds=embeds)
    other, mask = embeds.detach().clone(), torch.ones_like(ids)
    other[1, 2] += 1e-3
    if model.reads:
        refused(model, None, "no token's embedding in row 1, column 2", inputs_embeds=other)
        refused(model, None, "inputs_embeds must be", inputs_embeds=other[..., 1:])
        mask[1, 2] = 0  # padding is not read
        want = model(ids, attention_mask=mask).logits
        same(model(inputs_embeds=other, attention_mask=mask).logits, want)


def labels(model, ids):
    some = ids.clone()
    some[0, :5] = -100
    want = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), some[:, 1:].flatten())
    same(model(ids, labels=some).loss, want)
    same(model(ids, labels=some.int()).loss, want)
    refused(model, ids, "labels", labels=ids[:, 1:])


def shift_labels(model, ids):
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    want = model(ids, labels=ids).loss
    same(model(ids, shift_labels=shifted).loss, want)
    same(model(ids, labels=ids.flip(1), shift_labels=shifted).loss, want)
    refused(model, ids, "shift_labels", shift_labels=shifted[:, 1:])


def num_items_in_batch(model, ids):
    for n in (392, torch.tensor(392)):
        same(model(ids, labels=ids, num_items_in_batch=n).loss, model(ids, labels=ids).loss * 40 / 392)
    assert model(ids, num_items_in_batch=392).loss is None  # as a trainer calls that takes the loss itself


def ignore_index(model, ids):
    some = ids.clone()
    some[ids == 7] = -100
    same(model(ids, labels=ids, ignore_index=7).loss, model(ids, labels=some).loss)


def use_cache(model, ids):
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 21
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None


def logits_to_keep(model, ids):
    whole, some = model(ids).logits, torch.tensor([2, 7])
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for keep, want in ((3, whole[:, -3:]), (0, whole), (99, whole), (some, whole[:, some])):
        same(model(ids, logits_to_keep=keep).logits, want)
    same(model(ids, attention_mask=mask, logits_to_keep=3).logits, model(ids, attention_mask=mask).logits[:, -3:])
    if model.reads or isinstance(model, HopeForCausalLM):
        out = model(ids, logits_to_keep=3, labels=ids)
        same(out.loss, model(ids, labels=ids).loss)
        same(out.logits, whole[:, -3:])


def output_hidden_states(model, ids):
    whole, mask = model(ids, output_hidden_states=True), torch.ones_like(ids)
    assert len(whole.hidden_states) == len(model.model.layers) + 1
    same(whole.logits, model(ids).logits)
    same(whole.hidden_states[0], model.model.embed_tokens(ids))
    same(model.lm_head(whole.hidden_states[-1]), whole.logits)
    some = model(ids, output_hidden_states=[0, -1]).hidden_states
    for n, (got, want) in enumerate(zip(some, whole.hidden_states, strict=True)):
        same(got, want) if n in (0, len(some) - 1) else None
        assert (got is None) == (n not in (0, len(some) - 1))
    mask[1, :6] = 0
    padded = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for got, want in zip(padded, model(ids[1:, 6:], output_hidden_states=True).hidden_states, strict=True):
        same(got[1, 6:], want[0])
    half = model(ids[:, :10], output_hidden_states=True)
    rest = model(ids[:, 10:], past_key_values=half.past_key_values, output_hidden_states=True)
    for got in zip(half.hidden_states, rest.hidden_states, whole.hidden_states, strict=True):
        same(torch.cat(got[:2], 1), got[2])
    if model.reads:
        refused(model, ids, "output_hidden_states names 9", output_hidden_states=[9])
        model.learning = False
        before = model(ids[:, :4], output_hidden_states=True).hidden_states
        model.learning = True
        for got, want in zip(whole.hidden_states, before):  # the first chunk is read with the weights as they are
            same(got[:, :4], want)
        with torch.enable_grad():
            traced = model(ids, labels=ids, output_hidden_states=True)
            traced.hidden_states[0].retain_grad()
            traced.loss.backward()
        assert traced.hidden_states[0].grad.abs().sum() > 0


def output_attentions(model, ids):
    if isinstance(model, HopeForCausalLM):
        return refused(model, ids, "output_attentions", output_attentions=True)
    got = model(ids, output_attentions=True, output_hidden_states=True)
    same(got.logits, model(ids).logits)  # the one kernel and the other
    assert [m.shape for m in got.attentions] == [(2, 2, 21, 21)] * 2 and len(got.hidden_states) == 3
    for m in got.attentions:
        same(m.sum(-1), torch.ones_like(m[..., 0]))
        assert not m.triu(1).any()
    first = model(ids[:, :10], use_cache=True, output_attentions=True)
    rest = model(ids[:, 10:], past_key_values=first.past_key_values, output_attentions=True)
    for whole, one, two in zip(got.attentions, first.attentions, rest.attentions):
        same(whole[:, :, :10, :10], one)
        same(whole[:, :, 10:], two)
    reads, model.learning = model.reads, False
    plain = model(ids, output_attentions=True).attentions
    if reads:  # the first block of a level sees what earlier chunks changed
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        model.learning = True
        refused(model, ids, "output_attentions is of rows", attention_mask=mask, output_attentions=True)
        model.learning = False
    same(got.attentions[0][:, :, :4], plain[0][:, :, :4])
    model.set_attn_implementation("eager")
    for m, want in zip(plain, model(ids, output_attentions=True).attentions):
        same(m, want)
    model.learning = True


def return_dict(model, ids):
    logits, *_ = model(ids, return_dict=False)
    same(logits, model(ids).logits)


def misspelt(model, ids):
    for name in ("lables", "attention_msk", "positions_ids", "use_cach", "num_item_in_batch"):
        refused(model, ids, f"{name}.*did you mean", TypeError, **{name: 1})


def others(model, ids):
    if model.reads or isinstance(model, HopeForCausalLM):  # else they are the original's
        for name in ("unheard_of", "is_causal", "output_router_logits"):
            refused(model, ids, name, TypeError, **{name: False})


CHECKS = [
    input_ids, attention_mask, position_ids, cu_seq_lens, seq_idx, past_key_values, inputs_embeds, labels, shift_labels,
    num_items_in_batch, ignore_index, use_cache, logits_to_keep, output_hidden_states, output_attentions, return_dict,
    misspelt, others,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_every_keyword_has_its_effect_or_is_refused(model, ids, check):
    check(model, ids)


def test_no_keyword_of_the_original_is_left_out():
    named = {*inspect.signature(LlamaForCausalLM.forward).parameters, *TransformersKwargs.__annotations__}
    checked = "\n".join(inspect.getsource(check) for check in CHECKS)
    assert not [name for name in named - {"self", "kwargs"} if name not in checked]
