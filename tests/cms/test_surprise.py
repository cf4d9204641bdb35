"""Adaptive levels: updates where it is most surprising, as often as asked, each stream at its own state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling import Level, stack_levels
from nestling.cms.surprise import PATIENCE, begin_surprise, is_due
from slowly import examples


@settings(max_examples=examples(20), deadline=None)
@given(share=st.floats(0.05, 0.8), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_updates_come_as_often_as_asked(share, seed, scale):
    level = Level(4, surprise=share)
    signal = scale * torch.rand(400, 3, generator=torch.Generator().manual_seed(seed)).exp()
    state, came = begin_surprise(level, signal[0]), []
    for s in signal:
        due, state = is_due(level, state, s)
        came.append(due)
    came = torch.stack(came)
    assert torch.equal(state.updates, came.sum(0).float())
    rate = came[100:].float().mean(0)
    assert bool(((rate - share).abs() < 0.05).all()), rate
    assert bool(signal[100:][came[100:]].mean() > signal[100:][~came[100:]].mean())


def test_an_update_is_late_only_for_so_long():
    level = Level(4, surprise=0.25)
    state, gaps = begin_surprise(level, torch.zeros(1)), []
    signal = torch.full((200, 1), 1.0)
    signal[0] = 1e9  # nothing is ever as surprising again, until its mean is forgotten
    for s in signal:
        _, state = is_due(level, state, s)
        gaps.append(int(state.waited))
    assert max(gaps) < PATIENCE / level.surprise


def test_a_signal_that_is_not_finite_leaves_its_state_whole():
    level = Level(4, surprise=0.5)
    _, state = is_due(level, begin_surprise(level, torch.zeros(2)), torch.ones(2))
    _, state = is_due(level, state, torch.tensor([torch.nan, 1.0]))
    assert all(bool(t.isfinite().all()) for t in state)


@pytest.mark.parametrize("signal", ["gradient", "loss"])
def test_an_adaptive_level_learns_from_all_it_has_passed_over(make, signal):
    """What it has not yet used stays in its sums; cutting the stream anywhere changes nothing."""
    ids = torch.randint(31, (2, 161), generator=torch.Generator().manual_seed(1))
    model = stack_levels(make(), [Level(4, lr=0.1, surprise=0.3, signal=signal), Level(8, lr=0.1)])
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        cache, logits = None, []
        for piece in ids.split([3, 50, 1, 107], 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-9, atol=1e-9)
    level, slow = whole.past_key_values.levels.levels
    assert level.updates == 40 and slow.updates == 20
    updates, waiting = level.surprise.updates, level.surprise.tokens
    assert bool(((updates > 4) & (updates < 25)).all())
    for b in range(2):
        assert bool(level.sums[0][b].any()) == bool(waiting[b] > 0)
    assert level.surprise.tokens.tolist() == (4 * level.surprise.waited).tolist()
