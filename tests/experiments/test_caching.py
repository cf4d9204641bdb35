"""Kept memories: what is asked follows from what was read, equal parameters, one run of each kind and its tables."""

import torch

from experiments.caching import experiment, report
from experiments.caching.tasks import KEYS, TASKS
from experiments.shared.models.tasks import IGNORED, configuration
from nestling.models import HopeForCausalLM, sizes


def test_every_key_is_asked_for_once_and_lies_beyond_the_window():
    for label, draw in TASKS["pairs"].tests.items():
        tokens, targets = draw(3, torch.Generator().manual_seed(0))
        number = int(label)
        assert tokens.shape == (3, 4 * number) and int((targets != IGNORED).sum()) == 3 * number
        for words, asked in zip(tokens.tolist(), targets.tolist()):
            told = dict(zip(words[: 2 * number : 2], words[1 : 2 * number : 2]))
            assert len(told) == number and all(key < KEYS for key in told)
            assert [told[words[i]] for i in range(2 * number, 4 * number, 2)] == asked[2 * number :: 2]


def test_all_have_as_many_parameters():
    settings = experiment.defaults()
    counts = [sizes.parameters(configuration(settings, c, 2)) for c in settings.contenders]
    assert max(counts) < 1.02 * min(counts)


def test_one_run_of_each_and_its_tables(tmp_path):
    settings = experiment.defaults().smoke()
    work, rows = experiment.CachingWork(settings), {}
    jobs = experiment.plan(settings, settings.contenders, lambda job: None)
    for job in jobs:
        rows[job.key] = work(job)
    summary = experiment.summarize(settings, settings.contenders, lambda job: rows.get(job.key))
    table = report.table(summary)
    assert table.count("Hope, window 32, kept after training |") == 1
    assert "next token, ms, 24 / 48" in table
    sizes_of = {c["contender"]: c["cost"]["state_bytes"] for c in summary["contenders"] if "cost" in c}
    grown = {name: found["48"] - found["24"] for name, found in sizes_of.items()}
    assert grown["attention to all"] > 0
    report.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_with_other_options_the_weights_stay():
    settings = experiment.defaults().smoke()
    model = HopeForCausalLM(configuration(settings, settings.contenders[0], 8))
    changed = experiment.with_memory(model, {"cache_every": 64})
    own = changed.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert len(own) == len(model.state_dict()) + 2
