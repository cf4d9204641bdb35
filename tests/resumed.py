"""A run that stops and goes on ends where one without a stop does."""

import torch

from nestling.training import Trainer, checkpoint, train
from nestling.training.build import load_saved


def run_with_stops(config, *stops):
    """Train to each of these steps in a trainer of its own, saved at its end."""
    for number, stop in enumerate(stops):
        trainer = Trainer(config, resume=number > 0)
        while trainer.step < stop:
            trainer.train_step()
        trainer.save()


def goes_on(config, folder, *stops):
    """Train whole, and in another folder with stops: both end alike. The second run's configuration."""
    train(config)
    other = config.changed(out=str(folder))
    run_with_stops(other, *stops)
    Trainer(other, resume=True).run()
    assert_same_end(config, other)
    return other


def assert_same_end(config, other):
    """The weights that two runs ended with are the same bits."""
    ends = [load_saved(checkpoint.resolve(c.out)).state_dict() for c in (config, other)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
