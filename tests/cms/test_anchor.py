"""Texts of a model's own that reading must leave as they were."""

import copy

import pytest
import torch
from torch.nn import functional as F

from nestling import Level, stack_levels
from nestling.cms.anchor import LIKELY, set_anchor

RULES = {
    "spectral": Level(8, lr=0.1, optimizer="spectral", rank=4, decay=0.02),
    "dense": Level(8, lr=0.3),
}


@pytest.fixture
def lively(make):
    """A small model that says different things of different tokens."""

    def build(**changes):
        model = make(**changes)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 if p.dim() == 1 else 10)
        return model

    return build


def read(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


@torch.no_grad()
def far(model, plain, texts, cache):
    """KL(before || now) by its definition, mean over texts."""
    with model.adapted(cache):
        pairs = [(plain(t[None]).logits[0].log_softmax(-1), model(t[None]).logits[0].log_softmax(-1)) for t in texts]
    return sum(float(F.kl_div(now, before, log_target=True, reduction="batchmean")) for before, now in pairs)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_read_changes_the_anchor_less(lively, ids, rule):
    plain = lively()
    texts = torch.randint(31, (3, 12), generator=torch.Generator().manual_seed(2))
    found = {}
    for weight in (0, 1):
        model = stack_levels(copy.deepcopy(plain), [RULES[rule]])
        set_anchor(model, texts.tolist(), weight)
        found[weight] = far(model, plain, texts, read(model, ids[:1]))
    assert found[0] > 1.2 * found[1] > 0


def test_its_gradient_is_that_of_the_distance(lively, ids):
    """One step of plain descent after another, against the two losses added up by hand."""
    plain, level = lively(), Level(8, lr=0.2)
    model = stack_levels(copy.deepcopy(plain), [level], blocks=[-1])
    texts = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(2))
    set_anchor(model, texts.tolist(), 3.0)
    first, second = (read(model, ids[:, :n]).levels.levels[0].deltas for n in (9, 17))
    free = stack_levels(copy.deepcopy(plain), [level], blocks=[-1])
    whole = read(free, ids[:, :9]).levels.levels[0].deltas
    for a, b in zip(first, whole, strict=True):
        assert torch.equal(a, b)  # nothing was learned that the anchor could hold back
    for stream in range(2):
        hand = copy.deepcopy(free)
        hand.learning = False
        hand.requires_grad_(True)
        with torch.no_grad():
            for m, d in zip(hand.learner.modules[0], first, strict=True):
                m.weight += d[stream]
        past = plain(ids[stream : stream + 1, :8], use_cache=True).past_key_values
        logits = hand(ids[stream : stream + 1, 8:16], past_key_values=past).logits[0]
        loss = F.cross_entropy(logits, ids[stream, 9:17])
        text = texts[:1]  # 16 tokens, two chunks: the texts begin again
        before = plain(text).logits[0].log_softmax(-1).detach()
        loss = loss + 3.0 * F.kl_div(
            hand(text).logits[0].log_softmax(-1), before, log_target=True, reduction="batchmean"
        )
        grads = torch.autograd.grad(loss, [m.weight for m in hand.learner.modules[0]])
        for old, new, g in zip(first, second, grads, strict=True):
            torch.testing.assert_close(new[stream], old[stream] - level.lr * g, rtol=1e-6, atol=1e-9)


def test_a_text_is_taken_in_turn_wherever_the_stream_is_cut(lively, ids):
    model = stack_levels(lively(), [RULES["spectral"]])
    set_anchor(model, [[1, 2, 3], [4, 5, 6, 7]], 2.0)
    whole, part = read(model, ids), read(model, ids[:, :13])
    with torch.no_grad():
        model(ids[:, 13:], past_key_values=part)
    for a, b in zip(whole.levels.levels[0].deltas, part.levels.levels[0].deltas, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_many_tokens_are_kept_as_a_sum(lively):
    model = stack_levels(lively(vocab_size=200), [RULES["spectral"]])
    set_anchor(model, [[1, 2, 3]], 1.0)
    anchor = model.learner.anchor
    assert anchor.likely[0].shape == (3, LIKELY)
    logits = torch.randn(1, 3, 200)
    model.learning = False
    with torch.no_grad():
        before = model(torch.tensor([[1, 2, 3]])).logits
        assert anchor.distance(0, before).abs().item() < 1e-4
        exact = F.kl_div(logits[0].log_softmax(-1), before[0].log_softmax(-1), log_target=True, reduction="batchmean")
        assert 0 < anchor.distance(0, logits).item() <= float(exact) + 1e-4


def test_a_wrong_anchor_is_refused(lively):
    model = stack_levels(lively(), [RULES["dense"]])
    with pytest.raises(ValueError, match="weight must be finite"):
        set_anchor(model, [[1]], -1.0)
    with pytest.raises(ValueError, match="holds no token"):
        set_anchor(model, [[]], 1.0)
    assert model.learner.anchor is None
