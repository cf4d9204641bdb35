"""Parameters sharded over ranks (DTensor, as FSDP2 makes them): how a step sees them whole.

What is done element by element runs on each rank's shard. What needs whole matrices M3 divides among the ranks
(`optim.division`); elsewhere it is computed whole on every rank and each keeps its part. So a step is one process's
whatever the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def is_cut_by_rows(tensor: Any) -> bool:
    """Whether each rank of one line of ranks holds a stretch of its first dimension, as FSDP2 cuts."""
    return is_sharded(tensor) and tensor.device_mesh.ndim == 1 and tensor.placements[0].is_shard(0)


def local(tensor: Any) -> Tensor:
    """This rank's shard, to be written to; a plain tensor is its own."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of it, on every rank (collective)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def keep_shard(target: Any, value: Tensor) -> None:
    """Write this rank's part of a whole value, which every rank has, into its shard."""
    target.to_local().copy_(shard_of(value, target))


def shard_of(value: Tensor, like: Any) -> Tensor:
    """This rank's part of a whole value, sharded as `like` is."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def sharded_as(value: Tensor, like: Any) -> Tensor:
    """A whole value, which every rank has, as a DTensor sharded as `like` is; a plain tensor for a plain one."""
    from torch.distributed.tensor import DTensor

    if is_sharded(value) or not is_sharded(like):
        return value
    mesh, shape, stride = like.device_mesh, like.shape, like.stride()
    return DTensor.from_local(shard_of(value, like), mesh, like.placements, run_check=False, shape=shape, stride=stride)


def agreed(flag: bool, tensors: Sequence[Any]) -> bool:
    """Whether a flag holds on all ranks that share these tensors."""
    for mesh in {t.device_mesh for t in tensors if is_sharded(t)}:
        for dim in range(mesh.ndim):
            value = torch.tensor(float(flag), device=mesh.device_type)
            torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN, group=mesh.get_group(dim))
            flag = bool(value)
    return flag
