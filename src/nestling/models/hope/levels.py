"""A trained Hope whose MLPs learn while it reads: the same weights under other levels."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestling.cms.defaults import default_levels
from nestling.cms.fast_linear import check_uncompiled
from nestling.models.hope.configuration import HopeConfig
from nestling.models.hope.modeling import HopeForCausalLM
from nestling.schedule import Level, check_order


def is_hope(path: str | Path) -> bool:
    """Whether a path is a run, a checkpoint or a saved model of a Hope."""
    path = Path(path)
    folders = [path, *sorted(path.glob("checkpoints/*"))]
    try:
        found = [json.loads((f / "config.json").read_text("utf-8")) for f in folders if (f / "config.json").is_file()]
    except ValueError:
        return False  # who loads it says what is wrong with it
    return any(config.get("model_type") == HopeConfig.model_type for config in found if isinstance(config, dict))


def give_levels(model: HopeForCausalLM, levels: Sequence[Level | dict[str, Any]] | None = None) -> HopeForCausalLM:
    """A copy of a Hope with these levels on its MLPs, one for each; at first it computes exactly what the original did.

    Args:
        model: none of whose levels learns in a context yet.
        levels: fastest first, as many as its continuum memory has blocks; None for the default of one block.

    Raises:
        TypeError: a compiled model.
        ValueError: levels that learn already, or levels that do not fit the model or its context length.
    """
    check_uncompiled(model)
    own = model.config.levels
    if model.learner.fast:
        raise ValueError("the model's levels learn already while it reads: nestling learn takes it as it is")
    if levels is None and len(own) > 1:
        raise ValueError(f"the model has {len(own)} levels, and the default is one: name {len(own)} of them")
    chosen = check_order(default_levels(model.config) if levels is None else levels)
    if len(chosen) != len(own):
        raise ValueError(f"{len(chosen)} levels were given, but the model has {len(own)}: name one for each")
    config = copy.deepcopy(model.config)
    config.cms_levels = [level.to_dict() for level in chosen]
    fresh: Any = type(model)(config)
    fresh.to(dtype=model.dtype, device=model.device)
    fresh.load_state_dict(model.state_dict())
    if not fresh.learner.fast:
        raise ValueError(
            f"a chunk_size of {chosen[0].chunk_size} is not below the model's context_length "
            f"{config.context_length}: nothing would ever be learned; take a smaller one"
        )
    return fresh.train(model.training)
