"""A model over several processes: DDP, FSDP2, or windows in slices. The model itself knows nothing of it."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nestling.training.config import TrainConfig
from nestling.training.evaluation import token_losses
from nestling.training.sequence import SequencePipeline
from nestling.utils.ranks import Ranks


@dataclass(frozen=True)
class Parallel:
    """A model as a training step calls it; gradients of a backward pass are the mean over all ranks."""

    called: Any
    mode: str = "none"
    pipeline: SequencePipeline | None = None

    def backward(self, windows: Tensor, parts: int, last: bool, precision: str, apart: int | None) -> float:
        """Add the gradients of the mean loss of windows [B, T + 1], one of so many parts of a step, the last or not.

        Returns:
            The loss / parts, to be averaged over the ranks.
        """
        if self.pipeline is not None:
            part = self.pipeline.backward(windows, parts)
            if last:
                self.pipeline.exchange()
            return part
        with self._exchange(last):
            loss = token_losses(self.called, windows, precision, apart).mean() / parts
            loss.backward()
        return loss.item()

    def _exchange(self, wanted: bool):
        """A context for a forward and backward pass whose gradients are exchanged, or stay here for a later one."""
        if self.mode == "fsdp":
            self.called.set_requires_gradient_sync(wanted)
        return self.called.no_sync() if self.mode == "ddp" and not wanted else nullcontext()


def find_mode(run: TrainConfig, ranks: Ranks) -> str:
    """ "none", "ddp" or "fsdp"; ValueError for what the processes that run, or the run, do not fit."""
    config = run.parallel
    started = dist.is_available() and dist.is_initialized()
    mode = config.mode if config.mode != "auto" else "ddp" if ranks.size > 1 else "none"
    if mode == "none" and ranks.size > 1:
        raise ValueError(
            f"parallel.mode is none, but {ranks.size} processes run: use ddp or fsdp, or start one without torchrun"
        )
    if mode != "none" and not started:
        raise ValueError(
            f"parallel.mode {mode} needs the processes of torchrun: torchrun --nproc-per-node 2 -m nestling train ..."
        )
    if mode != "fsdp" and (config.offload or config.param_dtype != "float32"):
        raise ValueError(f"parallel.offload and parallel.param_dtype are for parallel.mode fsdp; this is {mode}")
    if run.compile and config.sequence > 1:
        raise ValueError(f"compile was not made to go with parallel.sequence {config.sequence}: leave one of them out")
    if config.sequence > 1:
        _check_sequence(run, mode, ranks)
    return mode


def _check_sequence(run: TrainConfig, mode: str, ranks: Ranks) -> None:
    count = run.parallel.sequence
    if ranks.size % count:
        raise ValueError(
            f"parallel.sequence {count} must divide the number of processes, and {ranks.size} run: start a multiple of "
            f"{count} with torchrun, or give --sequence-ranks 1"
        )
    if mode == "fsdp":
        raise ValueError(f"parallel.sequence {count} goes with parallel.mode ddp, not with fsdp: choose one of them")
    if run.data.documents == "apart":
        raise ValueError(
            f'parallel.sequence {count} hands a state over every cut, and data.documents "apart" begins anew inside a '
            "window: choose one of them"
        )
    if run.data.seq_len < count:
        raise ValueError(f"data.seq_len {run.data.seq_len} cannot be cut into parallel.sequence {count} slices")


def parallelize(model: nn.Module, mode: str, run: TrainConfig, device: torch.device) -> Parallel:
    """Spread a model over the ranks, before its optimiser is made.

    With fsdp every decoder layer (`_no_split_modules`) is gathered when it runs, and compiled by itself. A model whose
    levels learn in the context runs its upper layers from the middle of its own forward pass and takes gradients there:
    it is gathered once and whole, and what is spread is gradients, optimiser state and the weights between steps.
    """
    if mode == "none":
        return Parallel(torch.compile(model) if run.compile else model)
    config = run.parallel
    if config.sequence > 1:
        again = run.gradient_checkpointing
        pipeline = SequencePipeline(model, config.sequence, config.rows, device, run.precision, again)
        return Parallel(model, mode, pipeline)
    learns = _learns(model)
    if mode == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        inner = cast("nn.Module", torch.compile(model)) if run.compile else model  # gradients are sent outside of it
        wrapped = nn.parallel.DistributedDataParallel(inner, device_ids=ids, find_unused_parameters=learns)
        return Parallel(wrapped, mode)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),))}
    if config.param_dtype == "bf16":
        if learns:
            raise ValueError(
                "parallel.param_dtype bf16 would round what levels learn in a context: leave it at float32, or take "
                'precision "bf16", which learns in float32'
            )
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if config.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    # nothing writes into what a layer returns: `tests/training/test_parallel.py` holds the loss to one process's
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    if run.compile and learns:
        raise ValueError(
            "compile under parallel.mode fsdp is of single layers, and levels that learn in a context run them their "
            "own way: leave compile out, or take parallel.mode ddp"
        )
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, 0)
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in [] if learns else [m for m in model.modules() if type(m).__name__ in names]:
        if run.compile:
            module.compile()
        fully_shard(module, **options)
    fully_shard(model, **options)
    return Parallel(model, mode)


def _learns(model: nn.Module) -> bool:
    """Whether levels learn in the context."""
    learner = getattr(model, "learner", None)
    return bool(learner is not None and learner.fast)
