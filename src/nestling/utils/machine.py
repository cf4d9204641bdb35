"""The machine a run is on: its device, and requests to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def find_device(name: str, local: int | None = None) -> torch.device:
    """The device of a name; "auto" takes a GPU if there is one. ValueError if it is not available.

    Args:
        local: of several processes on this machine, the number of this one: each takes the GPU of its number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and local is not None:
        if ":" in name:
            raise ValueError(
                f"device {name!r} is one GPU, and several processes train: use 'cuda', and each has its own"
            )
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here: {str(error).splitlines()[0]}") from None
    return device


@contextmanager
def stop_requests(signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[threading.Event]:
    """An event that one of the signals sets; a second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {}

    def request(number, _frame) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in signals:
        before[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
