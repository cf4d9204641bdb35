"""Where figures go: a JSONL file always, and trackers by name."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from nestling.training.config import TrainConfig, unknown
from nestling.utils.files import write_text


class Tracker(Protocol):
    """Something that takes figures: trackio, TensorBoard, ..."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the figures of a step."""

    def close(self) -> None:
        """Finish writing."""


class Metrics:
    """The figures of a run in `metrics.jsonl`, one JSON object per line with `kind` ("train", "eval", ...) and `step`.

    Args:
        config: names the folder and the trackers.
        resume_step: lines after this step, which a killed run wrote past its last checkpoint, are dropped.
    """

    def __init__(self, config: TrainConfig, resume_step: int = 0) -> None:
        self.path = Path(config.out) / "metrics.jsonl"
        self._trackers = [make_tracker(name, config, resumed=resume_step > 0) for name in config.logging.trackers]
        if resume_step and self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        else:
            write_text(self.path, "")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line; numbers also go to the trackers as `kind/name`."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        numbers = {
            f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)
        }
        for tracker in self._trackers if numbers else ():
            tracker.log(numbers, step)

    def close(self) -> None:
        """Finish the trackers."""
        with redirect_stdout(sys.stderr):
            for tracker in self._trackers:
                tracker.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut short by a kill is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def make_tracker(name: str, config: TrainConfig, resumed: bool = False) -> Tracker:
    """A tracker by name; ValueError for an unknown or uninstalled one."""
    if name not in _TRACKERS:
        raise ValueError(unknown("tracker", name, _TRACKERS))
    try:
        with redirect_stdout(sys.stderr):  # stdout is the result's
            return _TRACKERS[name](config, resumed)
    except ImportError as error:
        raise ValueError(
            f"tracker {name!r} is not installed ({error}): pip install 'nestling[track]' or pip install {name}"
        ) from error


class TrackioTracker:
    """Trackio, and wandb, whose interface is the same."""

    def __init__(self, config: TrainConfig, resumed: bool, module: str = "trackio") -> None:
        self._tracker = importlib.import_module(module)
        options = {"name": Path(config.out).name, "config": config.to_dict()}
        self._tracker.init(project="nestling", resume="allow" if resumed else "never", **options)

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the figures of a step."""
        self._tracker.log(values, step=step)

    def close(self) -> None:
        """Finish writing."""
        self._tracker.finish()


class TensorboardTracker:
    """TensorBoard event files in the run's `tensorboard` folder."""

    def __init__(self, config: TrainConfig, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(config.out) / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the figures of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish writing."""
        self._writer.close()


_TRACKERS = {
    "trackio": TrackioTracker,
    "tensorboard": TensorboardTracker,
    "wandb": lambda config, resumed: TrackioTracker(config, resumed, "wandb"),
}
