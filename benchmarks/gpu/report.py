"""summary.md and the plots, from what the parts have found."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

Rows = dict[str, Any]
LAYERS = ("layers", ("ms", "tokens/s", "MFLOP/token", "TFLOP/s", "% of bf16 peak", "peak MiB"))
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "speed": {LAYERS[0]: LAYERS[1], "chunk size": LAYERS[1]},
    "graphs": {"step": LAYERS[1][:-1], "token": ("ms",)},
    "profiling": {"profile": ("ms", "busy ms", "% busy", "kernels launched", "microseconds per kernel")},
    "optimizers": {"optimisers": ("ms", "slowest ms", "mean ms", "bytes of state per parameter")},
    "peers": {"peers": ("ms", "tokens/s", "peak MiB")},
    "compiling": {"compile": ("first calls ms", "graphs", "graph breaks"),
                  "compiled": ("eager ms", "compiled ms", "times as fast")},
    "decode": {"layer": ("ms", "kernels launched", "% busy"),
               "model": ("ms", "slowest ms", "kernels launched", "% busy", "prefill ms")},
    "training": {"runs": ("size", "parameters", "steps", "micro-batches", "tokens/s", "step ms", "first loss",
                          "last loss", "peak MiB")},
}  # fmt: skip
TITLES = {
    "layers": "Layers against the block, forward and backward",
    "chunk size": "selfmod by chunk size, as Python launches it",
    "step": "The same as a CUDA graph", "token": "One token through a layer, as a CUDA graph",
    "profile": "Where the time goes", "optimisers": "A step of the optimiser", "peers": "flash-linear-attention",
    "compile": "torch.compile: first calls", "compiled": "torch.compile: after them",
    "layer": "One token through a layer",
    "model": "One token through a model", "runs": "Training",
}  # fmt: skip


def write(out: Path, results: dict[str, Any]) -> str:
    """Write all; returns the summary."""
    text = "\n".join(summary(results)) + "\n"
    for plot in (_speed, _training):
        try:
            plot(out, results)
        except Exception:  # figures are what matters
            text += f"\nNo plot:\n```\n{traceback.format_exc(limit=-2)}```\n"
    (out / "summary.md").write_text(text)
    return text


def summary(results: dict[str, Any]) -> list[str]:
    facts = results.get("facts", {})
    what, rates = facts.get("device", {}).get("what", {}), facts.get("rates", {})
    lines = [f"# {what.get('name', 'unknown device')}, {results.get('date', '')}", ""]
    lines += [f"- {key}: {_show(value)}" for key, value in (what | rates).items()]
    versions = facts.get("device", {}).get("versions", {})
    lines += ["- versions: " + ", ".join(f"{k} {v}" for k, v in versions.items())]
    lines += _checks(results)
    for part, tables in TABLES.items():
        for table, columns in tables.items():
            rows = results.get(part, {}).get(table, {})
            if rows:
                lines += [
                    "",
                    f"## {TITLES[table]}",
                    "",
                    *_table(rows, columns, _ratio(rows) if table == "layers" else {}),
                ]
    for name, row in results.get("profiling", {}).get("profile", {}).items():
        if "top" in row:
            lines += ["", f"## Kernels of {name}", ""]
            lines += _table({r["kernel"]: r for r in row["top"]}, ("calls", "ms", "% of busy"), {})
    lines += ["", "## Parts", ""]
    for part, found in results.items():
        if isinstance(found, dict) and "part" in found:
            state = {k: v for k, v in found["part"].items() if k != "failed"}
            lines.append(f"- {part}: {_show(state)} {found['part'].get('failed', {}).get('exception', '')}".rstrip())
    return lines


def _checks(results: dict[str, Any]) -> list[str]:
    lines = ["", "## Checks", ""]
    for part in ("check_layers", "check_models"):
        rows = results.get(part, {}).get("checks", {})
        good = [name for name, row in rows.items() if row.get("ok")]
        lines += [f"{part}: {len(good)} of {len(rows)} keep to what is allowed.", ""]
        for name, row in rows.items():
            if "exception" in row:
                lines += [f"- **{name}**: `{row['exception'][:300]}`", *(f"  - `{f}`" for f in row["frames"])]
            elif not row.get("ok"):
                lines.append(f"- **{name}**: {_show(row)}")
        for precision in ("float32", "bf16", "tf32"):
            own = [r for name, r in rows.items() if name.endswith(precision) and "ok" in r]
            numbers = [r[k] for r in own for k in ("values", "gradients") if isinstance(r.get(k), float)]
            if numbers:
                lines.append(f"- {precision}: largest relative error {max(numbers):.1e} of {len(own)} checks")
        lines.append("")
    return lines


def _ratio(rows: Rows) -> dict[str, float]:
    """Of the block's speed at the same size and precision."""
    found = {}
    for name, row in rows.items():
        layer, _, rest = name.partition(", ")
        base = rows.get(f"block, {rest}", {})
        if layer != "block" and "ms" in row and "ms" in base:
            found[name] = base["ms"] / row["ms"]
    return found


def _table(rows: Rows, columns: tuple[str, ...], ratio: dict[str, float]) -> list[str]:
    shown = [c for c in columns if any(isinstance(r, dict) and c in r for r in rows.values())]
    head = ["", *shown] + (["of the block"] if ratio else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    failures = []
    for name, row in rows.items():
        if not isinstance(row, dict) or not any(c in row for c in shown):
            failures += [f"- {name}: {_show(row)}"]
            continue
        cells = [name.replace("|", "/"), *(_show(row.get(c, "")) for c in shown)]
        cells += [f"{ratio[name]:.3f}" if name in ratio else ""] if ratio else []
        lines.append("| " + " | ".join(cells) + " |")
    return (lines if len(lines) > 2 else []) + ([""] if failures else []) + failures


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_show(v)}" for k, v in value.items())[:400]
    if isinstance(value, list):
        return "; ".join(_show(v) for v in value)[:400]
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else " ".join(str(value).split())


def _name(results: dict[str, Any]) -> str:
    return results.get("facts", {}).get("device", {}).get("what", {}).get("name", "unknown device")


def _speed(out: Path, results: dict[str, Any]) -> None:
    """Tokens a second over the chunk size, launched and replayed, and the block's as a line."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    speed = results.get("speed", {})
    eager = sorted((r["chunk"], r["tokens/s"]) for r in speed.get("chunk size", {}).values() if "tokens/s" in r)
    steps = results.get("graphs", {}).get("step", {})
    graph = sorted((int(n.split()[-1]), r["tokens/s"]) for n, r in steps.items() if "selfmod" in n and "tokens/s" in r)
    for rows, label in ((eager, "selfmod, launched by Python"), (graph, "selfmod, as a CUDA graph")):
        if rows:
            axes.plot(*zip(*rows, strict=True), marker="o", label=label)
    blocks = [r for n, r in speed.get("layers", {}).items() if n.startswith("block") and "tokens/s" in r]
    if blocks:
        label = f"attention + MLP block, {blocks[0]['precision']}"
        axes.axhline(blocks[0]["tokens/s"], color="black", linestyle="--", label=label)
        axes.set_title(f"{_name(results)}, width {blocks[0]['dim']}, T {blocks[0]['tokens']}")
    axes.set(xscale="log", yscale="log", xlabel="tokens of a chunk", ylabel="tokens/s, forward and backward")
    if axes.get_lines():
        axes.legend()
    figure.savefig(out / "speed.png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def _training(out: Path, results: dict[str, Any]) -> None:
    """Loss over tokens, and over seconds."""
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for name, row in results.get("training", {}).get("runs", {}).items():
        if "curve" in row:
            tokens, seconds, loss = zip(*row["curve"], strict=True)
            label = f"{name} ({row['parameters'] / 1e6:.0f}M, {row['tokens/s']:,.0f} tokens/s)"
            both[0].plot(tokens, loss, label=label)
            both[1].plot(seconds, loss, label=label)
    both[0].set(xlabel="tokens", ylabel="loss per token", xscale="symlog", title=_name(results))
    both[1].set(xlabel="seconds")
    if both[0].get_lines():
        both[0].legend(fontsize=8)
    figure.savefig(out / "training.png", dpi=130, bbox_inches="tight")
    plt.close(figure)
