"""`python -m benchmarks.gpu --out FOLDER [--minutes 5] [--quick] [--only PART,...]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["NESTLING_COMPILED"] = "0"  # the C++ forms are a CPU's
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not spoil the fork


@dataclass(frozen=True)
class Part:
    """A module's `run`, in a process of its own: what breaks the device for one does not for the next.

    seconds: of its turn, if the whole has five minutes.  early: it begins right after the first part, beside the
    others, and waits for its turn before it measures times; what it cannot prepare by then it does in its turn.
    """

    name: str
    seconds: float
    early: bool = False


PARTS = (
    Part("facts", 15),
    Part("check_layers", 45),
    Part("check_models", 25, early=True),
    Part("speed", 70),
    Part("training", 90, early=True),
    Part("graphs", 25),
    Part("profiling", 18),
    Part("decode", 20),
    Part("optimizers", 15),
    Part("peers", 12, early=True),
    Part("compiling", 12, early=True),
)
PREPARE = 30  # seconds that the first part that measures times waits at most for those that compile
CHECKS = ("facts", "check_layers", "check_models")
QUICK = 120.0  # seconds of a part in the quick form


class Running:
    """A part's process, and how it is told that its turn has come."""

    def __init__(self, part: Part, options: dict[str, Any], folder: Path, log: Path) -> None:
        context = multiprocessing.get_context("fork")  # what was imported once is there for all
        self.path = folder / f"{part.name}.json"
        self.ready, self.event, self.seconds = context.Event(), context.Event(), context.Value("d", 0.0)
        arguments = (part, options, self.path, log, self.ready, self.event, self.seconds)
        self.process = context.Process(target=_child, args=arguments)
        self.process.start()

    def take_turn(self, seconds: float) -> None:
        self.seconds.value = seconds
        self.event.set()
        self._signal(signal.SIGCONT)

    def pause(self) -> None:
        """Hold it until its turn: what it compiles and tries would show in the times of others."""
        self._signal(signal.SIGSTOP)

    def stop(self) -> None:
        """End it and whatever it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.is_alive():
                self._signal(number)
                self._signal(signal.SIGCONT)
                self.process.join(3)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def found(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}


def _child(part: Part, options: dict[str, Any], path: Path, log: Path, ready: Any, event: Any, seconds: Any) -> None:
    import importlib

    import torch

    from benchmarks.gpu import clock
    from benchmarks.gpu.record import Record, describe

    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.manual_seed(0)
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    clock.patience = 0.02 if options["quick"] else 1.0
    record = Record(path, 0.0)

    def turn() -> None:
        ready.set()
        event.wait()
        record.seconds = seconds.value
        record.start()

    print(f"== {part.name}", flush=True)
    try:
        module = importlib.import_module(f"benchmarks.gpu.{part.name}")
        if part.early:
            module.run(record, options, turn)
        else:
            turn()
            module.run(record, options)
        record.put("part", "finished", True)
    except BaseException as error:
        record.put("part", "failed", describe(error))
        raise


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that everything runs")
    parser.add_argument("--only", default="", help="parts, by comma")
    given = parser.parse_args()
    begin = time.monotonic()
    names = [part.name for part in PARTS]
    only = [name for name in given.only.split(",") if name] or names
    if unknown := set(only) - set(names):
        parser.error(f"parts are {', '.join(names)}; got {', '.join(sorted(unknown))}")

    import matplotlib

    matplotlib.use("Agg")
    import nestling.models  # noqa: F401 - before the processes part
    from benchmarks.gpu.report import write

    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "log.txt"
    log.write_text("")
    options = {"quick": given.quick, "threads": 1 if given.quick else 0, "rates": {}}
    results: dict[str, Any] = {"minutes": given.minutes, "quick": given.quick, "only": given.only}
    results["seconds imports"] = time.monotonic() - begin
    results["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    parts = [part for part in PARTS if part.name in only or part.name == "facts"]
    with tempfile.TemporaryDirectory() as folder:
        _run(parts, options, given, begin, Path(folder), log, results)
    text = write(given.out, results)
    print(text, flush=True)
    return 0


def _run(
    parts: list[Part], options: dict, given: Any, begin: float, folder: Path, log: Path, results: dict[str, Any]
) -> None:
    from benchmarks.gpu.record import write_json

    total = 60 * given.minutes
    running: dict[str, Running] = {}

    def start(part: Part) -> None:
        if part.name not in running:
            running[part.name] = Running(part, options, folder, log)

    def save(name: str) -> None:
        results[name] = running[name].found()
        write_json(given.out / "results.json", results)

    try:
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            left = total - (time.monotonic() - begin) - 8  # for the plots
            seconds = QUICK if given.quick else min(left, part.seconds * given.minutes / 5)
            if seconds < 3:
                results[part.name] = {"part": {"left out": "no time"}}
                continue
            start(part)
            one = running[part.name]
            one.take_turn(seconds)
            stop = time.monotonic() + seconds
            _wait(one, stop, lambda name=part.name: save(name))
            one.stop()
            save(part.name)
            done = results[part.name].get("part", {}).get("finished", False)
            spent = seconds - (stop - time.monotonic())
            state = "done" if done else "stopped or failed"
            results[part.name].setdefault("part", {})["turn seconds"] = round(spent, 1)
            print(f"{time.monotonic() - begin:6.1f} s  {part.name}: {state} after {spent:.1f} s", flush=True)
            if part.name == "facts":
                options["device"] = results["facts"].get("device", {}).get("what", {})
                options["rates"] = {k: v for k, v in results["facts"].get("rates", {}).items() if isinstance(v, float)}
                if options["device"].get("name") == "CPU" and not given.quick:
                    raise SystemExit("torch finds no GPU here: --quick runs the same at toy sizes")
                for other in parts:
                    if other.early and not given.quick:
                        start(other)
            if part.name in CHECKS and following and following.name not in CHECKS:
                _prepare(running, PREPARE * given.minutes / 5)
    finally:
        for one in running.values():
            one.stop()
        write_json(given.out / "results.json", results)


def _prepare(running: dict[str, Running], seconds: float) -> None:
    """Wait for the parts that compile; hold what is not ready after so many seconds."""
    stop = time.monotonic() + seconds
    for one in running.values():
        while one.process.is_alive() and not one.ready.wait(0.2) and time.monotonic() < stop:
            pass
        if one.process.is_alive() and not one.ready.is_set():
            one.pause()


def _wait(one: Running, stop: float, save: Callable[[], None]) -> None:
    """Until the part is over or its time is, keeping what it has found so far."""
    while one.process.is_alive() and time.monotonic() < stop + 2:  # it ends by itself, if it can
        one.process.join(1.0)
        save()


if __name__ == "__main__":
    sys.exit(main())
