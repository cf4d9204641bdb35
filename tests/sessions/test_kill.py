"""A reading session that is really killed, at random moments, ends with the state of one that was not."""

import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors import safe_open

from nestling.cms.files import save_stacked
from processes import Command

CHUNK = 8


@pytest.fixture
def start(model, tokenizer, tmp_path):
    """Starts the command on one thread."""
    save_stacked(model, tmp_path / "model", tokenizer)

    def begin(names, state, pipe=False):
        command = ["learn", tmp_path / "model", *names, "--state", state, "--threads", "1", "--save-every", "1"]
        return Command([*command, "--probe", "32", "--quiet", "--json"], tmp_path / "said", pipe)

    return begin


def notes(state):
    """What the file says of the session, None before there is a file."""
    if not state.exists():
        return None
    content = state.read_bytes()  # at once: the file is replaced all the time
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["notes"])["reading"]


def kill_at(process, state, tokens, delay):
    """SIGKILL the process `delay` seconds after its state says that so many tokens were read; what it says then."""
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        found = notes(state)
        if found is not None and found["tokens"] >= tokens:
            break
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    return notes(state)["tokens"]


def content(state):
    """The tensors of a state and what was measured."""
    with safe_open(str(state), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    found = notes(state)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in found["rows"]]
    return tensors, rows, found["tokens"], found["loss"], found["norms"]


def assert_same(a, b, places):
    (ours, *mine), (theirs, *others) = content(a), content(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), f"killed at {places}"
    assert mine == others, f"killed at {places}"


# in one process: test_session.py, test_killed_anywhere_and_resumed_is_bit_for_bit_the_same
@pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="processes: NESTLING_SLOW_TESTS=1 runs it")
@pytest.mark.timeout(240)
def test_killed_twice_and_resumed_is_bit_for_bit_the_same(start, model, session, write, tmp_path):
    texts = [write("a.txt", 900), write("b.txt", 700)]
    whole, state = tmp_path / "whole.state", tmp_path / "my.state"
    session(model, texts, whole, probe=32).run()
    choice, places = random.Random(time.time_ns()), []
    for low, high in ((16, 500), (600, 1300)):
        places.append((choice.randint(low, high), choice.random() * 0.05))
        reached = kill_at(start(texts, state), state, *places[-1])
        assert places[-1][0] <= reached < 1602, places
    last = start(texts, state)
    out, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    assert json.loads(out)["resumed"] is True
    assert_same(state, whole, places)


# in one process: test_session.py, test_a_killed_pipe_goes_on_from_its_journal
@pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="processes: NESTLING_SLOW_TESTS=1 runs it")
@pytest.mark.timeout(240)
def test_a_pipe_loses_nothing_that_came_out_of_it(start, model, session, write, tmp_path):
    text = write("a.txt", 3000).read_bytes()
    whole, state, journal = tmp_path / "whole.state", tmp_path / "my.state", tmp_path / "my.state.journal"
    session(model, ["-"], whole, piped=text, probe=32).run()
    came, choice = b"", random.Random(time.time_ns())
    place = (choice.randint(100, 800), choice.random() * 0.05)
    process = start(["-"], state, True)
    process.stdin.write(text[:1500])
    process.stdin.flush()
    kill_at(process, state, *place)
    came = journal.read_bytes().split(b"\n", 1)[1]
    assert text.startswith(came) and len(came) >= place[0] - CHUNK

    process = start(["-"], state, True)
    process.stdin.write(text[len(came) : 2500])
    process.stdin.flush()
    while notes(state)["tokens"] < 1000:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # it waits for the third kilobyte, or is about to
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"the same command goes on" in errors
    came = journal.read_bytes().split(b"\n", 1)[1]
    assert text.startswith(came)

    process = start(["-"], state, True)
    _, errors = process.communicate(text[len(came) :])
    assert process.returncode == 0, errors.decode()
    assert not journal.exists()
    assert_same(state, whole, place)
