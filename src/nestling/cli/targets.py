"""What the command line names: models by size, folder, configuration or factory, and optimisers by name."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestling.cli.common import nested
from nestling.utils.places import did_you_mean, expand

OPTIMIZERS = {"m3": "nestling.optim.M3", "sgd": "torch.optim.SGD"}


def load(target: str, settings: dict[str, Any] | None = None, *, weights: bool = False) -> dict[str, Any]:
    """Arguments of `nestling.levels` for a target, `model` among them.

    Args:
        target: a size's name, a folder with a run, a checkpoint or a Hugging Face model, a config.json, or
            `module:factory`, which returns a module or a dict of arguments.
        settings: fields of the configuration to change; dotted names reach into dicts.
        weights: build it with values (a folder's own, else fresh ones), not on the meta device.

    Raises:
        ValueError: nothing of that name, or settings for what has no configuration.
    """
    from nestling.models import sizes

    if target in sizes.NAMES:
        known = _fields(sizes.config(target))
        _check_names(known, settings)  # what follows from the size, as the number of heads, follows the settings
        return {"model": _built(sizes.config(target, **nested(settings or {}, {})), weights)}
    path = expand(target, "what to inspect")
    if path.is_dir():
        if weights and not settings:
            from nestling.training.build import load_saved
            from nestling.training.checkpoint import resolve

            return {"model": load_saved(resolve(path))}
        return {"model": _built(_changed(_config(path), settings), weights)}
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"no configuration at {path}{did_you_mean(path)}")
        return {"model": _built(_changed(_config(path), settings), weights)}
    if ":" in target:
        if settings:
            raise ValueError("--set changes a configuration; a factory has none")
        return _made(target)
    raise ValueError(
        f"nothing to inspect at {target!r}: give a size ({', '.join(sizes.NAMES)}), a folder with a run or a model, a "
        f"config.json, or module:factory{did_you_mean(path)}"
    )


def _config(path: Path) -> Any:
    """The configuration of a folder or file, without code or weights from elsewhere."""
    from transformers import AutoConfig

    import nestling.models  # noqa: F401 - registers the model types
    from nestling.training.checkpoint import resolve

    if path.is_dir():
        path = resolve(path) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{path} names no model_type")
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _changed(config: Any, settings: dict[str, Any] | None) -> Any:
    if not settings:
        return config
    values = _fields(config)
    _check_names(values, settings)
    return type(config)(**nested(settings, values))


def _fields(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version", "layer_types")}


def _check_names(known: dict[str, Any], settings: dict[str, Any] | None) -> None:
    from nestling.training.config import unknown

    for name in settings or ():
        if name.split(".")[0] not in known:
            raise ValueError(unknown("model option", name, known))


def _built(config: Any, weights: bool) -> nn.Module:
    import transformers
    from transformers import AutoModelForCausalLM

    with torch.device("cpu" if weights else "meta"):
        for name in getattr(config, "architectures", None) or ():
            if hasattr(transformers, name):
                return getattr(transformers, name)._from_config(config)
        return AutoModelForCausalLM.from_config(config)


def _made(target: str) -> dict[str, Any]:
    module, _, name = target.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: a user's own module lies where they are
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{target!r} cannot be imported: {error}") from error
    made = factory if isinstance(factory, nn.Module) else factory()
    made = {"model": made} if isinstance(made, nn.Module) else made
    if not isinstance(made, dict) or not isinstance(made.get("model"), nn.Module):
        raise ValueError(
            f"{target!r} must give a module, or a dict of arguments of nestling.levels with a model; got {made!r:.60}"
        )
    return dict(made)


def build_optimizer(
    model: nn.Module, name: str, lr: float, options: dict[str, Any], tokens_per_step: int | None, context: int | None
) -> Any:
    """An optimiser of the model by name; slow levels of a Hope get optimisers of their own, as in its training.

    Raises:
        ValueError: an unknown name or option.
    """
    from nestling.schedule import Schedule
    from nestling.training.config import OptimConfig
    from nestling.training.optimizers import LevelOptimizers

    if name == "dgd":
        from nestling.optim import DGD

        return DGD(model, lr, **options)
    config = OptimConfig(name=OPTIMIZERS.get(name, name), lr=lr, options=options)
    slow = tokens_per_step is not None and hasattr(model, "level_parameters")
    schedule = Schedule(model.config.levels, context or tokens_per_step, tokens_per_step) if slow else None
    return LevelOptimizers(model, config, schedule)


def random_tokens(model: nn.Module, batch: int, tokens: int) -> Tensor:
    """Random token ids for a language model.

    Raises:
        ValueError: a model without a vocabulary, or sizes below 1.
    """
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(
            "--measure draws random tokens, and this model has no vocabulary: let module:factory return measure="
        )
    if min(batch, tokens) < 1:
        raise ValueError(f"--batch and --tokens must be at least 1; got {batch} and {tokens}")
    return torch.randint(size, (batch, tokens), generator=torch.Generator().manual_seed(0))
