"""Rows of a Hope without levels that learn: packed texts, padding, and what a mask may look like."""

import pytest
import torch
from torch.nn import functional as F

from nestling.layers.mixers import MIXERS
from nestling.models import HopeConfig, HopeForCausalLM, HopeModel

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SIZES = [5, 1, 9]


@pytest.fixture(params=MIXERS)
def every(request):
    """A tiny model of every mixer by its name."""
    torch.manual_seed(0)
    config = HopeConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                        mixer=request.param)  # fmt: skip
    return HopeForCausalLM(config).double().eval()


def positions():
    return torch.cat([torch.arange(n) for n in SIZES])[None]


def test_packed_rows_are_rows_of_their_own(every):
    """Memories, convolutions and attention begin anew at each text: values and gradients, for every mixer."""
    ids = torch.randint(0, 40, (2, 15))
    given = dict(position_ids=positions(), labels=ids.masked_fill(positions() == 0, -100), num_items_in_batch=1)
    out = every(ids, use_cache=True, **given)
    out.loss.backward()
    got = [p.grad for p in every.parameters()]
    every.zero_grad()
    ends = []
    for row in range(2):
        texts = ids[row : row + 1].split(SIZES, 1)
        alone = [every(text, labels=text, num_items_in_batch=1, use_cache=True) for text in texts]
        torch.testing.assert_close(out.logits[row], torch.cat([a.logits for a in alone], 1)[0], **CLOSE)
        sum(a.loss for a in alone if a.loss.isfinite()).backward()
        ends.append(alone[-1].past_key_values)
    for g, p in zip(got, every.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-6)  # the loss is taken in float32
    more = torch.randint(0, 40, (2, 6))
    with torch.no_grad():  # the state goes on with the last text
        after = every(more, past_key_values=out.past_key_values).logits
        for row, cache in enumerate(ends):
            torch.testing.assert_close(after[row], every(more[row : row + 1], past_key_values=cache).logits[0], **CLOSE)


@torch.no_grad()
def test_every_way_to_say_that_a_row_is_packed(model):
    ids, ends = torch.randint(0, 40, (1, 15)), torch.tensor([0, 5, 6, 15])
    want = model(ids, position_ids=positions(), output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(model.lm_head(want.hidden_states[-1]), want.logits, **CLOSE)
    for given in (
        dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=9, max_length_k=9),
        dict(cu_seq_lens_q=ends.int(), position_ids=torch.arange(15)[None]),
        dict(seq_idx=(positions() == 0).cumsum(1).int(), attention_mask=torch.ones_like(ids)),
    ):
        assert torch.equal(model(ids, **given).logits, want.logits)
    wide, places, mask = (F.pad(t, (2, 3)) for t in (ids, positions(), torch.ones_like(ids)))
    padded = model(wide, position_ids=places, attention_mask=mask).logits
    torch.testing.assert_close(padded[:, 2:17], want.logits, **CLOSE)
    model.train().activation_checkpointing_enable()
    with torch.enable_grad():
        torch.testing.assert_close(model(ids, position_ids=positions()).logits, want.logits, **CLOSE)


WRONG = [
    (dict(position_ids=positions() + 1), "position_ids must go on at 0"),
    (dict(position_ids=torch.arange(15)[None] * 2), "position_ids must go on by one.*row 0 has 2 at column 1"),
    (dict(position_ids=torch.arange(15)), "position_ids must be"),
    (dict(cu_seq_lens_q=torch.tensor([0, 5, 14])), "cu_seq_lens_q must rise from 0 to the 15"),
    (dict(cu_seq_lens_q=torch.tensor([0, 5, 15]), max_length_q=9), "max_length_q is 9"),
    (dict(cu_seq_lens_q=torch.tensor([0, 5, 15]), cu_seq_lens_k=torch.tensor([0, 6, 15])), "different columns"),
    (dict(cu_seq_lens_q=torch.tensor([0, 6, 15]), position_ids=positions()), "begin no text"),
    (dict(max_length_q=9), "cu_seq_lens_q must say"),
    (dict(seq_idx=torch.zeros(1, 14)), "seq_idx must be"),
]


@pytest.mark.parametrize("given, word", WRONG)
@torch.no_grad()
def test_packing_that_does_not_fit_is_refused(make_model, given, word):
    model, ids = make_model("attention"), torch.randint(0, 40, (1, 15))
    with pytest.raises(ValueError, match=word):
        model(ids, **given)


@torch.no_grad()
def test_positions_go_on_from_what_was_read(make_model):
    """At the tokens of the row, or at its columns with padding; anything else would have no effect."""
    ids, mask = torch.randint(0, 40, (2, 9)), torch.ones(2, 9)
    mask[1, :4] = 0
    for mixer in ("selfmod", "attention"):
        model = make_model(mixer)
        for start in ([[9], [5]], [[9], [9]]):
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
            model(ids, past_key_values=cache, position_ids=torch.tensor(start) + torch.arange(9))
        for wrong in (torch.arange(9)[None], torch.arange(9)[None] + 10):
            with pytest.raises(ValueError, match="position_ids must go on at 18"):
                model(ids, past_key_values=cache, position_ids=wrong)
        with pytest.raises(ValueError, match="packed rows begin with no past"):
            model(ids, past_key_values=cache, seq_idx=(torch.arange(9) > 3)[None].expand(2, -1))


@torch.no_grad()
def test_padding_has_an_output_of_its_own(every):
    """At real tokens it changes nothing; at padding the mixers add nothing, whatever else is in the batch."""
    ids, mask = torch.randint(0, 40, (2, 12)), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = mask[0, 9:] = False
    for others in (mask[1], ~mask[0], torch.zeros(12, dtype=torch.bool)):
        both = torch.stack([mask[0], others])
        got = every(ids, attention_mask=both).logits
        torch.testing.assert_close(got[0, 5:9], every(ids[:1, 5:9]).logits[0], **CLOSE)
        hidden = every.model.embed_tokens(ids)
        for layer in every.model.layers:
            hidden, _ = layer.memory(hidden)
        want = every.lm_head(every.model.norm(hidden))
        torch.testing.assert_close(got[~both], want[~both], **CLOSE)
    changed = ids.clone()
    changed[~mask] = (changed[~mask] + 1) % 40
    first, second = (every(text, attention_mask=mask).logits[mask] for text in (ids, changed))
    torch.testing.assert_close(second, first, **CLOSE)


LOW = torch.finfo(torch.float32).min


@torch.no_grad()
def test_masks_are_read_as_what_they_are(make_model):
    """1 and 0 of any type, or what is added to scores: 0 and -inf, -1e9, the lowest number."""
    model, ids = make_model("selfmod"), torch.randint(0, 40, (2, 9))
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :4] = False
    want = model(ids, attention_mask=real).logits
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(model(ids, attention_mask=real.to(dtype)).logits, want)
    for low in (-torch.inf, -1e9, -1e4, LOW):
        assert torch.equal(model(ids, attention_mask=torch.where(real, 0.0, low)).logits, want)
    for wrong, word in (
        (torch.zeros(2, 9), "nothing but zeros"),
        (torch.where(real, 0.0, -1.0), "attention_mask holds -1.0"),
        (torch.where(real, 0.5, 0.0), "attention_mask holds 0.5"),
        (torch.where(real, torch.nan, 0.0), "attention_mask holds nan"),
        (real.long() + 1, "attention_mask holds 2"),
        (real[:, None, None].expand(2, 1, 9, 9), "attention_mask says which columns are padding"),
        (torch.where(real[:, None, None].expand(2, 1, 9, 9), 0.0, LOW), "attention_mask says which columns"),
        (real[:, 1:], r"attention_mask must be \[B, T\]"),
        (real[:1], r"attention_mask must be \[B, T\]"),
    ):
        for reader in (model, model.model):
            with pytest.raises(ValueError, match=word):
                reader(ids, attention_mask=wrong)


def test_the_model_without_a_head_reads_packed_rows_too(make_model):
    model, ids = make_model("deltanet"), torch.randint(0, 40, (1, 15))
    assert isinstance(model.model, HopeModel)
    with torch.no_grad():
        got = model.model(ids, position_ids=positions()).last_hidden_state
        want = torch.cat([model.model(text).last_hidden_state for text in ids.split(SIZES, 1)], 1)
    torch.testing.assert_close(got, want, **CLOSE)
