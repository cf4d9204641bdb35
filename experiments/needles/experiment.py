"""NL Tables 1 and 3, Fig. 9: needles in haystacks up to eight times as long as those of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.choice.experiment import DELTA, HOPE, TWO_KINDS, beside, horizon
from experiments.needles.report import plot, summarize, table
from experiments.needles.study import NeedleContender, Needles, NeedlesWork
from experiments.shared.corpus import find_files
from experiments.shared.models.tasks import TaskJob
from experiments.shared.work import Row

GROUP = "Models"
QUESTION = "Which layers find needles in haystacks, also in longer ones than they were trained on?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

# as `mixer="gated_deltanet"` has it: one convolution of the input, nothing begins small
GATED = DELTA | dict(initial_scale=1.0, conv_for="all", qkv_conv=0)
LONG = dict(horizon=[4096.0, 65536.0])


def defaults() -> Needles:
    """The experiment's settings."""

    def third(window: int, **changes: Any) -> list[dict[str, Any]]:
        return [{"mixer": "selfmod"} | HOPE | changes, {"mixer": "window_attention", "window": window}]

    window = {"mixer": "window_attention", "window": 256}
    small = {"mixer": "window_attention", "window": 64, "num_heads": 2}
    kinds = [small, beside(TWO_KINDS | LONG) | {"window": 64}]
    contenders = [
        NeedleContender("fourth default", mixers=[window, beside(HOPE | horizon(2048, 32768))]),
        NeedleContender("fourth default, window 64, long", mixers=[small, beside(HOPE | LONG) | {"window": 64}]),
        NeedleContender("Hope, window 64, long", mixers=kinds),
        NeedleContender("Hope, window 64, long, short windows", mixers=kinds, short_window=16),
        NeedleContender("third default", mixers=third(256)),
        NeedleContender("third default, window 64, long", mixers=third(64, **LONG)),
        NeedleContender("Hope's memory alone, long", "selfmod", options=HOPE | LONG),
        NeedleContender("attention", head_size=32),
        NeedleContender("attention over 64", "window_attention", options={"window": 64}, head_size=32),
        NeedleContender("gated DeltaNet", "selfmod", options=GATED),
    ]
    return Needles(contenders=contenders, seeds=[0, 1, 2])


def work(settings: Needles, data: str | Path | None, smoke: bool) -> NeedlesWork:
    """What trains; book text comes from `data`, a folder of books."""
    return NeedlesWork(settings, find_files(data, smoke))


def plan(settings: Needles, contenders: list[NeedleContender], row: Row) -> list[TaskJob]:
    """Every task and contender with the first seed, then with the second, ..."""
    return [
        TaskJob(contender.name, task, seed)
        for seed in settings.seeds
        for task in settings.tasks
        for contender in contenders
        if not contender.runs or seed in contender.runs.get(task, [])
    ]
