"""Meta-gradients with states alone kept between pieces: the same numbers, less memory."""

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from nestling import HopeConfig, HopeForCausalLM, stack_levels
from nestling.cms import learner

LEVELS = [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": 8, "lr": 0.2, "optimizer": "momentum"}]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(learner, "PIECE", 8)


def outer(model, ids, checkpointing, parts=1):
    """Loss, all gradients, and bytes kept for the backward pass; in `parts` calls that carry their cache."""
    (model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable)()
    model.train().zero_grad()
    logits, cache = [], None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        for piece in ids.chunk(parts, 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        loss = F.cross_entropy(torch.cat(logits, 1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads, sum(event.self_cpu_memory_usage for event in watch.events())


def models(make, kind, meta_grad):
    if kind == "stacked":
        return stack_levels(make(), LEVELS, meta_grad=meta_grad, context=16, blocks=[2, 3])
    torch.manual_seed(0)
    config = HopeConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mixer=kind,
                        cms_levels=[*LEVELS, {"chunk_size": None}], cms_meta_grad=meta_grad)  # fmt: skip
    return HopeForCausalLM(config).double()


@pytest.mark.parametrize("meta_grad", ["full", "first_order", "none"])
@pytest.mark.parametrize("kind", ["stacked", "attention", "selfmod"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradients_are_the_same(make, ids, kind, meta_grad, parts):
    model = models(make, kind, meta_grad)
    loss, want, _ = outer(model, ids, False, parts)
    again, got, _ = outer(model, ids, True, parts)
    assert again == pytest.approx(loss, rel=1e-12) and got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-8, atol=1e-12)


def test_memory_grows_by_the_states_between_pieces_only(make, ids):
    model = models(make, "stacked", "full")
    long = ids.repeat(1, 3)
    whole, pieces = ([outer(model, x, on)[2] for x in (ids, long)] for on in (False, True))
    assert pieces[1] < whole[1] / 3
    assert pieces[1] - pieces[0] < (whole[1] - whole[0]) / 3
