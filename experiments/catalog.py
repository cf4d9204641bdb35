"""Which experiments there are: every folder with an `experiment.py`. Nothing is imported to list them."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def names(folder: Path = HERE) -> list[str]:
    """The names of all experiments, in the order of their folders."""
    return sorted(path.parent.name for path in folder.glob("*/experiment.py"))


def by_group(folder: Path = HERE) -> dict[str, dict[str, str]]:
    """{group: {name: question}}, as each `experiment.py` says in the constants GROUP and QUESTION."""
    groups: dict[str, dict[str, str]] = {}
    for name in names(folder):
        text = (folder / name / "experiment.py").read_text(encoding="utf-8")
        groups.setdefault(_constant("GROUP", text) or "Others", {})[name] = _constant("QUESTION", text)
    return {group: groups[group] for group in sorted(groups)}


def listing(folder: Path = HERE) -> str:
    """All experiments as text, a line each under the heading of its group."""
    width = max(map(len, names(folder)), default=0)
    blocks = []
    for group, found in by_group(folder).items():
        blocks.append("\n".join([f"{group}:", *(f"  {name:<{width}}  {line}" for name, line in found.items())]))
    return "\n\n".join(blocks)


def _constant(name: str, text: str) -> str:
    found = re.search(rf'^{name} = "(.*)"$', text, re.MULTILINE)
    return found[1] if found else ""
