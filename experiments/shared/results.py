"""Results of runs as lines of a file: appended whole, read back after a kill, never rewritten."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from experiments.shared.work import Job


class Results:
    """The rows of `results.jsonl`, by job and fingerprint.

    Args:
        path: the file; it need not exist. A last line cut short by a kill is ignored.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._cut = False
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                self._keep(json.loads(line))
            except ValueError:
                continue
        if self.path.exists():
            content = self.path.read_bytes()
            self._cut = bool(content) and not content.endswith(b"\n")

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, job: Job, fingerprint: str) -> dict[str, Any] | None:
        """The row of a job made with these settings, or None."""
        return self._rows.get((job.kind, job.key, fingerprint))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row (with `kind`, `key` and `fingerprint`) in one write and bring it to the disk."""
        row = finite(row)
        line = json.dumps(row, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            file.write(("\n" if self._cut else "").encode() + line.encode())
            os.fsync(file.fileno())
        self._cut = False
        self._keep(row)

    def _keep(self, row: dict[str, Any]) -> None:
        self._rows[row["kind"], row["key"], row["fingerprint"]] = row


def finite(value: Any) -> Any:
    """The value with null for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
