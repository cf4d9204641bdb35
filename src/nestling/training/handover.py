"""A model's state as bytes, from the process that made it to the one that goes on with it.

A cache is any object: it is pickled with its tensors taken out, and these travel as one buffer. So nothing here knows
of layers: whatever state a model carries from call to call can be handed over.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNED = 8  # bytes: each tensor begins at a multiple, so that the buffer can be viewed as its type


class State(NamedTuple):
    """A state taken apart: all but its tensors, pickled, and each of these once."""

    rest: bytes
    tensors: list[Tensor]


class Spec(NamedTuple):
    """What a tensor is made of. `graph`: a gradient comes back for it; `host`: it lies in the CPU's memory."""

    shape: torch.Size
    dtype: torch.dtype
    graph: bool
    host: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """The tensor's own."""
        return cls(tensor.shape, tensor.dtype, tensor.requires_grad, tensor.device.type == "cpu")

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes in the buffer, up to where the next one begins."""
        return -(-self.nbytes // ALIGNED) * ALIGNED


def taken_apart(state: Any) -> State:
    """A state as bytes and tensors; one that is in it twice is there once, also as two equal views of one."""
    file, tensors, known = io.BytesIO(), [], {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> int | None:
            if not isinstance(found, Tensor):
                return None
            base = found if found._base is None else found._base
            same = id(base), found.data_ptr(), found.shape, found.stride(), found.dtype, found.requires_grad
            if same not in known:
                known[same] = len(tensors)
                tensors.append(found)
            return known[same]

    Pickler(file).dump(state)
    return State(file.getvalue(), tensors)


def put_together(state: State) -> Any:
    """The object that was taken apart, anew at every call, with these tensors."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place: int) -> Tensor:
            return state.tensors[place]

    return Unpickler(io.BytesIO(state.rest)).load()


def joined(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors as one buffer of bytes."""
    rooms = [Spec.of(tensor).room for tensor in tensors]
    buffer = torch.empty(sum(rooms), dtype=torch.uint8, device=device)
    for tensor, room in zip(tensors, buffer.split(rooms)):
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        room[: len(raw)] = raw
    return buffer


def parted(buffer: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """The tensors of a buffer, as leaves; those with a graph want their gradient."""
    found = []
    for spec, room in zip(specs, buffer.split([spec.room for spec in specs])):
        tensor = room[: spec.nbytes].view(spec.dtype).view(spec.shape)
        found.append((tensor.cpu() if spec.host else tensor).requires_grad_(spec.graph))
    return found


class Channel:
    """Messages in one direction between neighbours; a new one waits until the last was taken.

    Made by all ranks together: each channel has a process group of its own, since the messages of two directions would
    wait for each other on a GPU.

    Args:
        source, target: the ranks that this one hears and tells; None at an end.
        device: where tensors are received.

    Attributes:
        sent: bytes told so far.
    """

    def __init__(self, source: int | None, target: int | None, device: torch.device) -> None:
        self.source, self.target, self.device = source, target, device
        self.group = dist.new_group()
        self.sent = 0
        self._under_way: list[tuple[Any, Tensor]] = []  # a buffer lives until it was taken

    def send(self, state: State) -> None:
        """Tell the target a state."""
        specs = [Spec.of(tensor) for tensor in state.tensors]
        head = torch.frombuffer(bytearray(pickle.dumps((state.rest, specs))), dtype=torch.uint8)
        buffer = joined(state.tensors, self.device)
        self._send(torch.tensor([len(head), len(buffer)]), head, buffer)

    def receive(self) -> State:
        """The state that the source tells; its tensors are leaves."""
        head_size, size = self._receive(torch.empty(2, dtype=torch.int64)).tolist()
        head = self._receive(torch.empty(head_size, dtype=torch.uint8))
        rest, specs = pickle.loads(head.numpy().tobytes())
        return State(rest, self._receive_tensors(size, specs))

    def send_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Tell the target tensors of which it knows the shapes."""
        self._send(joined(tensors, self.device))

    def receive_like(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors that the source tells, each of the shape and type of one here."""
        specs = [Spec.of(tensor)._replace(graph=False) for tensor in like]
        return self._receive_tensors(sum(spec.room for spec in specs), specs)

    def wait(self) -> None:
        """Until everything that was sent is taken."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way = []

    def _send(self, *parts: Tensor) -> None:
        self.wait()
        self._under_way = [(dist.isend(part, self.target, group=self.group), part) for part in parts]
        self.sent += sum(part.numel() * part.element_size() for part in parts)

    def _receive(self, into: Tensor) -> Tensor:
        dist.recv(into, self.source, group=self.group)
        return into

    def _receive_tensors(self, size: int, specs: Sequence[Spec]) -> list[Tensor]:
        return parted(self._receive(torch.empty(size, dtype=torch.uint8, device=self.device)), specs)
