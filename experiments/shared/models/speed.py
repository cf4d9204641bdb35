"""Tokens per second of contenders' sequence layers alone, measured in turns on one thread."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from experiments.shared.models.study import ModelContender, TrainingStudy
from nestling.layers.mixers import build_mixer
from nestling.utils.files import write_text


def known_speeds(experiment: TrainingStudy) -> dict[str, dict[str, Any]]:
    """What `measure_speeds` left in the experiment's folder, by contender."""
    path = _path(experiment)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measure_speeds(experiment: TrainingStudy, contenders: list[ModelContender]) -> None:
    """Forward + backward of each contender's layer at `experiment.speed_shape`, in float32; kept in `speed.json`.

    The first contender of the experiment is timed in every round, so that each figure is also a ratio to it from the
    same minutes. Only what the file lacks is measured.
    """
    known = known_speeds(experiment)
    first = experiment.contenders[0]
    missing = [c for c in contenders if known.get(c.name, {}).get("settings") != _settings(experiment, c)]
    if not missing or not experiment.speed_rounds:
        return
    timed = [first, *(c for c in missing if c is not first)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = [_step(experiment, c) for c in timed]
        rounds = [[step() for step in steps] for _ in range(1 + experiment.speed_rounds)][1:]  # the first warms up
    finally:
        torch.set_num_threads(threads)
    tokens = experiment.speed_shape[0] * experiment.speed_shape[1]
    for i, contender in enumerate(timed):
        known[contender.name] = {
            "settings": _settings(experiment, contender),
            "tokens_per_second": tokens / statistics.median(r[i] for r in rounds),
            "ratio": statistics.median(r[0] / r[i] for r in rounds),
        }
    write_text(_path(experiment), json.dumps(known, indent=1) + "\n")


def _path(experiment: TrainingStudy) -> Path:
    return Path(experiment.out) / "speed.json"


def _settings(experiment: TrainingStudy, contender: ModelContender) -> dict[str, Any]:
    shape, rounds = experiment.speed_shape, experiment.speed_rounds
    return {"mixer": contender.mixer, "options": contender.options, "model": contender.model, "shape": shape} | {
        "rounds": rounds
    }


def _step(experiment: TrainingStudy, contender: ModelContender):
    """A function that runs the layer forward and backward once and returns the seconds."""
    batch, tokens, width, heads = experiment.speed_shape
    own = contender.model.get("num_attention_heads")
    if own:  # the same factor as between the models
        heads = max(1, heads * own // experiment.model.options["num_attention_heads"])
    torch.manual_seed(0)
    layer = build_mixer(contender.mixer, width, heads, **contender.options)
    x = torch.randn(batch, tokens, width, requires_grad=True)

    def step() -> float:
        started = time.perf_counter()
        layer(x)[0].square().mean().backward()
        return time.perf_counter() - started

    return step
