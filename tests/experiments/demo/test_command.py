"""`nestling demo`: exit codes and what is printed."""

import json

import pytest
from typer.testing import CliRunner

from experiments.demo import Outcome
from nestling.cli.main import app


@pytest.fixture
def command(monkeypatch, tmp_path, result):
    """Calls the command with the demo itself replaced by the made-up result."""

    def call(*arguments, learned=True, stopped=False):
        result["check"]["passed"], result["stopped"] = learned, stopped
        seen = {}

        def fake(config, text):
            seen.update(config=config, text=text)
            return Outcome(result, tmp_path / "report.html", learned, stopped)

        monkeypatch.setattr("experiments.demo.run", fake)
        return CliRunner().invoke(app, ["demo", *arguments]), seen

    return call


@pytest.mark.parametrize(
    ("learned", "stopped", "code"), [(True, False, 0), (False, False, 1), (True, True, 130), (False, True, 130)]
)
def test_exit_codes(command, learned, stopped, code):
    """0 only for a whole run that learned."""
    answer, _ = command(learned=learned, stopped=stopped)
    assert answer.exit_code == code
    assert ("It learned" in answer.output) == learned
    assert "report.html" in answer.output
    assert "nestling generate runs/demo/hope" in answer.output


def test_options_reach_the_demo(command, tmp_path):
    """Text, folder, time, threads, seed."""
    (tmp_path / "book.txt").write_text("word " * 3000)
    options = ["--text", str(tmp_path / "book.txt"), "--out", "x", "--minutes", "2", "--threads", "3", "--seed", "5"]
    _, seen = command(*options)
    config = seen["config"]
    assert (config.out, config.minutes, config.threads, config.seed) == ("x", 2.0, 3, 5)
    assert seen["text"].name == "book.txt"


def test_json_is_one_object(command):
    """Machine-readable, with the report's path and the headline numbers."""
    answer, _ = command("--json")
    values = json.loads(answer.stdout)
    assert values["learned"] is True
    assert values["report"].endswith("report.html")
    assert values["models"]["Hope"]["bits_per_byte_after"] == 2.5
    assert values["models"]["Transformer"]["state_bytes"] == {"64": 600, "512": 4800}


def test_bad_input_is_one_line(command):
    """No traceback."""
    answer, _ = command("--minutes", "0")
    assert answer.exit_code == 2
    assert "--minutes" in answer.output
    answer, _ = command("--text", "/nowhere.txt")
    assert answer.exit_code == 2
    assert "no file or folder" in answer.output
