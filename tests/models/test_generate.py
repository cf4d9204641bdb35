"""generate(): every way of decoding with the cache gives what the same way gives without."""

import pytest
import torch

from models.conftest import MIXERS
from slowly import some

NEW = 6  # from 11 tokens on: over the ends of two chunks of 4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def ids():
    return torch.randint(0, 40, (2, 11))


@pytest.fixture
def model(mixer, mixer_models):
    """One for all tests: generating changes nothing."""
    return mixer_models[mixer]


KNOWN = {}


def greedy(model, ids):
    """The definition: the whole text again for every token. Most tests ask for the same."""
    asked = model, ids.numpy().tobytes()
    if asked not in KNOWN:
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        KNOWN[asked] = ids
    return KNOWN[asked]


def generate(model, ids, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, pad_token_id=0, **options)


def test_greedy(model, ids):
    assert torch.equal(generate(model, ids), greedy(model, ids))


def test_sampling_draws_the_same_with_and_without_cache(model, ids):
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        draws.append(generate(model, ids, do_sample=True, top_k=20, temperature=1.5, use_cache=use_cache))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], greedy(model, ids))


def test_beams_take_their_state_along(model, ids):
    options = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}
    with_cache, without = (generate(model, ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)
    assert len(with_cache) == 4


def test_left_padded_prompts_continue_as_if_alone(model):
    lengths, tokens = [2, 9, 5], 9
    prompts = [torch.randint(0, 40, (1, n)) for n in lengths]
    batch = torch.cat([torch.nn.functional.pad(p, (tokens - p.shape[1], 0), value=7) for p in prompts])
    mask = torch.stack([torch.arange(tokens) >= tokens - n for n in lengths]).long()
    together = generate(model, batch, attention_mask=mask)[:, tokens:]
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row], greedy(model, prompt)[0, prompt.shape[1] :])


def test_continuation_from_a_returned_cache(model, ids):
    first = generate(model, ids, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == ids.shape[1] + NEW - 1
    longer = torch.cat([first.sequences, torch.randint(0, 40, (2, 5))], 1)
    again = generate(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(again, greedy(model, longer))


@some("mixer, chunk", [*((name, 3) for name in MIXERS), *(("hope", n) for n in (1, 4, 50))], MIXERS, (1, 3, 4, 50))
def test_prefill_in_chunks(mixer_models, ids, mixer, chunk):
    model = mixer_models[mixer]
    assert torch.equal(generate(model, ids, prefill_chunk_size=chunk), greedy(model, ids))


def test_prefill_in_chunks_of_a_padded_batch(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    whole = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=4), whole)
    assert torch.equal(whole[:1, 6:], greedy(model, ids[:1, 6:]))


def test_offloaded_cache(model, ids):
    assert torch.equal(generate(model, ids, cache_implementation="offloaded"), greedy(model, ids))


def test_embeddings_as_prompt(model, ids):
    embeds = model.get_input_embeddings()(ids)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(out, greedy(model, ids)[:, ids.shape[1] :])


def test_what_a_state_cannot_do_is_refused(make_model, ids):
    model = make_model("selfmod")
    with pytest.raises(ValueError, match="stateful"):
        generate(model, ids[:1], assistant_model=make_model("attention"))
    with pytest.raises(ValueError, match="stateful"):
        generate(model, ids[:1], prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="'static' cannot hold what HopeForCausalLM has read"):
        generate(model, ids, cache_implementation="static")
    assert generate(model, ids, cache_implementation="offloaded") is not None


def test_a_prompt_padded_on_the_right_is_refused_with_the_remedy(model, ids):
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="pad a prompt on its left"):
        generate(model, ids, attention_mask=mask)
