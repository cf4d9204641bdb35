"""What the experiments' reports share: means with spreads, Markdown tables, and the style of the figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# distinct for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#A0522D")


def spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation (of the sample; 0 for one value) of the finite values; None if there is none."""
    values = [v for v in values if v is not None]
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
    }


def pm(found: dict[str, Any] | None, digits: int = 3) -> str:
    """Mean ± standard deviation as text, "-" for nothing."""
    if found is None:
        return "-"
    text = f"{found['mean']:.{digits}f}"
    return f"{text} ± {found['std']:.{digits}f}" if len(found["values"]) > 1 else text


def bootstrap(differences: list[list[float]], samples: int = 2000) -> list[float] | None:
    """95% interval of the mean of paired differences [seeds][windows]; both are drawn again, with replacement."""
    if not differences:
        return None
    values, generator = torch.tensor(differences, dtype=torch.float64), torch.Generator().manual_seed(0)
    seeds, windows = (torch.randint(n, (samples, n), generator=generator) for n in values.shape)
    means = values[seeds].mean(1).gather(1, windows).mean(1)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def mean_bins(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The loss by position over several runs: bins with mean and standard deviation, in bits."""
    bins = []
    for cells in zip(*(row["loss_by_position"] for row in rows)):
        found = spread(None if c["loss"] is None else c["loss"] / 0.6931471805599453 for c in cells)
        if found:
            bins.append({"first": cells[0]["first"], "last": cells[0]["last"]} | found)
    return bins


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others figures."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def count(number: float | None) -> str:
    """A whole number with thousands separators."""
    return "-" if number is None else f"{number:,.0f}"


@contextmanager
def figure(path: Path, columns: int, size: tuple[float, float], *, rows: int = 1, **options: Any):
    """Axes of a new figure, saved as a PNG at the end: a list of them, or a list for each of several `rows`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    style |= {"grid.alpha": 0.3, "axes.titlesize": 11, "legend.frameon": False}
    with pyplot.rc_context(style):
        drawn, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
        try:
            yield axes if rows > 1 else axes[0]
            drawn.savefig(path, dpi=130)
        finally:
            pyplot.close(drawn)


def band(axis: Any, x: list[float], found: list[dict[str, Any]], label: str, colour: str, **options: Any) -> None:
    """A line of means with a band of one standard deviation."""
    mean = [f["mean"] for f in found]
    axis.plot(x, mean, label=label, color=colour, **options)
    low, high = ([f["mean"] + sign * f["std"] for f in found] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def mean_curve(rows: list[dict[str, Any]], tokens_per_step: int) -> tuple[list[float], list[dict[str, Any]]]:
    """The training loss of several runs: tokens, and mean and standard deviation in bits."""
    points = [p for p in zip(*(row["curve"] for row in rows)) if all(c[1] is not None for c in p)]
    bits = [spread(c[1] / 0.6931471805599453 for c in p) for p in points]
    return [p[0][0] * tokens_per_step for p in points], bits
