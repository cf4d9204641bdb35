"""What the fuzz run calls a hang, and that the page has the figures of the last run."""

import json
import signal
import time
from pathlib import Path

import pytest

from benchmarks import fuzz

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_figures_of_the_last_run():
    summary = json.loads((ROOT / "benchmarks" / "results" / "fuzz.json").read_text())
    page = (ROOT / "docs" / "when_something_fails.md").read_text(encoding="utf-8")
    assert page.split("<!-- fuzz -->")[1].split("<!-- end -->")[0].strip() == fuzz.table(summary)
    assert summary["originals_untouched"] and not summary["faults"]


def test_work_is_a_hang_and_waiting_for_the_machine_is_none(tmp_path, monkeypatch):
    (tmp_path / "originals").mkdir()
    for name in ("a.txt", "hope.state"):
        (tmp_path / "originals" / name).touch()
    one = object.__new__(fuzz.Fuzz)
    one.originals, one.work, one.models = tmp_path / "originals", tmp_path / "work", {}
    one.wait = lambda draw: time.sleep(0.4)

    def spin(draw):
        while True:
            pass

    one.spin, handlers = spin, [signal.signal(number, fuzz._hang) for number in (signal.SIGPROF, signal.SIGALRM)]
    monkeypatch.setattr(fuzz, "LIMIT", 0.2)
    monkeypatch.chdir(tmp_path)
    try:
        assert one.run("wait", 0, 0) == "taken"
        with pytest.raises(fuzz.Hung):
            one.run("spin", 0, 0)
    finally:
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), handlers):
            signal.signal(number, handler)


def test_a_run_goes_on_where_its_minutes_ended(tmp_path):
    before = {"seed": 3, "kinds": {"text": {"taken": 2, "refused": 1, "seconds": 9}}, "faults": []}
    (tmp_path / "fuzz.json").write_text(json.dumps(before))
    assert fuzz._begun(tmp_path / "fuzz.json", 3) == before
    assert fuzz._inputs(before["kinds"]["text"]) == 3
    assert fuzz._begun(tmp_path / "fuzz.json", 4)["kinds"] == {}
