"""The demo from start to report."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.demo.config import HOPE, TRANSFORMER, DemoConfig
from experiments.demo.pair import Pair
from experiments.demo.text import Text, byte_entropy
from experiments.demo.watch import Watch
from experiments.demo.worker import ModelWorker
from nestling.training.config import TrainConfig
from nestling.utils.files import write_text
from nestling.utils.locks import sole_writer
from nestling.utils.machine import stop_requests

FORMAT = "nestling-demo-1"
PARTS = (HOPE.lower(), TRANSFORMER.lower(), "text")  # folders of a demo's folder
FORWARD_COST = 0.35  # of a training step's time per token, about
WRITING_SECONDS = 8.0  # for samples, figures and the report


@dataclass(frozen=True)
class Outcome:
    """How the demo ended: its result (as in report.json), the report, whether it learned, whether it was stopped."""

    result: dict[str, Any]
    report: Path
    learned: bool
    stopped: bool


def run(config: DemoConfig, text: Text, watch: Watch | None = None) -> Outcome:
    """Train both models side by side, measure them and write the report.

    A first Ctrl-C ends the training; the report then shows what there is. A second one leaves at once.

    Raises:
        ValueError: a folder that holds something else or a running demo, too little text.  OSError: it cannot be
            written.
    """
    with sole_writer(Path(config.out).expanduser()):
        return _run(config, text, watch)


def _run(config: DemoConfig, text: Text, watch: Watch | None) -> Outcome:
    """`run` with the folder's lock held."""
    started = time.monotonic()
    if text.prompts and not config.prompts:
        config = replace(config, prompts=text.prompts)
    out = claim_folder(config.out)
    watch = watch or Watch([HOPE, TRANSFORMER])
    options = config.model_options()
    runs = {name: config.train_config(name, text, options[name], str(out)) for name in options}
    ids, corpus = _read(runs[HOPE], config)
    watch.say(
        f"Reading {text.name}: {corpus['train_bytes'] / 1e6:.1f} MB, {corpus['held_out_bytes'] / 1e6:.2f} held out"
    )
    watch.say("Starting two processes, one for each model ...")
    result: dict[str, Any] = {
        "format": FORMAT,
        "text": {"name": text.name, **corpus},
        "config": config.to_dict(),
        "machine": machine(),
        "complete": False,
        "models": {},
    }
    pair = Pair(ModelWorker, {name: (runs[name], config.to_dict()) for name in runs}, config.threads)
    try:
        with stop_requests((signal.SIGINT,)) as stop:
            models = {name: {**about, "curve": [], "held_out": []} for name, about in pair.ask("describe").items()}
            result["models"] = models
            counts = " and ".join(f"{name} {models[name]['parameters']:,}" for name in models)
            watch.say(f"Parameters: {counts}. The same bytes for both, step by step.")
            deadline = started + 60 * config.minutes
            result["planned_steps"] = _train(config, pair, watch, models, stop, deadline)
            result["stopped"] = stop.is_set()
            result["steps"] = models[HOPE]["curve"][-1]["step"] if models[HOPE]["curve"] else 0
        if not result["steps"]:
            raise KeyboardInterrupt
        if result["stopped"]:
            watch.say("Stopped. Measuring what there is (Ctrl-C again leaves at once) ...", "yellow")
        for name, folder in pair.ask("save").items():
            models[name]["checkpoint"] = folder
        write_json(out / "report.json", result)  # whatever happens from here on, the curves are kept
        watch.say("Measuring: loss by position, states, memories, samples ...")
        for method in ("positions", "states", "memory", "samples"):
            for name, values in pair.ask(method).items():
                models[name][method] = values
    finally:
        watch.stop()
        pair.close()
    known = _known_words(ids)
    for model in models.values():
        for item in model["samples"]:
            item["known_words"] = _share_known(item["text"], known)
    result["check"] = check(models, corpus["byte_entropy"], config.margin)
    result["complete"] = True
    result["seconds"] = time.monotonic() - started
    from experiments.demo.report import build

    write_json(out / "report.json", result)
    write_text(out / "report.html", build(result))
    return Outcome(result, out / "report.html", result["check"]["passed"], result["stopped"])


def check(models: dict[str, dict], entropy: float, margin: float) -> dict[str, Any]:
    """Whether both models learned: held-out bits per byte below the entropy of the bytes by at least the margin."""
    reached = {name: model["held_out"][-1]["bits"] for name, model in models.items()}
    bar = entropy - margin
    learned = {name: bool(bits <= bar) for name, bits in reached.items()}  # not true of a NaN
    return {"byte_entropy": entropy, "margin": margin, "bar": bar, "learned": learned, "passed": all(learned.values())}


def plan_steps(seconds: float, per_step: float, config: DemoConfig) -> int:
    """Steps that fit into `seconds`, measurements included, within the configured limits."""
    tokens = config.seq_len * config.batch_size
    measured = config.long_windows * config.long_context + config.state_context + config.excerpt
    measured += config.seq_len * config.eval_windows * (len(config.eval_at) + 1)
    left = seconds - WRITING_SECONDS - measured * FORWARD_COST * per_step / tokens
    return min(config.max_steps, max(config.min_steps, int(left / per_step)))


def claim_folder(path: str | Path) -> Path:
    """The demo's folder, cleared of an earlier demo; a folder with anything else in it is a ValueError."""
    out = Path(path).expanduser()
    mark = out / "demo.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not mark.is_file():
        raise ValueError(f"--out: {out} holds something else than a demo; name another folder")
    write_json(mark, {"format": FORMAT})
    for name in PARTS[:2]:  # the text stays: it is the same, or is made again
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("report.html", "report.json"):
        (out / name).unlink(missing_ok=True)
    return out


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    import torch

    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file, whole or absent; numbers that are not finite become null, as JSON knows no others."""
    write_text(path, json.dumps(finite(values), indent=1) + "\n")


def _read(run: dict[str, Any], config: DemoConfig) -> tuple[Any, dict[str, Any]]:
    """Make the token files once, for both; returns the training ids and what to say about the text."""
    from nestling.training import load_corpus

    corpus = load_corpus(TrainConfig.from_dict(run).data)
    least = config.seq_len + 1
    if len(corpus.val) < least:
        raise ValueError(
            f"the text is too short: {len(corpus.val)} bytes are held out, {least} are needed; give a longer --text"
        )
    return corpus.train.ids, {
        "train_bytes": corpus.train.num_bytes,
        "held_out_bytes": corpus.val.num_bytes,
        "byte_entropy": byte_entropy(corpus.val.ids),
        "files": len(run["data"]["text"]),
        "held_out_files": len(run["data"]["val_text"]),
    }


def _train(config: DemoConfig, pair: Pair, watch: Watch, models: dict, stop: threading.Event, deadline: float) -> None:
    """Step by step, both at once, so that they stand at the same step whenever it ends."""
    per_step = max(pair.ask("calibrate", config.calibration_seconds).values())
    steps = plan_steps(deadline - time.monotonic(), per_step, config)
    watch.say(f"{per_step:.2f} s per step on this machine: {steps} steps of {config.seq_len * config.batch_size} bytes")
    pair.ask("plan", steps)
    _evaluate(pair, watch, models)
    watch.start(steps)
    due, began, replan = list(config.eval_at), time.monotonic(), True

    def heard(name: str, report: dict[str, Any]) -> None:
        models[name]["curve"].append(report)
        watch.step(name, report)

    step = 0
    while step < steps and not stop.is_set():
        pair.ask("step", heard=heard)
        step += 1
        watch.line(step, steps)
        if replan and step >= config.replan_at * steps:
            replan = False
            per_step = (time.monotonic() - began) / step  # evaluations so far included: rather a step less
            revised = step + plan_steps(deadline - time.monotonic(), per_step, config)
            # never so few that the learning rate's decay would have had to begin already
            revised = min(config.max_steps, max(config.min_steps, math.ceil(step / (1 - config.decay)) + 1, revised))
            if revised != steps:
                steps = revised
                pair.ask("plan", steps)
                watch.plan(steps)
        if step == steps or (due and step >= due[0] * steps):
            due = [part for part in due if part * steps > step]
            _evaluate(pair, watch, models)
    if step and step < steps:
        _evaluate(pair, watch, models)
    watch.line(step, steps, last=True)
    watch.stop()
    return steps


def _evaluate(pair: Pair, watch: Watch, models: dict) -> None:
    for name, report in pair.ask("held_out").items():
        models[name]["held_out"].append(report)
        watch.held_out(name, report["bits"])


def _words(raw: bytes) -> list[bytes]:
    return re.findall(rb"[^\W\d_]{3,}", raw)


def _known_words(ids: Any) -> set[bytes]:
    import numpy as np

    return set(_words(np.asarray(ids)[np.asarray(ids) < 256].astype(np.uint8).tobytes()))


def _share_known(text: str, known: set[bytes]) -> float | None:
    """The part of a sample's words of three letters and more that occur in the training text; None without words."""
    words = _words(text.encode())
    words = words[:-1] if text and text[-1].isalpha() else words  # the last one may be cut off
    return sum(word in known for word in words) / len(words) if words else None


def finite(value: Any) -> Any:
    """Values for JSON: tuples as lists, numbers that are not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
