"""What a model costs in processor time of one thread, whatever else the machine does: training, the next token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nestling.models import HopeForCausalLM
from nestling.models.hope import HopeConfig
from nestling.models.hope.cache import cache_bytes

REPEATS, NEXT = 5, 40  # of a timing; tokens that are timed one by one


def cost_of(config: HopeConfig, lengths: Sequence[int]) -> dict[str, Any]:
    """By length: forward and backward passes over one text of it in tokens a second, the bytes of its state after it,
    and milliseconds for one more token, each the median."""
    torch.manual_seed(0)
    model = HopeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"trained": {}, "state_bytes": {}, "next_token": {}}
    for length in lengths:
        ids = torch.randint(config.vocab_size, (1, length), generator=generator)

        def passes(ids: torch.Tensor = ids) -> None:
            model(ids, labels=ids, use_cache=False).loss.backward()

        found["trained"][str(length)] = length / _seconds(passes, REPEATS)
        with torch.no_grad():
            out = model(ids, use_cache=True)
            found["state_bytes"][str(length)] = cache_bytes(out.past_key_values)
            cache = out.past_key_values
            seconds = _seconds(lambda ids=ids, cache=cache: model(ids[:, :1], past_key_values=cache), NEXT)
        found["next_token"][str(length)] = 1000 * seconds
    return found


def _seconds(act: Callable[[], Any], repeats: int) -> float:
    """The median of so many, after one that is not counted."""
    act()
    times = []
    for _ in range(repeats):
        began = time.thread_time()
        act()
        times.append(time.thread_time() - began)
    return statistics.median(times)
