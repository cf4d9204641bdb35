"""Several steps for one chunk: against a plain loop, cut anywhere, at a text's end, refused where they cannot be."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nestling import Level, stack_levels
from nestling.cms.anchor import set_anchor
from nestling.cms.defaults import default_levels, fast_levels
from nestling.cms.fast_linear import Factors, FastLinear, applied, features
from nestling.cms.inner_optimizers import mean_singular_value
from nestling.generation.state import load_state, save_state
from nestling.models import HopeConfig
from nestling.ops.orthogonalize import orthogonalize_reference
from slopes import assert_meta_gradient

TWICE = Level(8, lr=0.1, optimizer="spectral", rank=4, decay=0.02, steps=2)


def learned(cache):
    return cache.levels.levels[0].deltas


def same(ours, theirs, tolerance=1e-9):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-10)


def by_hand(model, ids, ups, count):
    """What one stream's factors become by `count` tokens after their context, each half a leaf of its own.

    Shares no code with the engine: a dense matrix for each half, put in by running the block's MLP by hand.
    """
    mlps = [block.mlp for block in model.model.layers]
    names = ("gate_proj", "up_proj", "down_proj")
    weights = [getattr(mlp, name).weight.detach() for mlp in mlps for name in names]
    downs = [features(4, w.shape[1], n, w.dtype, w.device) for n, w in enumerate(weights)]
    halves = [[up.clone().requires_grad_() for up in ups] for _ in range(2)]
    forwards = {}

    def mlp_by_hand(n):
        def forward(x):
            out = []
            for part, half in zip(x.split(4, dim=1), halves):
                gate, up, down = (weights[3 * n + k] + half[3 * n + k] @ downs[3 * n + k] for k in range(3))
                out.append((F.silu(part @ gate.T) * (part @ up.T)) @ down.T)
            return torch.cat(out, 1)

        return forward

    for n, mlp in enumerate(mlps):
        forwards[mlp], mlp.forward = mlp.forward, mlp_by_hand(n)
    try:
        logits = model(ids[:, :count], use_cache=False).logits[0]
    finally:
        for mlp, forward in forwards.items():
            mlp.forward = forward
    loss = F.cross_entropy(logits, ids[0, 1 : count + 1], reduction="sum")
    used = [leaf for half in halves[: -(-count // 4)] for leaf in half]
    grads = torch.autograd.grad(loss, used)
    found = list(ups)
    for at in range(0, count, 4):
        share = min(4, count - at) / 4
        for n, w in enumerate(weights):
            step = orthogonalize_reference(grads[at // 4 * len(ups) + n][None])[0] * mean_singular_value(w)
            found[n] = (1 - 0.02 * share) * found[n] - 0.1 * share * step
    return found


@pytest.mark.parametrize("count", [8, 6, 3])
def test_it_is_the_loop_over_the_parts_of_a_chunk(make, ids, count):
    """A whole chunk, and the open one at a text's end: one step for four tokens, a share for fewer."""
    model, row = make(), ids[:1]
    stacked = stack_levels(copy.deepcopy(model), [TWICE])
    with torch.no_grad():
        cache = stacked(row[:, :count], use_cache=True).past_key_values
        stacked.finish(cache, row[:, count : count + 1])
    ups = [torch.zeros(1, *d.shape[1:], dtype=d.dtype)[0] for d in learned(cache)]
    same([d[0] for d in learned(cache)], by_hand(model, row, ups, count), 1e-6)
    assert all(d.abs().max() > 0 for d in learned(cache))


@torch.no_grad()
@pytest.mark.parametrize("optimizer", ["gd", "momentum", "adamw", "m3", "spectral"])
def test_cut_anywhere_saved_and_apart(make, ids, tmp_path, optimizer):
    model = stack_levels(make(), [replace(TWICE, optimizer=optimizer, lr=0.02)])
    whole = model(ids, use_cache=True)
    assert whole.past_key_values.nbytes == model.state_bytes(2)
    part = model(ids[:, :13], use_cache=True).past_key_values
    save_state(tmp_path / "s", part, model)
    rest = model(ids[:, 13:], past_key_values=load_state(tmp_path / "s", model), use_cache=True)
    torch.testing.assert_close(rest.logits, whole.logits[:, 13:], rtol=1e-9, atol=1e-9)
    same(learned(rest.past_key_values), learned(whole.past_key_values))
    single = model(ids[1:], use_cache=True)  # streams do not mix
    torch.testing.assert_close(single.logits, whole.logits[1:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_at_different_places_learn_what_they_would_alone(make, ids):
    model = stack_levels(make(), [TWICE])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    both = model(ids, attention_mask=mask, use_cache=True)
    alone = model(ids[:1, 3:], use_cache=True)
    torch.testing.assert_close(both.logits[:1, 3:], alone.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [8, 7, 3])
def test_a_layer_has_factors_for_each_part(tokens):
    torch.manual_seed(0)
    layer, x = FastLinear.of(torch.nn.Linear(16, 6)).double(), torch.randn(2, tokens, 16, dtype=torch.float64)
    parts = -(-tokens // 4)
    up, down = torch.randn(2, parts, 6, 3, dtype=torch.float64), features(3, 16, 0, torch.float64, x.device)
    with applied([layer], [Factors(up.flatten(0, 1), down, 4)]):
        y = layer(x)
    for row in range(2):
        for at in range(tokens):
            want = (layer.weight + up[row, at // 4] @ down) @ x[row, at] + layer.bias
            torch.testing.assert_close(y[row, at], want)


def test_a_gradient_that_is_not_finite_is_refused_part_by_part(make, ids):
    from nestling.cms.state import begin_level
    from nestling.cms.steps import in_steps

    model = stack_levels(make(), [TWICE])
    modules = model.learner.modules[0][:1]
    state = replace(begin_level(TWICE, modules, 2, 8), count=8)
    grads = torch.randn(4, *state.deltas[0].shape[1:], dtype=torch.float64)
    grads[3, 0, 0] = torch.nan  # the second stream's second part
    found = in_steps(TWICE, state, [grads], [torch.ones(())])
    assert found.refused.tolist() == [0, 1] and found.written.isnan().tolist() == [False, True]
    taken = -0.1 * orthogonalize_reference(grads[2:3])[0]  # the step of its first part is kept
    torch.testing.assert_close(found.deltas[0][1], taken, rtol=1e-7, atol=1e-9)


def test_a_full_meta_gradient_goes_through_the_steps(make, ids):
    model = stack_levels(make(), [TWICE], blocks=[-1], meta_grad="full")
    assert_meta_gradient(model, ids[:, :20])


def test_what_cannot_be_is_refused(make):
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="steps"):
            Level(8, rank=2, steps=steps)
    for wrong in (
        dict(chunk_size=9),
        dict(chunk_size=None),
        dict(rank=None),
        dict(optimizer="dgd"),
        dict(surprise=0.5),
    ):
        with pytest.raises(ValueError, match="steps=2"):
            replace(TWICE, **wrong)
    with pytest.raises(ValueError, match="level 1 takes 2 steps in a chunk of 16 tokens, but 8 are"):
        stack_levels(make(), [Level(8), replace(TWICE, chunk_size=16)])
    with pytest.raises(ValueError, match="or the context"):
        stack_levels(make(), [TWICE], context=4)
    model = stack_levels(make(), [TWICE])
    with pytest.raises(ValueError, match="without --fast"):
        set_anchor(model, [[1, 2, 3]], 1.0)
    with pytest.raises(ValueError, match="context this Hope was trained on"):
        fast_levels(HopeConfig(context_length=128))


def test_the_fast_rule_is_the_default_in_longer_chunks(make):
    config = make().config
    (slow,), (fast,) = default_levels(config), fast_levels(config)
    assert fast == replace(slow, chunk_size=128, steps=2) and "steps" not in repr(slow) and "steps=2" in repr(fast)
    assert Level.from_dict(fast.to_dict()) == fast
