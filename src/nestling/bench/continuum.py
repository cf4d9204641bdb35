"""What levels cost: reading against a plain forward and a fine-tuning step, a stream's state, meta-gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nestling.bench import measure
from nestling.bench.settings import BenchSettings
from nestling.bench.table import Table
from nestling.cms.learner import PIECE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# the target: a model of SmolLM2-135M's shape (its weights decide no figure), two levels over its last four blocks
SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
             num_key_value_heads=3, tie_word_embeddings=True)  # fmt: skip
SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
             num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
BLOCKS = (-4, -3, -2, -1)
CHUNKS = (64, 512)
PLAIN = "plain forward"
RECOMPUTED = "full, recomputed"


def _model(settings: BenchSettings) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = SHAPE if settings.dim >= 128 else SMALL  # small with --quick
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=8192)).to(settings.device).eval()


def _stacked(model: PreTrainedModel, placement: str, **options) -> PreTrainedModel:
    from nestling import Level, stack_levels

    levels = [Level(size, lr=0.1) for size in CHUNKS]
    return stack_levels(copy.deepcopy(model), levels, placement, blocks=BLOCKS, **options)


def _with_default(model: PreTrainedModel, share: float = 1.0, fast: bool = False) -> PreTrainedModel:
    """The levels that `nestling convert` writes, or with --fast, over the last blocks."""
    from nestling import stack_levels
    from nestling.cms.defaults import default_levels, fast_levels

    count = model.config.num_hidden_layers
    blocks = range(round(count * (1 - share)), count)
    return stack_levels(copy.deepcopy(model), (fast_levels if fast else default_levels)(model.config), blocks=blocks)


def reading(settings: BenchSettings) -> Table:
    """Tokens a second of one stream: a model that learns while it reads, beside the same model plain and fine-tuned."""
    s, model = settings, _model(settings)
    tokens = max(CHUNKS)
    ids = torch.randint(model.config.vocab_size, (1, tokens + 1), device=s.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def plain() -> None:
        with torch.no_grad(), s.autocast():
            model(ids[:, :tokens], use_cache=True)

    def read(other: PreTrainedModel) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), s.autocast():
                other(ids[:, :tokens], use_cache=True, next_tokens=ids[:, tokens:])  # the last chunk is learned too

        return run

    def tune() -> None:
        with s.autocast():
            loss = model(ids[:, :tokens], labels=ids[:, :tokens]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    calls = {
        PLAIN: plain,
        "levels, depth": read(_stacked(model, "depth")),
        "levels, depth, down_proj only": read(_stacked(model, "depth", target_modules=["down_proj"])),
        "levels, width": read(_stacked(model, "width")),
        "the default level, all blocks": read(_with_default(model)),
        "the default level, last third": read(_with_default(model, 1 / 3)),
        "fine-tuning step of all": tune,
    }
    timing = measure.interleave(calls, s)
    rows = [
        speed(timing, name, tokens)
        | {"of fine-tuning": timing.ratio(name, "fine-tuning step of all"), "rounds": timing.rounds}
        for name in calls
    ]
    note = f"Levels of {CHUNKS[0]} and {CHUNKS[1]} tokens over the last {len(BLOCKS)} blocks, first order, one stream."
    note += " The default: rank 16, the spectral rule, every 64 tokens."
    return Table(f"Reading {tokens} tokens, a model of SmolLM2-135M's shape", rows, [note])


def speed(timing: measure.Timing, name: str, tokens: int) -> dict[str, Any]:
    """Tokens a second of a call, and as a part of the plain forward's."""
    low, high = timing.spread(name, PLAIN)
    return {
        "what": name,
        "tokens/s": tokens / timing.median(name),
        "of plain": timing.ratio(name, PLAIN),
        "low": low,
        "high": high,
    }


def streams(settings: BenchSettings) -> Table:
    """Bytes of one stream's state, predicted and as measured after reading, and the time of a fork."""
    s, model = settings, _model(settings)
    ids = torch.randint(model.config.vocab_size, (1, max(CHUNKS) + 1), device=s.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    for name, placement, options in (
        ("depth", "depth", {}),
        ("depth, down_proj only", "depth", dict(target_modules=["down_proj"])),
        ("width 36", "width", {}),
        ("width 144", "width", dict(width=144)),
    ):
        stacked = _stacked(model, placement, **options)
        with torch.no_grad():
            cache = stacked(ids, use_cache=True).past_key_values
        timing = measure.interleave({"fork": cache.fork}, s)
        fork = cache.fork()
        pairs = zip(_tensors(cache), _tensors(fork), strict=True)
        rows.append(
            {
                "placement": name,
                "predicted MB": stacked.state_bytes() / 1e6,
                "measured MB": cache.nbytes / 1e6,
                "equal": "yes" if stacked.state_bytes() == cache.nbytes else "no",
                "% of the weights": 100 * cache.nbytes / weights,
                "fork ms": 1e3 * timing.median("fork"),
                "tensors copied": sum(a.data_ptr() != b.data_ptr() for a, b in pairs),
            }
        )
    note = f"Two levels of {CHUNKS[0]} and {CHUNKS[1]} tokens; beside it stand the keys and values of the text itself."
    return Table("The state of one stream", rows, [note])


def _tensors(cache) -> list[Tensor]:
    held: list[Tensor] = [t for layer in cache.layers for t in (layer.keys, layer.values)]

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    cache.levels.map(keep)
    return held


def meta_grads(settings: BenchSettings) -> Table:
    """A training step of a Hope-Attention through levels that learn: what each way of differentiating it costs."""
    from nestling.models import HopeConfig, HopeForCausalLM

    s = settings
    tokens = s.tokens
    levels = [{"chunk_size": 64, "lr": 0.05}, {"chunk_size": 256, "lr": 0.05}, {"chunk_size": None}]
    ids = torch.randint(256, (s.batch, tokens), device=s.device)
    steps, kept = {}, {}
    ways = {"no levels that learn": None, "none": "none", "first_order": "first_order", "full": "full",
            RECOMPUTED: "full"}  # fmt: skip
    for name, meta_grad in ways.items():
        torch.manual_seed(0)
        model = HopeForCausalLM(
            HopeConfig(hidden_size=s.dim // 2, num_hidden_layers=4, num_attention_heads=s.heads, mixer="attention",
                       cms_levels=levels, cms_meta_grad=meta_grad or "none")
        ).to(s.device)  # fmt: skip
        model.learning = meta_grad is not None
        if name == RECOMPUTED:
            model.activation_checkpointing_enable()

        def forward(model=model) -> Tensor:
            return model(ids, labels=ids, use_cache=False).loss

        def step(model=model, forward=forward) -> None:
            forward().backward()
            model.zero_grad(set_to_none=True)

        step()
        steps[name], kept[name] = step, _kept_bytes(forward)
    timing = measure.interleave(steps, s)
    base = next(iter(steps))
    rows = [
        {
            "meta_grad": name,
            "tokens/s": s.batch * tokens / timing.median(name),
            "times the step without": 1 / timing.ratio(name, base),
            "low": 1 / timing.spread(name, base)[1],
            "high": 1 / timing.spread(name, base)[0],
            "MiB kept for backward": kept[name] / 2**20,
            "rounds": timing.rounds,
        }
        for name in steps
    ]
    note = (
        "Levels of 64 and 256 tokens beside one of the outer loop, in every layer. Kept: between forward and backward. "
    )
    note += f"{RECOMPUTED}: with gradient checkpointing, pieces of {PIECE} tokens."
    return Table(f"Training through levels, {s.batch} x {tokens} tokens, width {s.dim // 2}", rows, [note])


def _kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward call leaves allocated for the backward pass."""
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        loss = forward()
    kept = sum(event.self_cpu_memory_usage for event in watch.events())
    kept += torch.cuda.memory_allocated() - before if on_gpu else 0
    del loss
    return kept
