"""Runs an experiment from its folder: configuration, missing runs, then summary, table and figure."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from experiments.catalog import names
from experiments.shared.interface import Experiment, entries, find, folder_of
from experiments.shared.models.paper import write
from experiments.shared.results import Results, finite
from experiments.shared.scheduler import run_jobs
from nestling.training.config import unknown
from nestling.utils.files import write_text
from nestling.utils.locks import sole_writer
from nestling.utils.machine import find_device


def run_experiment(
    name: str,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    workers: int = 1,
    device: str = "cpu",
    only: list[str] | None = None,
    time_limit: float | None = None,
    smoke: bool = False,
    report_only: bool = False,
    options: dict[str, Any] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Run what an experiment still lacks and write `summary.json`, `table.md` and `plot.png` into its folder.

    Args:
        name: one of `experiments.catalog.names()`.
        out: the folder of settings and results; its `config.json` is used, or written with the defaults. None: the
            experiment's own, for a smoke run `runs/NAME-smoke` here.
        data: the data's folder; None: the one of the experiment in the folder that NESTLING_DATA names.
        workers: processes of one thread each; 0 runs in this process.
        device: where models are trained, "cpu" or "cuda"; several workers share one GPU.
        only: names of contenders; the others keep what results they have and are not run.
        time_limit: seconds after which no further run starts.
        smoke: a tiny version that takes seconds, in a folder of its own.
        report_only: run nothing, write the report from the results there are.
        options: changes to the configuration by dotted name.
        show: progress on stderr.

    Returns:
        The summary, with `missing` (runs still to do) and `failed` (errors by run).

    Raises:
        ValueError: an unknown experiment, contender, option or device, no data, nothing to report on, a folder in
            which another is running.
    """
    experiment = find(name)
    if workers < 0:
        raise ValueError(f"workers must not be negative, not {workers}")
    folder = Path(out) if out else Path("runs", f"{name}-smoke") if smoke else folder_of(name)
    settings = load(name, folder, options or {}, smoke)
    known = [c.name for c in settings.contenders]
    for wanted in only or ():
        if wanted not in known:
            raise ValueError(unknown("contender", wanted, known))
    work = experiment.work(settings, data, smoke)
    if device != "cpu":
        if not work.anywhere:
            raise ValueError(f"experiment {name!r} runs on a CPU only; leave --device out")
        work.device = str(find_device(device, None))
    with sole_writer(folder):  # results are read, added to and reported on
        results = Results(folder / "results.jsonl")
        chosen = [c for c in settings.contenders if not only or c.name in only]
        fingerprint = functools.cache(work.fingerprint)

        def row(job: Any) -> dict[str, Any] | None:
            return results.get(job, fingerprint(job))

        def plan() -> list[Any]:
            return experiment.plan(settings, chosen, row)

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
        missing = [job.label for job in plan() if not row(job)]
        if not missing and not report_only:
            work.finish(chosen)
        summary = experiment.summarize(settings, settings.contenders, row)
        if not entries(experiment, summary):
            raise ValueError(f"{folder} holds no results of these settings yet; " + (_listed(failed) or "run it first"))
        write_report(experiment, summary, folder)
        return finite(summary) | {"missing": missing, "failed": failed, "folder": str(folder)}


def write_paper(name: str, out: str | Path | None = None) -> tuple[Path, str]:
    """Configurations of an experiment at the paper's size, checked and not run: their folder, and a table of them.

    Raises:
        ValueError: the experiment has none.
    """
    experiment = find(name)
    if not hasattr(experiment, "paper"):
        known = [n for n in names() if "\ndef paper(" in (folder_of(n) / "experiment.py").read_text(encoding="utf-8")]
        raise ValueError(f"experiment {name!r} has no configurations at the paper's size; {', '.join(known)} has")
    folder = Path(out) if out else Path("runs", f"{name}-paper")
    return folder, write(experiment.paper(), folder)


def load(name: str, folder: Path, options: dict[str, Any], smoke: bool = False) -> Any:
    """The experiment's settings: the folder's `config.json` over the defaults, changed by `options`."""
    path = folder / "config.json"
    settings = find(name).defaults()
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


def write_report(experiment: Experiment, summary: dict[str, Any], folder: Path) -> None:
    """`summary.json`, `table.md` and `plot.png` from a summary."""
    write_text(folder / "summary.json", json.dumps(finite(summary), indent=1) + "\n")
    write_text(folder / "table.md", experiment.table(summary))
    experiment.plot(summary, folder / "plot.png")


def _listed(failed: dict[str, str]) -> str:
    return "; ".join(f"{key}: {error}" for key, error in failed.items())
