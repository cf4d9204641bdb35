"""The page of a reading session: one file of HTML that needs no network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.sessions.series import Series
from nestling.utils.files import write_text

if TYPE_CHECKING:
    from nestling.sessions.session import Session

SHOWN = 200  # documents in the table
SMOOTH = 0.9  # how much of the mean a point keeps


def page(session: Session, path: str | Path | None = None, model: str = "") -> str:
    """The page of a session as text; written to `path` if given."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    text = json.dumps(_finite(_data(session, model)), ensure_ascii=False).replace("</", "<\\/")
    made = template.replace("DATA", text, 1)
    if path is not None:
        write_text(path, made)
    return made


def _data(session: Session, model: str) -> dict[str, Any]:
    result, notes, learner = session.result(), session.notes, session.model.learner
    rows = result["documents"]
    sizes = [row["bytes"] for row in rows]
    tokens, size = sum(row["tokens"] for row in rows), sum(sizes)
    bits = tokens / size / math.log(2) if size else 1.0  # of the whole session: where a token's bytes are not known
    loss = [[p[0], p[2] * _bits(p[0], rows, bits)] for p in notes.loss.points if p[1]]
    return {
        "model": model,
        "tokens": result["tokens"],
        "state": {"path": result["state"], "bytes": result["state_bytes"]},
        "documents": [
            {key: row[key] for key in ("name", "from", "tokens", "bytes", "reading", "before", "after", "control")}
            | {"levels": row["levels"], "not_finite": row["not_finite"]}
            for row in rows[:SHOWN]
        ],
        "left_out": max(0, len(rows) - SHOWN),
        "bands": [[row["from"], row["name"]] for row in rows][:: max(1, len(rows) // 400)],
        "probe": max((row["probe_tokens"] for row in rows), default=0),
        "loss": loss,
        "chunks": notes.loss.every,
        "smooth": _smoothed(loss),
        "levels": [
            {**counts, "points": _points(series), "each": series.every, "rule": str(_rule(learner.levels[i]))}
            for i, counts, series in zip(learner.fast, result["levels"], notes.norms)
        ],
        "held_out": [[row["at"], row["bits_per_byte"], row["behind"]] for row in result["held_out"]],
        "examples": _examples(result),
        "settings": _settings(session, result),
    }


def _bits(at: float, rows: list[dict], usual: float) -> float:
    """Bits per byte of one nat per token, in the document at a position."""
    for row in rows:
        if row["from"] <= at < row["from"] + row["tokens"] + 1:
            return row["tokens"] / row["bytes"] / math.log(2)
    return usual


def _points(series: Series) -> list[list[float]]:
    return [[p[0], p[2] if p[1] else None, p[4]] for p in series.points]


def _smoothed(points: list[list[float]]) -> list[list[float]]:
    smooth, mean, weight = [], 0.0, 0.0
    for x, y in points:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * y, SMOOTH * weight + (1 - SMOOTH)
        smooth.append([x, mean / weight])
    return smooth


def _rule(level: Any) -> str:
    options = [f"{level.optimizer}, lr {level.lr:g}"]
    options += [f"clip {level.clip:g}"] if level.clip is not None else []
    options += [f"decay {level.decay:g}"] if level.decay else []
    options += [f"surprise {level.surprise:g}"] if level.surprise is not None else []
    return ", ".join(options)


def _examples(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What to show of single tokens: the held-out text first, then the latest documents."""
    held = [row for row in result["held_out"][-1:] if row["examples"]]
    found = [{"title": "held-out text, never learned", "items": row["examples"]} for row in held]
    latest = [row for row in result["documents"] if row["examples"]][-4 + len(found) :]
    return found + [{"title": row["name"], "items": row["examples"]} for row in latest]


def _settings(session: Session, result: dict[str, Any]) -> list[list[str]]:
    weights = next(session.model.parameters()).dtype
    memory = result["memory"]
    rows = [
        ["model", f"{type(session.model).__name__}, {sum(p.numel() for p in session.model.parameters()):,} weights, "
                  f"{str(weights).removeprefix('torch.')}"],
        ["attention begins anew", f"every {result['settings']['context']:,} tokens" if result["settings"]["context"]
                                  else "never"],
        ["state", f"{result['state']}, {result['state_bytes'] / 1e6:,.1f} MB held by the levels"],
    ]  # fmt: skip
    if memory["ratio"]:
        first, last = (f"{memory[name] / 1e6:,.0f} MB" for name in ("first_half", "last_half"))
        rows.append(["memory at most", f"{first} in the first half, {last} in the last"])
    return rows


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
