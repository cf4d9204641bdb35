"""Figures of a run as text, as a Markdown page, and as a picture."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def number(value: object, column: str = "") -> str:
    """A figure with three significant digits, an integer with separators, a missing one as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if column.startswith("of the machine"):
        return f"{value:.0%}"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def markdown(part: dict) -> str:
    """One part as a Markdown table with its notes."""
    columns = list(part["rows"][0])
    lines = [f"**{part['title']}**", "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join("---" if isinstance(part["rows"][0][c], str) else "--:" for c in columns) + "|")
    for row in part["rows"]:
        lines.append("| " + " | ".join(number(row.get(c), c) for c in columns) + " |")
    return "\n".join([*lines, *(f"\n{note}" for note in part["notes"])])


def machine(environment: dict) -> str:
    """Where the figures come from, in one sentence."""
    e = environment
    where = e.get("gpu") or e["cpu"]
    load = "" if e["load"] is None else f"; load average {e['load'][0]} before and {e['load after'][0]} after"
    cores = f"{e['threads']} thread{'s' * (e['threads'] != 1)} of {e['cores']} cores"
    note = f" {e['note']}." if "note" in e else ""
    return f"{where}, {cores}, {e['dtype']}, torch {e['torch']}, {e['date']}{load}.{note}"


def update_page(page: str, results: dict[str, dict]) -> str:
    """The page with the text between `<!-- bench NAME [PART] -->` and `<!-- end -->` written anew from results.

    Raises:
        ValueError: a marker names a result or a part there is not.
    """

    def section(match: re.Match) -> str:
        name, part = match[2], match[3]
        if name not in results:
            raise ValueError(f"the page asks for results {name!r}; given are {', '.join(results) or 'none'}")
        if part and part not in results[name]["parts"]:
            raise ValueError(f"the page asks for part {part!r} of {name!r}, which was not measured")
        text = markdown(results[name]["parts"][part]) if part else machine(results[name]["environment"])
        return f"{match[1]}\n{text}\n\n<!-- end -->"

    return re.sub(r"(<!-- bench (\S+)(?: (\S+))? -->\n).*?<!-- end -->", section, page, flags=re.DOTALL)


def plot(result: dict, path: str | Path) -> None:
    """A picture of the parts that have one: speed over length, layers, decoding, memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawings = {"lengths": _lengths, "mixers": _mixers, "decode": _decode, "memory": _memory, "optim": _optim}
    chosen = [name for name in drawings if name in result["parts"]]
    if not chosen:
        raise ValueError(f"nothing to draw: none of {', '.join(drawings)} was measured")
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            1, len(chosen), figsize=(4.4 * len(chosen), 3.6), squeeze=False, layout="constrained"
        )
        for name, ax in zip(chosen, axes[0], strict=True):
            drawings[name](ax, result["parts"][name]["rows"])
        figure.savefig(path, dpi=140)
        plt.close(figure)


def _length_axis(ax, values: list[int], label: str) -> None:
    ax.set_xscale("log", base=2)
    names = [f"{v >> 20}M" if v >= 1 << 20 else f"{v >> 10}K" if v >= 1024 else str(v) for v in values]
    ax.set_xticks(values, names)
    ax.minorticks_off()
    ax.set_xlabel(label)


def _lengths(ax, rows) -> None:
    names = list(dict.fromkeys(r["layer"] for r in rows))
    for name in names:
        own = [r for r in rows if r["layer"] == name]
        ax.plot([r["tokens"] for r in own], [r["tokens/s"] for r in own], "o-", label=name.replace("_", " "))
    tokens = [r["tokens"] for r in own]
    ax.plot(tokens, [r["block tokens/s"] for r in own], "s--", label="softmax attention + MLP block")
    _length_axis(ax, tokens, "tokens of the sequence")
    ax.set_ylim(0, 1.5 * max(r["tokens/s"] for r in rows))  # room for the names
    ax.set(title="Training speed", ylabel="tokens/s, forward and backward")
    ax.legend(frameon=False)


def _mixers(ax, rows) -> None:
    rows = sorted(rows, key=lambda r: r["ratio"])
    names = [r["layer"].replace("_", " ") for r in rows]
    ax.barh(names, [r["ratio"] for r in rows], color=["C1" if r["layer"] == "selfmod" else "C0" for r in rows])
    for at, row in enumerate(rows):
        ax.text(
            row["ratio"],
            at,
            f" {row['ratio']:.2f}",
            va="center",
            bbox=dict(facecolor="white", edgecolor="none", pad=0.5),
        )
    ax.margins(x=0.15)
    ax.axvline(1, color="0.5", linewidth=0.8)
    ax.set(title="Layers at the target's size", xlabel="tokens/s over the block's")


def _decode(ax, rows) -> None:
    labels = {"memory_and_attention": "Hope's memory", "selfmod": "self-modifying Titans", "attention": "attention"}
    for (name, label), style in zip(labels.items(), ("^-", "o-", "s--")):
        own = [r for r in rows if r["layer"] == name]
        ax.plot([r["position"] for r in own], [r["ms/token"] for r in own], style, label=label)
    _length_axis(ax, sorted({r["position"] for r in rows}), "position in the text")
    ax.set_yscale("log")
    ax.set(title="Decoding", ylabel="ms per token, one layer")
    ax.legend(frameon=False)


def _memory(ax, rows) -> None:
    for name, style in (("boundary states", "o-"), ("everything", "s--")):
        own = [r for r in rows if r["keeps"] == name]
        ax.plot([r["tokens"] for r in own], [r["MiB over idle"] for r in own], style, label=f"keeps {name}")
    _length_axis(ax, sorted({r["tokens"] for r in rows}), "tokens of the sequence")
    ax.set_ylim(bottom=0)
    ax.set(title="Peak memory of a training step", ylabel="MiB")
    ax.legend(frameon=False)


def _optim(ax, rows) -> None:
    """Steps in units of Muon's, at each width, on one thread."""
    rows = [r for r in rows if r["threads"] == min(r["threads"] for r in rows)]
    names = list(dict.fromkeys(r["optimizer"] for r in rows))
    for name in names:
        own = [r for r in rows if r["optimizer"] == name]
        style = "o-" if name.startswith("M3") else "s--"
        ax.plot([r["width"] for r in own], [r["times Muon"] for r in own], style, label=name)
    widths = sorted({r["width"] for r in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(widths, [str(w) for w in widths])
    ax.minorticks_off()
    ax.set_yscale("log")
    ax.set(title="A step of each optimiser", xlabel="width of the transformer", ylabel="times Muon's in float32")
    ax.legend(frameon=False, fontsize=7)


def main(arguments: list[str]) -> None:
    """`python -m nestling.bench.show PAGE RESULT.json ...`: write the page's tables anew.

    In place of the page a picture (.png, .svg, .pdf): every part as the last of the results that have it measured it.
    """
    page, *files = map(Path, arguments)
    results = {path.stem: json.loads(path.read_text()) for path in files}
    if page.suffix in (".png", ".svg", ".pdf"):
        plot({"parts": {name: part for result in results.values() for name, part in result["parts"].items()}}, page)
        return
    page.write_text(update_page(page.read_text(), results))


if __name__ == "__main__":
    main(sys.argv[1:])
