"""A trained model and its tokenizer, from wherever `nestling` or Hugging Face left them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nestling.training.build import load_saved
from nestling.training.checkpoint import resolve
from nestling.training.tokenizers import load_tokenizer
from nestling.utils.machine import find_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_model(path: str | Path, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and tokenizer of a run's folder (its newest whole checkpoint), of a checkpoint, or of a saved Hugging
    Face model.

    Raises:
        CheckpointError: nothing usable there, or a damaged checkpoint; the message names the previous good one.
    """
    folder = resolve(path)
    model = load_saved(folder)
    return model.to(find_device(device)).eval(), load_tokenizer(folder)
