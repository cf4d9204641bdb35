"""Whole models of a named size."""

from __future__ import annotations

import torch

from nestling.bench import measure
from nestling.bench.settings import BenchSettings
from nestling.bench.table import Table, compare


def model(settings: BenchSettings) -> Table:
    """Whole models of a named size: a training step's forward and backward, Hope against Hope-Attention."""
    from nestling.models import sizes
    from nestling.models.hope import HopeForCausalLM

    s, steps, peaks, counts = settings, {}, {}, {}
    base = sizes.config(s.model or "tiny")
    for mixer in ("hope", "selfmod", "attention"):
        torch.manual_seed(0)
        config = base if mixer == base.mixer else sizes.matched_config(base, mixer)
        network = HopeForCausalLM(config).to(s.device)
        ids = torch.randint(config.vocab_size, (s.model_batch, s.model_tokens), device=s.device)

        def step(network=network, ids=ids) -> None:
            with s.autocast():
                loss = network(ids, labels=ids, use_cache=False).loss
            loss.backward()
            network.zero_grad(set_to_none=True)

        steps[mixer], counts[mixer] = step, sum(p.numel() for p in network.parameters())
        if s.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks[mixer] = torch.cuda.max_memory_allocated() / 2**20
    timing = measure.interleave(steps, s)
    count = s.model_batch * s.model_tokens
    rows = []
    for mixer in steps:
        row = {"mixer": mixer, "parameters": counts[mixer], "batch": s.model_batch, "tokens": s.model_tokens}
        row |= compare(timing, mixer, "attention", count)
        rows.append(row | ({"peak MiB": peaks[mixer]} if peaks else {}))
    return Table(f"Models of size {s.model or 'tiny'}, forward and backward", rows)
