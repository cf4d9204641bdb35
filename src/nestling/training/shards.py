"""A trainer's state whose tensors are spread over ranks, on disk: `torch.distributed.checkpoint` holds those tensors.

In the file of everything else an empty one on the meta device stands for each. Its place in the tree is its name, so
that any number of ranks, or one process, can put the state together again.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.optim.sharding import is_sharded, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def split(state: dict) -> tuple[dict, dict[str, Tensor]]:
    """A nested state as one without sharded tensors, and these by their place."""
    shards: dict[str, Tensor] = {}

    def take(place: str, value: Any) -> Any:
        if not is_sharded(value):
            return value
        shards[place] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return _mapped(state, take), shards


def write(shards: dict[str, Tensor], folder: Path) -> None:
    """Every rank writes its parts into one folder (collective); OSError on every rank if one cannot."""
    import torch.distributed.checkpoint as dcp

    try:
        with _quiet():
            dcp.save(shards, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"{folder} could not be written: {reason}") from error


def read(state: dict, folder: Path, sharded: bool) -> dict:
    """The state with its tensors from the folder: this rank's parts with `sharded` (collective), else whole."""
    found: dict[str, Tensor] = {}
    mesh = None
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def make(place: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta:
            found[place] = _empty(value, mesh)
            return found[place]
        return value

    state = _mapped(state, make)
    if found:
        import torch.distributed.checkpoint as dcp

        with _quiet():
            dcp.load(found, checkpoint_id=folder, no_dist=not sharded)
    return state


def whole_model(model: PreTrainedModel, plain: PreTrainedModel, wanted: bool) -> PreTrainedModel:
    """A sharded model's weights in `plain`'s form, in the CPU's memory of the ranks where it is `wanted` (collective).

    Args:
        plain: a copy of the model from before it was sharded, on the meta device.
    """
    weights = {}
    for name, value in model.state_dict().items():
        full = whole(value)
        if wanted:
            weights[name] = full.cpu()
    gathered = copy.deepcopy(plain)
    if wanted:
        gathered.load_state_dict(weights, assign=True)
        gathered.tie_weights()
    return gathered


def _empty(like: Tensor, mesh: Any) -> Tensor:
    if mesh is None:
        return torch.empty(like.shape, dtype=like.dtype)
    from torch.distributed.tensor import Shard, empty

    return empty(like.shape, dtype=like.dtype, device_mesh=mesh, placements=[Shard(0)])


def _mapped(value: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _mapped(inner, change, f"{place}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, change, f"{place}.{i}") for i, inner in enumerate(value)]
    return change(place[1:], value)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of its own deprecated parts there, and of running without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
