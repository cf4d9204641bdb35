"""Rows of a batch keep their own boundaries: what a row reads and learns is what it would alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestling.cms import LevelsCache, learning_model, merge
from nestling.cms.fast_linear import Factors
from nestling.generation import load_state, save_state
from slowly import examples, some

CLOSE = dict(rtol=1e-9, atol=1e-10)
HYBRID = [{"mixer": "selfmod", "chunk_size": 4}, {"mixer": "window_attention", "window": 6}]
KINDS = ("depth", "width", "low rank", "context", "selfmod", "nested hybrid")


def make_model(kind, original, **changes):
    """Levels with every rule that remembers something: momentum, adaptive clocks, contexts, levels that begin anew."""
    stacked = {
        "depth": dict(levels=[Level(4, lr=0.5), Level(8, lr=0.25, optimizer="dgd")]),
        "width": dict(levels=[Level(4, lr=0.5, optimizer="momentum"), Level(8, surprise=0.5)], placement="width"),
        "low rank": dict(levels=[Level(4, lr=0.5, rank=3), Level(8, lr=0.25)]),
        "context": dict(levels=[Level(4, lr=0.5)], context=8),
    }
    torch.manual_seed(0)
    if kind in stacked:
        return stack_levels(copy.deepcopy(original), **stacked[kind], **changes)
    levels = [dict(chunk_size=3, lr=0.5, optimizer="adamw"), dict(chunk_size=6, lr=0.25), dict(chunk_size=None)]
    which = {"mixers": HYBRID, "cms_variant": "nested"} if kind == "nested hybrid" else {"mixer": "selfmod"}
    changes = {f"cms_{name}": value for name, value in changes.items()}
    config = HopeConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, cms_levels=levels,
                        **which, **changes)  # fmt: skip
    return HopeForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def models(made):
    """One model of each kind, for tests that only read."""
    return {kind: make_model(kind, made[0]) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request, models):
    return models[request.param]


def draw(shape, seed):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths, tokens, side="left"):
    """Masks [B, T] of rows of these lengths."""
    columns = torch.arange(tokens)
    return torch.stack([columns >= tokens - n if side == "left" else columns < n for n in lengths]).long()


def learned(model, cache, row):
    """What a row's levels hold, zeros where they hold nothing yet."""
    modules, deltas = model._learned(cache)
    whole = [d.product if isinstance(d, Factors) else d for d in deltas]
    return [torch.zeros_like(m.weight) if d is None else d[row] for m, d in zip(modules, whole)]


def assert_learned_alike(model, cache, row, alone):
    for got, want in zip(learned(model, cache, row), learned(model, alone, 0), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@settings(max_examples=examples(12), deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_what_a_row_learns_is_what_it_would_learn_alone(models, data):
    """Any masks, in any calls: logits of every real token, zeros elsewhere, and what every level holds at the end."""
    model, rows = models[data.draw(st.sampled_from(KINDS))], data.draw(st.integers(1, 3))
    cache, alone = None, [LevelsCache(config=model.config) for _ in range(rows)]
    calls = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    for n, tokens in enumerate(calls):
        bits = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
        mask = torch.tensor(data.draw(st.lists(bits, min_size=rows, max_size=rows)))
        ids, following = draw((rows, tokens), n), draw((rows, 1), n + 9) if data.draw(st.booleans()) else None
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, next_tokens=following)
        cache = out.past_key_values
        for row, real in enumerate(mask):
            assert not out.logits[row, ~real].any()
            if real.any():
                known = None if following is None else following[row : row + 1]
                own = model(ids[row : row + 1, real], past_key_values=alone[row], use_cache=True, next_tokens=known)
                torch.testing.assert_close(out.logits[row, real], own.logits[0], **CLOSE)
    assert cache.get_seq_length() == sum(calls)
    for row, own in enumerate(alone):
        assert_learned_alike(model, cache, row, own)


@some(
    "kind, meta_grad", [("depth", "full"), ("selfmod", "first_order"), ("depth", "none")],
    ("depth", "selfmod"), ("full", "first_order", "none"),
)  # fmt: skip
def test_the_outer_gradient_is_the_sum_of_what_rows_give_alone(made, kind, meta_grad):
    model, ids, lengths = make_model(kind, made[0], meta_grad=meta_grad), draw((3, 14), 3), [14, 5, 10]
    mask = padded(lengths, 14, "right")
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.train().activation_checkpointing_enable()
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), num_items_in_batch=1).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    model.activation_checkpointing_disable()
    model.eval().zero_grad()
    for row, n in enumerate(lengths):
        model(ids[row : row + 1, :n], labels=ids[row : row + 1, :n], num_items_in_batch=1).loss.backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    for got in gradients:
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)  # the loss is taken in float32


@some(
    "kind, how",
    [("depth", "position_ids"), ("low rank", "position_ids"),
     ("context", "cu_seq_lens"), ("nested hybrid", "seq_idx"), ("width", "padded")],
    KINDS, ("position_ids", "cu_seq_lens", "seq_idx", "padded"),
)  # fmt: skip
@torch.no_grad()
def test_each_text_of_a_packed_row_is_a_stream_of_its_own(models, kind, how):
    """Equal to rows of their own; the row goes on with its last text, and what went on before ends with the first."""
    model, sizes = models[kind], [9, 1, 13]
    ids, more = draw((2, 23), 4), draw((2, 6), 5)
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    given = {
        "position_ids": dict(position_ids=positions),
        "seq_idx": dict(seq_idx=(positions == 0).cumsum(1).expand(2, -1)),
        "cu_seq_lens": dict(cu_seq_lens_q=torch.tensor([0, 9, 10, 23]), max_length_q=13),
        "padded": dict(position_ids=F.pad(positions, (3, 0)), attention_mask=padded([23, 23], 26)),
    }[how]
    rows = 1 if how == "cu_seq_lens" else 2
    inputs = F.pad(ids[:rows], (26 - 23, 0)) if how == "padded" else ids[:rows]
    out = model(inputs, use_cache=True, **given)
    after = model(more[:rows], past_key_values=out.past_key_values).logits
    for row in range(rows):
        texts = [model(text, use_cache=True) for text in ids[row : row + 1].split(sizes, 1)]
        want = torch.cat([text.logits for text in texts], 1)[0]
        torch.testing.assert_close(out.logits[row, -23:], want, **CLOSE)
        own = model(more[row : row + 1], past_key_values=texts[-1].past_key_values).logits[0]
        torch.testing.assert_close(after[row], own, **CLOSE)
    cache = model(more[:, :5], use_cache=True).past_key_values
    positions = torch.cat([torch.arange(5, 9), torch.arange(7)])[None]
    out = model(ids[:, :11], past_key_values=cache.fork(), position_ids=positions)
    torch.testing.assert_close(out.logits[:, :4], model(ids[:, :4], past_key_values=cache).logits, **CLOSE)
    torch.testing.assert_close(out.logits[:, 4:], model(ids[:, 4:11]).logits, **CLOSE)


@some("kind", ["low rank", "nested hybrid"], KINDS)
@torch.no_grad()
def test_a_cache_of_rows_at_different_places(models, kind, tmp_path):
    """Everything that a cache can do: rows chosen and repeated, forks, snapshots, files, forgetting, `adapted`."""
    model = models[kind]
    lengths, ids, more = [11, 4, 7, 4], draw((4, 11), 6), draw((4, 9), 7)
    cache = model(ids, attention_mask=padded(lengths, 11), use_cache=True).past_key_values
    alone = [model(ids[r : r + 1, 11 - n :], use_cache=True).past_key_values for r, n in enumerate(lengths)]
    assert len(cache.parts) == 3 and cache.streams == 4 and not cache.is_compileable
    assert cache.nbytes == sum(own.nbytes for own in alone)

    def follow(held, rows):
        got = model(more[rows], past_key_values=held, use_cache=True).logits
        for n, row in enumerate(rows):
            want = model(more[row : row + 1], past_key_values=alone[row].fork()).logits[0]
            torch.testing.assert_close(got[n], want, **CLOSE)

    follow(cache.fork(), [0, 1, 2, 3])
    for rows, change in (([3, 0, 0, 2], "reorder_cache"), ([1, 3], "batch_select_indices")):
        chosen = cache.fork()
        getattr(chosen, change)(torch.tensor(rows))
        follow(chosen, rows)
        assert not chosen.parts or len(rows) == 4
    repeated = cache.fork()
    repeated.batch_repeat_interleave(2)
    assert repeated.tokens_read(8) == [11, 11, 4, 4, 7, 7, 4, 4]
    cache.snapshot("here")
    follow(cache, [0, 1, 2, 3])
    cache.rollback("here")
    assert cache.get_seq_length() == 11 and cache.tokens_read(4) == lengths
    save_state(tmp_path / "rows.state", cache, model)
    follow(load_state(tmp_path / "rows.state", model), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(4)
    with pytest.raises(ValueError, match="holds 4 streams"):
        model(more[:2], past_key_values=cache)
    with model.adapted(cache):
        got = model(more).logits
    for row, own in enumerate(alone):
        with model.adapted(own):
            torch.testing.assert_close(got[row], model(more[row : row + 1]).logits[0], **CLOSE)
    for change in (lambda c: c.reset([0]), lambda c: c.forget_context()):
        for held in (cache, *alone):
            change(held)
        follow(cache.fork(), [0, 1, 2, 3])
    save_state(tmp_path / "rows.state", cache, model)
    follow(load_state(tmp_path / "rows.state", model), [0, 1, 2, 3])
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.parts
    assert torch.equal(model(more, past_key_values=cache).logits, model(more).logits)


def test_merge_takes_one_of_the_rows(made):
    model, ids = make_model("depth", made[0]), draw((2, 12), 8)
    with torch.no_grad():
        cache = model(ids, attention_mask=padded([12, 9], 12), use_cache=True).past_key_values
        with model.adapted(cache):
            want = model(ids).logits[1]
        merge(model, cache, stream=1)
        with model.adapted(cache):
            torch.testing.assert_close(model(ids).logits[1], want, **CLOSE)


BEAMS, PIECES = {"num_beams": 3, "length_penalty": 0.5}, {"prefill_chunk_size": 5}


@some(
    "kind, options",
    [("context", BEAMS), ("selfmod", {}), ("context", PIECES)],
    ("context", "selfmod"),
    ({}, BEAMS, PIECES),
)
def test_prompts_of_different_lengths_generate_what_each_would_alone(models, kind, options):
    """As lm-eval calls it: left padding, learning on."""
    model, lengths, prompts = models[kind], [12, 3, 7, 7], draw((4, 12), 9)
    how = dict(min_new_tokens=6, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    together = model.generate(prompts, attention_mask=padded(lengths, 12), **how)[:, 12:]
    for row, n in enumerate(lengths):
        own = prompts[row : row + 1, 12 - n :]
        alone = model.generate(own, attention_mask=torch.ones_like(own), **how)[:, n:]
        assert torch.equal(together[row], alone[0])


@torch.no_grad()
def test_aligned_rows_are_read_together(models, monkeypatch):
    """Without padding nothing is taken apart; with it, streams at one place go together to a boundary."""
    model, ids, calls = models["depth"], draw((3, 30), 10), []
    learner_read = type(model.learner).read
    monkeypatch.setattr(type(model.learner), "read", lambda *a, **k: calls.append(a[1].shape) or learner_read(*a, **k))
    monkeypatch.setattr(learning_model, "read_apart", None)
    cache = model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(30)[None]).past_key_values
    model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(3, 31), position_ids=torch.full((3, 1), 30))
    assert calls == [(3, 30), (3, 1)]
    monkeypatch.undo()
    calls.clear()
    monkeypatch.setattr(type(model.learner), "read", lambda *a, **k: calls.append(a[1].shape) or learner_read(*a, **k))
    model(ids, attention_mask=padded([30, 22, 22], 30))
    assert calls == [(3, 20), (2, 2), (1, 10)]
    calls.clear()
    model(ids[:1], attention_mask=padded([22], 30))
    assert calls == [(1, 22)]


@torch.no_grad()
def test_inference_mode_with_padding(models):
    model, ids, mask = models["depth"], draw((2, 9), 11), padded([9, 5], 9)
    want = [model(ids, attention_mask=mask, use_cache=True)]
    want.append(model(ids, past_key_values=want[0].past_key_values))
    with torch.inference_mode():
        first = model(ids.clone(), attention_mask=mask, use_cache=True)
        second = model(ids.clone(), past_key_values=first.past_key_values)
    assert torch.equal(first.logits, want[0].logits) and torch.equal(second.logits, want[1].logits)


@torch.no_grad()
def test_what_levels_hold_is_never_passed_over(model):
    """A call that neither learns nor applies levels refuses their cache, also where rows stand apart."""
    ids = draw((2, 9), 12)
    for mask in (None, padded([9, 5], 9)):
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        with model.adapted(cache), pytest.raises(ValueError, match="what levels learned"):
            model(ids, past_key_values=cache)
