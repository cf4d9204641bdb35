"""Small byte models of other families, trained here in minutes: a Llama and a Hope of two sizes, a Qwen, a Mistral."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config, set_seed

from nestling.models import HopeConfig, HopeForCausalLM
from nestling.training.tokenizers import byte_tokenizer
from nestling.utils.files import new_folder
from nestling.utils.places import cache_folder

BOOKS = ("charles-dickens--bleak-house.txt", "samuel-pepys--the-diary.txt")  # no judged text is from them
WIDTH, LAYERS, HEADS, WINDOW, BATCH, RATE = 128, 3, 4, 256, 8, 3e-3
FAMILIES = {  # and their width and layers
    "byte llama": (WIDTH, LAYERS), "byte hope": (WIDTH, LAYERS), "byte qwen": (WIDTH, LAYERS),
    "byte mistral": (WIDTH, LAYERS), "byte llama, small": (64, 2), "byte hope, small": (64, 2),
}  # fmt: skip


def build(family: str, width: int = WIDTH, layers: int = LAYERS) -> nn.Module:
    """Random weights."""
    set_seed(0)
    sizes = dict(vocab_size=len(byte_tokenizer()), hidden_size=width, num_hidden_layers=layers,
                 num_attention_heads=HEADS, tie_word_embeddings=True)  # fmt: skip
    if family.startswith("byte hope"):
        return HopeForCausalLM(HopeConfig(**sizes, context_length=WINDOW))
    sizes |= dict(intermediate_size=3 * width, max_position_embeddings=4096)
    if family == "byte qwen":  # heads share keys and values; queries and keys are normed
        config = Qwen3Config(**sizes, num_key_value_heads=HEADS // 2, head_dim=width // HEADS)
    elif family == "byte mistral":
        config = MistralConfig(**sizes, num_key_value_heads=HEADS // 2, sliding_window=None)
    else:
        config = LlamaConfig(**sizes)
    return AutoModelForCausalLM.from_config(config)


@functools.lru_cache(maxsize=2)
def trained(
    family: str, steps: int, files: tuple[Path, ...], width: int | None = None, layers: int | None = None
) -> tuple[nn.Module, Any]:
    """A family's model after `steps` of AdamW on some files, and its tokenizer; made once and kept in the cache.

    Args:
        width, layers: None for the family's own.
    """
    tokenizer = byte_tokenizer()
    width, layers = width or FAMILIES[family][0], layers or FAMILIES[family][1]
    texts = [file.read_bytes() for file in files]
    settings = repr([family, steps, width, layers, HEADS, WINDOW, BATCH, RATE, [len(t) for t in texts]])
    folder = cache_folder() / "defaults" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    if not folder.exists():
        model = build(family, width, layers)
        text = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).long()
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        with torch.enable_grad():
            for _ in range(steps):
                at = torch.randint(len(text) - WINDOW, (BATCH,))
                rows = torch.stack([text[a : a + WINDOW] for a in at])
                optimizer.zero_grad()
                model(rows, labels=rows).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rate.step()
        with new_folder(folder) as aside:
            model.save_pretrained(aside)
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False), tokenizer
