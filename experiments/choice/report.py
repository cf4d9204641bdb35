"""Table and figure of the choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def summarize(settings: Any, contenders: list[Any], row: Any) -> dict[str, Any]:
    return {"contenders": ["-"]}


def table(summary: dict[str, Any]) -> str:
    return ""


def plot(summary: dict[str, Any], path: Path) -> None:
    pass
