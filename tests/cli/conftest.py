"""Runs the command in this process, on a tiny text and model."""

import json

import pytest
from typer.testing import CliRunner

from nestling.cli.main import app

TINY = [
    *("--set", "hidden_size=16", "--set", "num_hidden_layers=1", "--set", "num_attention_heads=2"),
    *("--set", "intermediate_size=16", "--seq-len", "16", "--batch-size", "2", "--device", "cpu", "--quiet"),
]


@pytest.fixture
def text(tmp_path):
    """A text file of about 5 kB."""
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. the dog ran to the log!\n" * 100)
    return path


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls `nestling` with arguments; gives the exit code, stdout and stderr."""
    monkeypatch.setenv("NESTLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, input=None):
        return CliRunner().invoke(app, [str(a) for a in arguments], input=input)

    return run


@pytest.fixture
def trained(call, text, tmp_path):
    """The folder of a run of a few steps."""
    result = call("train", text, "--out", tmp_path / "run", "--steps", 4, *TINY, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["step"] == 4
    return tmp_path / "run"
