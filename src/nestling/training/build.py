"""The model of a run: by size name, from a saved model, or from a config file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nestling.training.checkpoint import CheckpointError, resolve
from nestling.training.config import ModelConfig, unknown
from nestling.utils.places import did_you_mean
from nestling.utils.quiet import no_bars

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """The model a run starts from, in float32.

    Args:
        config: a size name, a saved model's folder (its weights are kept, so `options` must be empty) or a
            `config.json`.
        tokenizer: decides the vocabulary and the special ids of a fresh model; a saved model must have room for it.
        seed: of the fresh weights.

    Raises:
        ValueError: an unknown size or option, a vocabulary that does not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import nestling.models  # noqa: F401 - registers the model types

    path = Path(config.name)
    if path.is_dir():
        if config.options:
            raise ValueError(
                f"model.options {sorted(config.options)} cannot change the saved model {path}; leave them out"
            )
        model = load_saved(resolve(path)).float()
        _check_vocabulary(model.config.vocab_size, tokenizer, str(path))
        return model
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"no model configuration at {path}")
        values = {**json.loads(path.read_text(encoding="utf-8")), **special}
        kind = values.pop("model_type", None)
        if kind is None:
            raise ValueError(f"{path} names no model_type")
        model_config = _with_options(lambda options: AutoConfig.for_model(kind, **options), values, config.options)
    else:
        model_config = _sized(config, special)
    _check_vocabulary(model_config.vocab_size, tokenizer, config.name)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)


def load_saved(path: str | Path, kind: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """The causal language model saved in a folder, as `kind` if given; CheckpointError if it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    import nestling.models  # noqa: F401 - registers the model types
    from nestling.cms.files import is_stacked, load_stacked, own_weights

    try:
        if is_stacked(path):
            return load_stacked(path)
        with no_bars():
            model = (kind or AutoModelForCausalLM).from_pretrained(path)
    except Exception as error:
        raise CheckpointError(f"the model in {path} cannot be loaded: {error}") from error
    own_weights(model)
    return model


def _sized(config: ModelConfig, special: dict[str, Any]) -> PreTrainedConfig:
    from nestling.models import sizes

    if config.name not in sizes.NAMES:
        raise ValueError(
            unknown("model", config.name, sizes.NAMES)
            + f"; or give a saved model's folder or a config.json{did_you_mean(config.name)}"
        )
    return _with_options(lambda options: sizes.config(config.name, **options), special, config.options)


def _with_options(make, values: dict[str, Any], options: dict[str, Any]) -> PreTrainedConfig:
    """A configuration with options that must be among its fields."""
    known = make(values)
    names = [name for name in known.to_dict() if not name.startswith("_")]
    for name in options:
        if name not in names:
            raise ValueError(unknown("model option", name, names))
    return make({**values, **options})


def _check_vocabulary(size: int, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    if size < len(tokenizer):
        raise ValueError(
            f"model {name!r} has a vocabulary of {size}, but the tokenizer makes {len(tokenizer)} ids: use the "
            "model's own "
            "tokenizer, or a larger vocab_size"
        )
