"""What the numbers say, in sentences computed from them."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import numpy as np

from experiments.demo.config import HOPE, TRANSFORMER

SURE = 2.0  # standard errors that a difference must exceed to be called one
WEAK = 0.1  # correlations below it are called none
STEADY = 0.05  # relative changes below it are called none
FADED = 0.3  # a norm that falls by this part is said to fade


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of the demo in short, as JSON types."""
    models = {}
    for name, model in result["models"].items():
        last = model["curve"][-1]
        models[name] = {
            "parameters": model["parameters"],
            "bits_per_byte_before": model["held_out"][0]["bits"],
            "bits_per_byte_after": model["held_out"][-1]["bits"],
            "tokens_per_second": last["tokens"] / last["seconds"],
            "state_bytes": {str(row["tokens"]): row["bytes"] for row in _ends(model["states"])},
            "checkpoint": model["checkpoint"],
        }
    return {
        "learned": result["check"]["passed"],
        "stopped": result["stopped"],
        "steps": result["steps"],
        "bytes_read": models and next(iter(result["models"].values()))["curve"][-1]["tokens"],
        "byte_entropy": result["check"]["byte_entropy"],
        "bar": result["check"]["bar"],
        "seconds": result["seconds"],
        "models": models,
    }


def verdict(result: dict[str, Any]) -> str:
    """Whether it learned, and what was asked of it."""
    check = result["check"]
    asked = (
        f"the bar was {check['bar']:.2f}: {check['margin']:g} below the {check['byte_entropy']:.2f} that the "
        "frequencies of the bytes alone give"
    )
    reached = {name: _bits(model["held_out"][-1]["bits"]) for name, model in result["models"].items()}
    both = f"{HOPE} {reached[HOPE]} and the {TRANSFORMER} {reached[TRANSFORMER]} bits per byte on held-out text"
    if check["passed"]:
        return f"It learned: {both} ({asked})."
    failed = " and ".join(name for name, well in check["learned"].items() if not well)
    stopped = " The run was stopped early." if result["stopped"] else ""
    return f"It did not learn enough: {both} ({asked}); {failed} missed it.{stopped}"


def compared(ours: list[float], theirs: list[float]) -> tuple[float, float, str]:
    """Difference ours - theirs over the same windows, its standard error, and "lower", "higher" or "no different"."""
    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    mean = float(difference.mean())
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else math.inf
    if abs(mean) <= SURE * error or not math.isfinite(mean):
        return mean, error, "no different"
    return mean, error, "lower" if mean < 0 else "higher"


def about_result(result: dict[str, Any]) -> str:
    """The comparison at the end, at equal text and at equal time."""
    hope, transformer = result["models"][HOPE], result["models"][TRANSFORMER]
    a, b = hope["held_out"][-1], transformer["held_out"][-1]
    mean, error, word = compared(a["windows"], b["windows"])
    sure = f"(standard error {error:.3f} over the same held-out windows)"
    if not math.isfinite(mean):
        return "A loss is not finite: there is nothing to compare."
    said = {
        "lower": f"Hope is better by {-mean:.3f} bits per byte {sure}",
        "higher": f"Hope is worse by {mean:.3f} bits per byte {sure}",
        "no different": f"the two cannot be told apart: a difference of {abs(mean):.3f} bits per byte {sure}",
    }[word]
    return f"After the same {_count(a['tokens'])} bytes, {said}. One seed and a few minutes: this ranks nothing."


def about_curves(result: dict[str, Any]) -> str:
    """How far each came, and what the time says."""
    hope, transformer = result["models"][HOPE], result["models"][TRANSFORMER]
    entropy = result["check"]["byte_entropy"]
    a, b = hope["held_out"][-1], transformer["held_out"][-1]
    ratio = hope["curve"][-1]["seconds"] / transformer["curve"][-1]["seconds"]
    where = next((row["tokens"] for row in hope["held_out"] if row["bits"] < entropy), None)
    crossed = f"Hope passed it after {_count(where)} bytes at the latest. " if where else "Hope has not passed it. "
    bits = at_time(hope["held_out"], b["seconds"])
    slow = (
        f"Hope takes {ratio:.1f} times the Transformer's time per byte; when the Transformer was done, Hope stood at "
        f"{_bits(bits)} and the Transformer at {_bits(b['bits'])}."
        if ratio > 1
        else f"Hope takes {ratio:.2f} of the Transformer's time per byte and ended at {_bits(a['bits'])}."
    )
    return f"The dashed line is what the frequencies of the bytes alone give ({entropy:.2f}). {crossed}{slow}"


def at_time(rows: list[dict[str, Any]], seconds: float) -> float:
    """The held-out loss after so many seconds of training, between the measurements on either side."""
    return float(np.interp(seconds, [row["seconds"] for row in rows], [row["bits"] for row in rows]))


def about_positions(result: dict[str, Any]) -> str:
    """Whether context is used, inside and beyond the trained length."""
    trained, sentences = result["config"]["seq_len"], []
    for name, model in result["models"].items():
        edges, windows = model["positions"]["edges"], np.asarray(model["positions"]["windows"], float)
        inside = [i for i in range(len(edges) - 1) if edges[i + 1] <= trained]
        beyond = [i for i in range(len(edges) - 1) if edges[i] >= trained]
        if not inside:
            return "The held-out text is too short for a loss by position."
        first, last = windows[:, inside[0]], windows[:, inside[-1]]
        span = f"{edges[inside[-1]] + 1}–{edges[inside[-1] + 1]}"
        sentence = f"{name}: {first.mean():.2f} in the first {edges[1]} bytes, {last.mean():.2f} in bytes {span}"
        if beyond:
            end = windows[:, beyond[-1]]
            _, _, word = compared(end.tolist(), last.tolist())
            verb = {
                "lower": "and falls further beyond the trained length",
                "higher": "but rises beyond the trained length",
                "no different": "and holds beyond the trained length",
            }[word]
            sentence += f", {verb} ({end.mean():.2f})"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def about_states(result: dict[str, Any]) -> str:
    """How the state grows."""
    said = []
    for name, model in result["models"].items():
        first, last = _ends(model["states"])
        growth = last["bytes"] / first["bytes"]
        if growth < 1.001:
            said.append(f"{name}'s state is {size(last['bytes'])} however long the text")
        else:
            said.append(
                f"the {name}'s grows {growth:.1f}-fold, from {size(first['bytes'])} after {first['tokens']:,} bytes to "
                f"{size(last['bytes'])} after {last['tokens']:,}"
            )
    meeting = _crossing(result)
    return "; ".join(said)[:1].upper() + "; ".join(said)[1:] + f". {meeting}"


def about_memory(result: dict[str, Any]) -> str:
    """Whether the memories' loss falls along the text, and whether they fade meanwhile."""
    said, fitting = [], 0
    layers = result["models"][HOPE]["memory"]["layers"]
    for layer in layers:
        loss, norm = np.asarray(layer["loss"], float), np.asarray(layer["norm"], float)
        part = max(1, len(loss) // 8)
        first, last = float(loss[:part].mean()), float(loss[-part:].mean())
        change = (last - first) / max(first, 1e-12)
        verb = "falls" if change < -STEADY else "rises" if change > STEADY else "stays even,"
        sentence = f"layer {layer['layer']} {verb} from {_short(first)} to {_short(last)}"
        if change < -STEADY and norm[-1] < (1 - FADED) * norm[0]:
            sentence += " as its weights shrink, and with them its targets (fading, not only fitting)"
        elif change < -STEADY:
            fitting += 1
        said.append(sentence)
    end = "no memory" if not fitting else "every memory" if fitting == len(layers) else f"{fitting} of {len(layers)}"
    return (
        "Inner loss: how badly a memory's weights map a byte's key to its target. First to last eighth "
        f"of the text: {', '.join(said)}. So {end} clearly comes to fit its targets better."
    )


def about_settings(result: dict[str, Any]) -> str:
    """Learning rate, decay and norm, with their ranges."""
    said = []
    for layer in result["models"][HOPE]["memory"]["layers"]:
        eta, alpha, norm = (np.asarray(layer[key], float) for key in ("eta", "alpha", "norm"))
        low, high = np.percentile(eta, [1, 99])
        span, change = _count(float(np.median(horizon(alpha)))), signed(norm[-1] / norm[0] - 1)
        learns = f"learns at {low:.2g} to {high:.2g}, forgets over {span} bytes, norm {change}"
        said.append(f"layer {layer['layer']} {learns}")
    return f"Every memory is told its rate and decay, byte by byte: {'; '.join(said)} over the text."


def signed(part: float) -> str:
    """A change in per cent, with its sign."""
    return f"{part:+.0%}".replace("-", "\N{MINUS SIGN}")


def about_surprise(result: dict[str, Any]) -> str:
    """Whether the memory's loss has to do with the model's own."""
    memory = result["models"][HOPE]["memory"]
    bits = np.asarray(memory["bits"][1:], float)
    said = []
    for layer in memory["layers"]:
        r = correlation(np.asarray(layer["loss"][1:], float), bits)
        kind = "hardly related" if abs(r) < WEAK else "higher at surprises" if r > 0 else "lower at surprises"
        said.append(f"layer {layer['layer']} {r:+.2f} ({kind})".replace("-", "\N{MINUS SIGN}"))
    return f"Rank correlation of a byte's inner loss with the model's surprise at that byte: {', '.join(said)}."


def about_samples(result: dict[str, Any]) -> str:
    """How much of what was written is words."""
    said = []
    for name, model in result["models"].items():
        shares = [s["known_words"] for s in model["samples"] if s["known_words"] is not None]
        said.append(f"{name} {fmean(shares):.0%}" if shares else f"{name} wrote none")
    return f"Words of three letters or more that occur in the training text: {', '.join(said)}. Same prompts for both."


def horizon(alpha: np.ndarray) -> np.ndarray:
    """Bytes over which a memory of decay alpha forgets: 1 / (1 - alpha)."""
    return 1 / np.maximum(1 - np.asarray(alpha, float), 1e-6)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; 0 if one side does not vary."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    ranks = [np.argsort(np.argsort(x, kind="stable")) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _crossing(result: dict[str, Any]) -> str:
    """Where the growing state becomes the larger one."""
    hope, transformer = (result["models"][name]["states"] for name in (HOPE, TRANSFORMER))
    smaller = [row["tokens"] for row, other in zip(hope, transformer) if row["bytes"] < other["bytes"]]
    if len(smaller) == len(hope):
        return f"Hope's is the smaller one from {hope[0]['tokens']:,} bytes on."
    if not smaller:
        return f"Up to {hope[-1]['tokens']:,} bytes Hope's is the larger one."
    return f"Hope's is the smaller one from {smaller[0]:,} bytes on."


def _ends(states: list[dict[str, int]]) -> tuple[dict[str, int], dict[str, int]]:
    return states[0], states[-1]


def _bits(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _short(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "under 0.001"


def _count(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.2f} million"
    return f"{value:,.0f}"
