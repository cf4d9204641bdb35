"""Hope's forward: the cache is the state, padding is nothing, and with plain settings it is Llama."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from nestling.models import HopeConfig, HopeForCausalLM, HopeModel
from nestling.models.hope.cache import HopeCacheLayer, cache_bytes, detach_cache
from slowly import examples

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def test_registered_with_the_auto_classes(make_config):
    config = make_config()
    assert isinstance(AutoConfig.for_model("hope"), HopeConfig)
    assert isinstance(AutoModel.from_config(config), HopeModel)
    assert isinstance(AutoModelForCausalLM.from_config(config), HopeForCausalLM)


def test_plain_attention_with_one_level_is_llama():
    """An independent definition of the whole: the weights of a Llama give its logits."""
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
        )
    ).double()
    hope = HopeForCausalLM(
        HopeConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            mixer="attention",
            mixer_options={"num_kv_heads": 2, "conv_size": 0, "output_gate": False},
            tie_word_embeddings=False,
        )
    ).double()
    names = {
        "self_attn.o_proj": "mixer.out_proj",
        "self_attn.": "mixer.",
        "post_attention_layernorm": "memory.blocks.0.norm",
        "input_layernorm": "norm",
        "mlp.": "memory.blocks.0.",
    }
    weights = {}
    for name, weight in llama.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = weight
    hope.load_state_dict(weights)
    ids = torch.randint(0, 40, (2, 11))
    with torch.no_grad():  # Llama computes its norms and angles in float32
        torch.testing.assert_close(hope(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-6)


@settings(max_examples=examples(8))
@given(data=st.data())
@torch.no_grad()
def test_a_text_in_pieces_is_one_pass(mixer_models, data):
    mixer = data.draw(st.sampled_from(sorted(mixer_models)))
    model, tokens = mixer_models[mixer], data.draw(st.integers(2, 19))
    ids = torch.randint(0, 40, (2, tokens))
    whole = model(ids).logits
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1), max_size=4)) | {tokens})
    cache, start, pieces = None, 0, []
    for cut in cuts:
        out = model(ids[:, start:cut], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, cut
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)
    assert cache.get_seq_length() == tokens


@torch.no_grad()
def test_left_padding_writes_nothing(model):
    """A batch of texts of unequal length: each text's logits and state as if it were alone."""
    lengths, tokens = [3, 11, 6], 11
    ids = torch.randint(0, 40, (3, tokens))
    mask = torch.stack([torch.arange(tokens) >= tokens - n for n in lengths])
    more = torch.randint(0, 40, (3, 4))
    batch = model(ids, attention_mask=mask.long(), use_cache=True)
    after = model(more, past_key_values=batch.past_key_values).logits
    for row, n in enumerate(lengths):
        alone = model(ids[row : row + 1, -n:], use_cache=True)
        torch.testing.assert_close(batch.logits[row, -n:], alone.logits[0], **CLOSE)
        next_ = model(more[row : row + 1], past_key_values=alone.past_key_values).logits
        torch.testing.assert_close(after[row], next_[0], **CLOSE)


@torch.no_grad()
def test_padding_fed_token_by_token_writes_nothing(model):
    """Also where a single token is padding, and the mask covers the whole history."""
    ids, mask = torch.randint(0, 40, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, :4] = 0
    cache, logits = None, []
    for t in range(7):
        out = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    alone = model(ids[1:, 4:]).logits[0]
    torch.testing.assert_close(torch.cat(logits, 1)[1, 4:], alone, **CLOSE)


@torch.no_grad()
def test_other_sequences_of_the_batch_do_not_matter(model):
    ids = torch.randint(0, 40, (3, 9))
    together = model(ids).logits
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], model(ids[row : row + 1]).logits, **CLOSE)


@torch.no_grad()
def test_cache_is_a_value_per_sequence(model):
    """Selecting, repeating and resetting the cache's sequences is doing so with the texts."""
    ids, more = torch.randint(0, 40, (3, 6)), torch.randint(0, 40, (1, 5))

    def cache():
        return model(ids, use_cache=True).past_key_values

    def follow(cache, rows):
        return model(more.expand(rows, -1), past_key_values=cache).logits

    expected = follow(cache(), 3)
    chosen = cache()
    chosen.batch_select_indices(torch.tensor([2, 0]))
    torch.testing.assert_close(follow(chosen, 2), expected[[2, 0]], **CLOSE)
    repeated = cache()
    repeated.batch_repeat_interleave(2)
    torch.testing.assert_close(follow(repeated, 6), expected.repeat_interleave(2, 0), **CLOSE)
    reordered = cache()
    reordered.reorder_cache(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(follow(reordered, 3), expected[[1, 1, 0]], **CLOSE)
    fresh = cache()
    fresh.reset()
    assert fresh.get_seq_length() == 0
    torch.testing.assert_close(follow(fresh, 1), model(more).logits, **CLOSE)


@torch.no_grad()
def test_an_earlier_state_is_not_written_into(model):
    out = model(torch.randint(0, 40, (2, 6)), use_cache=True)
    states = [layer.state for layer in out.past_key_values.layers]
    kept = [leaf.clone() for leaf in tree_leaves(states)]
    model(torch.randint(0, 40, (2, 9)), past_key_values=out.past_key_values)
    assert all(torch.equal(a, b) for a, b in zip(kept, tree_leaves(states)))
    assert all(leaf.shape[0] == 2 for leaf in kept)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["selfmod", "deltanet", "window", "hybrid"])
def test_state_does_not_grow_with_the_text(make_model, mixer):
    model = make_model(mixer)
    short = model(torch.randint(0, 40, (1, 8)), use_cache=True).past_key_values
    long = model(torch.randint(0, 40, (1, 64)), use_cache=True).past_key_values
    assert cache_bytes(short) == cache_bytes(long) > 0


@torch.no_grad()
def test_an_empty_dynamic_cache_is_filled(model):
    ids = torch.randint(0, 40, (1, 6))
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        assert model(ids, past_key_values=cache).past_key_values is cache
        assert all(isinstance(layer, HopeCacheLayer) for layer in cache.layers)
        assert cache.get_seq_length() == 6


def test_gradients_cross_the_cache_until_it_is_detached(model):
    ids = torch.randint(0, 40, (1, 10))
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    first = model(inputs_embeds=embeds[:, :6], use_cache=True)
    model(inputs_embeds=embeds[:, 6:], past_key_values=first.past_key_values).logits.sum().backward()
    assert embeds.grad[:, :6].abs().max() > 0
    embeds.grad = None
    first = model(inputs_embeds=embeds[:, :6], use_cache=True)
    model(inputs_embeds=embeds[:, 6:], past_key_values=detach_cache(first.past_key_values)).logits.sum().backward()
    assert embeds.grad[:, :6].abs().max() == 0


def test_every_parameter_gets_a_gradient(model):
    ids = torch.randint(0, 40, (2, 14))
    model.train()(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_loss_is_the_mean_next_token_loss(model):
    ids = torch.randint(0, 40, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].reshape(-1, 40), labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_logits_to_keep_hidden_states_and_tuples(model):
    ids = torch.randint(0, 40, (2, 9))
    whole = model(ids, output_hidden_states=True, use_cache=False)
    assert whole.past_key_values is None
    assert len(whole.hidden_states) == 3
    assert torch.equal(whole.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.lm_head(whole.hidden_states[-1]), whole.logits, **CLOSE)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:], **CLOSE)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole.logits[:, [1, 4]], **CLOSE)
    assert torch.equal(model(ids, return_dict=False, use_cache=False)[0], whole.logits)


def test_attention_compiles_in_one_graph(make_model):
    model, ids = make_model("attention"), torch.randint(0, 40, (2, 9))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids, labels=ids, use_cache=False).loss, model(ids, labels=ids, use_cache=False).loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model, reentrant):
    ids = torch.randint(0, 40, (2, 13))

    def gradients():
        model.zero_grad()
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        return out.loss.detach(), [p.grad.clone() for p in model.parameters()]

    model.train()
    loss, expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, found = gradients()
    assert torch.equal(loss, again)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_gradient_checkpointing_carries_the_state(model):
    """Segments of a long text: the state is an argument of the layer, which checkpointing does not drop."""
    ids = torch.randint(0, 40, (1, 12))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    whole = model(ids).logits
    first = model(ids[:, :7], use_cache=True)
    second = model(ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, **CLOSE)
    second.logits.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16(make_model, mixer, how):
    model, ids = make_model(mixer).float(), torch.randint(0, 40, (2, 12))
    exact = model(ids).logits
    if how == "weights":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values)
    found = torch.cat([first.logits, second.logits], 1).float()
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


@torch.no_grad()
def test_input_that_does_not_fit(make_model):
    model, ids = make_model("attention"), torch.randint(0, 40, (2, 5))
    cache = model(ids, use_cache=True).past_key_values
    before = cache.layers[0].state
    for call, error, says in [
        (lambda: model(torch.tensor([[3, 40]])), ValueError, "has the id 40"),
        (lambda: model(torch.tensor([[-1, 4]])), ValueError, "has the id -1"),
        (lambda: model(ids, labels=ids + 40), ValueError, "labels has the id"),
        (lambda: model(ids.float()), ValueError, "whole numbers"),
        (lambda: model(ids[0]), ValueError, "whole numbers"),
        (lambda: model(ids[:, :0]), ValueError, "input is empty"),
        (lambda: model(ids[:0]), ValueError, "input is empty"),
        (lambda: model(), ValueError, "exactly one"),
        (lambda: model(ids, inputs_embeds=torch.zeros(2, 5, 16)), ValueError, "exactly one"),
        (lambda: model(ids, attention_mask=torch.ones(2, 4)), ValueError, "attention_mask must be"),
        (lambda: model(ids, attention_mask=torch.ones(2, 1, 5, 5)), ValueError, "attention_mask says"),
        (lambda: model(ids, position_ids=torch.tensor([[0, 1, 2, 4, 5]] * 2)), ValueError, "row of its own"),
        (lambda: model(ids[:1], past_key_values=cache), ValueError, "holds 2 sequences"),
        (lambda: model(ids, past_key_values=((ids, ids),)), TypeError, "transformers Cache"),
        (lambda: make_model("window")(ids, past_key_values=cache), ValueError, "another configuration"),
        (lambda: make_model(num_hidden_layers=3)(ids, past_key_values=cache), ValueError, "2 layers"),
        (lambda: model.float()(ids, past_key_values=cache), ValueError, "float64"),
        (lambda: model(ids, atention_mask=torch.ones(2, 5)), TypeError, "did you mean attention_mask"),
        (lambda: model(ids, output_attentions=True), ValueError, "no attention maps"),
        (lambda: cache.crop(-1), ValueError, "cannot be cropped"),
        (lambda: cache.update(ids, ids, 0), TypeError, "store"),
    ]:
        with pytest.raises(error, match=says):
            call()
    assert cache.layers[0].state is before
    assert cache.get_seq_length() == 5
    foreign = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    with pytest.raises(ValueError, match="DynamicLayer"):
        model(ids, past_key_values=foreign)
    limited = make_model(max_position_embeddings=8)
    cache = limited(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="max_position_embeddings"):
        limited(ids, past_key_values=cache)
