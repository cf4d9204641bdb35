"""A run that is really killed, at random moments, ends with the weights of one that was not."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from nestling.training import Trainer, checkpoint, train
from nestling.training.build import load_saved
from processes import Command

STEPS = 40
SLOW_LEVEL = [{"chunk_size": None}, {"chunk_size": 7 * 64}]  # 7 steps of 2 x 2 x 16 tokens


def start(config):
    """The run as a process of its own, on one thread."""
    folder = Path(config.out).parent
    config.save(folder / "killed.json")
    return Command(["train", "--config", folder / "killed.json", "--resume"], folder / "said")


def kill_at(process, config, step, delay):
    """SIGKILL the process `delay` seconds after its figures reach a step; the step it had reached."""
    metrics = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        lines = metrics.read_text().count('"train"') if metrics.exists() else 0
        if lines >= step:
            break
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()


@pytest.mark.timeout(240)
def test_killed_twice_and_resumed_is_bit_for_bit_the_same(config, tmp_path):
    config = config.changed(
        **{
            "steps": STEPS,
            "model.options": {**config.model.options, "cms_levels": SLOW_LEVEL},
            "optim.accumulate": 2,
            "logging.save_every": 3,  # checkpoints fall inside the slow level's chunks
            "logging.eval_every": 0,
            "data.cache_dir": str(tmp_path / "cache"),
        }
    )
    train(config)
    other = config.changed(out=str(tmp_path / "killed"))
    choice = random.Random(time.time_ns())
    places = []
    for low, high in ((4, 14), (18, 32)):
        step, delay = choice.randint(low, high), choice.random() * 0.02
        places.append((step, delay))
        kill_at(start(other), other, step, delay)
        reached = checkpoint.load_trainer_state(checkpoint.newest(other.out)[0])["step"]
        assert 0 < reached < STEPS, f"killed at {places}, checkpoint of step {reached}"
    resumed = Trainer(other, resume=True)
    resumed.run()
    whole = load_saved(checkpoint.resolve(config.out)).state_dict()
    again = load_saved(checkpoint.resolve(other.out)).state_dict()
    different = [name for name in whole if not torch.equal(whole[name], again[name])]
    assert not different, f"killed at {places}"
