"""What cannot be written or read as text: one line, exit code, and no state lost."""

import errno
import io
import json
import os
import sys

import pytest

from nestling.cli import common
from nestling.cli.common import App, readable
from nestling.generation import load_notes
from nestling.utils import places
from nestling.utils.locks import sole_writer


class Failing(io.StringIO):
    """A stdout that takes some characters and then fails."""

    def __init__(self, room, code):
        super().__init__()
        self.room, self.code = room, code

    def write(self, text):
        self.room -= len(text)
        if self.room < 0:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)


def invoke(monkeypatch, stdout, *arguments):
    """The command with that stdout; its exit code."""
    from nestling.cli.main import app

    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["nestling", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        super(App, app).__call__(list(map(str, arguments)))
    return ended.value.code


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPIPE])
def test_generate_keeps_the_state_when_stdout_fails(call, trained, tmp_path, monkeypatch, capfd, code):
    state, whole = tmp_path / "a.state", tmp_path / "b.state"
    options = ["-n", 12, "--greedy"]
    assert invoke(monkeypatch, Failing(3, code), "generate", trained, "-p", "the cat", *options, "--state", state) == 1
    monkeypatch.undo()
    errors = capfd.readouterr().err
    assert errors == ("" if code == errno.EPIPE else "error: No space left on device\n")
    first = call("generate", trained, "-p", "the cat", *options, "--state", whole, "--json")
    assert first.exit_code == 0 and state.exists()
    assert call("generate", trained, "-p", " sat", *options, "--state", state).exit_code == 0


def test_results_that_cannot_be_written_are_one_line(trained, tmp_path, monkeypatch, capfd):
    arguments = ["train", "--out", trained, "--resume", "--json"]
    assert invoke(monkeypatch, Failing(3, errno.ENOSPC), *arguments) == 1
    monkeypatch.undo()
    assert "error: No space left on device\n" in capfd.readouterr().err
    assert invoke(monkeypatch, Failing(3, errno.EPIPE), *arguments) == 1
    monkeypatch.undo()
    assert "error" not in capfd.readouterr().err


def test_prompts_are_checked_before_anything_is_read(call, trained, tmp_path, monkeypatch):
    state = tmp_path / "a.state"
    for prompts, words in (("\udcff\udcfe", "is no UTF-8 text"), ("", "is empty")):
        result = call("generate", trained, "-p", "the cat", "-p", prompts, "--state", state)
        assert result.exit_code == 2 and words in result.stderr
        assert not state.exists()
    # the bytes of é as a terminal in ASCII hands them over
    result = call("generate", trained, "-p", "caf\udcc3\udca9", "-n", 1, "--greedy", "--json")
    assert json.loads(result.stdout)["results"][0]["prompt"] == "café"
    assert readable("\udcc3\udca9", "x") == "é"
    lines = iter(["the", "\udcff", "cat"])  # and then Ctrl-D
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    result = call("generate", trained, "-i", "-n", 1, "--greedy", "--state", state)
    assert result.exit_code == 0 and "is no UTF-8" in result.stderr and state.exists()


def test_generate_waits_for_nobody_and_keeps_a_sessions_place(call, trained, tmp_path):
    state = tmp_path / "a.state"
    assert call("generate", trained, "-p", "the cat", "-n", 1, "--state", state).exit_code == 0
    with sole_writer(state):
        before = state.read_bytes()
        result = call("generate", trained, "-p", "the", "--state", state)
        assert result.exit_code == 2 and "is being written by another" in result.stderr
        assert state.read_bytes() == before
    from nestling.generation import load_state, save_state
    from nestling.generation.load import load_model

    model, _ = load_model(trained, "cpu")
    save_state(state, load_state(state, model), model, notes={"format": "nestling-reading-1", "reading": 7})
    assert call("generate", trained, "-p", "the", "-n", 1, "--state", state).exit_code == 0
    assert load_notes(state) == {"format": "nestling-reading-1", "reading": 7}


def test_streams_that_are_closed_or_too_narrow(monkeypatch):
    app, narrow = App(), io.TextIOWrapper(io.BytesIO(), "ascii")
    app.command()(lambda: print("é \udcff"))
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    monkeypatch.setattr(sys, "stdout", narrow)
    app([], standalone_mode=False)
    narrow.flush()
    assert narrow.buffer.getvalue() == b"? ?\n"
    monkeypatch.setattr(sys, "stdout", None)
    app([], standalone_mode=False)


def test_any_other_error_is_one_line_too(monkeypatch, capsys):
    def fails():
        raise RuntimeError("no such thing")

    with pytest.raises(common.typer.Exit):
        common.friendly(fails)()
    assert capsys.readouterr().err.startswith("error: RuntimeError: no such thing (a fault of nestling or of this")


def test_without_a_home_the_cache_is_temporary_and_ones_own(tmp_path, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in ("NESTLING_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(places.Path, "home", nowhere)
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = places.cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)  # a library is loaded from it
    with pytest.raises(PermissionError, match="belongs to someone else"):
        places.cache_folder()
