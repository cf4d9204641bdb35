"""Runs an experiment from its folder: configuration, missing runs, then summary, table and figure."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from nestling.evals import EXPERIMENTS, cost, quality, stability
from nestling.evals.config import MACHINE, Contender, Experiment, Job
from nestling.evals.corpus import find_files, load_texts
from nestling.evals.results import Results, finite
from nestling.evals.scheduler import run_jobs
from nestling.evals.speed import layer_speeds
from nestling.training.config import unknown
from nestling.training.files import write_text

_MODULES = {"quality": quality, "cost": cost, "stability": stability}

# a smoke run has every contender, so that none is found broken after an hour
_SMOKE = {
    "steps": 4,
    "seeds": [0, 1],
    "data.seq_len": 24,
    "data.batch_size": 2,
    "data.val_fraction": 0.02,
    "test_text": "",
    "eval_windows": 4,
    "eval_batch_size": 2,
    "position_bins": 4,
    "curve_points": 4,
    "speed_shape": [1, 16, 16, 2],
}
_SMOKE_MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


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
        name: "quality", "cost" or "stability".
        out: the folder, `experiments/NAME` if None; its `config.json` is used, or written with the defaults.
        data: a folder of .txt files; None: `books` in the folder that NESTLING_DATA names.
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
        ValueError: an unknown experiment, contender or option, no text, nothing to report on.
    """
    if name not in EXPERIMENTS:
        raise ValueError(unknown("experiment", name, EXPERIMENTS))
    if workers < 0:
        raise ValueError(f"workers must not be negative, not {workers}")
    folder = Path(out) if out else Path("runs" if smoke else "experiments") / (f"{name}-smoke" if smoke else name)
    experiment = load(name, folder, options or {}, smoke)
    module, known = _MODULES[name], [c.name for c in experiment.contenders]
    for wanted in only or ():
        if wanted not in known:
            raise ValueError(unknown("contender", wanted, known))
    files = find_files(data, smoke)
    texts = load_texts(files, experiment.test_text, experiment.data)
    results = Results(folder / "results.jsonl")
    chosen = [c for c in experiment.contenders if not only or c.name in only]

    fingerprint = functools.cache(lambda job: experiment.fingerprint(job, texts.fingerprint))

    def row(job: Job) -> dict[str, Any] | None:
        return results.get(job, fingerprint(job))

    def plan() -> list[Job]:
        return module.plan(experiment, chosen, row)

    failed: dict[str, str] = {}
    if not report_only:
        _check_models(experiment, chosen, len(texts.corpus.tokenizer))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists() or smoke:
            save(experiment, folder / "config.json")
        failed = run_jobs(
            experiment, files, texts, results, plan, lambda job: row(job) is not None,
            workers=workers, time_limit=time_limit, show=show,
        )  # fmt: skip
    missing = [j.key + (" (test)" if j.kind == "test" else "") for j in plan() if not row(j)]
    timed = [] if report_only or missing else chosen  # alone on the machine, after the last run
    speeds = layer_speeds(experiment, timed, folder / "speed.json")
    summary = module.summarize(experiment, experiment.contenders, row, speeds)
    if not summary[next(k for k in ("contenders", "settings", "groups") if k in summary)]:
        raise ValueError(f"{folder} holds no results of these settings yet; " + (_listed(failed) or "run it first"))
    write_report(module, summary, folder)
    return finite(summary) | {"missing": missing, "failed": failed, "folder": str(folder)}


def load(name: str, folder: Path, options: dict[str, Any], smoke: bool = False) -> Experiment:
    """The experiment's configuration: the folder's `config.json` over the defaults, changed by `options`."""
    path = folder / "config.json"
    experiment = Experiment.load(path) if path.exists() and not smoke else _MODULES[name].defaults()
    if experiment.name != name:
        raise ValueError(f"{path} is the configuration of {experiment.name!r}, not of {name!r}: choose another --out")
    if smoke:
        model = experiment.model.options | _SMOKE_MODEL
        contenders = [dataclasses.asdict(c) | {"seeds": None} for c in experiment.contenders]
        changes = {"model.options": model, "contenders": contenders, "lrs": experiment.lrs[:2]}
        changes |= {"speed_rounds": min(1, experiment.speed_rounds), "long_context": min(2, experiment.long_context)}
        experiment = experiment.changed(**(_SMOKE | changes))
    return experiment.changed(**(options | {"out": str(folder)}))


def save(experiment: Experiment, path: Path) -> None:
    """Write a configuration without what belongs to this machine or comes from the grid."""
    values = experiment.to_dict()
    for name in MACHINE + ("seed", "precision"):
        values.pop(name, None)
    values["data"] = {name: values["data"][name] for name in ("seq_len", "batch_size", "val_fraction")}
    values["optim"].pop("lr")
    for contender in values["contenders"]:
        for name in ("options", "model", "seeds"):
            if not contender[name]:
                contender.pop(name)
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_report(module: Any, summary: dict[str, Any], folder: Path) -> None:
    """`summary.json`, `table.md` and `plot.png` from a summary."""
    write_text(folder / "summary.json", json.dumps(finite(summary), indent=1) + "\n")
    write_text(folder / "table.md", module.table(summary))
    module.plot(summary, folder / "plot.png")


def _check_models(experiment: Experiment, contenders: list[Contender], vocab_size: int) -> None:
    """Every contender's configuration is built once, so that a wrong option is an error before the first run."""
    from nestling.evals.runs import model_config

    for contender in contenders:
        try:
            model_config(experiment, contender.name, vocab_size)
        except (ValueError, TypeError) as error:
            raise ValueError(f"contender {contender.name!r}: {error}") from error


def _listed(failed: dict[str, str]) -> str:
    return "; ".join(f"{key}: {error}" for key, error in failed.items())
