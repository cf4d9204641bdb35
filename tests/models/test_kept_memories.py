"""A Hope whose memory keeps what stretches wrote (`cache_every`): saved, decoded, carried, turned on after training."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import nestling
from nestling.generation.state import load_state, save_state
from nestling.models import HopeConfig, HopeForCausalLM
from nestling.models.hope.cache import cache_bytes
from nestling.training.levels import chunk_warnings

SIZES = dict(hidden_size=16, num_hidden_layers=2, vocab_size=40, num_attention_heads=2)
KEPT = {"chunk_size": 4, "window": 6, "cache_every": 4}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HopeForCausalLM(HopeConfig(**SIZES, mixer_options=KEPT)).double().eval()


@pytest.fixture
def ids():
    return torch.randint(40, (3, 23), generator=torch.Generator().manual_seed(1))


def test_an_option_of_the_default_hope(model):
    (memory,) = (m for m in model.modules() if hasattr(m, "log_cache_scale"))
    assert memory.config.cache_every == 4 and memory.cache_bias.shape == (2,)
    assert HopeConfig(**SIZES, mixer_options=KEPT).state_signature() != HopeConfig(**SIZES).state_signature()


@torch.no_grad()
def test_saved_and_loaded(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_decoding_with_the_cache_is_decoding_without(model, ids, beams):
    options = dict(max_new_tokens=9, do_sample=False, num_beams=beams, pad_token_id=0)
    options["attention_mask"] = torch.ones_like(ids)
    options["attention_mask"][1, :7] = 0
    with_cache, without = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)


@torch.no_grad()
def test_a_text_cut_anywhere_and_its_state_on_disk(model, ids, tmp_path):
    whole = model(ids).logits
    out = model(ids[:, :14], use_cache=True)
    save_state(tmp_path / "state", out.past_key_values, model)
    carried = load_state(tmp_path / "state", model)
    rest = model(ids[:, 14:], past_key_values=carried).logits
    torch.testing.assert_close(torch.cat([out.logits, rest], 1), whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_state_grows_by_a_memory_and_a_key_a_stretch(model, ids):
    sizes = [cache_bytes(model(ids[:, :n], use_cache=True).past_key_values) for n in (12, 16, 20)]
    heads, p = 2, 8
    one = ids.shape[0] * 8 * (heads * p * p + heads * p + 1)  # float64, and which stretch it is
    assert [b - a for a, b in zip(sizes, sizes[1:])] == [one, one]


@torch.no_grad()
def test_turned_on_after_training(ids, tmp_path):
    """Checkpoints from without it load, its gate at its beginning, and inside the first stretch nothing is changed."""
    torch.manual_seed(0)
    options = {name: value for name, value in KEPT.items() if name != "cache_every"}
    plain = HopeForCausalLM(HopeConfig(**SIZES, mixer_options=options)).eval()
    plain.save_pretrained(tmp_path)
    on = HopeForCausalLM.from_pretrained(tmp_path, mixer_options=KEPT)
    (memory,) = (m for m in on.modules() if hasattr(m, "log_cache_scale"))
    torch.testing.assert_close(memory.log_cache_scale.exp(), torch.full((2,), memory.config.cache_scale))
    assert not memory.cache_bias.any()
    before, after = plain(ids).logits, on(ids).logits
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def test_described_in_the_nested_system(model):
    text = str(nestling.levels(model))
    assert "kept memories" in text


@pytest.mark.parametrize(("window", "warned"), [(4, True), (5, False)])
def test_training_in_which_nothing_is_kept_is_warned_of(model, window, warned):
    assert any("smaller cache_every" in said for said in chunk_warnings(model, window)) is warned
