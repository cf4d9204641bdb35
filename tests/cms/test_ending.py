import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from nestling import Level
from nestling.cms import stack_levels
from nestling.generation import load_state, save_state

RULES = {
    "gd": Level(8, lr=0.3, clip=0.5),
    "dgd": Level(8, lr=0.2, optimizer="dgd"),
    "adamw": Level(8, lr=0.01, optimizer="adamw"),
    "spectral": Level(8, lr=0.05, optimizer="spectral", rank=4, decay=0.02),
}


@torch.no_grad()
def read(model, ids, cache=None, **call):
    return model(ids, past_key_values=cache, use_cache=True, **call)


def deltas(cache, level=0):
    return cache.levels.levels[level].deltas


@pytest.mark.parametrize("rule", RULES)
def test_an_open_chunk_is_learned_as_a_shorter_one(make, ids, rule):
    """Of 5 of 8 tokens: what a level of chunk 5 learns, at 5/8 of the step."""
    level = RULES[rule]
    model, like = (stack_levels(make(), [each]) for each in (level, level.part(5 / 8)))
    cache = read(model, ids[:, :5]).past_key_values
    assert cache.nbytes == 0  # nothing was learned yet
    model.finish(cache, ids[:, 5:6])
    like.learner.levels = (Level.from_dict(level.part(5 / 8).to_dict() | {"chunk_size": 5}),)
    wanted = read(like, ids[:, :5], next_tokens=ids[:, 5:6]).past_key_values
    assert cache.nbytes == model.state_bytes(2)
    for ours, theirs in zip(deltas(cache), deltas(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert ours.abs().max() > 0


def test_without_what_follows_the_last_token_is_a_target_alone(make, ids):
    model = stack_levels(make(), [RULES["gd"]])
    known, alone, single = (read(model, ids[:, :count]).past_key_values for count in (4, 5, 1))
    model.finish(known, ids[:, 4:5])
    model.finish(alone)
    for ours, theirs in zip(deltas(alone), deltas(known), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    model.finish(single)
    assert single.levels.tokens.shape[1] == 1 and single.nbytes == 0


def test_reading_goes_on_in_the_same_context_with_a_new_chunk(make, ids, tmp_path):
    levels = [Level(8, lr=0.3), Level(16, lr=0.2, optimizer="momentum")]
    model = stack_levels(make(), levels)
    cache = read(model, ids[:, :13]).past_key_values
    model.finish(cache, ids[:, 13:14])
    assert (cache.levels.position, cache.tokens_read(2), cache.get_seq_length()) == (16, [13, 13], 13)
    assert [s.updates for s in cache.levels.levels] == [2, 1]  # the slow one too: its chunk is over
    save_state(tmp_path / "state", cache, model)
    kept = cache.fork()
    out = read(model, ids[:, 13:22], cache)
    assert [s.updates for s in cache.levels.levels] == [3, 1]
    again = read(model, ids[:, 13:22], load_state(tmp_path / "state", model))
    assert torch.equal(out.logits, again.logits)
    # what follows sees all 13 tokens before it, by what was learned up to there
    with model.adapted(kept):
        following = model(
            ids[:, 13:14], past_key_values=DynamicCache([(x.keys, x.values) for x in kept.layers]), use_cache=True
        ).logits
    torch.testing.assert_close(out.logits[:, :1], following, rtol=1e-9, atol=1e-12)


def test_rows_at_different_places_each_end_their_own_chunk(make, ids):
    model = stack_levels(make(), [RULES["gd"]])
    mask = torch.ones_like(ids[:, :13])
    mask[0, :3] = 0
    both = read(model, ids[:, :13], attention_mask=mask).past_key_values
    model.finish(both, ids[:, 13:14])
    for row, start in ((0, 3), (1, 0)):
        alone = read(model, ids[row : row + 1, start:13]).past_key_values
        model.finish(alone, ids[row : row + 1, 13:14])
        for ours, theirs in zip(deltas(both.taken([row])), deltas(alone), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_an_outer_loss_reaches_the_weights_through_it(make, ids):
    model = stack_levels(make(), [Level(8, lr=0.3)], meta_grad="full")
    cache = model(ids[:, :5], use_cache=True).past_key_values
    model.finish(cache, ids[:, 5:6])
    with model.adapted(cache):
        loss = F.cross_entropy(model(ids[:, 6:12]).logits.flatten(0, 1), ids[:, 7:13].flatten())
    through = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
    cache.levels = cache.levels.map(torch.Tensor.detach)
    with model.adapted(cache):
        loss = F.cross_entropy(model(ids[:, 6:12]).logits.flatten(0, 1), ids[:, 7:13].flatten())
    assert not torch.allclose(through, torch.autograd.grad(loss, model.model.embed_tokens.weight)[0])


def test_inference_mode_and_wrong_tokens(make, ids):
    model = stack_levels(make(), [RULES["gd"]])
    with torch.inference_mode():
        cache = model(ids[:, :5].clone(), use_cache=True).past_key_values
        model.finish(cache)
    assert cache.levels.levels[0].updates == 1
    with pytest.raises(ValueError, match="next_tokens must be"):
        model.finish(cache, ids[:1, :1])
    with pytest.raises(ValueError, match="next_tokens"):
        model.finish(cache, torch.full((2, 1), 99))
