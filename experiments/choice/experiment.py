"""The default Hope is chosen here: state tracking, recall and language together, for candidates and baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.choice.report import plot, summarize, table
from experiments.choice.study import Choice, ChoiceContender, ChoiceJob, ChoiceWork
from experiments.shared.work import Row

GROUP = "Models"
QUESTION = "Which Hope tracks state, recalls pairs and models language, all with one setting?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

# every option of the first default, written out: what a contender does not change stays as it is here
FIRST = dict(
    architecture="mlp", skip="outer", adaptive=["k", "v", "eta", "alpha"], gates="linear", objective="l2", dgd=True,
    gated_erase=False, step="joint", erase_gate=False, erase_range=1.0, erase_layer="first", tied_write=True,
    self_targets=True, momentum=True, decay="learned", rate="learned", initial_rate=0.02, initial_scale=1.0,
    retain="initial", horizon=[128.0, 2048.0], read="before", normalize_values=True, conv_size=4, conv_for="all",
    qkv_conv=0, conv_init="uniform", chunk_size=64,
)  # fmt: skip
# a matrix per head, written as Gated DeltaNet writes it, static projections
DELTA = FIRST | dict(
    architecture="linear", adaptive=[], objective="dot", gated_erase=True, step="layer", self_targets=False,
    momentum=False, initial_rate=1.0, initial_scale=0.1, retain="zero", read="after", normalize_values=False,
    conv_for="gates", qkv_conv=4,
)  # fmt: skip
# the same with an erase gate of range 2 and a write gate of its own, decays that keep, convolutions that pass
TRACKING = DELTA | dict(
    gated_erase=False, erase_gate=True, erase_range=2.0, tied_write=False, rate="gate", horizon=[1024.0, 16384.0],
    conv_init="last",
)  # fmt: skip
# of the first of two layers: key, value and erase see single tokens
PLAIN_KEYS = TRACKING | dict(qkv_conv=0)
LONG = dict(horizon=[4096.0, 65536.0], conv_for=["gate", "eta", "alpha"])
TIED = dict(tied_write=True, horizon=[4096.0, 65536.0])
BY_TOKEN = PLAIN_KEYS | LONG | TIED
SHORT, UNIFORM = dict(horizon=[128.0, 2048.0]), dict(conv_init="uniform")
# k and v are memories whose rate begins near zero: the layer begins as the static one
ADAPTIVE = dict(adaptive=["k", "v"], projection_rate=0.02, retain="initial")
# the memory of the default Hope, every option written out: its convolutions begin near the identity, its erase sees
# single tokens and begins by turning values around
HALF = TRACKING | SHORT | dict(tied_write=True, conv_for=["gate", "eta", "alpha"], qkv_conv_init=None)
HOPE = HALF | dict(initial_erase=0.85)
# the same with heads that never erase beside those that do
TWO_KINDS = HOPE | dict(tied_write=False, erase_heads="half", horizon=[2048.0, 32768.0])
# the first with queries, keys and values of single tokens
PLAIN_HOPE = HOPE | dict(qkv_conv=0, horizon=[2048.0, 32768.0])
# until it was seen to lose parity in `languages`: the convolution in front of the gates was drawn at random
SECOND = HALF | UNIFORM | dict(qkv_conv_init="last")

# a Transformer as it is published, without the convolution and the output gate that all others have
PLAIN = dict(conv_size=0, output_gate=False)

SMALL_HEADS = {"mixer": "window_attention", "window": 256, "head_size": 32}


def defaults() -> Choice:
    """The experiment's settings."""
    window = {"mixer": "window_attention", "window": 256}
    third, half, second = ([_selfmod(options), window] for options in (HOPE, HALF, SECOND))
    contenders = [
        # the two at the best of their rates on text; what else is compared had 0.007
        ChoiceContender("attention", "attention", head_size=32, text_lr=5e-3),
        ChoiceContender("hope", mixers=[window, beside(TWO_KINDS)], text_lr=5e-3),
        ChoiceContender(
            "hope, two kinds, plain keys", mixers=[window, beside(TWO_KINDS | {"qkv_conv": 0})], text_lr=5e-3
        ),
        ChoiceContender("fourth default", mixers=[window, beside(HOPE | horizon(2048, 32768))], text_lr=5e-3),
        ChoiceContender("hope, plain keys", mixers=[window, beside(PLAIN_HOPE)], text_lr=5e-3),
        ChoiceContender("third default", mixers=third, text_lr=5e-3),
        ChoiceContender("beside", mixers=[SMALL_HEADS, beside(HOPE)], text_lr=5e-3),
        ChoiceContender("beside, heads of 64", mixers=[window, beside(HOPE)], text_lr=5e-3),
        ChoiceContender("beside in both", mixers=[beside(HOPE)], text_lr=5e-3),
        *(
            ChoiceContender(
                f"beside, {low} to {high}", mixers=[SMALL_HEADS, beside(HOPE | horizon(low, high))], text_lr=5e-3
            )
            for low, high in ((512, 8192), (2048, 32768))
        ),
        ChoiceContender(
            "attention, plain", "attention", PLAIN, head_size=32, text_lr=5e-3, runs={"text 1000": [0, 1, 2]}
        ),
        ChoiceContender("attention, lr 0.007", "attention", head_size=32, runs={"text 1000": [0, 1]}),
        ChoiceContender("third default, erase from a half", mixers=half, text_lr=5e-3),
        ChoiceContender("second default", mixers=second, text_lr=5e-3),
        ChoiceContender("second default, lr 0.007", mixers=second, runs={"text 1000": [0]}),
        ChoiceContender("gated deltanet, conv", options=DELTA),
        ChoiceContender(
            "first default", options=FIRST, head_size=32, runs={"parity": [0], "recall": [0], "text 1000": [0, 1, 2]}
        ),
        ChoiceContender("tracking", options=TRACKING),
        ChoiceContender("tracking, erase by token", options=TRACKING | dict(conv_for=["gate", "eta", "alpha"])),
        ChoiceContender(
            "plain keys, tracking",
            mixers=[_selfmod(PLAIN_KEYS | dict(conv_for=["gate", "eta", "alpha", "v"])), _selfmod(TRACKING)],
        ),
        ChoiceContender(
            "plain keys, tracking, by token",
            mixers=[
                _selfmod(PLAIN_KEYS | dict(conv_for=["gate", "eta", "alpha", "v"])),
                _selfmod(TRACKING | dict(conv_for=["gate", "eta", "alpha"])),
            ],
        ),
        ChoiceContender("plain keys, long", mixers=[_selfmod(PLAIN_KEYS | LONG), _selfmod(TRACKING | LONG)]),
        ChoiceContender(
            "plain keys, adaptive",
            mixers=[_selfmod(PLAIN_KEYS | LONG | ADAPTIVE), _selfmod(TRACKING | LONG | ADAPTIVE)],
        ),
        ChoiceContender("tied + window", mixers=[_selfmod(TRACKING | TIED), {"mixer": "window_attention"}]),
        ChoiceContender("token, tracking", mixers=[_selfmod(BY_TOKEN), _selfmod(TRACKING)]),
        ChoiceContender("tracking, short", options=TRACKING | SHORT),
        ChoiceContender("tracking, uniform", options=TRACKING | UNIFORM),
        ChoiceContender("tracking, short, uniform", options=TRACKING | SHORT | UNIFORM),
        ChoiceContender("plain keys + window", mixers=[_selfmod(PLAIN_KEYS | LONG), {"mixer": "window_attention"}]),
    ]
    return Choice(contenders=contenders, seeds=[0, 1, 2])


def horizon(low: float, high: float) -> dict[str, Any]:
    """Tokens after which what is written has decayed to 1 / e: of the first and of the last head."""
    return {"horizon": [float(low), float(high)]}


def beside(options: dict[str, Any]) -> dict[str, Any]:
    """A memory and attention over a window in one layer, the attention's heads of 32."""
    return {"mixer": "memory_and_attention", "window": 256} | options


def _selfmod(options: dict[str, Any]) -> dict[str, Any]:
    return {"mixer": "selfmod"} | options


def work(settings: Choice, data: str | Path | None, smoke: bool) -> ChoiceWork:
    """What trains; parity and pairs are drawn, the text is the standard library's sources."""
    return ChoiceWork(settings)


def plan(settings: Choice, contenders: list[ChoiceContender], row: Row) -> list[ChoiceJob]:
    """Every contender and task with the first seed, then with the second, ..."""
    return [
        ChoiceJob(contender.name, task, seed)
        for seed in settings.seeds
        for contender in contenders
        for task in settings.tasks
        if not contender.runs or seed in contender.runs.get(task, [])
    ]
