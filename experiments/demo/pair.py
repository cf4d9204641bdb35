"""Two objects in two processes, asked the same question at the same time."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


class WorkerError(RuntimeError):
    """A process ended or failed without an error of its own that could be passed on."""


class Pair:
    """Processes by name, each holding an object made by `make(*arguments)`.

    Args:
        make: an importable function or class.
        arguments: its arguments, by name of the process.
        threads: of torch in each process.
    """

    def __init__(self, make: Callable[..., Any], arguments: dict[str, tuple], threads: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes, self._ends = {}, {}
        for name, args in arguments.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, args, threads), daemon=True, name=name)
            process.start()
            theirs.close()
            self._processes[name], self._ends[name] = process, ours
        try:
            self._gather()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *args: Any, heard: Callable[[str, Any], None] | None = None) -> dict[str, Any]:
        """Call a method of every object at once; returns what each answered.

        `heard(name, answer)` is called as soon as one is known. An exception of a process is raised here.
        """
        for end in self._ends.values():
            end.send((method, args))
        return self._gather(heard)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for name, process in self._processes.items():
            self._ends[name].close()
            process.terminate()
            process.join(5)

    def _gather(self, heard: Callable[[str, Any], None] | None = None) -> dict[str, Any]:
        names = {end: name for name, end in self._ends.items()}
        open_ends, answers = list(names), {}
        while open_ends:
            for end in wait(open_ends):
                name = names[end]
                open_ends.remove(end)
                answers[name] = _receive(end, name)
                if heard is not None:
                    heard(name, answers[name])
        return {name: answers[name] for name in self._ends}


def _receive(end: Connection, name: str) -> Any:
    try:
        went_well, answer = end.recv()
    except (EOFError, OSError):
        raise WorkerError(f"the process that trains {name} ended by itself (killed, perhaps for memory)") from None
    if went_well:
        return answer
    error, report = answer
    if isinstance(error, ValueError | TypeError | OSError):
        raise error
    raise WorkerError(f"the process that trains {name} failed:\n{report}")


def _serve(end: Connection, make: Callable[..., Any], args: tuple, threads: int) -> None:
    """Make the object, then answer until the other side closes. Ctrl-C is the other side's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(threads)
    held = None
    while True:
        try:
            if held is None:
                held, answer = make(*args), None
            else:
                try:
                    method, values = end.recv()
                except (EOFError, OSError):
                    return
                answer = getattr(held, method)(*values)
            end.send((True, answer))
        except Exception as error:
            end.send((False, (_portable(error), traceback.format_exc())))
            if held is None:
                return


def _portable(error: Exception) -> Exception:
    """The error if it can travel, else its text."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(str(error))
    return error
