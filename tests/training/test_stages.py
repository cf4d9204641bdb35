"""Memories whose chunks are longer in the first part of a run, and then the model's own."""

import pytest

from nestling.training import Trainer
from resumed import goes_on


def selfmod(config, chunk, main):
    options = {"mixer": "selfmod", "mixer_options": {"chunk_size": chunk, "memory_chunk_size": main}}
    return {"model.options": {**config.model.options, **options}}


@pytest.fixture
def staged(config):
    """A run whose memories have chunks three times as long in the first seven of its twelve steps."""
    changed = {"schedule.chunk_factor": 3, "schedule.chunk_until": 0.6, "optim.accumulate": 2}
    return config.changed(**selfmod(config, 4, 2), **changed)


def test_chunks_are_longer_at_first(staged):
    plain = staged.changed(**{"schedule.chunk_factor": 1})
    stages = [Trainer(plain.changed(**selfmod(plain, *chunks))) for chunks in [(12, 6), (4, 2)]]
    trainer = Trainer(staged)
    held_out = [run.evaluate().loss for run in (trainer, *stages)]
    assert held_out[0] == held_out[2] != held_out[1]  # the model is what it says, whatever it is trained with
    for step in range(9):
        stage = stages[step >= 7]
        stage.model.load_state_dict(trainer.model.state_dict())
        stage.step = step
        assert trainer.train_step().loss == stage.train_step().loss, step


def test_a_run_of_two_stages_goes_on_in_either(staged, tmp_path):
    staged = staged.changed(**{"optim.accumulate": 1})
    other = goes_on(staged, tmp_path / "other", 5, 9)
    with pytest.raises(ValueError, match=r"cannot change schedule.chunk_factor \(was 3, now 1\)"):
        Trainer(other.changed(**{"schedule.chunk_factor": 1}), resume=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.options": {"mixer": "attention"}}, "this HopeForCausalLM has none"),
        ({"data.seq_len": 12}, "makes a chunk of 12 tokens, and a window of 12 has no second one"),
        ({"schedule.chunk_factor": 0}, "schedule.chunk_factor must be at least 1"),
    ],
)
def test_stages_without_an_effect_are_refused(staged, changes, said):
    with pytest.raises(ValueError, match=said):
        Trainer(staged.changed(**changes))
