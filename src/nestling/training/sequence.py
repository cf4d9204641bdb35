"""Sequence parallelism: windows are cut over a row of ranks, and the state a model carries from call to call travels.

Rank s of a row of N reads slice s of every window. It begins with the state that rank s - 1 ended with and hands its
own on; in the backward pass the gradient of a state travels the other way. The windows of a batch are a pipeline: while
rank 1 reads its slice of the first, rank 0 reads the second. Rank s takes the oldest window back as soon as N - s of
them are read (one forward, one backward), so of M + N - 1 moments N - 1 are idle.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nestling.training.evaluation import autocast, losses_of
from nestling.training.handover import Channel, State, put_together, taken_apart


class Pending(NamedTuple):
    """Windows between their forward and backward pass on this rank."""

    windows: Tensor
    received: State | None
    loss: Tensor
    told: list[Tensor]  # of the state that was handed on


class SequencePipeline:
    """Forward and backward passes of a model over windows that are cut over `size` neighbouring ranks.

    Args:
        model: a causal language model whose cache is all that it carries on.
        size: ranks N of a row, a divisor of all ranks; the rows of ranks share the batch.
        rows: windows that are read at once.
        device: where the model is.
        precision: "float32" or "bf16" (autocast).
        recompute: keep of a window only the state that was received, and read the slice again for its backward pass.
    """

    def __init__(
        self, model: nn.Module, size: int, rows: int, device: torch.device, precision: str, recompute: bool = False
    ) -> None:
        self.model, self.size, self.rows, self.precision, self.recompute = model, size, rows, precision, recompute
        rank = dist.get_rank()
        self.place = rank % size
        self.last = self.place + 1 == size
        before, after = rank - 1 if self.place else None, None if self.last else rank + 1
        self.states, self.gradients = Channel(before, after, device), Channel(after, before, device)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor, 0)

    def backward(self, windows: Tensor, parts: int = 1) -> float:
        """Add the gradients of the mean loss of windows [B, T + 1] / parts; every rank of a row has the same windows.

        Returns:
            N times this rank's part of that loss. The mean over all ranks is the mean over the rows of ranks, and so it
            is with gradients (`exchange`).
        """
        weight = self.size / (windows[:, 1:].numel() * parts)
        pending: deque[Pending] = deque()
        total = 0.0
        for part in windows.split(self.rows):
            pending.append(self._forward(part, weight))
            total += pending[-1].loss.item()
            if len(pending) == self.size - self.place:
                self._backward(pending.popleft(), weight)
        while pending:
            self._backward(pending.popleft(), weight)
        self.states.wait()
        self.gradients.wait()
        return total

    def exchange(self) -> None:
        """Make every gradient the mean over all ranks; one that no rank has stays None."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        dist.all_reduce(used)
        chosen = [p for p, anywhere in zip(parameters, used.tolist()) if anywhere]
        for parameter in chosen:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for work in [dist.all_reduce(p.grad, async_op=True) for p in chosen]:
            work.wait()
        for parameter in chosen:
            parameter.grad /= dist.get_world_size()

    def _forward(self, windows: Tensor, weight: float) -> Pending:
        received = self.states.receive() if self.place else None
        loss, state = self._read(windows, received, weight)
        if state is not None:
            self.states.send(state)
        if self.recompute:  # the graph ends here
            return Pending(windows, received, loss.detach(), [])
        return Pending(windows, received, loss, [] if state is None else state.tensors)

    def _backward(self, window: Pending, weight: float) -> None:
        loss, told = window.loss, window.told
        if self.recompute:
            loss, state = self._read(window.windows, window.received, weight)
            told = [] if state is None else state.tensors
        told = [tensor for tensor in told if tensor.requires_grad]
        gradients = self.gradients.receive_like(told) if told else []
        torch.autograd.backward([loss, *told], [None, *gradients])
        leaves = [] if window.received is None else [t for t in window.received.tensors if t.requires_grad]
        if leaves:
            self.gradients.send_tensors([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])

    def _read(self, windows: Tensor, received: State | None, weight: float) -> tuple[Tensor, State | None]:
        """This rank's slice: its part of the loss, and the state after it unless it is the last."""
        length = windows.shape[1] - 1
        begin, end = (length * place // self.size for place in (self.place, self.place + 1))
        ids, targets = windows[:, begin:end], windows[:, begin + 1 : end + 1]
        # levels that learn from what they read can end a chunk here: what follows is known
        follows = {"next_tokens": targets[:, -1:]} if getattr(self.model, "reads", False) and not self.last else {}
        cache = None if received is None else put_together(received)
        with autocast(windows.device, self.precision):
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=not self.last, **follows)
        loss = losses_of(out.logits, targets).sum() * weight
        return loss, None if self.last else taken_apart(out.past_key_values)
