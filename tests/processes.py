"""Processes of their own for tests, forked from a server that has imported everything: a start costs milliseconds.

Memory, signals, pipes and exit codes are a process's own. What a fork leaves out is the start of the interpreter:
`tests/experiments/test_discovery.py` starts the command, and the command a worker, as anybody would.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from slowly import ASKED

PRELOADED = ["nestling.models", "nestling.training", "nestling.sessions", "nestling.generation", "nestling.cli.main"]


def fork_instead_of_spawn() -> None:
    """Whoever asks multiprocessing for its context "spawn" gets "forkserver", whose processes are as fresh."""
    get_context = multiprocessing.get_context
    get_context("forkserver").set_forkserver_preload(PRELOADED)
    multiprocessing.get_context = lambda method=None: get_context("forkserver" if method == "spawn" else method)


class Command:
    """`python -m nestling ARGUMENTS`, running; as subprocess.Popen shows a process.

    Args:
        arguments: of the command.
        folder: for files with what it says.
        pipe: whether `stdin` is open for writing; else it is empty.
        environment: what is set for it besides.
    """

    def __init__(
        self, arguments: list[object], folder: Path, pipe: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        folder.mkdir(exist_ok=True)
        self._said = [folder / f"{len(list(folder.iterdir()))}.{name}" for name in ("out", "err")]
        theirs, ours = context.Pipe(duplex=False)
        words = [str(argument) for argument in arguments]
        self._process = context.Process(target=_run, args=(words, theirs, self._said, environment or {}), daemon=True)
        self._process.start()
        theirs.close()
        self.stdin = os.fdopen(os.dup(ours.fileno()), "wb")
        ours.close()
        if not pipe:
            self.stdin.close()

    @property
    def returncode(self) -> int | None:
        """As of a finished process: its exit code, less than zero for a signal."""
        return self._process.exitcode

    poll = returncode.fget

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Any signal."""
        os.kill(self._process.pid, number)

    def communicate(self, text: bytes = b"") -> tuple[bytes, bytes]:
        """Write the text, close the pipe, wait; what it said on stdout and stderr."""
        if not self.stdin.closed:
            self.stdin.write(text)
            self.stdin.close()
        self._process.join()
        return tuple(path.read_bytes() for path in self._said)


def as_torchrun(world: int) -> list[dict[str, str]]:
    """What torchrun sets for each of so many processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(world)]


def on_ranks(world: int, work: Callable, *arguments: object) -> None:
    """Call `work(*arguments)` in so many processes of one gloo group; an error in one is an error here."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    started = [
        context.Process(target=_at_rank, args=(one, answers, work, arguments), daemon=True)
        for one in as_torchrun(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    said = [answers.get() for _ in range(world) if not answers.empty()]
    failed = [text for text in said if text]
    assert not failed, "\n".join(failed)
    assert [process.exitcode for process in started] == [0] * world


def _at_rank(environment: dict[str, str], answers, work: Callable, arguments: tuple) -> None:
    import torch

    from nestling.utils.ranks import process_group

    os.environ.update(environment)
    torch.set_num_threads(1)
    # a rank that waits for ever; compilers and all settings take minutes on a machine that has other work
    faulthandler.dump_traceback_later(1200 if ASKED else 300, exit=True)
    try:
        with process_group("cpu"):
            work(*arguments)
        answers.put("")
    except BaseException:
        answers.put(f"rank {environment['RANK']}: {traceback.format_exc()}")
        os._exit(1)  # without the group's end, for which the others would have to be there


def _run(arguments: list[str], pipe, said: list[Path], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    for number, file in enumerate([pipe, *(path.open("wb") for path in said)]):
        os.dup2(file.fileno(), number)
        file.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["nestling", *arguments]
    runpy.run_module("nestling", run_name="__main__", alter_sys=True)
