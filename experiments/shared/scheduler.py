"""Runs the jobs of a plan in processes of one thread each; what is finished is never done again."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from experiments.shared.results import Results
from experiments.shared.work import Job, Work

Plan = Callable[[], list[Job]]  # every job that the results so far call for, done or not
_queue: Any = None  # of a worker process: where it tells how far it is


def run_jobs(
    name: str,
    work: Work,
    results: Results,
    plan: Plan,
    done: Callable[[Job], bool],
    *,
    workers: int = 1,
    time_limit: float | None = None,
    show: bool = True,
) -> dict[str, str]:
    """Run what a plan still needs, asking it again after each result; returns the error of each job that failed.

    Args:
        name: the experiment's, for the display.
        work: what does a job; worker processes get a copy.
        results: where rows go.
        plan: all jobs known to be needed, most urgent first.
        done: whether a job has its row; it is skipped then.
        workers: processes of one thread each; 0 runs in this process.
        time_limit: seconds after which no further job starts.
        show: a progress bar in a terminal, a line per result elsewhere.
    """
    failed: dict[str, str] = {}
    deadline = None if time_limit is None else time.monotonic() + time_limit
    running: dict[Future, Job] = {}
    jobs: list[Job] = plan()

    def waiting() -> list[Job]:
        if deadline is not None and time.monotonic() > deadline:
            return []
        busy = set(running.values())
        return [j for j in jobs if not done(j) and j not in busy and j.key not in failed]

    with _Display(name, work, show) as display, _pool(workers) as (submit, queue):
        while True:
            while len(running) < max(1, workers) and (todo := waiting()):
                running[submit(work, todo[0], display)] = todo[0]
                display.update(jobs, sum(map(done, jobs)), running.values())
            if not running:
                return failed
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            while queue is not None and not queue.empty():
                display.progress(*queue.get())
            for future in finished:
                job = running.pop(future)
                try:
                    results.add(future.result())
                    display.finished(job, future.result())
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    failed[job.key] = f"{type(error).__name__}: {error}"
                    display.say(f"{job.key} failed: {failed[job.key]}")
            if finished:
                jobs = plan()
            display.update(jobs, sum(map(done, jobs)), running.values())


@contextmanager
def _pool(workers: int):
    """(submit, queue): jobs go to processes that tell their steps through the queue, or run here at once."""
    if workers == 0:
        yield _run_here, None
        return
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(dict.fromkeys(before, "1"))  # read when a worker imports torch
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(queue,))
    try:
        yield lambda work, job, _: pool.submit(_work, work, job), queue
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    else:
        pool.shutdown()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _run_here(work: Work, job: Job, display: _Display) -> Future:
    future: Future = Future()
    try:
        future.set_result(work(job, lambda step, loss: display.progress(job.key, step, loss)))
    except Exception as error:
        future.set_exception(error)
    return future


def _start(queue: Any) -> None:
    import torch

    global _queue
    _queue = queue
    torch.set_num_threads(1)


def _work(work: Work, job: Job) -> dict[str, Any]:
    last = 0.0

    def progress(step: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            _queue.put((job.key, step, loss))

    return work(job, progress)


class _Display:
    """A bar over the jobs with what is running, or a line per finished job where there is no terminal."""

    def __init__(self, name: str, work: Work, show: bool) -> None:
        from rich.console import Console

        self._console, self._name, self._work, self._show = Console(stderr=True), name, work, show
        self._steps: dict[str, str] = {}
        self._bar = None

    def __enter__(self) -> _Display:
        if self._show and self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = [TextColumn(self._name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}")]
            self._bar = Progress(*columns, TimeElapsedColumn(), console=self._console)
            self._task = self._bar.add_task(self._name, now="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def progress(self, key: str, step: int, loss: float) -> None:
        self._steps[key] = f" step {step} loss {loss:.2f}"

    def update(self, jobs: list[Job], done: int, running) -> None:
        self._count = f"{done}/{len(jobs)}"
        if self._bar is not None:
            now = " | ".join(f"{j.key}{self._steps.get(j.key, '')}" for j in running)
            self._bar.update(self._task, completed=done, total=len(jobs), now=now)

    def finished(self, job: Job, row: dict[str, Any]) -> None:
        self.say(self._work.describe(job, row), "")

    def say(self, text: str, style: str = "yellow") -> None:
        if self._bar is not None:
            self._console.print(text, style=style, highlight=False, markup=False)
        elif self._show:
            print(f"[{self._count} before] {text}", file=sys.stderr, flush=True)
