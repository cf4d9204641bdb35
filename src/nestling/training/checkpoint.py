"""Checkpoints that are whole or absent, know their own content, and are refused by name when damaged or foreign.

A run's folder holds `checkpoints/step-00000250/` (the model and tokenizer as Hugging Face saves them, the trainer's
state, and a manifest with the size and digest of every file) and `latest`, a link to the newest. What is spread over
ranks of the trainer's state lies in `shards/`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nestling.training.shards import split, write
from nestling.utils.files import link, new_folder
from nestling.utils.places import did_you_mean
from nestling.utils.quiet import no_bars
from nestling.utils.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
KIND = "nestling-checkpoint"
MANIFEST = "manifest.json"
STATE = "trainer.pt"
SHARDS = "shards"
_NAME = re.compile(r"step-(\d{8})$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, what is wrong, and the previous good one."""


def save_checkpoint(
    run: str | Path,
    step: int,
    model: PreTrainedModel,
    tokenizer,
    state: dict[str, Any],
    keep: int = 2,
    ranks: Ranks | None = None,
) -> Path:
    """Write the checkpoint of a step and drop all but the newest `keep`. Every rank calls it.

    Nothing that was there is touched until the new one is whole and on the disk. Raises OSError (a full disk, say)
    with nothing lost.
    """
    ranks = ranks or Ranks()
    path = Path(run) / "checkpoints" / f"step-{step:08d}"
    if ranks.together(lambda: _is_whole(path), only_first=True):
        return path
    state, shards = split(state)
    with contextlib.ExitStack() as stack:  # an error on any rank goes through it on the first, and nothing is left
        aside = ranks.together(lambda: stack.enter_context(new_folder(path)), only_first=True)
        if shards:
            write(shards, aside / SHARDS)

        def fill() -> None:
            with no_bars():
                model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
            torch.save(state, aside / STATE)
            written = sorted(f for f in aside.rglob("*") if f.is_file())
            files = {
                f.relative_to(aside).as_posix(): {"bytes": f.stat().st_size, "sha256": _digest(f)} for f in written
            }
            manifest = {"kind": KIND, "format": FORMAT, "step": step, "files": files}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            stack.close()

        ranks.together(fill, only_first=True)
    if ranks.first:
        with contextlib.suppress(OSError):  # a file system without links: the newest is found by its number
            link(Path(run) / "latest", f"checkpoints/{path.name}")
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return path


def _is_whole(path: Path) -> bool:
    """Whether a whole checkpoint is there; a damaged one is removed: a resumed run starts from the newest whole one."""
    if not path.exists():
        return False
    try:
        verify(path)
    except CheckpointError:
        shutil.rmtree(path)
        return False
    return True


def list_checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first (not verified)."""
    root = Path(run) / "checkpoints"
    return sorted(p for p in root.glob("step-*") if _NAME.search(p.name)) if root.is_dir() else []


def verify(path: str | Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint; CheckpointError says what is missing, truncated or changed."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        kind, version, files = manifest["kind"], manifest["format"], manifest["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint of `nestling train`: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error}") from None
    if kind != KIND or version != FORMAT:
        raise CheckpointError(
            f"{path} is of kind {kind!r}, format {version!r}; this version reads {KIND!r}, format {FORMAT}"
        )
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{file} is truncated: {file.stat().st_size} bytes of {entry['bytes']}")
        if _digest(file) != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged: its content does not match its digest")
    return manifest


def newest(run: str | Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of a run, and what is wrong with any newer one.

    Raises:
        CheckpointError: there is none; the message lists what was found.
    """
    problems = []
    for path in reversed(list_checkpoints(run)):
        try:
            verify(path)
            return path, problems
        except CheckpointError as error:
            problems.append(str(error))
    found = ": " + "; ".join(problems) if problems else " (it has no checkpoints/step-*)"
    raise CheckpointError(f"{run} holds no usable checkpoint{found}")


def resolve(path: str | Path) -> Path:
    """The folder with the model that a path means: a run (its newest whole checkpoint), a checkpoint, or any saved
    Hugging Face model.

    Raises:
        CheckpointError: nothing usable there; for a damaged checkpoint the message names the previous good one.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        return newest(path)[0]
    if (path / MANIFEST).exists() or _NAME.search(path.resolve().name):
        try:
            verify(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_previous_good(path.resolve())}") from None
        return path
    if (path / "config.json").is_file():
        return path
    if not path.exists():
        raise CheckpointError(
            f"no model at {path}: give a run's folder, one of its checkpoints, or a saved Hugging Face model"
            f"{did_you_mean(path)}"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file: give the folder of a run, a checkpoint or a saved Hugging Face model")
    raise CheckpointError(f"{path} holds no model: neither checkpoints/ nor a config.json")


def load_trainer_state(path: str | Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint, read without running code from the file."""
    try:
        return torch.load(Path(path) / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{Path(path) / STATE} cannot be read: {error}") from error


def random_state() -> dict[str, Any]:
    """The state of every random generator a run may draw from, as tensors and plain values."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries draw from it
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator back where `random_state` found it."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    if torch.cuda.is_available() and len(state.get("cuda", [])) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def clean(run: str | Path) -> None:
    """Remove what a killed run left half-written."""
    root = Path(run) / "checkpoints"
    for leftover in root.glob(".step-*.tmp") if root.is_dir() else []:
        shutil.rmtree(leftover, ignore_errors=True)


def _previous_good(path: Path) -> str:
    for other in reversed(list_checkpoints(path.parent.parent)):
        if other.name < path.name:
            try:
                verify(other)
                return f"; the previous good checkpoint is {other}"
            except CheckpointError:
                continue
    return ""


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
