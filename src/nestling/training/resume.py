"""Whether and where a run goes on, that it is the same run, and that nobody else is at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nestling.training import checkpoint
from nestling.training.config import TrainConfig
from nestling.utils.locks import sole_writer
from nestling.utils.ranks import Ranks

# in a resumed run
MAY_CHANGE = (
    *("out", "steps", "device", "threads", "compile", "gradient_checkpointing", "logging", "data.cache_dir"),
    *("parallel.mode", "parallel.offload", "parallel.sequence", "parallel.rows"),
)


def find_checkpoint(out: str | Path, resume: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint a run in `out` starts from (None: from the beginning), and what its user should know.

    Raises:
        ValueError: a run is there and `resume` is not asked for; `resume` is, and no checkpoint can be used.
    """
    found = checkpoint.list_checkpoints(out)
    if found and not resume:
        raise ValueError(
            f"{out} already holds a run ({found[-1].name}): resume it (--resume) or write elsewhere (--out)"
        )
    if not resume:
        return None, []
    if not found:
        return None, [f"{out} holds no checkpoint yet: starting from the beginning"]
    path, problems = checkpoint.newest(out)
    return path, [f"{problem}; resuming from {path}" for problem in problems]


def check_same_run(state: dict[str, Any], config: TrainConfig, corpus: str) -> None:
    """Raise ValueError unless going on from a trainer's state with this configuration and text gives the same run."""
    changes = differences(TrainConfig.from_dict(state["config"]).to_dict(), config.to_dict())
    refused = [c for c in changes if not any(c[0] == name or c[0].startswith(name + ".") for name in MAY_CHANGE)]
    if refused:
        listed = ", ".join(f"{name} (was {old!r}, now {new!r})" for name, old, new in refused)
        raise ValueError(f"a resumed run cannot change {listed}; keep it, or start a new run with another --out")
    if state["corpus"] != corpus:
        raise ValueError(
            f"the text or tokenizer changed since the run in {config.out} began; start a new run with another --out"
        )
    if state["step"] > config.steps:
        raise ValueError(f"steps must be at least {state['step']}, which the run has already taken, not {config.steps}")


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """(dotted name, old value, new value) of everything that differs between two nested dictionaries."""
    found = []
    for name in [*old, *(n for n in new if n not in old)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append((f"{prefix}{name}", before, after))
    return found


@contextmanager
def writing_alone(out: str, ranks: Ranks) -> Iterator[None]:
    """The lock of a run's folder, held by the first rank for all."""
    with ExitStack() as stack:
        ranks.together(lambda: stack.enter_context(sole_writer(out)), only_first=True)
        yield
