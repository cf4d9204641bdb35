"""Two processes asked at once: answers, errors, a process that dies."""

import os
import signal

import pytest

from experiments.demo.pair import Pair, WorkerError


class Box:
    """What the processes of these tests hold."""

    def __init__(self, value):
        if value is None:
            raise ValueError("a box needs a value")
        self.value = value

    def add(self, number):
        """An answer."""
        self.value += number
        return self.value

    def fail(self, kind):
        """An error."""
        raise {"value": ValueError, "bug": KeyError}[kind](f"box {self.value}")

    def threads(self):
        """What torch was told."""
        import torch

        return torch.get_num_threads()

    def die(self):
        """A process killed from outside."""
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def pair():
    """Two boxes, 1 and 10."""
    made = Pair(Box, {"a": (1,), "b": (10,)})
    yield made
    made.close()


def test_both_answer_and_each_is_heard(pair):
    """Answers come by name, and one by one as they are known."""
    heard = []
    first = pair.ask("add", 5, heard=lambda name, answer: heard.append((name, answer)))
    assert first == {"a": 6, "b": 15}
    assert sorted(heard) == [("a", 6), ("b", 15)]
    assert pair.ask("threads") == {"a": 1, "b": 1}


def test_an_error_is_raised_here_with_its_kind(pair):
    """Bad input stays a ValueError; a bug brings its traceback."""
    with pytest.raises(ValueError, match="box"):
        pair.ask("fail", "value")


def test_making_can_fail():
    """The error of the constructor is the error here."""
    with pytest.raises(ValueError, match="needs a value"):
        Pair(Box, {"a": (None,), "b": (1,)})


def test_a_bug_and_a_killed_process_are_told_apart():
    """One has a traceback, the other none to show."""
    pair = Pair(Box, {"a": (1,)})
    try:
        with pytest.raises(WorkerError, match="KeyError"):
            pair.ask("fail", "bug")
        assert pair.ask("add", 1) == {"a": 2}
        with pytest.raises(WorkerError, match="ended by itself"):
            pair.ask("die")
    finally:
        pair.close()
