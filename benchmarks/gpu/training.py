"""A short training of Hope, a Transformer and Gated DeltaNet on Python's own sources: tokens a second, and loss."""

from __future__ import annotations

import math
import random
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.clock import autocast, device, free, on_gpu, set_tf32, synchronize
from benchmarks.gpu.record import Record
from nestling import HopeForCausalLM
from nestling.models import sizes

VOCABULARY, TOKENS, BATCH = 32_000, 1024, 16
LR, WARM_UP = 6e-4, 30
MEGABYTES = 40
SHARE = 40.0  # seconds of one run, at most
RUNS: dict[str, tuple[str | None, dict]] = {
    "Hope": (None, {}),
    "Transformer": ("attention", {}),
    "Gated DeltaNet": ("gated_deltanet", {}),
    "self-modifying memories, chunks of 256": ("selfmod", dict(chunk_size=256)),
}
SIZES = ("125m", "35m", "tiny")
FEWEST = 20  # steps in the first run's time, or all models are taken smaller
EVERY = 5  # steps between two losses that are kept


def run(record: Record, options: dict[str, Any], turn: Callable[[], None]) -> None:
    quick = options["quick"]
    tokens, batch, vocabulary, megabytes = (64, 2, 256, 0.2) if quick else (TOKENS, BATCH, VOCABULARY, MEGABYTES)
    kept: list[Tensor] = []
    record.attempt("data", "tokens", lambda: _stream(vocabulary, megabytes, kept), 150)
    turn()
    set_tf32("bf16+tf32")
    if not kept:  # the tokenizer was too slow: bytes will do
        vocabulary = 256
        record.attempt("data", "bytes", lambda: _stream(256, megabytes, kept), 30)
    candidates = ["tiny"] if quick else list(SIZES)
    for left, (name, (mixer, mixer_options)) in zip(range(len(RUNS), 0, -1), RUNS.items(), strict=True):
        share = 1.5 if quick else min(SHARE, max(0.0, record.left - 2) / left)
        while True:
            model = (candidates[0], vocabulary, mixer, mixer_options)
            fewest = FEWEST if left == len(RUNS) and len(candidates) > 1 else 0  # the first run decides the size
            train = partial(_train, model, kept[0], batch, tokens, share, fewest)
            result = record.attempt("runs", name, train, share + 30)
            free()
            if result is None or not result["too slow"]:
                break
            record.put("too slow", f"{name}, {candidates.pop(0)}", {"step ms": result["step ms"]})


def _text(megabytes: float) -> bytes:
    """Python files of the standard library, then of installed packages, in a shuffled order."""
    files: list[Path] = []
    for folder in ("stdlib", "purelib"):
        found = sorted(Path(sysconfig.get_paths()[folder]).rglob("*.py"))
        random.Random(0).shuffle(found)
        files += [f for f in found if folder == "purelib" or "site-packages" not in f.parts]
    text, total = [], 0
    for file in files:
        try:
            content = file.read_bytes()
        except OSError:
            continue
        text.append(content)
        total += len(content)
        if total >= 1e6 * megabytes:
            break
    return b"\n\n".join(text)


def _stream(vocabulary: int, megabytes: float, kept: list[Tensor]) -> dict[str, Any]:
    """Tokens of the text: its bytes for a vocabulary of 256, else those of a tokenizer trained on a part of it."""
    text = _text(megabytes)
    if vocabulary == 256:
        kept.append(torch.frombuffer(bytearray(text), dtype=torch.uint8).long())
        return {"bytes": len(text), "tokens": len(text), "vocabulary": 256}
    from tokenizers import ByteLevelBPETokenizer

    pieces = [text[i : i + 20_000].decode(errors="ignore") for i in range(0, len(text), 20_000)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(pieces[:: max(1, len(pieces) // 400)], vocab_size=vocabulary, show_progress=False)
    ids = [i for encoded in tokenizer.encode_batch(pieces) for i in encoded.ids]
    kept.append(torch.tensor(ids))
    return {"bytes": len(text), "tokens": len(ids), "vocabulary": tokenizer.get_vocab_size()}


def _model(size: str, vocabulary: int, mixer: str | None, mixer_options: dict) -> HopeForCausalLM:
    """Hope of a named size; others with MLPs that make up for their smaller or larger layers."""
    torch.manual_seed(0)
    config = sizes.config(size, vocab_size=vocabulary)
    if mixer is not None:
        config = sizes.matched_config(config, mixer, mixer_options)
    return HopeForCausalLM(config).to(device()).train()


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [{"params": matrices, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0}]  # fmt: skip


def _train(model: tuple, data: Tensor, batch: int, tokens: int, seconds: float, fewest: int) -> dict[str, Any]:
    """Steps until the time is up; stopped at once if fewer than `fewest` would fit.

    A batch that does not fit into memory is cut in two, as often as needed.
    """
    network, parts = _model(*model), 1
    optimizer = torch.optim.AdamW(_groups(network), lr=LR, betas=(0.9, 0.95), fused=on_gpu())
    losses, step, began, warm = [], 0, time.monotonic(), None
    found = {"size": model[0], "parameters": sum(p.numel() for p in network.parameters()), "batch": batch,
             "tokens per row": tokens}  # fmt: skip
    per_step, too_slow = batch * tokens, False
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    while time.monotonic() - began < seconds and (step + 1) * per_step < len(data):
        rows = data[step * per_step : (step + 1) * per_step].view(batch, tokens).to(device())
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARM_UP)
        try:
            loss = _step(network, optimizer, rows, parts)
        except torch.cuda.OutOfMemoryError:
            if parts == batch:
                raise
            loss = None
        if loss is None:
            parts *= 2
            optimizer.zero_grad(set_to_none=True)
            free()
            continue
        step += 1
        if step == 2:  # what compiles and allocates is over
            synchronize()
            warm = time.monotonic()
        if step % EVERY == 1:
            losses.append([step * per_step, round(time.monotonic() - began, 2), float(loss)])
            if not math.isfinite(losses[-1][-1]):
                break
        if step == 3 and fewest:
            synchronize()
            too_slow = seconds / max(time.monotonic() - warm, 1e-9) < fewest
            if too_slow:
                break
    synchronize()
    timed = step - 2 if step > 2 else step
    spent = time.monotonic() - (warm if step > 2 else began)
    losses.append([step * per_step, round(time.monotonic() - began, 2), float(loss)])
    found |= {
        "steps": step, "micro-batches": parts, "tokens/s": timed * per_step / spent,
        "step ms": 1e3 * spent / timed, "first loss": losses[0][-1], "last loss": losses[-1][-1],
        "too slow": too_slow, "curve": losses,
    }  # fmt: skip
    if on_gpu():
        found["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor, parts: int) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=rows.device)
    for part in rows.chunk(parts):
        with autocast("bf16"):
            loss = network(part, labels=part, use_cache=False).loss / parts
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return total
