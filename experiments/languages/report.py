"""Table and figure of the formal languages: a row for each contender, a column for each language."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.shared.report import COLOURS, figure, markdown, pm, spread
from experiments.shared.work import Row

if TYPE_CHECKING:
    from experiments.languages.study import LanguageContender, Languages


def summarize(settings: Languages, contenders: list[LanguageContender], row: Row) -> dict[str, Any]:
    """Accuracy in % of each contender by language and bin, of whole words and of letters, over seeds."""
    from experiments.languages.study import LanguageJob

    found = []
    for contender in contenders:
        languages = {}
        for language in settings.languages:
            runs = [r for s in settings.seeds if (r := row(LanguageJob(contender.name, language, s)))]
            if runs:
                languages[language] = {
                    bin_: {kind: spread(100 * r["accuracy"][bin_][kind] for r in runs) for kind in ("words", "letters")}
                    for bin_ in settings.bins
                } | {"parameters": runs[0]["parameters"]}
        if languages:
            found.append({"contender": contender.name, "languages": languages})
    return {"experiment": "languages", "bins": [*settings.bins], "languages": settings.languages, "contenders": found}


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown: whole words first, then letters."""
    bins = summary["bins"]
    parts = []
    for kind in ("words", "letters"):
        lines = [
            [found["contender"], *(_cell(found["languages"].get(name), bins, kind) for name in summary["languages"])]
            for found in summary["contenders"]
        ]
        parts.append(markdown([f"{kind}, {' / '.join(bins)}", *summary["languages"]], lines))
    runs = max((len(_values(found)) for found in summary["contenders"]), default=0)
    parts.append(
        f"Accuracy in % at lengths {' and '.join(bins)}, trained at the first: *words* with every set right, and "
        f"*letters*; mean ± standard deviation over {runs} seeds; a cell without a spread is one seed.\n"
    )
    return "\n".join(parts)


def _values(found: dict[str, Any]) -> list[float]:
    languages = list(found["languages"].values())
    return max((next(v for k, v in own.items() if k != "parameters")["words"]["values"] for own in languages), key=len)


def _cell(own: dict[str, Any] | None, bins: list[str], kind: str) -> str:
    return "-" if not own else " / ".join(pm(own[bin_][kind], 1) for bin_ in bins)


def plot(summary: dict[str, Any], path: Path) -> None:
    """A panel for each language: accuracy of whole words of each seed, by bin."""
    names = [c["contender"] for c in summary["contenders"]]
    size = (2.2 + 1.9 * len(summary["languages"]), 1.6 + 0.3 * len(names))
    with figure(path, len(summary["languages"]), size, sharey=True) as axes:
        for axis, language in zip(axes, summary["languages"]):
            for place, found in enumerate(summary["contenders"]):
                for shift, (bin_, colour) in enumerate(zip(summary["bins"], COLOURS)):
                    values = (
                        found["languages"].get(language, {}).get(bin_, {"words": {"values": []}})["words"]["values"]
                    )
                    heights = [place - 0.12 + 0.24 * shift] * len(values)
                    axis.scatter(values, heights, s=18, color=colour, alpha=0.7, label=bin_ if place == 0 else None)
            axis.set(title=language, xlabel="words right, %", xlim=(-5, 105))
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        axes[-1].legend(title="length", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
