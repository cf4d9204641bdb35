"""The search itself: a study on disk that goes on where it stopped."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestling.tuning.objectives import Command, Failed, Pruned, TrainingRun
from nestling.tuning.space import DEFAULTS, Space, text_of
from nestling.utils.files import write_text
from nestling.utils.locks import sole_writer
from nestling.utils.machine import stop_requests

FILE = "study.journal"
GIVE_UP = 3  # failures in a row after which a search is hopeless


@dataclass
class Outcome:
    """How a search stands. `first` is the figure of the settings it began with, None if they were not tried."""

    best: dict[str, Any] | None
    value: float | None
    first: float | None
    paste: str
    finished: int
    pruned: int
    failed: int
    folder: str
    interrupted: bool = False
    errors: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def tune(
    objective: Command | TrainingRun | Callable[[Any], float],
    out: str | Path,
    *,
    space: Space | None = None,
    trials: int = 20,
    time_limit: float | None = None,
    maximize: bool = False,
    prune: bool = True,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Search until `trials` have ended in the study of a folder; what was done before counts.

    Args:
        objective: a command, a training run, or a function of an optuna trial.
        out: the study's folder.
        space: ranges by name; what the objective needs and `space` lacks comes from the defaults.
        trials: finished and pruned trials in the end.
        time_limit: seconds after which no further trial starts.
        maximize: the figure is better when larger.
        prune: stop a trial that does worse than the median of the others at the same step.
        seed: of the proposals.
        say: called with a line on every trial.

    Raises:
        ValueError: optuna is not installed, the folder holds another search or one is running there, the very first
            trial failed, or several in a row.
    """
    optuna = _optuna()
    if trials < 1:
        raise ValueError(f"trials must be at least 1, not {trials}")
    own = isinstance(objective, Command | TrainingRun)
    if own:
        space = objective.space(space or Space(), DEFAULTS)
    elif space:
        raise ValueError("--space is for --command and training runs; a function asks its trial for values itself")
    out = Path(out)
    start = space.start() if own else {}
    errors: list[str] = []
    with sole_writer(out), stop_requests() as stop:
        _same_search(out, objective, space, maximize)
        study = _open(optuna, out, maximize, prune, seed)
        if start and not _counted(optuna, study):
            study.enqueue_trial(start, skip_if_exists=True)
        deadline = None if time_limit is None else time.monotonic() + time_limit
        while _counted(optuna, study) < trials and not stop.is_set():
            if deadline is not None and time.monotonic() > deadline:
                break
            trial = study.ask()
            begun = time.monotonic()
            try:
                values = space.suggest(trial) if own else None
                figure, state = _run(optuna, objective, trial, values, stop)
            except (KeyboardInterrupt, SystemExit):
                _again(optuna, study, trial)
                stop.set()
                break
            except (Failed, ValueError) as error:
                if stop.is_set():  # the signal reached the command too
                    _again(optuna, study, trial)
                    break
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                errors.append(f"trial {trial.number} ({_shown(trial.params)}): {error}")
                ended = [t.state for t in study.trials if t.state.is_finished()]
                hopeless = ended[-GIVE_UP:] == [optuna.trial.TrialState.FAIL] * GIVE_UP
                if len(ended) == 1 or hopeless:
                    raise ValueError(errors[-1]) from None
                say(errors[-1])
                continue
            study.tell(trial, figure, state=state)
            best = _best(optuna, study)
            ending = "pruned" if state == optuna.trial.TrialState.PRUNED else f"{figure:.5g}"
            standing = "" if best is None else f", best {best.value:.5g}"
            count = f"{_counted(optuna, study)}/{trials}"
            say(f"trial {count}: {_shown(trial.params)} -> {ending}{standing}, {time.monotonic() - begun:.0f} s")
    return _outcome(optuna, study, objective, start, out, stop.is_set(), errors)


def _run(optuna: Any, objective: Any, trial: Any, values: dict[str, Any] | None, stop: Any) -> tuple[Any, Any]:
    """(figure, state) of a trial."""
    states = optuna.trial.TrialState

    def report(step: int, value: float) -> bool:
        if stop.is_set():
            raise KeyboardInterrupt
        if not math.isfinite(value):
            return True
        trial.report(value, step)
        return trial.should_prune()

    try:
        figure = float(objective(trial) if values is None else objective(values, report))
    except (Pruned, optuna.TrialPruned):
        return None, states.PRUNED
    if stop.is_set():
        raise KeyboardInterrupt
    if not math.isfinite(figure):
        raise Failed(f"the figure is {figure}")
    return figure, states.COMPLETE


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError("nestling tune needs optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _open(optuna: Any, out: Path, maximize: bool, prune: bool, seed: int) -> Any:
    from optuna.storages.journal import JournalFileBackend

    out.mkdir(parents=True, exist_ok=True)
    (out / f"{FILE}.lock").unlink(missing_ok=True)  # optuna's own, which a kill leaves behind: the folder is ours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / FILE)))
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if prune else optuna.pruners.NopPruner()
        study = optuna.create_study(
            study_name="tune", storage=storage, load_if_exists=True, pruner=pruner,
            direction="maximize" if maximize else "minimize",
        )  # fmt: skip
        # a resumed search must not propose again what it proposed before: the number of trials moves the seed
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), n_startup_trials=6, multivariate=True)
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:  # cut off by a kill
            _again(optuna, study, trial)
    return study


def _again(optuna: Any, study: Any, trial: Any) -> None:
    """Take a trial that was cut off out of the count; its settings come next."""
    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    if trial.params:
        study.enqueue_trial(trial.params)


def _same_search(out: Path, objective: Any, space: Space | None, maximize: bool) -> None:
    """Write down what is searched; ValueError if the folder holds a search of something else."""
    what = {"objective": _name(objective), "space": None if space is None else str(space), "maximize": maximize}
    if isinstance(objective, TrainingRun):
        run = objective.config.to_dict()
        what["run"] = {k: v for k, v in run.items() if k not in ("out", "threads", "logging")}
    path = out / "search.json"
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        other = next((name for name in what if known.get(name) != json.loads(json.dumps(what[name]))), None)
        if other:
            raise ValueError(
                f"{out} holds a search with another {other}: {known.get(other)!r}, not {what[other]!r}; choose another "
                "--out, or delete the folder"
            )
    write_text(path, json.dumps(what, indent=2) + "\n")


def _name(objective: Any) -> str:
    """What tells one objective from another in the study's folder."""
    if isinstance(objective, Command):
        return objective.template
    if isinstance(objective, TrainingRun):
        return "Training"  # not the class's name: folders outlive it
    return f"{objective.__module__}:{objective.__qualname__}"


def _counted(optuna: Any, study: Any) -> int:
    states = optuna.trial.TrialState
    return sum(t.state in (states.COMPLETE, states.PRUNED) for t in study.trials)


def _best(optuna: Any, study: Any) -> Any:
    done = any(t.state == optuna.trial.TrialState.COMPLETE for t in study.trials)
    return study.best_trial if done else None


def _outcome(
    optuna: Any, study: Any, objective: Any, start: dict[str, Any], out: Path, interrupted: bool, errors: list[str]
) -> Outcome:
    states = optuna.trial.TrialState
    number = {s: sum(t.state == s for t in study.trials) for s in (states.COMPLETE, states.PRUNED, states.FAIL)}
    best = _best(optuna, study)
    params = None if best is None else dict(best.params)
    begun = [t.value for t in study.trials if t.state == states.COMPLETE and t.params == start]
    return Outcome(
        best=params,
        value=None if best is None else best.value,
        first=begun[0] if begun else None,
        paste="" if params is None else _paste(objective, params),
        finished=number[states.COMPLETE],
        pruned=number[states.PRUNED],
        failed=number[states.FAIL],
        folder=str(out),
        interrupted=interrupted,
        errors=errors,
    )


def _paste(objective: Any, params: dict[str, Any]) -> str:
    if isinstance(objective, Command | TrainingRun):
        return objective.paste(params)
    return ", ".join(f"{name}={value!r}" for name, value in params.items())


def _shown(params: dict[str, Any]) -> str:
    return " ".join(f"{name} {text_of(value)}" for name, value in params.items())
