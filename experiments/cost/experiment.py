"""Cost at equal quality: the self-modifying layer with one option changed at a time.

Which settings lie within the default's seed spread, and how fast is each? The ablations are the rows of NL Table 6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.shared.models.runs import TrainingWork
from experiments.shared.models.speed import known_speeds
from experiments.shared.models.study import ModelContender, TrainingJob, TrainingStudy
from experiments.shared.report import COLOURS, count, figure, markdown, pm, spread
from experiments.shared.work import Row

GROUP = "Models"
QUESTION = "What is each choice of the self-modifying layer worth, and what does it cost?"
ENTRIES = "settings"  # of the summary

# what a setting may change and still be the same learning rule, only cheaper or dearer
SIZES = {"expansion", "gates", "chunk_size", "memory_chunk_size", "num_attention_heads"}


def defaults() -> TrainingStudy:
    """The experiment's settings."""
    changes: dict[str, dict[str, Any]] = {
        "expansion 2": {"expansion": 2},
        "expansion 4": {"expansion": 4},
        "gates mlp": {"gates": "mlp"},
        "chunk 32": {"chunk_size": 32},
        "chunk 128": {"chunk_size": 128},
        "read after": {"read": "after"},
        "read chunk": {"read": "chunk"},
        "step layer": {"step": "layer"},
        "no dgd": {"dgd": False},
        "no momentum": {"momentum": False},
        "retain zero": {"retain": "zero"},
        "no decay": {"decay": "none", "adaptive": ["k", "v", "eta"]},
        "static k": {"adaptive": ["v", "eta", "alpha"]},
        "static v": {"adaptive": ["k", "eta", "alpha"]},
        "adaptive q": {"adaptive": ["k", "v", "q", "eta", "alpha"]},
        "all static": {"adaptive": []},
    }
    # three seeds where a claim rests on it
    weighed = ("expansion 2", "read chunk", "no momentum", "all static")
    contenders: list[dict[str, Any]] = [{"name": "default", "seeds": [0, 1, 2]}]
    for name, options in changes.items():
        contenders.append({"name": name, "options": options} | ({"seeds": [0, 1, 2]} if name in weighed else {}))
    contenders += [{"name": f"heads {n}", "model": {"num_attention_heads": n}} for n in (1, 4)]
    return TrainingStudy.from_dict(
        {
            "name": "cost",
            "steps": 400,
            "model": {
                "name": "tiny",
                "options": {
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 288,
                },
            },
            "data": {"seq_len": 256, "batch_size": 2},
            "optim": {"name": "adamw"},
            "lrs": [5e-3],
            "seeds": [0],
            "speed_rounds": 5,
            "contenders": contenders,
        }
    )


def _jobs(experiment: TrainingStudy, contender: ModelContender) -> list[TrainingJob]:
    seeds = experiment.seeds if contender.seeds is None else contender.seeds
    return [TrainingJob(contender.name, experiment.lrs[0], s, experiment.precisions[0]) for s in seeds]


def work(experiment: TrainingStudy, data: str | Path | None, smoke: bool) -> TrainingWork:
    """What trains, on the text files of `data`."""
    return TrainingWork(experiment, data, smoke)


def plan(experiment: TrainingStudy, contenders: list[ModelContender], row: Row) -> list[TrainingJob]:
    """Every contender with its first seed, then with the second, ..."""
    jobs = [(i, job) for c in contenders for i, job in enumerate(_jobs(experiment, c))]
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def summarize(
    experiment: TrainingStudy, contenders: list[ModelContender], row: Row, speeds: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Figures of each setting; `difference` is to the default, seed by seed where both were run.

    `speeds` are by setting; None reads those in the folder.
    """
    speeds = known_speeds(experiment) if speeds is None else speeds
    first = experiment.contenders[0]
    own = {j.seed: r for j in _jobs(experiment, first) if (r := row(j))}
    base = spread(r["bits_per_byte"] for r in own.values())
    found = []
    for contender in contenders:
        rows = {j.seed: r for j in _jobs(experiment, contender) if (r := row(j))}
        if not rows:
            continue
        value = spread(r["bits_per_byte"] for r in rows.values())
        pairs = [(r["bits_per_byte"], own[seed]["bits_per_byte"]) for seed, r in rows.items() if seed in own]
        speed = speeds.get(contender.name, {})
        found.append(
            {
                "setting": contender.name,
                "options": contender.options | contender.model,
                "parameters": next(iter(rows.values()))["parameters"],
                "tails": value,
                "difference": spread(a - b for a, b in pairs if a and b) if contender.name != first.name else None,
                "within_spread": bool(value and base and value["mean"] <= max(base["values"])),
                "diverged": sum(r["diverged"] for r in rows.values()),
                "runs": len(rows),
                "training_tokens_per_second": spread(r["tokens_per_second"] for r in rows.values()),
                "layer_tokens_per_second": speed.get("tokens_per_second"),
                "layer_speed_ratio": speed.get("ratio"),
            }
        )
    usable = [f for f in found if f["within_spread"] and not f["diverged"] and SIZES.issuperset(f["options"])]
    fastest = max(usable, key=_speed, default=None)
    return {
        "experiment": "cost",
        "tokens": experiment.steps * experiment.tokens_per_step,
        "lr": experiment.lrs[0],
        "speed_shape": experiment.speed_shape,
        "default": base,
        "cheapest_within_spread": fastest and fastest["setting"],
        "settings": found,
    }


def _speed(found: dict[str, Any]) -> float:
    if found["layer_speed_ratio"]:
        return found["layer_speed_ratio"]
    return found["training_tokens_per_second"]["mean"] / 1e9  # not timed alone: after all that were


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown."""
    header = ["setting", "parameters", "bits per byte", "- default", "within its spread", "diverged"]
    header += ["layer tokens/s", "x default", "training tokens/s"]
    rows = []
    for s in summary["settings"]:
        ratio = "-" if s["layer_speed_ratio"] is None else f"{s['layer_speed_ratio']:.2f}"
        within = "yes" if s["within_spread"] else "no"
        figures = [pm(s["tails"]), pm(s["difference"]), within, f"{s['diverged']}/{s['runs']}"]
        speeds = [count(s["layer_tokens_per_second"]), ratio, count(s["training_tokens_per_second"]["mean"])]
        rows.append([s["setting"], count(s["parameters"]), *figures, *speeds])
    batch, tokens, width, heads = summary["speed_shape"]
    note = f"\nBits per byte on the tails, mean ± standard deviation over seeds, after {count(summary['tokens'])} "
    note += f"training bytes at lr {summary['lr']:g}. Layer tokens/s: forward and backward of the layer alone, batch "
    note += (
        f"{batch}, T {tokens}, d {width}, {heads} heads, float32, one thread. Within its spread: the mean is no worse "
    )
    note += "than the default's worst seed. The fastest such change of sizes and gates (the rule is the same): "
    note += f"{summary['cheapest_within_spread'] or '-'}.\n"
    return markdown(header, rows) + note


def plot(summary: dict[str, Any], path: Path) -> None:
    """Loss of each setting against the default's seeds, and its speed."""
    found = [s for s in summary["settings"] if s["tails"]]
    found.sort(key=lambda s: s["tails"]["mean"])
    names, base = [s["setting"] for s in found], summary["default"]
    colours = [COLOURS[1] if s["setting"] == "default" else COLOURS[0] for s in found]
    with figure(path, 2, (11, 1.4 + 0.3 * len(found)), sharey=True) as (loss, speed):
        for place, (s, colour) in enumerate(zip(found, colours)):
            values = s["tails"]["values"]
            loss.plot([min(values), max(values)], [place, place], color=colour, alpha=0.4, linewidth=2)
            loss.scatter(values, [place] * len(values), s=14, color=colour, alpha=0.6)
            loss.scatter([s["tails"]["mean"]], [place], s=60, color=colour, marker="|", linewidths=2.5)
        if base:
            label = "range of the default's seeds"
            loss.axvspan(min(base["values"]), max(base["values"]), color=COLOURS[1], alpha=0.12, label=label)
            loss.legend(loc="lower right")
        loss.set_yticks(range(len(found)), names)
        loss.invert_yaxis()
        loss.set(xlabel="bits per byte on held-out tails (lower is better)", title="Quality")
        timed = all(s["layer_tokens_per_second"] for s in found)
        key = (lambda s: s["layer_tokens_per_second"]) if timed else (lambda s: s["training_tokens_per_second"]["mean"])
        speed.barh(range(len(found)), [key(s) for s in found], color=colours, alpha=0.8)
        what = "layer alone, forward + backward" if timed else "training"
        speed.set(xlabel=f"tokens/s, one thread ({what})", title="Speed")
