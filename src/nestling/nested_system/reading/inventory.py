"""The tensors and modules of a model by the names a user knows, wrappers looked through."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from nestling.nested_system.describe import spec
from nestling.nested_system.formalism import TensorSpec
from nestling.nested_system.frequency import Frequency

# attribute under which a wrapper keeps the module it wraps, and what the wrapper is
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": ("_orig_mod", "torch.compile"),
    "torch.nn.parallel.distributed.DistributedDataParallel": ("module", "DistributedDataParallel"),
    "torch.nn.parallel.data_parallel.DataParallel": ("module", "DataParallel"),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "_fsdp_wrapped_module", "FullyShardedDataParallel"),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": (
        "_checkpoint_wrapped_module", "activation checkpointing"),
    "torch.optim.swa_utils.AveragedModel": ("module", "AveragedModel"),
}  # fmt: skip


def unwrap(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module inside all wrappers around it, and what they are."""
    names: list[str] = []
    while True:
        kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
        found = next((_WRAPPERS[kind] for kind in kinds if kind in _WRAPPERS), None)
        if found is None:
            return module, names
        module = getattr(module, found[0])
        names.append(found[1])


class Inventory:
    """Every module and tensor of a model, by name, and what descriptions have claimed and set.

    Args:
        model: any module.  context_length: tokens of a context.
    """

    def __init__(self, model: nn.Module, context_length: int = 1024) -> None:
        self.context_length = context_length
        self.root, outer = unwrap(model)
        self.wrappers = set(outer)
        self.modules: dict[str, nn.Module] = {}
        self.repeated: list[tuple[str, str]] = []  # a module under a second name
        self.frequencies: dict[str, Frequency] = {}
        self.initial: set[str] = set()  # paths whose weights are only a fast level's initial state
        self.claimed: set[str] = set()
        self.consumed: set[str] = set()  # modules whose children their own description covers
        self.tensors: dict[str, Tensor] = {}  # by first name
        self.aliases: dict[str, str] = {}  # second name: first name
        self._walk(self.root, "", {})
        self._names: dict[int, str] = {}
        for path, module in self.modules.items():
            for name, tensor in _own(module):
                self._add(".".join(p for p in (path, name) if p), tensor)

    def _walk(self, module: nn.Module, name: str, seen: dict[nn.Module, str]) -> None:
        module, wrappers = unwrap(module)
        self.wrappers.update(wrappers)
        if module in seen:
            self.repeated.append((name, seen[module]))
            return
        seen[module] = name
        self.modules[name] = module
        for child, inner in module._modules.items():  # named_children leaves out repeated ones
            if inner is not None:
                self._walk(inner, f"{name}.{child}" if name else child, seen)

    def _add(self, name: str, tensor: Tensor) -> None:
        if isinstance(tensor, UninitializedTensorMixin):
            raise ValueError(f"parameter {name} of a lazy module has no shape yet: run the model once, then look at it")
        first = self._names.setdefault(id(tensor), name)
        if first == name:
            self.tensors[name] = tensor
        else:
            self.aliases[name] = first

    def name_of(self, tensor: Tensor) -> str | None:
        """The first name of a tensor of the model, None if it is none of its."""
        return self._names.get(id(tensor))

    def claim(self, name: str, tensor: Tensor) -> TensorSpec:
        """The tensor's description; it counts as described from now on."""
        first = self._names[id(tensor)]
        name = name if name in self.aliases or name in self.tensors else first
        self.claimed.add(name)
        return self.entry(name)

    def consume(self, path: str) -> None:
        """Leave out what lies below a module: its description speaks for all of it."""
        self.consumed.add(path)

    def is_consumed(self, path: str) -> bool:
        """Whether a module lies below one that was consumed."""
        parts = path.split(".")
        return any(".".join(parts[:end]) in self.consumed for end in range(len(parts))) and path != ""

    def below(self, path: str) -> list[tuple[str, Tensor]]:
        """Tensors at and below a module, by their names there."""
        inside = [p for p in self.modules if p == path or not path or p.startswith(f"{path}.")]
        return [(".".join(q for q in (p, n) if q), t) for p in inside for n, t in _own(self.modules[p])]

    def entry(self, name: str) -> TensorSpec:
        """The description of a tensor by name."""
        first = self.aliases.get(name, name)
        tensor = self.tensors[first]
        role = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        return spec(name, tensor.shape, tensor.dtype, role, None if first == name else first)

    def frequency_of(self, name: str) -> Frequency | None:
        """The frequency a description has set for what lies under a path: the longest such path decides."""
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            if (path := ".".join(parts[:end])) in self.frequencies:
                return self.frequencies[path]
        return None

    def is_initial_state(self, name: str) -> bool:
        """Whether the weights of this name are an initial state of a level that learns in the context."""
        parts = name.split(".")
        return any(".".join(parts[:end]) in self.initial for end in range(1, len(parts) + 1))

    def unclaimed(self) -> Iterator[tuple[str, list[str]]]:
        """Modules with tensors that no description has claimed, and their names."""
        for path, module in self.modules.items():
            names = [".".join(p for p in (path, n) if p) for n, _ in _own(module)]
            if left := [name for name in names if name not in self.claimed]:
                yield path, left


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = [(n, p) for n, p in module._parameters.items() if p is not None]
    return parameters + [(n, b) for n, b in module._buffers.items() if isinstance(b, torch.Tensor)]
