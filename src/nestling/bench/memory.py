"""What a training step holds: peak memory over the length, each measured by `peak.py` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from torch.utils._pytree import tree_leaves

from nestling.bench.modules import layer_of
from nestling.bench.settings import BenchSettings
from nestling.bench.table import Table
from nestling.layers.titans_scan import PIECES


def memory(settings: BenchSettings) -> Table:
    """Peak memory of a training step over the length, each in a process of its own."""
    s, rows = settings, []
    layer = layer_of(s)
    segment = layer.config.segment_size
    piece = segment // PIECES
    boundary = sum(t.numel() * t.element_size() for t in tree_leaves(layer.initial_state(1)))
    for kept, size in (("boundary states", segment), ("everything", 0)):
        for tokens in s.memory_lengths if size else s.memory_lengths[:2]:
            grown = peak_growth(s, tokens, size)
            rows.append({"keeps": kept, "tokens": tokens, "MiB over idle": grown / 2**20})
            base = next(r for r in rows if r["keeps"] == kept)
            linear = tokens / base["tokens"]
            first = base["MiB over idle"]
            rows[-1]["over linear growth"] = rows[-1]["MiB over idle"] / first / linear if first else None
            rows[-1]["boundary states MiB"] = (tokens / piece * boundary / 2**20) if size else None
    note = f"Recomputed in pieces of {piece} tokens; one boundary state is {boundary / 2**20:.2f} MiB."
    return Table("Peak memory of a training step, one sequence", rows, [note])


def peak_growth(settings: BenchSettings, tokens: int, segment_size: int) -> int:
    """Bytes by which a training step raises the peak of a fresh process."""
    values = dict(
        dim=settings.dim, heads=settings.heads, tokens=tokens, segment_size=segment_size, device=settings.device,
        dtype=settings.dtype, threads=torch.get_num_threads(), warm=min(settings.memory_lengths[0], 128),
    )  # fmt: skip
    command = [sys.executable, "-m", "nestling.bench.peak", json.dumps(values)]
    threads = str(torch.get_num_threads())
    # freed blocks go back to the system at once, so that the peak is what is alive and not what is fragmented
    environment = {"OMP_NUM_THREADS": threads, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory at {tokens} tokens failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)["bytes"]
