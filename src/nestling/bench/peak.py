"""One training step in a process of its own: how far did memory rise? `python -m nestling.bench.peak JSON`."""

from __future__ import annotations

import contextlib
import json
import sys

import torch

from nestling.bench import measure
from nestling.bench.settings import BenchSettings
from nestling.layers.mixers import build_mixer


def main(values: dict) -> int:
    """Bytes by which a step at `tokens` raises the process's peak over what it holds after a short step."""
    settings = BenchSettings(device=values["device"], dtype=values["dtype"])
    torch.set_num_threads(values["threads"])
    layer = build_mixer("selfmod", values["dim"], values["heads"], segment_size=values["segment_size"])
    layer = layer.to(settings.device)
    measure.train_step(layer, settings.random(1, values["warm"], values["dim"]), settings)()  # threads, caches
    before = restart(settings.device)
    measure.train_step(layer, settings.random(1, values["tokens"], values["dim"]), settings)()
    return max(0, peak(settings.device) - before)


def restart(device: str) -> int:
    """Begin a new peak; what is held now, in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        return peak(device)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as order:
        order.write("5")
    return _status("VmRSS")


def peak(device: str) -> int:
    """Largest memory since `restart`, in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        # not ru_maxrss: a process starts with its parent's
        return _status("VmHWM")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    print(json.dumps({"bytes": main(json.loads(sys.argv[1]))}))
