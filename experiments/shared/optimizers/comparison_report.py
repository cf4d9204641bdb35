"""What comparisons of optimisers by training end in: figures at equal steps and at equal time, and the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.shared.optimizers.comparison import (
    Comparison,
    ComparisonJob,
    Model,
    Row,
    cut,
    final,
    of_model,
    searcher,
    step_seconds,
)
from experiments.shared.optimizers.contenders import OptimizerContender
from experiments.shared.report import COLOURS, band, count, figure, markdown, pm, spread


def summarize(settings: Comparison, contenders: list[OptimizerContender], row: Row) -> dict[str, Any]:
    """Figures of every optimiser on every model; `difference` is to the first contender, seed by seed."""
    found = []
    for model in settings.models:
        seconds = step_seconds(settings, model, row)
        rows: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
        for c in of_model(settings, model, contenders):
            jobs = [final(settings, model, c, seed, row) for seed in settings.seeds]
            cuts = [cut(settings, model, c, seed, row) for seed in settings.seeds] if model.equal_time else []
            rows[c.name] = {"final": _by_seed(jobs, row), "time": _by_seed(cuts, row)}
        first = settings.contenders[0].name
        for c in of_model(settings, model, contenders):
            if any(row(j) for j in _searched(settings, model, c)):
                found.append(_figures(settings, model, c, rows, first, seconds, row))
    return {
        "experiment": settings.name,
        "first": settings.contenders[0].name,
        "batch_size": settings.batch_size,
        "seeds": len(settings.seeds),
        "lr_range": [settings.lr_low, settings.lr_high],
        "models": [{"name": m.name, "steps": m.steps, "trials": m.trials} for m in settings.models],
        "contenders": found,
    }


def _searched(settings: Comparison, model: Model, contender: OptimizerContender) -> list[ComparisonJob]:
    who = searcher(settings, contender).name
    return [ComparisonJob(who, model.name, "search", settings.search_seed, 0.0, 0, i) for i in range(model.trials)]


def _by_seed(jobs: list[ComparisonJob | None], row: Row) -> dict[int, dict[str, Any]]:
    return {j.seed: r for j in jobs if j and (r := row(j))}


def _figures(
    settings: Comparison,
    model: Model,
    contender: OptimizerContender,
    rows: dict[str, dict[str, dict[int, dict[str, Any]]]],
    first: str,
    seconds: dict[str, tuple[float, float]],
    row: Row,
) -> dict[str, Any]:
    own, base = rows[contender.name], rows.get(first, {"final": {}})["final"]
    searched = [r for j in _searched(settings, model, contender) if (r := row(j))]
    rows_final = [r for r in own["final"].values() if not r["failed"]]
    lr = next((r["lr"] for r in own["final"].values()), None)
    tried = sorted(r["lr"] for r in searched)
    # a rate beyond every other one tried: the best may lie further out
    edge = lr is not None and len(tried) > 1 and lr in (tried[0], tried[-1])
    times = own["time"] if contender.name != first else own["final"]
    model_seconds, update_seconds = seconds.get(contender.name, (None, None))
    return {
        "contender": contender.name,
        "model": model.name,
        "options": contender.options,
        "parameters": next((r["parameters"] for r in searched), None),
        "lr": lr,
        "lr_at_edge": edge,
        "search": [[r["lr"], None if r["failed"] else r["end"]["loss"]] for r in searched],
        "runs": len(own["final"]),
        "failed": len(own["final"]) - len(rows_final),
        **_end(rows_final),
        "train_loss": spread(r["train"]["loss"] for r in rows_final),
        "train_accuracy": spread(r["train"].get("accuracy") for r in rows_final),
        "difference": None if contender.name == first else _paired(own["final"], base),
        "curve": _curve(rows_final),
        "evaluated": _evaluated(rows_final),
        "model_seconds": model_seconds,
        "optimizer_seconds": update_seconds,
        "time_steps": spread(r["steps"] for r in times.values()),
        "time": _end([r for r in times.values() if not r["failed"]]),
        "time_difference": None if contender.name == first else _paired(own["time"], base),
    }


def _end(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {k: spread(r["end"].get(k) for r in rows) for k in ("loss", "accuracy")}


def _paired(own: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    shared = [seed for seed in own if seed in base and not own[seed]["failed"] and not base[seed]["failed"]]
    return spread(own[seed]["end"]["loss"] - base[seed]["end"]["loss"] for seed in shared)


def _curve(rows: list[dict[str, Any]]) -> list[Any]:
    """[step, mean and spread of the training loss up to it]."""
    return [[points[0][0], spread(p[1] for p in points)] for points in zip(*(r["curve"] for r in rows))]


def _evaluated(rows: list[dict[str, Any]]) -> list[Any]:
    """[step, {name: mean and spread of a test figure}]."""
    return [
        [points[0][0], {k: spread(p[1][k] for p in points) for k in points[0][1]}]
        for points in zip(*(r["evaluated"] for r in rows))
    ]


def table(summary: dict[str, Any]) -> str:
    """Figures at equal steps and at equal time, as Markdown, for each model."""
    text, alone = "", len(summary["models"]) == 1
    for model in summary["models"]:
        found = [c for c in summary["contenders"] if c["model"] == model["name"]]
        if not found:
            continue
        found.sort(key=lambda c: (c["loss"] or {"mean": 99.0})["mean"])
        lead = "" if alone else f"{model['name']}, "
        text += f"{lead}{count(found[0]['parameters'])} parameters, at equal steps ({model['steps']}):\n\n"
        text += _steps_table(found, summary["first"]) + "\n"
        if any(c["time"]["loss"] for c in found if c["contender"] != summary["first"]):
            found.sort(key=lambda c: (c["time"]["loss"] or {"mean": 99.0})["mean"])
            text += f"{lead}at equal time (that of {summary['first']}):\n\n"
            text += _time_table(found, summary["first"]) + "\n"
    low, high = summary["lr_range"]
    trials = " and ".join(str(m["trials"]) if alone else f"{m['trials']} ({m['name']})" for m in summary["models"])
    text += f"Mean ± standard deviation over {summary['seeds']} seeds, differences seed by seed. Each optimiser had "
    text += f"{trials} trials for its learning rate between {low:g} and {high:g}, on held-out training data; "
    text += "weight decay, schedule, clipping and batches are the same for all. CPU time of one thread.\n"
    if any(c["lr_at_edge"] for c in summary["contenders"]):
        text += "\\* the best learning rate is the smallest or largest that was tried.\n"
    return text


def _steps_table(found: list[dict[str, Any]], first: str) -> str:
    accuracy = any(c["accuracy"] for c in found)
    header = ["optimiser", "lr", "test loss", f"- {first}", *(["test accuracy"] if accuracy else []), "train loss"]
    header += ["model ms/step", "optimiser ms/step"]
    rows = []
    for c in found:
        lr = "-" if c["lr"] is None else f"{c['lr']:g}" + ("*" if c["lr_at_edge"] else "")
        name = c["contender"] + (f" ({c['failed']} of {c['runs']} failed)" if c["failed"] else "")
        speeds = [_ms(c["model_seconds"]), _ms(c["optimizer_seconds"])]
        hits = [pm(c["accuracy"])] if accuracy else []
        rows.append([name, lr, pm(c["loss"], 4), pm(c["difference"], 4), *hits, pm(c["train_loss"], 4), *speeds])
    return markdown(header, rows)


def _time_table(found: list[dict[str, Any]], first: str) -> str:
    accuracy = any(c["time"]["accuracy"] for c in found)
    header = ["optimiser", "steps", "test loss", f"- {first}", *(["test accuracy"] if accuracy else [])]
    rows = []
    for c in found:
        steps = count(c["time_steps"] and c["time_steps"]["mean"])
        hits = [pm(c["time"]["accuracy"])] if accuracy else []
        rows.append([c["contender"], steps, pm(c["time"]["loss"], 4), pm(c["time_difference"], 4), *hits])
    return markdown(header, rows)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def plot(summary: dict[str, Any], path: Path) -> None:
    """For each model: training loss by step, test loss by step and by time, and the search."""
    models = [m for m in summary["models"] if any(c["model"] == m["name"] and c["runs"] for c in summary["contenders"])]
    colours = {name: COLOURS[i] for i, name in enumerate(dict.fromkeys(c["contender"] for c in summary["contenders"]))}
    with figure(path, 4, (16, 4.2 * max(1, len(models))), rows=max(1, len(models))) as axes:
        for line, model in zip(axes if len(models) > 1 else [axes], models):
            found = [c for c in summary["contenders"] if c["model"] == model["name"] and c["curve"]]
            _draw(line, found, colours, model["name"] if len(models) > 1 else "")


def _draw(axes: Any, found: list[dict[str, Any]], colours: dict[str, str], name: str) -> None:
    train, test, clock, search = axes
    for c in found:
        colour, label = colours[c["contender"]], c["contender"]
        later = c["curve"][max(1, len(c["curve"]) // 8) :]  # the first fall would flatten the rest
        band(train, [p[0] for p in later], [p[1] for p in later], label, colour)
        points = [(s, f["loss"]) for s, f in c["evaluated"][:-1] if f["loss"]]  # the last is on more test data
        shown = points[1:] if len(points) > 3 else points
        band(test, [s for s, _ in shown], [f for _, f in shown], label, colour, marker="o", markersize=3)
        if c["model_seconds"]:
            step = c["model_seconds"] + c["optimizer_seconds"]
            band(clock, [s * step for s, _ in shown], [f for _, f in shown], label, colour, marker="o", markersize=3)
        tried = sorted((lr, loss) for lr, loss in c["search"] if loss is not None)
        if tried:
            search.plot(*zip(*tried), color=colour, marker="o", markersize=4, linewidth=1, label=label)
    lead = f"{name}: " if name else ""
    train.set(xlabel="step", ylabel="training loss", title=lead + "training loss")
    test.set(xlabel="step", ylabel="test loss", title=lead + "test loss, equal steps")
    clock.set(xlabel="CPU seconds", ylabel="test loss", title=lead + "test loss by time")
    search.set(xlabel="learning rate", ylabel="validation loss", xscale="log", title=lead + "search")
    train.legend()
