"""A demo of a few seconds from text to report: what it leaves, how it ends, how it is stopped."""

import json
import re
import signal
import time

import pytest

from experiments.demo.config import HOPE, TRANSFORMER
from experiments.demo.report import build
from experiments.demo.run import check, claim_folder, plan_steps, run
from experiments.demo.text import Text
from experiments.demo.watch import Watch

pytestmark = pytest.mark.filterwarnings("error:constrained_layout")


class Silent(Watch):
    """Says nothing; `on_step` may interfere."""

    def __init__(self, on_step=lambda name, report: None):
        super().__init__([HOPE, TRANSFORMER])
        self.said, self.on_step = [], on_step

    def say(self, text, style=None):
        """Keep the line."""
        self.said.append(text)

    def step(self, name, report):
        """A model has taken a step."""
        super().step(name, report)
        self.on_step(name, report)


@pytest.fixture(scope="module")
def demo(tmp_path_factory, small, text):
    """One small demo, for all tests that only look."""
    return run(small(tmp_path_factory.mktemp("demo") / "out"), text, Silent())


def test_both_train_on_the_same_text_for_equal_steps(demo):
    """Same size within 2%, same steps, and losses that are theirs."""
    hope, transformer = demo.result["models"][HOPE], demo.result["models"][TRANSFORMER]
    assert abs(hope["parameters"] - transformer["parameters"]) <= 0.02 * hope["parameters"]
    assert (hope["mixers"], transformer["mixers"]) == (
        ["window_attention", "memory_and_attention"],
        ["attention", "attention"],
    )
    steps = [row["step"] for row in hope["curve"]]
    assert steps == [row["step"] for row in transformer["curve"]] == list(range(1, demo.result["steps"] + 1))
    assert 6 <= demo.result["steps"] <= 12
    assert [row["tokens"] for row in hope["held_out"]] == [row["tokens"] for row in transformer["held_out"]]
    assert hope["held_out"][-1]["step"] == demo.result["steps"]
    assert hope["held_out"][-1]["bits"] < hope["held_out"][0]["bits"]


def test_measurements_have_their_shapes(demo):
    """Positions, states, the memory along the text, samples."""
    hope, transformer = demo.result["models"][HOPE], demo.result["models"][TRANSFORMER]
    assert hope["positions"]["edges"] == [0, 16, 32, 64]
    assert [len(row) for row in hope["positions"]["windows"]] == [3, 3, 3]
    sizes = [[row["bytes"] for row in model["states"]] for model in (hope, transformer)]
    assert sizes[0][0] == sizes[0][1]
    assert sizes[1][0] < sizes[1][1]
    length = len(hope["memory"]["text"])
    assert [len(layer[k]) for layer in hope["memory"]["layers"] for k in ("loss", "eta", "alpha", "norm")] == 4 * [
        length
    ]
    assert [layer["layer"] for layer in hope["memory"]["layers"]] == [2]  # the first has attention alone
    assert all(0 < a <= 1 for a in hope["memory"]["layers"][0]["alpha"])
    assert transformer["memory"]["layers"] == []
    assert [s["prompt"] for s in hope["samples"]] == [s["prompt"] for s in transformer["samples"]]
    # a model of a few steps may end one of its texts at once, not all of them
    assert any(s["text"] for s in hope["samples"]) and any(s["text"] for s in transformer["samples"])


def test_folder_holds_report_numbers_and_models(demo, monkeypatch):
    """The report is the result's; the models can be loaded and go on writing."""
    from nestling.generation.load import load_model

    folder = demo.report.parent
    stored = json.loads((folder / "report.json").read_text())
    assert stored["steps"] == demo.result["steps"]
    monkeypatch.setattr("experiments.demo.figures.both", lambda *arguments: "")  # most of the time of a page
    written = re.sub(r'<div class="(?:wide|narrow)">.*?</div>', "", demo.report.read_text(), flags=re.S)
    assert written == build(demo.result)
    assert len(re.findall(r"<h2>", demo.report.read_text())) == 5
    model, tokenizer = load_model(folder / "hope")
    assert sum(p.numel() for p in model.parameters()) == demo.result["models"][HOPE]["parameters"]
    assert len(tokenizer) == 259


def test_interrupt_reports_what_there_is_and_a_second_run_starts_afresh(tmp_path, small, text):
    """After Ctrl-C both stand at the same step; the folder can be used again."""

    def interrupt(name, report):
        if report["step"] == 3 and name == HOPE:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    config = small(tmp_path / "out", min_steps=200, max_steps=200)
    started = time.monotonic()
    outcome = run(config, text, Silent(interrupt))
    assert outcome.stopped
    assert signal.getsignal(signal.SIGINT) is before
    assert {len(model["curve"]) for model in outcome.result["models"].values()} == {3}
    assert all(model["held_out"][-1]["step"] == 3 for model in outcome.result["models"].values())
    assert "stopped at step 3 of 200" in outcome.report.read_text()
    assert time.monotonic() - started < 120
    claim_folder(config.out)
    assert not outcome.report.exists()
    assert not (tmp_path / "out" / "hope").exists()


def test_check_asks_both_for_the_margin():
    """A model at the bar has learned; one above it, or not finite, has not."""

    def models(hope, transformer):
        return {HOPE: {"held_out": [{"bits": hope}]}, TRANSFORMER: {"held_out": [{"bits": transformer}]}}

    assert check(models(3.75, 3.0), 4.5, 0.75)["passed"]
    assert check(models(3.76, 3.0), 4.5, 0.75)["learned"] == {HOPE: False, TRANSFORMER: True}
    assert not check(models(float("nan"), 3.0), 4.5, 0.75)["passed"]


def test_plan_fits_the_time_within_its_limits(small, tmp_path):
    """More time or a faster machine means more steps; a slow one takes the least number."""
    config = small(tmp_path, min_steps=10, max_steps=500)
    assert plan_steps(1.0, 0.1, config) == 10
    assert plan_steps(1e6, 0.1, config) == 500
    few, many = plan_steps(40, 0.2, config), plan_steps(40, 0.1, config)
    assert 10 < few < many < 400
    assert many * 0.1 < 40


def test_folders_of_others_are_left_alone(tmp_path):
    """Only an empty folder, or an earlier demo's, is written to."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else than a demo"):
        claim_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="is a file"):
        claim_folder(tmp_path / "notes.txt")


def test_too_little_held_out_text_is_refused_before_any_training(tmp_path, small):
    """The message says what to do."""
    path = tmp_path / "short.txt"
    path.write_text("a short text. " * 12)
    with pytest.raises(ValueError, match="longer --text"):
        run(small(tmp_path / "out"), Text("short", [str(path)], []), Silent())


@pytest.mark.parametrize("changes", [{"minutes": 0}, {"minutes": float("nan")}, {"threads": 0}, {"replan_at": 0.9}])
def test_configuration_is_checked(small, tmp_path, changes):
    """Numbers out of range are named."""
    with pytest.raises(ValueError, match=r"minutes|threads|replan_at"):
        small(tmp_path, **changes)
