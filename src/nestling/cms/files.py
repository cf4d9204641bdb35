"""A stacked model on disk: as Hugging Face keeps a model, with the recipe of its levels in the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.cms.stacked_model import StackedConfig, StackedForCausalLM
from nestling.utils.files import new_folder, write_text
from nestling.utils.locks import sole_writer
from nestling.utils.quiet import no_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION = "calibration.json"  # what was tried, in the folder of a model whose rule was calibrated
# until version 0.1 the recipe lay beside the original's configuration
OLD_RECIPE, OLD_FORMAT = "levels.json", "nestling-levels-1"


def save_stacked(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a stacked model into a new folder, whole or not at all.

    Raises:
        ValueError: the model has no levels, or the folder exists.
    """
    if not isinstance(model, StackedForCausalLM):
        raise ValueError(f"{type(model).__name__} has no levels: stack_levels first, or use its save_pretrained")
    save_new(model, folder, tokenizer)


def save_new(
    model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write any model into a new folder, whole or not at all; ValueError if it exists.

    calibration: what was tried to find its rule (`nestling.sessions.calibrate`), written beside it.
    """
    folder = Path(folder)
    with sole_writer(folder):
        if folder.exists():
            raise ValueError(f"{folder} exists already: choose another folder, or remove it first")
        with new_folder(folder) as aside, no_bars():
            model.save_pretrained(aside)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            if calibration is not None:
                write_text(aside / CALIBRATION, json.dumps(calibration, indent=1) + "\n")


def is_stacked(folder: str | Path) -> bool:
    """Whether a folder holds a model with levels.

    Raises:
        ValueError: a damaged configuration.
    """
    folder = Path(folder)
    return (folder / OLD_RECIPE).is_file() or _json(folder / "config.json").get(
        "model_type"
    ) == StackedConfig.model_type


def load_stacked(folder: str | Path) -> StackedForCausalLM:
    """The stacked model in a folder.

    Raises:
        ValueError: no such folder, or levels and weights that do not belong together.
    """
    if not is_stacked(folder):
        raise ValueError(f"{folder} holds no model with levels: make one with nestling convert")
    with no_bars():
        model = StackedForCausalLM.from_pretrained(folder, config=_config(Path(folder)))
    own_weights(model)
    return model


def own_weights(model: PreTrainedModel) -> None:
    """Weights come as views of their file: copy them, at the alignment of fresh ones (products may round by it)."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


def _config(folder: Path) -> StackedConfig:
    if not (folder / OLD_RECIPE).is_file():
        return StackedConfig.from_pretrained(folder)
    recipe, original = _json(folder / OLD_RECIPE), _json(folder / "config.json")
    if (known := recipe.pop("format", None)) != OLD_FORMAT:
        raise ValueError(f"{folder / OLD_RECIPE} is of format {known!r}; this version reads {OLD_FORMAT}")
    return StackedConfig(original=original, levels=recipe, dtype=original.get("dtype"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return dict(found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
