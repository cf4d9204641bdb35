"""The demo's figures. Each is drawn twice, for wide and for narrow pages, with letters of one size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.demo.config import HOPE, TRANSFORMER
from experiments.demo.svg import HOPE_COLOUR, LAYER_COLOURS, LINE, MUTED, POINT, STYLE, TRANSFORMER_COLOUR, to_svg
from experiments.demo.words import SURE, horizon, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {HOPE: HOPE_COLOUR, TRANSFORMER: TRANSFORMER_COLOUR}
DASHES = {HOPE: "-", TRANSFORMER: (0, (5, 1.5))}
WIDE, NARROW = 760, 380  # pixels
ROW = 64  # bytes of text in a row where no chunk size says better
SMOOTH_BYTES = 16  # bytes that the thick lines along a text average over
DECADES = 30  # from this ratio of large to small values on an axis is logarithmic
LETTER_HEIGHT = 17  # pixels that two names need between them


def both(draw: Callable[..., Figure], result: dict[str, Any], label: str, name: str) -> str:
    """A figure as HTML: the wide and the narrow form, of which the style sheet shows one."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        forms = [
            f'<div class="{kind}">{to_svg(draw(result, width), label, f"{name}-{kind}")}</div>'
            for kind, width in (("wide", WIDE), ("narrow", NARROW))
        ]
    return "".join(forms)


def curves(result: dict[str, Any], width: int) -> Figure:
    """Loss by bytes read and by seconds of training."""
    wide = width > 500
    figure, axes = _axes(width, 560, 2, 1)
    entropy = result["check"]["byte_entropy"]
    values = [
        row["bits"] for model in result["models"].values() for row in model["held_out"] if math.isfinite(row["bits"])
    ]
    last = max(model["held_out"][-1]["bits"] for model in result["models"].values())
    # the beginning, before anything is learned, is cut off; the ends and the frequencies never are
    floor = 0.92 * min(entropy, *values)
    ceiling = max(1.1 * entropy, 1.1 * last if math.isfinite(last) else 0, min(1.3 * entropy, max(values)))
    for ax, (by, scale, label) in zip(
        axes, (("tokens", 1000, "thousand bytes read"), ("seconds", 1, "seconds of training"))
    ):
        reach = max(model["curve"][-1][by] / scale for model in result["models"].values())
        ends = []
        for name, model in result["models"].items():
            rows, curve = [row for row in model["held_out"] if math.isfinite(row["bits"])], model["curve"]
            smooth = _smoothed([row["bits"] for row in curve])
            ax.plot([row[by] / scale for row in curve], smooth, color=COLOURS[name], lw=1, alpha=0.4)
            x, y = [row[by] / scale for row in rows], [row["bits"] for row in rows]
            ax.plot(x, y, color=COLOURS[name], ls=DASHES[name], marker="o", ms=4)
            # named behind the last of all points: behind its own, a name would lie on the curve that goes on
            ax.plot([x[-1], reach], [y[-1]] * 2, color=COLOURS[name], lw=1, ls=":", alpha=0.6)
            ends.append((max(x[-1], reach), y[-1], f"{name} {y[-1]:.2f}", COLOURS[name]))
        ax.set_ylim(floor, ceiling)
        ax.set_xlim(0, reach * (1.2 if wide else 1.5))
        ax.axhline(entropy, color=MUTED, lw=1, ls=(0, (4, 3)))
        ax.text(ax.get_xlim()[1], entropy, "byte frequencies alone", color=MUTED, ha="right", va="bottom", fontsize=12)
        _label_ends(ax, ends)
        ax.set_xlabel(label)
        ax.set_ylabel("bits per byte")
    return figure


def positions(result: dict[str, Any], width: int) -> Figure:
    """Loss by position in the context, with twice the standard error, and where training ended."""
    figure, (ax,) = _axes(width, 320, 1, 1)
    trained, ends = result["config"]["seq_len"], []
    for name, model in result["models"].items():
        edges, windows = model["positions"]["edges"], np.asarray(model["positions"]["windows"], float)
        x = np.arange(len(edges) - 1)
        mean = windows.mean(0)
        error = SURE * windows.std(0, ddof=1) / np.sqrt(len(windows)) if len(windows) > 1 else np.zeros_like(mean)
        ax.fill_between(x, mean - error, mean + error, color=COLOURS[name], alpha=0.13, lw=0)
        ax.plot(x, mean, color=COLOURS[name], ls=DASHES[name], marker="o", ms=5)
        ends.append((x[-1], mean[-1], f"{name} {mean[-1]:.2f}", COLOURS[name]))
    names = [f"{a + 1}–{b}" for a, b in zip(edges[:-1], edges[1:])]
    if width < 500:
        names = [str(b) for b in edges[1:]]
    ax.set_xticks(range(len(names)), names)
    room = 0.9 if width > 500 else 1.3
    ax.set_xlim(-0.3, len(names) - 1 + room)
    inside = sum(edge <= trained for edge in edges[1:])
    if 0 < inside < len(names):
        ax.axvspan(inside - 0.5, len(names) - 1 + room, color=LINE, alpha=0.35, lw=0)
        ax.text(inside - 0.42, 0.97, "longer than any\ntext in training", color=MUTED, va="top", fontsize=12,
                transform=ax.get_xaxis_transform())  # fmt: skip
    _label_ends(ax, ends)
    ax.set_xlabel("position in the context, bytes" + ("" if width > 500 else " up to"))
    ax.set_ylabel("bits per byte")
    return figure


def states(result: dict[str, Any], width: int) -> Figure:
    """Bytes of state by length of the text."""
    figure, (ax,) = _axes(width, 270, 1, 1)
    top = max(row["bytes"] for model in result["models"].values() for row in model["states"])
    unit, name_of_unit = (1e6, "MB") if top >= 1e6 else (1e3, "kB")
    for name, model in result["models"].items():
        x = [row["tokens"] for row in model["states"]]
        y = [row["bytes"] / unit for row in model["states"]]
        ax.plot(x, y, color=COLOURS[name], ls=DASHES[name], marker="o", ms=4)
        high = y[-1] * unit > 0.85 * top  # beside the last point, where the other line is not
        ax.annotate(f"{name} {size(y[-1] * unit)}", (x[-1], y[-1]), (-14, 0) if high else (0, 9), color=COLOURS[name],
                    textcoords="offset points", ha="right", va="center" if high else "bottom",
                    fontweight="bold")  # fmt: skip
    ax.set_ylim(0, top / unit * 1.1)
    ax.set_xlim(0, None)
    ax.set_xticks([row["tokens"] for row in result["models"][HOPE]["states"]][:: 1 if width > 500 else 2])
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    ax.set_xlabel("bytes of text read")
    ax.set_ylabel(f"state, {name_of_unit}")
    return figure


def memory(result: dict[str, Any], width: int) -> Figure:
    """Inner loss, learning rate, memory horizon and weight norm along the text, one line per layer."""
    seen = result["models"][HOPE]["memory"]
    chunk = result["models"][HOPE]["chunk"] or ROW
    panels = (
        ("loss", "inner loss", None),
        ("eta", "learning rate η", None),
        ("alpha", "horizon 1 / (1 − α), bytes", horizon),
        ("norm", "norm of the weights", None),
    )
    wide, length, trained = width > 500, len(seen["text"]), result["config"]["seq_len"]
    figure, axes = _axes(width, 700 if wide else 760, len(panels), 1, sharex=True)
    for ax, (key, title, change) in zip(axes, panels):
        lines = [np.asarray(layer[key], float) for layer in seen["layers"]]
        lines = lines if change is None else [change(line) for line in lines]
        _scale(ax, np.concatenate(lines))
        ends = []
        for i, values in enumerate(lines):
            colour = LAYER_COLOURS[i % len(LAYER_COLOURS)]
            x = np.arange(1, len(values) + 1)
            steps = key == "norm"  # it changes with each chunk only
            if not steps:
                ax.plot(x, values, color=colour, lw=0.6, alpha=0.25)
            smooth = values if steps else _window_mean(values, SMOOTH_BYTES)
            ax.plot(x, smooth, color=colour, lw=2)
            ends.append((x[-1], smooth[-1], f"layer {seen['layers'][i]['layer']}", colour))
        if trained < length:
            ax.axvspan(trained, length, color=LINE, alpha=0.35, lw=0, zorder=0)
        for edge in range(0, length + 1, chunk):
            ax.axvline(edge, color=LINE, lw=0.6, zorder=0)
        ax.set_title(title, pad=6)
        ax.set_xlim(0, length * (1.1 if wide else 1.22))
        _label_ends(ax, ends)
    every = chunk * max(1, length // chunk // (8 if wide else 4))
    axes[-1].set_xticks(range(0, length + 1, every))
    axes[-1].set_xlabel(
        "byte of the text below" + ("; thin lines: chunks; grey: longer than any text in training" if wide else "")
    )
    return figure


def _scale(ax: Axes, values: np.ndarray) -> None:
    """Limits that leave out the rare extremes; logarithmic where the values span decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [1, 99])
    if low > 0 and high / low > DECADES:
        ax.set_yscale("log")
        subs = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
        ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=5))
        ax.yaxis.set_major_formatter(
            FuncFormatter(
                lambda v, _: f"{v:,.0f}" if v >= 1 else np.format_float_positional(v, 3, trim="-", fractional=False)
            )
        )
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="y", which="minor", length=0)
        ax.set_ylim(low / 1.3, high * 1.3)
    else:
        room = 0.12 * max(high - low, 1e-3 * abs(high), 1e-9)
        ax.set_ylim(0 if 0 <= low < 0.3 * high else low - room, high + room)


def _axes(width: int, height: int, rows: int, columns: int, **options: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / POINT, height / POINT), dpi=POINT, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, hspace=0.06)
    found = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(found.flat)


def _label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names to the right of the lines' ends `(x, y, name, colour)`, moved apart where they would touch."""
    low, high = ax.get_ylim()
    log = ax.get_yscale() == "log"
    height = ax.get_position().height * ax.figure.get_size_inches()[1] * POINT
    gap = LETTER_HEIGHT / height

    def place(y: float) -> float:
        a, b, y = (np.log(max(v, 1e-300)) if log else v for v in (low, high, y))
        return float(np.clip((y - a) / (b - a), 0, 1))

    ordered = sorted(ends, key=lambda end: end[1])
    wanted = [place(end[1]) for end in ordered]
    spots = list(wanted)
    for i in range(1, len(spots)):
        if abs(ordered[i][0] - ordered[i - 1][0]) < 0.2 * ax.get_xlim()[1]:  # else they stand at different places
            spots[i] = max(spots[i], spots[i - 1] + gap)
    shift = np.mean(spots) - np.mean(wanted)
    shift = min(shift, spots[0] - gap / 2) if spots[0] > gap / 2 else spots[0] - gap / 2  # not into the axis below
    for (x, _, text, colour), spot in zip(ordered, spots):
        ax.annotate(text, (x, spot - shift), (8, 0), xycoords=ax.get_xaxis_transform(), textcoords="offset points",
                    color=colour, va="center", fontweight="bold", annotation_clip=False)  # fmt: skip


def _smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth


def _window_mean(values: np.ndarray, length: int) -> np.ndarray:
    """The mean over the `length` values up to each one."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - length)
    return (sums[ends] - sums[starts]) / (ends - starts)
