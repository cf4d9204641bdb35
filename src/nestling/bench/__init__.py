"""`nestling bench`: what the layers cost on this machine, correctness first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict

from nestling.bench import chunks, continuum, decode, dgd, layers, memory, model, optim, peers
from nestling.bench.correctness import check
from nestling.bench.settings import QUICK, BenchSettings, environment
from nestling.bench.table import Table

__all__ = ["GROUPS", "PARTS", "QUICK", "BenchSettings", "Incorrect", "Table", "run"]

LAYERS = (
    layers.chunk, layers.lengths, layers.mixers, layers.efficiency, decode.decode, decode.decode_models, memory.memory,
    peers.peers,
)  # fmt: skip
OPTIMIZERS = (optim.optim, optim.optim_target, optim.optim_bfloat16, optim.orthogonality, dgd.dgd)
CONTINUUM = (continuum.reading, chunks.chunks, continuum.streams, continuum.meta_grads)
GROUPS = {
    group: tuple(part.__name__ for part in parts)
    for group, parts in dict(layers=LAYERS, optim=OPTIMIZERS, continuum=CONTINUUM).items()
}
PARTS: dict[str, Callable[[BenchSettings], Table]] = {
    part.__name__: part for part in (*LAYERS, model.model, *OPTIMIZERS, *CONTINUUM)
}


class Incorrect(Exception):
    """A fast form does not equal its definition; `failures` says which. No figure was taken."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__("; ".join(failures))
        self.failures = failures


def run(
    settings: BenchSettings, only: Iterable[str] | None = None, report: Callable[[str, Table], None] | None = None
) -> dict:
    """Check, then measure.

    Args:
        settings: sizes, repeats, device.
        only: names of `PARTS`; None is the group "layers", or "model" alone where the settings name one.
        report: called with each part's name and table as it is done.

    Returns:
        {"environment", "settings", "parts": {name: {"title", "rows", "notes"}}}, ready for JSON.

    Raises:
        ValueError: an unknown part.  Incorrect: a check failed.
    """
    chosen = (("model",) if settings.model else GROUPS["layers"]) if only is None else tuple(only)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown or not chosen:
        raise ValueError(f"parts are {', '.join(PARTS)}; got {', '.join(unknown) or 'none'}")
    if settings.model is not None:
        from nestling.models import sizes

        if settings.model not in sizes.NAMES:
            raise ValueError(f"model must be one of {', '.join(sizes.NAMES)}; got {settings.model!r}")
    failures = check(settings.device)
    if failures:
        raise Incorrect(failures)
    result = {"environment": environment(settings), "settings": asdict(settings), "parts": {}}
    for name in chosen:
        table = PARTS[name](settings)
        result["parts"][name] = asdict(table)
        if report is not None:
            report(name, table)
    result["environment"]["load after"] = environment(settings)["load"]
    return result
