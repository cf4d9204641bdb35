"""What a stream has learned as a thing: forked, rolled back, reset, merged, used without learning, kept small."""

import copy

import pytest
import torch

from nestling import Level, stack_levels
from nestling.cms import LevelsCache, merge
from nestling.generation import load_state, save_state

TWO = [Level(4, lr=0.5), Level(8, lr=0.25)]


@torch.no_grad()
def read(model, ids, cache=None):
    out = model(ids, past_key_values=cache, use_cache=True)
    return out.logits, out.past_key_values


def deltas(cache):
    return [d for s in cache.levels.levels if s is not None for d in s.deltas]


def test_rollback_goes_on_as_if_nothing_had_been_read_since(make, ids):
    model = stack_levels(make(), TWO)
    _, cache = read(model, ids[:, :11])
    cache.snapshot("first")
    want, _ = read(model, ids[:, 11:], cache.fork())
    read(model, ids[:, :9], cache)
    cache.snapshot("second")
    read(model, ids[:, :9], cache)
    cache.rollback()
    assert cache.levels.position == 20 and list(cache.snapshots) == ["first", "second"]
    cache.rollback("first")
    assert cache.levels.position == cache.get_seq_length() == 11 and list(cache.snapshots) == ["first"]
    assert torch.equal(read(model, ids[:, 11:], cache)[0], want)
    for wrong in (2, 0, "third"):
        with pytest.raises(ValueError, match="snapshot"):
            cache.rollback(wrong)


def test_a_snapshot_shares_what_has_not_changed(make, ids):
    model = stack_levels(make(), [Level(4, lr=0.5), Level(40, lr=0.25)])
    _, cache = read(model, ids[:, :10])
    cache.snapshot("a")
    read(model, ids[:, :10], cache)
    (fast, slow), (old_fast, old_slow) = cache.levels.levels, cache.snapshots["a"].levels.levels
    assert all(a is b for a, b in zip(slow.deltas, old_slow.deltas))
    assert not any(a is b for a, b in zip(fast.deltas, old_fast.deltas))


def test_reset_of_one_level_leaves_the_others(make, ids):
    model = stack_levels(make(), TWO)
    _, cache = read(model, ids)
    slow = cache.levels.levels[1]
    cache.reset([0])
    assert cache.levels.levels[0] is None and cache.levels.levels[1] is slow
    read(model, ids[:, :5], cache)
    assert cache.levels.levels[0].updates in (1, 2)
    with pytest.raises(ValueError, match="level 2"):
        cache.reset([2])
    cache.reset()
    assert cache.levels is None and cache.get_seq_length() == 0
    assert torch.equal(read(model, ids, cache)[0], read(model, ids)[0])


@pytest.mark.parametrize("placement", ["depth", "width"])
def test_adapted_is_the_model_it_has_become(make, ids, placement):
    """Any batch, padding and generation, with what one stream learned, and nothing learned any more."""
    model = stack_levels(make(), TWO, placement)
    original = copy.deepcopy(model)
    _, cache = read(model, ids[:1])
    before = copy.copy(cache.levels)
    with torch.no_grad(), model.adapted(cache):
        got = model(ids, attention_mask=torch.ones_like(ids)).logits
        model.generate(ids[:, :5], max_new_tokens=3, do_sample=False, pad_token_id=0)
        padded = model(torch.cat([ids[:, :3] * 0, ids], 1), attention_mask=torch.cat([ids[:, :3] * 0, ids * 0 + 1], 1))
    torch.testing.assert_close(padded.logits[:, 3:], got, rtol=1e-9, atol=1e-9)
    assert cache.levels == before and model.reads
    with torch.no_grad():
        for i in (0, 1):
            for module, d in zip(original.learner.modules[i], cache.levels.levels[i].deltas, strict=True):
                module.weight += d[0]
        original.learning = False
        torch.testing.assert_close(got, original(ids).logits, rtol=1e-10, atol=1e-11)
    both = read(model, ids)[1]
    with torch.no_grad(), model.adapted(both):
        two = model(ids).logits
    torch.testing.assert_close(two[0], got[0], rtol=1e-9, atol=1e-10)
    with model.adapted(both), pytest.raises(ValueError, match="2 streams were read"):
        model(ids[:1].repeat(3, 1))


def test_merge_writes_a_stream_into_the_shared_weights(make, ids):
    model = stack_levels(make(), TWO)
    _, cache = read(model, ids)
    with torch.no_grad(), model.adapted(cache):
        want = model(ids).logits[1]
    merge(model, cache, stream=1, levels=[0])
    assert cache.levels.levels[0] is None and cache.levels.levels[1] is not None
    with torch.no_grad(), model.adapted(cache):
        torch.testing.assert_close(model(ids).logits[1], want, rtol=1e-10, atol=1e-11)
    for wrong in (dict(stream=2), dict(levels=[5])):
        with pytest.raises(ValueError, match=r"stream 2|level 5"):
            merge(model, cache, **wrong)


def test_attention_begins_anew_at_every_context(make, ids):
    """Levels stay, keys go: equal to reading each context by itself with the levels of before."""
    model = stack_levels(make(), TWO, context=16)
    whole, cache = read(model, ids)
    assert cache.get_seq_length() == 41 and cache.layers[0].get_seq_length() == 9
    _, first = read(model, ids[:, :16])
    out, _ = read(model, ids[:, 16:20], first)
    torch.testing.assert_close(out, whole[:, 16:20], rtol=1e-9, atol=1e-10)
    plain = stack_levels(make(), TWO)
    _, other = read(plain, ids[:, :17])
    with torch.no_grad(), plain.adapted(other):
        torch.testing.assert_close(plain(ids[:, 16:20]).logits, out, rtol=1e-9, atol=1e-10)
    out = model.generate(ids[:, :11], max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(read(model, out)[0][:, 10:-1].argmax(-1), out[:, 11:])


def test_forget_context_keeps_what_levels_learned(make, ids):
    model = stack_levels(make(), TWO)
    _, cache = read(model, ids)
    kept = deltas(cache)
    cache.forget_context()
    assert all(a is b for a, b in zip(deltas(cache), kept)) and cache.layers[0].get_seq_length() == 0
    got, _ = read(model, ids[:, :3], cache.fork())
    with torch.no_grad(), model.adapted(cache):
        torch.testing.assert_close(got, model(ids[:, :3]).logits, rtol=1e-9, atol=1e-10)


def test_target_modules_choose_as_peft_does(make, ids):
    original = make()
    for wanted, count in ((["down_proj"], 2), (["mlp.up_proj", "o_proj"], 4), (r"self_attn\.[qk]_proj", 4)):
        model = stack_levels(copy.deepcopy(original), [Level(4, lr=0.5)], blocks=[-1, -2], target_modules=wanted)
        assert len(model.learner.modules[0]) == count
        assert read(model, ids)[1].nbytes == model.state_bytes(2)
    with pytest.raises(ValueError, match="names no linear layer"):
        stack_levels(original, [Level(4)], target_modules=["nothing"])


def test_independent_blocks_stand_side_by_side(make, ids):
    original = make(dtype=torch.float32)
    with torch.no_grad():
        want = original(ids[:, :4]).logits
    model = stack_levels(original, [Level(4, lr=0.5), Level(8, lr=0.25)], "width", width=3, variant="independent")
    assert torch.equal(read(model, ids[:, :4])[0], want)
    chain, x = model.model.layers[0].mlp, torch.randn(1, 2, 16)
    for block in chain.added:
        torch.nn.init.normal_(block.down_proj.weight)
    y = chain.mlp(x)
    torch.testing.assert_close(chain(x), y + sum(b.change(y) for b in chain.added))
    with pytest.raises(ValueError, match="side by side"):
        stack_levels(make(), TWO, variant="independent")


def test_one_bad_chunk_does_not_spoil_a_slower_level(make, ids):
    model = stack_levels(make(), TWO)
    with torch.no_grad():
        cache = model(ids[:, :5]).past_key_values
        for layer in cache.layers:
            layer.keys[0] = torch.nan  # while the second chunk is read
        cache = model(ids[:, 5:9], past_key_values=cache).past_key_values
    fast, slow = cache.levels.levels
    assert fast.refused.tolist() == [1, 0] and slow.refused.tolist() == [1, 0]
    assert slow.updates == 1 and all(d.isfinite().all() and d[0].any() for d in slow.deltas)


@pytest.mark.parametrize("optimizer", ["gd", "m3", "dgd", "adamw"])
def test_bfloat16_weights_learn_in_float32(make, ids, optimizer):
    model = stack_levels(make(dtype=torch.bfloat16), [Level(4, lr=1e-3, optimizer=optimizer)])
    logits, cache = read(model, ids)
    assert logits.dtype == torch.float32 and all(d.dtype == torch.float32 and d.any() for d in deltas(cache))
    assert cache.nbytes == model.state_bytes(2) and bool(logits.isfinite().all())


def test_a_compact_file_holds_factors_where_they_are_smaller(make, ids, tmp_path):
    model = stack_levels(make(dtype=torch.float32, hidden_size=64, intermediate_size=96), [Level(4, lr=0.5)])
    _, cache = read(model, ids[:1, :9])  # two updates of four tokens: rank 8
    save_state(tmp_path / "dense", cache, model)
    save_state(tmp_path / "compact", cache, model, compact=True)
    dense, compact = ((tmp_path / n).stat().st_size for n in ("dense", "compact"))
    assert compact < 0.5 * dense
    loaded = load_state(tmp_path / "compact", model)
    for a, b in zip(deltas(loaded), deltas(cache), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(b.abs().max()))
    for a, b in zip(deltas(load_state(tmp_path / "dense", model)), deltas(cache), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda m, ids: stack_levels(m, [Level(None)]), "could ever be updated"),
        (lambda m, ids: stack_levels(m, TWO, context=6), "multiple of the fastest"),
        (lambda m, ids: stack_levels(m, [Level(8)], context=3), "or divide it"),
        (lambda m, ids: stack_levels(m, TWO, "width", width=0), "width must be"),
        (lambda m, ids: stack_levels(m, TWO, "width", target_modules=["up_proj"]), "target_modules"),
        (lambda m, ids: stack_levels(m, TWO, meta_grad="some"), "meta_grad"),
        (lambda m, ids: Level(4, surprise=1.5), "surprise"),
        (lambda m, ids: Level(4, signal="smell"), "signal"),
        (lambda m, ids: Level(4, erase=-1), "erase"),
        (lambda m, ids: stack_levels(copy.deepcopy(m), TWO)(ids, past_key_values=other(m, ids)), "other levels"),
    ],
)
def test_bad_input_is_named(make, ids, call, word):
    with pytest.raises(ValueError, match=word):
        call(make(), ids)


def other(model, ids):
    return read(stack_levels(copy.deepcopy(model), [Level(4, lr=0.5)]), ids)[1]


def test_a_cache_of_another_kind_is_refused(make, ids):
    model = stack_levels(make(), TWO)
    with pytest.raises(TypeError, match="past_key_values"):
        model(ids, past_key_values=[1])
    with pytest.raises(TypeError, match="expected the cache"), model.adapted({}):
        pass
    with model.adapted(LevelsCache()):  # nothing read: the model itself
        assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("optimizer", ["gd", "adamw"])
def test_recall_goes_on_from_here_with_what_was_known_then(make, ids, tmp_path, optimizer):
    model = stack_levels(make(), [Level(4, lr=0.5, optimizer=optimizer), Level(8, lr=0.25)])
    _, cache = read(model, ids[:, :8])
    cache.snapshot("first")
    then = deltas(cache)
    _, cache = read(model, ids[:, 8:30], cache)
    model.finish(cache)
    save_state(tmp_path / "a.state", cache, model)  # snapshots are in the file
    cache = load_state(tmp_path / "a.state", model)
    now, counts = cache.fork(), [s.updates for s in cache.levels.levels]
    cache.recall("first")
    assert all(torch.equal(a, b) for a, b in zip(deltas(cache), then, strict=True))
    assert [s.updates for s in cache.levels.levels] == counts and list(cache.snapshots) == ["first"]
    assert cache.levels.position == now.levels.position and torch.equal(cache.layers[0].keys, now.layers[0].keys)
    with model.adapted(cache), torch.no_grad():
        want = model(ids[:, :5]).logits
    with model.adapted(cache.snapshots["first"]), torch.no_grad():
        torch.testing.assert_close(model(ids[:, :5]).logits, want, rtol=0, atol=0)
    read(model, ids[:, 30:], cache)  # and learns on
    assert [s.updates for s in cache.levels.levels] > counts
    now.recall(None)
    assert not any(d.any() for d in deltas(now))
    with pytest.raises(ValueError, match="no snapshot 'other'; there are: 'first'"):
        now.recall("other")
    now.snapshots["one"] = now.snapshots["first"].taken([0])
    with pytest.raises(ValueError, match="the same streams"):
        now.recall("one")
