"""NL Table 5: which layers recognise six formal languages, at the lengths they were trained on and beyond?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.languages.report import plot, summarize, table
from experiments.languages.study import LanguageContender, LanguageJob, Languages, LanguagesWork
from experiments.shared.work import Row

GROUP = "Models"
QUESTION = "Which layers recognise six formal languages, also in words longer than any they were trained on?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

# every option that matters here, written out: the table keeps its meaning when a default changes
MATRIX = dict(
    architecture="linear", adaptive=[], objective="dot", dgd=True, gated_erase=False, step="layer", self_targets=False,
    momentum=False, initial_rate=1.0, initial_scale=0.1, retain="zero", read="after", normalize_values=False,
    conv_size=4, conv_for="gates", qkv_conv=4, conv_init="last", chunk_size=16, horizon=[1024.0, 16384.0],
)  # fmt: skip
DELTA = MATRIX | dict(decay="none", conv_init="uniform")
NEGATIVE = dict(erase_gate=True, erase_range=2.0, tied_write=True, rate="gate")
TRACKING = MATRIX | NEGATIVE | dict(tied_write=False, decay="learned")
TIED = TRACKING | dict(tied_write=True, horizon=[4096.0, 65536.0])
HALF = TIED | dict(horizon=[128.0, 2048.0], conv_for=["gate", "eta", "alpha"])
HOPE = HALF | dict(initial_erase=0.85)
SECOND = HALF | dict(conv_init="uniform", qkv_conv_init="last")
FIRST = dict(
    architecture="mlp", skip="outer", adaptive=["k", "v", "eta", "alpha"], gates="linear", objective="l2", dgd=True,
    gated_erase=False, step="joint", erase_gate=False, self_targets=True, momentum=True, decay="learned",
    rate="learned", initial_rate=0.02, initial_scale=1.0, retain="initial", horizon=[128.0, 2048.0], read="before",
    normalize_values=True, conv_size=4, conv_for="all", qkv_conv=0, conv_init="uniform", chunk_size=16,
)  # fmt: skip


def windowed(name: str, mixers: list[dict[str, Any]], *lengths: int) -> list[LanguageContender]:
    """The layers trained for each of so many steps, with windows that are short in part of them."""
    return [
        LanguageContender(f"{name}, short windows, {steps} steps", mixers=mixers, steps=steps, short_window=4)
        for steps in lengths
    ]


def defaults() -> Languages:
    """The experiment's settings."""
    linear = MATRIX | dict(decay="none", dgd=False, rate="one", step="plain", conv_init="uniform")
    window = {"mixer": "window_attention", "window": 256}
    beside = {"mixer": "memory_and_attention", "window": 256} | HOPE | dict(horizon=[2048.0, 32768.0])
    kinds = beside | dict(tied_write=False, erase_heads="half")
    free = dict(norm_limit=1e4)  # before, sums of some 40 letters met the memory's bound
    contenders = [
        *windowed("Hope", [window, kinds | free], 1200),
        *windowed("Hope, plain keys", [window, kinds | free | dict(qkv_conv=0)], 1200),
        LanguageContender("fifth default", mixers=[window, kinds], runs=[0]),
        *windowed("fifth default", [window, kinds], 1200, 2000),
        *windowed("fifth default, plain keys", [window, kinds | dict(qkv_conv=0)], 1200),
        LanguageContender("fourth default", mixers=[window, beside]),
        LanguageContender("fourth default, 2000 steps", mixers=[window, beside], runs=[0], steps=2000),
        LanguageContender("third default", mixers=[{"mixer": "selfmod"} | HOPE, window]),
        LanguageContender(
            "third default, 2000 steps", mixers=[{"mixer": "selfmod"} | HOPE, window], runs=[0], steps=2000
        ),
        LanguageContender("Hope, matrix memory", options=TRACKING),
        LanguageContender(
            "Hope, matrix memory + window", mixers=[{"mixer": "selfmod"} | TIED, {"mixer": "window_attention"}]
        ),
        LanguageContender("Hope, erase from a half", mixers=[{"mixer": "selfmod"} | HALF, window], runs=[0]),
        LanguageContender("Hope, second default", mixers=[{"mixer": "selfmod"} | SECOND, window], runs=[0]),
        LanguageContender("Hope, first default", options=FIRST, head_size=32, runs=[0]),
        LanguageContender("Hope, matrix memory, 2000 steps", options=TRACKING, runs=[0], steps=2000),
        LanguageContender("Transformer", "attention", head_size=32),
        LanguageContender("Transformer, 2000 steps", "attention", head_size=32, runs=[0], steps=2000),
        LanguageContender("linear attention", options=linear),
        LanguageContender("DeltaNet", options=DELTA),
        LanguageContender("DeltaNet, eigenvalues to -1", options=DELTA | NEGATIVE),
        LanguageContender("LSTM", "lstm"),
        LanguageContender("LSTM, 2000 steps", "lstm", runs=[0], steps=2000),
    ]
    return Languages(contenders=contenders, seeds=[0, 1, 2])


def work(settings: Languages, data: str | Path | None, smoke: bool) -> LanguagesWork:
    """What trains; words are drawn, nothing is read."""
    return LanguagesWork(settings)


def plan(settings: Languages, contenders: list[LanguageContender], row: Row) -> list[LanguageJob]:
    """Every contender and language with the first seed, then with the second, ..."""
    return [
        LanguageJob(contender.name, language, seed)
        for seed in settings.seeds
        for language in settings.languages
        for contender in contenders
        if not contender.runs or seed in contender.runs
    ]
