"""What an optimiser's step costs on several processes: bytes sent, multiply-adds and time, here and on paper.

python -m benchmarks.distributed --json benchmarks/results/distributed.json    # 2 and 4 gloo processes
python -m benchmarks.distributed --only sequence --json benchmarks/results/distributed.json    # renews a part of it
python -m benchmarks.distributed --tables benchmarks/results/distributed.json  # the tables of docs/distributed.md
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import sequence_parallel
from nestling.bench.optim import shapes
from nestling.ops.orthogonalize import multiply_adds
from nestling.optim import M3, DeltaMomentum
from nestling.optim.division import make_plan

WIDTH, LAYERS, STEPS = 128, 4, 4  # of the model measured; the first step is not counted
PAPER_WIDTH, PAPER_LAYERS, PAPER_RANKS = 2048, 24, (8, 16, 64, 256, 1024)
BASE = "AdamW"
LR = 1e-3


def optimizers(mode: str) -> dict:
    """What is measured, by name: makes an optimiser of parameters."""
    found = {
        BASE: partial(torch.optim.AdamW, lr=LR),
        "torch.optim.Muon": partial(torch.optim.Muon, lr=LR),
        "M3, divided": partial(M3, lr=LR, process_group=dist.group.WORLD if mode == "ddp" else None),
        "M3, Muon's settings, divided": partial(
            M3, lr=LR, periods=(1,), second_moment=False, process_group=dist.group.WORLD if mode == "ddp" else None
        ),
        "DeltaMomentum": partial(DeltaMomentum, lr=LR),
    }
    if mode == "ddp":
        found["M3, every rank all"] = partial(M3, lr=LR)
    return found


class Sent(TorchDispatchMode):
    """Counts the bytes this rank sends (as rings and pairwise exchanges do), and the multiply-adds of its products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.products = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented  # a DTensor takes itself apart first
        name, ranks = function.name(), dist.get_world_size()
        if name == "c10d::allreduce_":
            self.bytes += sum(size(x) for x in args[0]) * 2 * (ranks - 1) / ranks
        elif name == "c10d::alltoall_base_":
            own = args[4][dist.get_rank()] * args[1].element_size() if args[4] else size(args[1]) / ranks
            self.bytes += size(args[1]) - own
        elif "all_gather" in name or "allgather" in name:
            self.bytes += size(args[0] if "functional" in name else args[1]) * (ranks - 1)
        elif "reduce_scatter" in name or "all_to_all" in name:
            self.bytes += size(args[0]) * (ranks - 1) / ranks
        elif "all_reduce" in name:
            self.bytes += size(args[0]) * 2 * (ranks - 1) / ranks
        out = function(*args, **(kwargs or {}))
        matrices = [x for x in args if isinstance(x, Tensor) and x.ndim >= 2]
        if name.split("::")[1].split(".")[0] in ("mm", "bmm", "baddbmm", "addmm") and len(matrices) >= 2:
            self.products += matrices[-2].numel() * matrices[-1].shape[-1]
        return out


def size(x: Tensor) -> float:
    return x.numel() * x.element_size()


def measure(rank: int, ranks: int, port: int, results: Path) -> None:
    """One process of a measurement."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    rows = []
    for mode in ("ddp", "fsdp"):
        made = {}
        for name, make in optimizers(mode).items():
            parameters = model(mode, ranks)
            made[name] = (parameters, make(parameters))
        seconds: dict[str, list[float]] = {name: [] for name in made}
        counted, failed = {}, {}
        for step in range(STEPS):
            for name, (parameters, optimizer) in made.items():
                if name in failed:
                    continue
                for i, p in enumerate(parameters):
                    torch.manual_seed(1000 * step + i)
                    p.grad = torch.randn_like(p)
                dist.barrier()
                start = time.perf_counter()
                try:
                    if step == 0:
                        with Sent() as sent:
                            optimizer.step()
                        counted[name] = (sent.bytes, sent.products)
                        continue
                    optimizer.step()
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    failed[name] = str(error).splitlines()[0]
                    continue
                seconds[name].append(time.perf_counter() - start)
        for name in made:
            row: dict = {"ranks": ranks, "mode": mode, "optimizer": name}
            if name in failed:
                rows.append(row | {"failed": failed[name]})
                continue
            ratios = [a / b for a, b in zip(seconds[name], seconds[BASE])]
            total = sum(p.numel() for p in made[name][0])
            row |= {"bytes_per_parameter": counted[name][0] / total, "products": counted[name][1]}
            row |= {"milliseconds": 1e3 * statistics.median(seconds[name]), "times_adamw": statistics.median(ratios)}
            rows.append(row)
    (results / f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def model(mode: str, ranks: int) -> list[nn.Parameter]:
    """The matrices of a small transformer, whole on every rank or sharded over all."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for _ in range(LAYERS) for shape in shapes(WIDTH)]
    if mode == "ddp":
        return parameters
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    return [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in parameters]


def start(work: Callable[..., None], ranks: int, folder: Path, *arguments: object) -> None:
    """Run work(rank, ranks, port, folder, ...) in so many processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(work, (ranks, port, folder, *arguments), nprocs=ranks)


def measured(ranks: int, folder: Path) -> list[dict]:
    """The rows of so many processes; the work of each and the largest."""
    start(measure, ranks, folder)
    of_ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    rows = of_ranks[0]
    for i, row in enumerate(rows):
        if "failed" not in row:
            row["products"] = max(rows[i]["products"] for rows in of_ranks)
            row["bytes_per_parameter"] = max(rows[i]["bytes_per_parameter"] for rows in of_ranks)
    return rows


def on_paper() -> list[dict]:
    """Operations and bytes of a rank at one step of M3 without a slow boundary, from the plan that would be used."""
    sizes = [shape for _ in range(PAPER_LAYERS) for shape in shapes(PAPER_WIDTH)]
    kinds = {shape: sizes.count(shape) for shape in sizes}
    requests = tuple((n, torch.Size(s), (1, *s), multiply_adds(5, *s)) for s, n in kinds.items())
    total = sum(n * s.numel() for n, s, _, _ in requests)
    everything = sum(n * cost for n, _, _, cost in requests)
    rows = []
    for ranks in PAPER_RANKS:
        work = make_plan(requests, 0, ranks, True).work
        part = (ranks - 1) / ranks
        rows.append(
            {
                "ranks": ranks,
                "parameters": total,
                "work": max(work) / everything,
                "teraflops": 2 * max(work) / 1e12,
                "m3_fsdp_mb": 2 * 4 * total * part / ranks / 1e6,
                "gathered_mb": 4 * total * part / 1e6,
                "m3_ddp_mb": 4 * total * part / 1e6,
                "fsdp_mb": 3 * 4 * total * part / 1e6,
                "ddp_mb": 2 * 4 * total * part / 1e6,
            }
        )
    return rows


def tables(result: dict) -> dict[str, str]:
    """The tables of the page in Markdown, by name."""
    heads = ("processes", "mode", "optimiser", "bytes sent per parameter", "work of a rank", "time / AdamW's")
    lines = [f"| {' | '.join(heads)} |", "| ---: | --- | --- | ---: | ---: | ---: |"]
    whole = {(r["mode"], r["optimizer"]): r.get("products") for r in result["one"]}
    for row in result["rows"]:
        begin = f"| {row['ranks']} | {row['mode']} | {row['optimizer']} |"
        if "failed" in row:
            lines.append(f"{begin} refused | - | - |")
            continue
        base = whole[row["mode"], row["optimizer"]]
        share = f"{row['products'] / base:.2f}" if base else "-"
        lines.append(f"{begin} {row['bytes_per_parameter']:.2f} | {share} | {row['times_adamw']:.1f} |")
    heads = (
        "ranks",
        "work of the busiest",
        "its TFLOP",
        "M3 under FSDP2, MB",
        "FSDP2, MB",
        "M3 under DDP, MB",
        "DDP, MB",
    )
    paper = [f"| {' | '.join(heads)} |", f"|{' ---: |' * len(heads)}"]
    for row in result["paper"]:
        figures = [row["m3_fsdp_mb"], row["fsdp_mb"], row["m3_ddp_mb"], row["ddp_mb"]]
        texts = [f"{row['ranks']:,}", f"{row['work']:.4f}", f"{row['teraflops']:.3f}", *(f"{x:,.0f}" for x in figures)]
        paper.append(f"| {' | '.join(texts)} |")
    found = {"distributed": "\n".join(paper)} | ({"optimisers": "\n".join(lines)} if result["rows"] else {})
    return found | sequence_parallel.tables(result["sequence"])


def machine() -> dict:
    """What was measured on, and how busy it was."""
    return {"cores": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--only", choices=("optimizers", "sequence"))
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    arguments = parser.parse_args()
    if arguments.tables:
        for name, table in tables(json.loads(arguments.tables.read_text())).items():
            print(f"<!-- {name} -->\n\n{table}\n")
        return
    import tempfile

    renewed = arguments.only and arguments.json and arguments.json.is_file()
    result = json.loads(arguments.json.read_text()) if renewed else {}

    def keep(found: dict) -> None:
        result.update(found)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "sequence":
            keep({"width": WIDTH, "layers": LAYERS, "paper": on_paper(), "machine": machine(), "rows": []})
            keep({"one": measured(1, Path(folder))})
            for ranks in arguments.ranks:
                keep({"rows": result["rows"] + measured(ranks, Path(folder)), "after": machine()})
        if arguments.only != "optimizers":
            before, found = machine(), sequence_parallel.measured(start, Path(folder))
            keep({"sequence": {"machine": before, "after": machine()} | found})
    if {"rows", "sequence"} <= result.keys():
        print("\n\n".join(tables(result).values()))


if __name__ == "__main__":
    main()
