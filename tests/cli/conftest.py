"""Runs the command in this process, on a tiny text and model."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from nestling.cli.main import app

TINY = [
    *("--set", "hidden_size=16", "--set", "num_hidden_layers=1", "--set", "num_attention_heads=2"),
    *("--set", "intermediate_size=16", "--seq-len", "16", "--batch-size", "2", "--device", "cpu", "--quiet"),
]


TEXT = "the cat sat on the mat. the dog ran to the log!\n" * 100


@pytest.fixture
def text(tmp_path):
    """A text file of about 5 kB."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls `nestling` with arguments; gives the exit code, stdout and stderr."""
    monkeypatch.setenv("NESTLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, input=None):
        return CliRunner().invoke(app, [str(a) for a in arguments], input=input)

    return run


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """The folder of a run of a few steps, for all tests: they get copies."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    words = ["train", folder / "text.txt", "--out", folder / "run", "--steps", 4, *TINY, "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words], env={"NESTLING_CACHE": str(folder / "cache")})
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["step"] == 4
    return folder / "run"


@pytest.fixture
def trained(trained_once, tmp_path):
    """A test's own folder of a run of a few steps."""
    return shutil.copytree(trained_once, tmp_path / "run", symlinks=True)
