"""Windows in slices over processes: bytes of the state at a cut, time and memory, here and on paper.

Part of `python -m benchmarks.distributed`.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nestling.layers.beside import MemoryBesideAttention
from nestling.models import sizes
from nestling.models.hope import HopeConfig, HopeForCausalLM
from nestling.training.evaluation import token_losses
from nestling.training.sequence import SequencePipeline
from nestling.utils.shapes import shapes_alone

MIXERS: dict[str, dict] = {
    "default": {},
    "selfmod": {"mixer": "selfmod"},
    "gated DeltaNet": {"mixer": "gated_deltanet"},
    "full attention": {"mixer": "attention"},
}
SIZE, TOKENS, WINDOWS, REPEATS = "tiny", 512, 4, 3  # measured; the first repeat is not counted
PAPER_TOKENS, PAPER_RANKS = 32_768, 8
MEMORY_TOKENS = 2048


def state_bytes(config: HopeConfig, tokens: int) -> int:
    """Bytes of one window's state after so many tokens, a multiple of every chunk; nothing is allocated."""
    with shapes_alone():
        layers = HopeForCausalLM(config).model.layers
        past = SimpleNamespace(keys=torch.empty(1, tokens, 1, 1))
    total = 0
    for mixer in (layer.mixer for layer in layers):
        state = mixer.state_like((None, past) if isinstance(mixer, MemoryBesideAttention) else past, 1)
        for memory in (state, getattr(state, "memory", None)):
            if hasattr(memory, "memories"):  # between two chunks the weights at the chunk's start are those of now
                total -= sum(bytes_of(fast.start) for fast in memory.memories)
        total += bytes_of(state)
    return total


def bytes_of(tree: object) -> int:
    leaves = [leaf for leaf in tree_leaves(tree) if hasattr(leaf, "dtypes")]
    return sum(torch.Size(leaf.shape).numel() * leaf.dtypes[0].itemsize for leaf in leaves)


def ring_bytes(config: HopeConfig, tokens: int, ranks: int) -> float:
    """What a rank sends for a window in ring attention: keys and values forward, both and their gradients back."""
    kept = 2 * tokens / ranks * config.hidden_size * 4 * config.num_hidden_layers
    return 3 * (ranks - 1) * kept


def on_paper(names: Sequence[str] = sizes.NAMES) -> list[dict]:
    """Bytes that a rank sends for one window and its gradient: the state at the last cut, and a ring's."""
    rows, read = [], PAPER_TOKENS // PAPER_RANKS * (PAPER_RANKS - 1)
    for name in names:
        row: dict = {"size": name, "tokens": PAPER_TOKENS, "ranks": PAPER_RANKS}
        for mixer, options in MIXERS.items():
            row[mixer] = 2 * state_bytes(sizes.config(name, **options), read) / 1e6
        row["ring"] = ring_bytes(sizes.config(name), PAPER_TOKENS, PAPER_RANKS) / 1e6
        rows.append(row)
    return rows


def model_of(options: dict) -> HopeForCausalLM:
    torch.manual_seed(0)
    return HopeForCausalLM(sizes.config(SIZE, **options)).train()


def measure(rank: int, ranks: int, port: int, results: Path) -> None:
    """One process: whole windows in the first process, then slices in all, by turns."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    windows = torch.randint(0, 256, (WINDOWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    rows = []
    for name, options in MIXERS.items():
        model = model_of(options)
        pipeline = SequencePipeline(model, ranks, 1, torch.device("cpu"), "float32")
        seconds: dict[str, list[float]] = {"one": [], "slices": []}
        work: dict[str, list[float]] = {"one": [], "slices": []}  # processor seconds of all processes
        for repeat in range(REPEATS):
            for kind in seconds:
                model.zero_grad()
                before = pipeline.states.sent, pipeline.gradients.sent
                dist.barrier()
                start, own = time.perf_counter(), time.process_time()
                if kind == "slices":
                    loss = torch.tensor(pipeline.backward(windows))
                    pipeline.exchange()
                    dist.all_reduce(loss)
                    found = loss.item() / ranks
                elif rank == 0:
                    expected = in_one(model, windows)
                used = torch.tensor(time.process_time() - own)
                dist.all_reduce(used)  # which waits for all
                if repeat:
                    seconds[kind].append(time.perf_counter() - start)
                    work[kind].append(used.item())
        if rank == 0:
            assert abs(found - expected) < 1e-4, (name, found, expected)
            sent = (pipeline.states.sent - before[0]) / WINDOWS
            ratios, more = ([b / a for a, b in zip(x["one"], x["slices"])] for x in (seconds, work))
            row = {"mixer": name, "ranks": ranks, "state_mb": sent / 1e6, "seconds": statistics.median(seconds["one"])}
            row["paper_mb"] = state_bytes(sizes.config(SIZE, **options), TOKENS // ranks) / 1e6
            rows.append(row | {"work": statistics.median(more), "ratio": statistics.median(ratios), "ratios": ratios})
            (results / "sequence.json").write_text(json.dumps(rows))
            print(rows[-1], flush=True)
    dist.barrier()
    dist.destroy_process_group()


def in_one(model: HopeForCausalLM, windows: Tensor) -> float:
    """The loss of windows that are read one after the other, and its gradients."""
    total = 0.0
    for window in windows.split(1):
        loss = token_losses(model, window).mean() / len(windows)
        loss.backward()
        total += loss.item()
    return total


def measure_memory(rank: int, ranks: int, port: int, results: Path, recompute: bool) -> None:
    """What a process needs more than before its first pass: of whole windows, or of slices."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    model = model_of({"mixer": "selfmod"})
    windows = torch.randint(0, 256, (2, MEMORY_TOKENS + 1), generator=torch.Generator().manual_seed(0))
    pipeline = SequencePipeline(model, ranks, 1, torch.device("cpu"), "float32", recompute)
    in_one(model, windows[:, :257])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipeline.backward(windows)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    most = torch.tensor(own)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if rank == 0:
        row = {"ranks": ranks, "read_again": recompute, "mb": most.item() * 1024 / 1e6}
        (results / "memory.json").write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


def measured(start: Callable[..., None], folder: Path) -> dict:
    """Everything here; `start` runs a function in so many processes."""
    start(measure, 2, folder)
    memory = []
    for ranks, recompute in ((1, False), (2, False), (2, True)):
        start(measure_memory, ranks, folder, recompute)
        memory.append(json.loads((folder / "memory.json").read_text()))
    return {"rows": json.loads((folder / "sequence.json").read_text()), "memory": memory, "paper": on_paper()}


def tables(result: dict) -> dict[str, str]:
    """The tables of the page in Markdown, by name."""
    heads = ("sequence layer", "state at the cut, MB", "by arithmetic", "work / one's", "time / one's")
    measured = [f"| {' | '.join(heads)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in result["rows"]:
        low, high = min(row["ratios"]), max(row["ratios"])
        figures = f"{row['state_mb']:.2f} | {row['paper_mb']:.2f} | {row['work']:.2f}"
        measured.append(f"| {row['mixer']} | {figures} | {row['ratio']:.2f} ({low:.2f}-{high:.2f}) |")
    memory = ["| processes | slices | memory of a process, MB |", "| ---: | --- | ---: |"]
    for row in result["memory"]:
        kind = "-" if row["ranks"] == 1 else "read again (`--gradient-checkpointing`)" if row["read_again"] else "kept"
        memory.append(f"| {row['ranks']} | {kind} | {row['mb']:,.0f} |")
    heads = ("size", *(f"{name}, MB" for name in MIXERS), "ring attention, MB")
    paper = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for row in result["paper"]:
        figures = (f"{row[name]:,.1f}" for name in (*MIXERS, "ring"))
        paper.append(f"| {row['size']} | {' | '.join(figures)} |")
    found = {"ring": "\n".join(paper)}
    return found | ({"sequence": "\n".join(measured), "memory": "\n".join(memory)} if result["rows"] else {})
