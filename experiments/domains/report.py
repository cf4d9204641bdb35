"""What came out of reading books of several authors: figures by contender, tables and a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.shared.continual.rows import Rows
from experiments.shared.report import COLOURS, band, figure, markdown, pm, spread

BASE = "no levels"
BELOW = -0.02  # mean gain in bits per byte under which a line would flatten all others
TIMED = ("fixed", "adaptive")  # how the names of those begin that are compared at equal numbers of updates


def summary(settings: Any, rows: Rows) -> dict[str, Any]:
    """Means over seeds; gains are bits per byte below those of no levels on the same text, of the same seed."""
    base = {r["seed"]: r for r in rows.get(BASE, ())}
    found = []
    for name, runs in rows.items():
        runs = [r for r in runs if r["seed"] in base]
        if not runs:
            continue
        entry: dict[str, Any] = {"contender": name, "seconds": spread(r["seconds"] for r in runs)}
        gains = [_gains(r["windows"], base[r["seed"]]["windows"]) for r in runs]  # [seed][section][window]
        sections = [[statistics.fmean(w) for w in g] for g in gains]
        entry["sight"] = spread(statistics.fmean(statistics.fmean(w) for w in r["windows"][:-1]) for r in runs)
        entry["back"] = spread(statistics.fmean(r["windows"][-1]) for r in runs)
        entry["gain first"] = spread(s[0] for s in sections)
        entry["gain sight"] = spread(statistics.fmean(s[:-1]) for s in sections)
        entry["gain back"] = spread(s[-1] for s in sections)
        entry["curve"] = [spread(w) for w in zip(*([x for section in g for x in section] for g in gains))]
        if len(runs[0]["known"]) > 1:
            entry |= _known(runs)
        if runs[0]["held"]:
            entry["held"] = _held(runs)
        entry["updates"] = [spread(u) for u in zip(*(r["updates"] for r in runs))]
        found.append(entry)
    facts = {k: getattr(settings, k) for k in ("books", "length", "context", "probes", "seeds")}
    return {"experiment": "domains", **facts, "contenders": found}


def _gains(windows: list[list[float]], base: list[list[float]]) -> list[list[float]]:
    return [[b - w for w, b in zip(*pair)] for pair in zip(windows, base)]


def _known(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """From bits [after section, of book]: what was learned of each book, kept of it, and carried over to others."""
    own, lost, ahead, first = [], [], [], []
    for run in runs:
        known, books = run["known"], len(run["books"])
        before, end = known[0], known[books]  # `end`: after every book, before the return
        own.append(statistics.fmean(before[b] - known[b + 1][b] for b in range(books)))
        lost.append(statistics.fmean(end[b] - known[b + 1][b] for b in range(books - 1)))
        ahead.append(statistics.fmean(before[b] - known[b][b] for b in range(1, books)))
        first.append([before[0] - k[0] for k in known])
    return {"learned": spread(own), "forgotten": spread(lost), "transfer": spread(ahead),
            "first book": [spread(stage) for stage in zip(*first)]}  # fmt: skip


def _held(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By level: by how much the bits of the first and the last book rise when it begins anew."""
    found = []
    for level in range(len(runs[0]["held"])):
        rises = [[h - k for h, k in zip(r["held"][level], r["known"][len(r["books"])])] for r in runs]
        found.append({"first": spread(r[0] for r in rises), "last": spread(r[-1] for r in rises),
                      "all": spread(statistics.fmean(r) for r in rises)})  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    """Contenders, what each level holds, and adaptive levels beside fixed ones."""
    header = ["contender", "first sight", "return", "gain, first sight", "gain, return", "learned", "forgotten"]
    header += ["transfer", "updates", "seconds"]
    rows = []
    for e in found["contenders"]:
        updates = " + ".join(pm(u, 0) for u in e["updates"]) or "-"
        keys = ("sight", "back", "gain sight", "gain back", "learned", "forgotten", "transfer")
        rows.append([e["contender"], *(pm(e.get(k), 3 if n < 2 else 4) for n, k in enumerate(keys)), updates,
                     pm(e["seconds"], 0)])  # fmt: skip
    text = markdown(header, rows)
    text += (
        f"\nBits per byte, mean ± standard deviation over {len(found['seeds'])} seeds, which draw the books' order and "
        f"parts: {found['books']} books of {found['length']:,} tokens each, then {found['length']:,} other tokens of "
        "the first. Gain: bits per byte below no levels on the same text. Learned, forgotten and transfer are measured "
        "on parts never read, with nothing in the context: the fall from before the stream to right after a book "
        "was read; the rise from there to when all books were read (all but the last book); the fall to right before a "
        "book was read. First sight and return are read, and learned from, in the stream; fine-tuning sees "
        "no further back than its own step.\n"
    )
    held = [[f"{e['contender']}: level {n} (fastest: 1)", *(pm(h[k], 4) for k in ("first", "last", "all"))]
            for e in found["contenders"] for n, h in enumerate(e.get("held", ()), 1) if len(e["held"]) > 1]  # fmt: skip
    if held:
        text += "\nWhat a level holds: the rise of bits per byte when it alone begins anew after all books.\n\n"
        text += markdown(["level", "first book", "last book", "all books"], held)
    return text


def plot(found: dict[str, Any], path: Path) -> None:
    """Gain along the stream, the first book between the books, what each level holds, adaptive beside fixed."""
    entries = [e for e in found["contenders"] if e["contender"] != BASE]
    main = [e for e in entries if not e["contender"].startswith(TIMED)]
    timed = [e for e in entries if e["contender"].startswith(TIMED)]
    books, length, context = found["books"], found["length"], found["context"]
    with figure(path, 2, (14, 9), rows=2) as ((stream, first), (held, paced)):
        over, shown = max(1, length // context // 3), []  # windows of a point
        for n, e in enumerate(main):
            means = [c["mean"] for c in e["curve"]]
            points = [statistics.fmean(means[i : i + over]) for i in range(0, len(means), over)]
            below = statistics.fmean(points) < BELOW
            shown += [] if below else points
            places = [(i + over / 2) * context for i in range(0, len(means), over)]
            stream.plot(places, points, marker="o", markersize=3, color=COLOURS[n],
                        label=e["contender"] + (" (far below)" if below else ""))  # fmt: skip
            if "first book" in e:
                band(first, list(range(len(e["first book"]))), e["first book"], e["contender"], COLOURS[n], marker="o")
        for axis in (stream, first, held, paced):
            axis.axhline(0, color="0.5", linewidth=0.8)
        for book in range(1, books + 1):
            stream.axvline(book * length, color="0.6", linewidth=0.8, linestyle="--")
        stream.set(title="At first sight: gain over no levels", xlabel="tokens read (last: the first book again)",
                   ylabel="bits per byte")  # fmt: skip
        if shown:
            low, high = min(0, *shown), max(0, *shown)
            stream.set_ylim(low - 0.1 * (high - low), high + 0.35 * (high - low) + 1e-3)
        stream.legend(fontsize=9, loc="upper left", ncols=2)
        first.set(title="First book, parts never read: gain over before", ylabel="bits per byte")
        first.set_xticks(range(books + 2), ["before", *(f"book {b}" for b in range(1, books + 1)), "return"])
        first.legend(fontsize=9, loc="upper left")
        bars = [(f"{e['contender']}\nlevel {n}", h) for e in entries for n, h in enumerate(e.get("held", ()), 1)
                if e in main and len(e["held"]) > 1]  # fmt: skip
        for shift, key, colour in ((-0.18, "first", COLOURS[0]), (0.18, "last", COLOURS[1])):
            held.bar([i + shift for i in range(len(bars))], [h[key]["mean"] for _, h in bars], 0.34, color=colour,
                     yerr=[h[key]["std"] for _, h in bars], capsize=3, label=f"{key} book")  # fmt: skip
        held.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=9)
        held.set(title="What a level holds: rise when it alone begins anew", ylabel="bits per byte")
        held.legend(fontsize=9)
        measures = (("gain sight", "first sight"), ("gain back", "return"), ("learned", "learned"))
        for n, e in enumerate(timed):
            spots = [i + 0.2 * (n - (len(timed) - 1) / 2) for i in range(len(measures))]
            updates = pm(e["updates"][0], 0)
            paced.errorbar(spots, [e[k]["mean"] for k, _ in measures], yerr=[e[k]["std"] for k, _ in measures], fmt="o",
                           capsize=3, color=COLOURS[n], label=f"{e['contender']} ({updates} updates)")  # fmt: skip
        paced.set_xticks(range(len(measures)), [label for _, label in measures])
        paced.set(title="Adaptive against fixed: gain", ylabel="bits per byte")
        paced.margins(y=0.3)
        paced.legend(fontsize=9, loc="upper right")
