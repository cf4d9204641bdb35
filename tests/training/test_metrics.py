import json
import sys
import types

import pytest

from nestling.training import train
from nestling.training.metrics import Metrics, read_metrics


@pytest.fixture
def trackio(monkeypatch):
    """Stands in for the trackio package and keeps what it is told."""
    module = types.ModuleType("trackio")
    module.calls = []
    module.init = lambda **options: (print("welcome"), module.calls.append(("init", options)))
    module.log = lambda values, step: module.calls.append(("log", step, values))
    module.finish = lambda: module.calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_trackers_get_every_number_and_leave_stdout_alone(config, trackio, capsys):
    config = config.changed(**{"logging.trackers": ["trackio"]})
    train(config)
    kinds = [call[0] for call in trackio.calls]
    assert kinds[0] == "init"
    assert kinds[-1] == "finish"
    assert trackio.calls[0][1]["name"] == "run"
    assert trackio.calls[0][1]["resume"] == "never"
    logged = [call for call in trackio.calls if call[0] == "log"]
    assert [step for _, step, values in logged if "train/loss" in values] == list(range(1, 13))
    assert [step for _, step, values in logged if "eval/bits_per_byte" in values] == [6, 12]
    assert capsys.readouterr().out == ""
    train(config.changed(steps=13), resume=True)
    assert [call[1]["resume"] for call in trackio.calls if call[0] == "init"] == ["never", "allow"]


def test_an_uninstalled_tracker_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"'trackio' is not installed.*nestling\[track\]"):
        train(config.changed(**{"logging.trackers": ["trackio"]}))


def test_lines_after_the_resumed_step_and_a_cut_line_are_dropped(config):
    metrics = Metrics(config)
    for step in (1, 2, 3):
        metrics.write("train", step, loss=float(step), words=[1, 2])
    with open(metrics.path, "a") as file:
        file.write('{"kind": "tr')
    again = Metrics(config, resume_step=2)
    again.write("eval", 2, loss=0.5)
    assert [(row["kind"], row["step"]) for row in read_metrics(again.path)] == [("train", 1), ("train", 2), ("eval", 2)]
    assert all(json.loads(line) for line in again.path.read_text().splitlines())
