"""Runs an experiment from its folder: configuration, missing runs, then summary, table and figure.

An experiment is a module with `defaults()` (its settings, which know `stored` and `smoke`), `plan`, `summarize`,
`table` and `plot`; one of `experiments.shared.optimizers` also has `work(settings, data, smoke)`, which does its jobs.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

from experiments.shared import EXPERIMENTS
from experiments.shared.config import Experiment
from experiments.shared.results import Results, finite
from experiments.shared.runs import TextWork
from experiments.shared.scheduler import run_jobs
from experiments.shared.speed import layer_speeds
from nestling.training.config import unknown
from nestling.utils.files import write_text


def run_experiment(
    name: str,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    workers: int = 1,
    only: list[str] | None = None,
    time_limit: float | None = None,
    smoke: bool = False,
    report_only: bool = False,
    options: dict[str, Any] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Run what an experiment still lacks and write `summary.json`, `table.md` and `plot.png` into its folder.

    Args:
        name: one of `experiments.shared.EXPERIMENTS`.
        out: the folder, `experiments/NAME` if None; its `config.json` is used, or written with the defaults.
        data: the data's folder; None: the one of the experiment in the folder that NESTLING_DATA names.
        workers: processes of one thread each; 0 runs in this process.
        only: names of contenders; the others keep what results they have and are not run.
        time_limit: seconds after which no further run starts.
        smoke: a tiny version that takes seconds, in a folder of its own.
        report_only: run nothing, write the report from the results there are.
        options: changes to the configuration by dotted name.
        show: progress on stderr.

    Returns:
        The summary, with `missing` (runs still to do) and `failed` (errors by run).

    Raises:
        ValueError: an unknown experiment, contender or option, no data, nothing to report on.
    """
    module = _module(name)
    if workers < 0:
        raise ValueError(f"workers must not be negative, not {workers}")
    folder = Path(out) if out else Path("runs" if smoke else "experiments") / (f"{name}-smoke" if smoke else name)
    settings = load(name, folder, options or {}, smoke)
    known = [c.name for c in settings.contenders]
    for wanted in only or ():
        if wanted not in known:
            raise ValueError(unknown("contender", wanted, known))
    work = TextWork(settings, data, smoke) if isinstance(settings, Experiment) else module.work(settings, data, smoke)
    results = Results(folder / "results.jsonl")
    chosen = [c for c in settings.contenders if not only or c.name in only]
    fingerprint = functools.cache(work.fingerprint)

    def row(job: Any) -> dict[str, Any] | None:
        return results.get(job, fingerprint(job))

    def plan() -> list[Any]:
        return module.plan(settings, chosen, row)

    failed: dict[str, str] = {}
    if not report_only:
        work.check(chosen)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists() or smoke:
            save(settings, folder / "config.json")
        failed = run_jobs(
            name, work, results, plan, lambda job: row(job) is not None,
            workers=workers, time_limit=time_limit, show=show,
        )  # fmt: skip
    missing = [j.key + (" (test)" if j.kind == "test" else "") for j in plan() if not row(j)]
    extra = []
    if isinstance(settings, Experiment):
        timed = [] if report_only or missing else chosen  # alone on the machine, after the last run
        extra = [layer_speeds(settings, timed, folder / "speed.json")]
    summary = module.summarize(settings, settings.contenders, row, *extra)
    if not summary[next(k for k in ("contenders", "settings", "groups") if k in summary)]:
        raise ValueError(f"{folder} holds no results of these settings yet; " + (_listed(failed) or "run it first"))
    write_report(module, summary, folder)
    return finite(summary) | {"missing": missing, "failed": failed, "folder": str(folder)}


def load(name: str, folder: Path, options: dict[str, Any], smoke: bool = False) -> Any:
    """The experiment's settings: the folder's `config.json` over the defaults, changed by `options`."""
    path = folder / "config.json"
    settings = _module(name).defaults()
    if path.exists() and not smoke:
        settings = type(settings).load(path)
    if settings.name != name:
        raise ValueError(f"{path} is the configuration of {settings.name!r}, not of {name!r}: choose another --out")
    if smoke:
        settings = settings.smoke()
    return settings.changed(**(options | {"out": str(folder)}))


def save(settings: Any, path: Path) -> None:
    """Write what a configuration wants kept."""
    write_text(path, json.dumps(settings.stored(), indent=2) + "\n")


def write_report(module: Any, summary: dict[str, Any], folder: Path) -> None:
    """`summary.json`, `table.md` and `plot.png` from a summary."""
    write_text(folder / "summary.json", json.dumps(finite(summary), indent=1) + "\n")
    write_text(folder / "table.md", module.table(summary))
    module.plot(summary, folder / "plot.png")


def _module(name: str) -> Any:
    if name not in EXPERIMENTS:
        raise ValueError(unknown("experiment", name, EXPERIMENTS))
    return importlib.import_module(f"experiments.{name}.experiment")


def _listed(failed: dict[str, str]) -> str:
    return "; ".join(f"{key}: {error}" for key, error in failed.items())
