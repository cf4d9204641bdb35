"""Attention that sees no further than a few tokens in a share of a run's steps, and then as far as the model says."""

import pytest

from nestling.training import Trainer
from nestling.training.config import ScheduleConfig
from nestling.training.schedules import window_limit
from resumed import goes_on

HOPE = {"mixer": "hope", "mixer_options": {"window": 6}}


@pytest.fixture
def shortened(config):
    """A Hope with windows of 6 tokens that sees 2 of them in half of the first nine of its twelve steps."""
    options = {**config.model.options, **HOPE}
    return config.changed(**{"model.options": options, "schedule.short_window": 2, "optim.accumulate": 2})


def limits(config):
    return [window_limit(step, config.steps, config.schedule, config.seed) for step in range(config.steps)]


def test_a_share_of_the_steps_is_drawn():
    schedule = ScheduleConfig(short_window=2, short_share=0.3, short_until=0.5)
    drawn = [window_limit(step, 4000, schedule, 0) for step in range(4000)]
    assert set(drawn[:2000]) == {2, None} and set(drawn[2000:]) == {None}
    assert 0.27 < drawn.count(2) / 2000 < 0.33
    assert drawn != [window_limit(step, 4000, schedule, 1) for step in range(4000)]
    assert not any(window_limit(step, 9, ScheduleConfig(), 0) for step in range(9))


def test_windows_are_short_in_those_steps_and_never_when_judged(shortened):
    assert {2, None} == set(limits(shortened)) and limits(shortened)[9:] == [None] * 3
    plain = shortened.changed(**{"schedule.short_window": None})
    short = plain.changed(**{"model.options": {**plain.model.options, "mixer_options": {"window": 2}}})
    runs = {None: Trainer(plain), 2: Trainer(short)}
    trainer = Trainer(shortened)
    held_out = [run.evaluate().loss for run in (trainer, runs[None], runs[2])]
    assert held_out[0] == held_out[1] != held_out[2]
    for step, limit in enumerate(limits(shortened)):
        run = runs[limit]
        run.model.load_state_dict(trainer.model.state_dict())
        run.step = step
        assert trainer.train_step().loss == run.train_step().loss, step
    assert [layer.window for layer in trainer.model.modules() if hasattr(layer, "window")] == [6]


def test_a_run_with_short_windows_goes_on_as_if_nothing_had_happened(shortened, tmp_path):
    shortened = shortened.changed(**{"optim.accumulate": 1})
    other = goes_on(shortened, tmp_path / "other", 5)
    with pytest.raises(ValueError, match=r"cannot change schedule.short_window \(was 2, now 3\)"):
        Trainer(other.changed(**{"schedule.short_window": 3}), resume=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule.short_window": 6}, "short_window 6 shortens no window: this HopeForCausalLM has windows of 6"),
        ({"model.options": {"mixer": "selfmod"}}, "has no attention"),
        ({"model.options": {"mixer": "attention"}}, "and this HopeForCausalLM has none: leave it out"),
        ({"schedule.short_window": 0}, "schedule.short_window must be at least 1"),
        ({"schedule.short_share": 1.5}, "schedule.short_share"),
    ],
)
def test_short_windows_without_an_effect_are_refused(shortened, changes, said):
    with pytest.raises(ValueError, match=said):
        Trainer(shortened.changed(**changes))
