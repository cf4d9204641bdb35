"""A stacked model on disk: the model as Hugging Face keeps it, and beside it the recipe of its levels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.cms.stack import stack_levels
from nestling.cms.stacked_model import FORMAT, RECIPE, StackedForCausalLM
from nestling.utils.files import new_folder
from nestling.utils.locks import sole_writer
from nestling.utils.quiet import no_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_stacked(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a stacked model into a new folder, whole or not at all.

    Raises:
        ValueError: the model has no levels, or the folder exists.
    """
    if not isinstance(model, StackedForCausalLM):
        raise ValueError(f"{type(model).__name__} has no levels: stack_levels first, or use its save_pretrained")
    folder = Path(folder)
    with sole_writer(folder):
        if folder.exists():
            raise ValueError(f"{folder} exists already: choose another folder, or remove it first")
        with new_folder(folder) as aside, no_bars():
            model.save_pretrained(aside, max_shard_size="1TB")
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)


def is_stacked(folder: str | Path) -> bool:
    """Whether a folder holds a model with levels."""
    return (Path(folder) / RECIPE).is_file()


def load_stacked(folder: str | Path) -> PreTrainedModel:
    """The stacked model in a folder.

    Raises:
        ValueError: no such folder, or a recipe or weights that do not belong together.
    """
    import torch
    from safetensors.torch import load_model
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = _recipe(Path(folder))
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    stacked = stack_levels(model, recipe.pop("levels"), **recipe)
    try:
        load_model(stacked, Path(folder) / "model.safetensors")
    except (RuntimeError, OSError) as error:
        raise ValueError(f"the weights in {folder} do not fit its {RECIPE}: {error}") from error
    return stacked.eval()


def _recipe(folder: Path) -> dict[str, Any]:
    if not is_stacked(folder):
        raise ValueError(f"{folder} holds no {RECIPE}: it is no model with levels; make one with nestling convert")
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        known = recipe.pop("format")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / RECIPE} is damaged ({error})") from None
    if known != FORMAT:
        raise ValueError(f"{folder / RECIPE} is of format {known!r}; this version reads {FORMAT}")
    return recipe
