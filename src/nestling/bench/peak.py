"""One training step in a process of its own: how far did memory rise? `python -m nestling.bench.peak JSON`."""

from __future__ import annotations

import json
import sys

import torch

from nestling.bench import measure
from nestling.layers.settings import build_mixer


def main(values: dict) -> int:
    """Bytes by which a step at `tokens` raises the process's peak over the peak of a short step."""
    settings = measure.Settings(device=values["device"], dtype=values["dtype"])
    torch.set_num_threads(values["threads"])
    layer = build_mixer("selfmod", values["dim"], values["heads"], segment_size=values["segment_size"])
    layer = layer.to(settings.device)
    measure.train_step(layer, settings.random(1, values["warm"], values["dim"]), settings)()  # threads, caches
    before = peak(settings.device, resting=True)
    measure.train_step(layer, settings.random(1, values["tokens"], values["dim"]), settings)()
    return max(0, peak(settings.device) - before)


def peak(device: str, resting: bool = False) -> int:
    """Largest memory so far, in bytes; `resting`: what is held now."""
    if device == "cuda":
        return torch.cuda.memory_allocated() if resting else torch.cuda.max_memory_allocated()
    import resource

    if resting and sys.platform == "linux":
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(json.dumps({"bytes": main(json.loads(sys.argv[1]))}))
