"""What a kind of module or optimiser is as memories: a register of descriptions, open to any new one.

from nestling.nested_system import describes

@describes(MyMemory)
def my_memory(module, place):
    yield place.weights("my kind of memory", retrieval="y = W x", macs=module.weight.numel())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nestling.nested_system.formalism import AssociativeMemory, Cost, TensorSpec, Transfer
from nestling.nested_system.frequency import Frequency

if TYPE_CHECKING:
    from nestling.nested_system.rules import Rule

Description = Callable[[Any, Any], "Iterable[AssociativeMemory | Transfer] | Rule"]
Predicate = Callable[[nn.Module], bool]

_CLASSES: dict[type | str, Description] = {}
_PREDICATES: list[tuple[Predicate, Description]] = []


def describes(*kinds: type | str) -> Callable[[Description], Description]:
    """Register the decorated function as the description of module classes or optimiser classes.

    For a module it is called with the module and its `Place` in the model, and yields memories and transfers; children
    are read on their own afterwards. For an optimiser it is called with the optimiser and a parameter group, and
    returns a `Rule`. A subclass is described as its nearest registered base. The latest registration wins.

    Args:
        kinds: classes, or their dotted names (so that nothing need be imported).

    Raises:
        TypeError: something that is no class of modules or optimisers.
    """
    if not kinds:
        raise TypeError("describes needs a class: @describes(MyModule)")
    for kind in kinds:
        fits = isinstance(kind, type) and issubclass(kind, (nn.Module, torch.optim.Optimizer))
        if not (fits or (isinstance(kind, str) and "." in kind)):
            raise TypeError(f"describes takes module or optimiser classes, or their dotted names; got {kind!r}")

    def add(description: Description) -> Description:
        for kind in kinds:
            _CLASSES[kind] = description
        return description

    return add


def describes_if(predicate: Predicate) -> Callable[[Description], Description]:
    """As `describes`, for every module that satisfies a predicate and whose class has no description of its own."""

    def add(description: Description) -> Description:
        _PREDICATES.append((predicate, description))
        return description

    return add


def transparent(module: nn.Module, place: Place) -> Iterator[AssociativeMemory]:
    """The description of a module that is no memory itself: its children are all there is to it."""
    yield from ()


def description_of(thing: Any) -> Description | None:
    """The registered description of a module or optimiser, None if there is none."""
    for kind in type(thing).__mro__:
        for key in (kind, f"{kind.__module__}.{kind.__qualname__}"):
            if key in _CLASSES:
                return _CLASSES[key]
    if isinstance(thing, nn.Module):
        for predicate, description in _PREDICATES:
            if predicate(thing):
                return description
    return None


def spec(name: str, shape: Iterable[int], dtype: torch.dtype, role: str, shared: str | None = None) -> TensorSpec:
    """A TensorSpec from a shape and a dtype."""
    shape = tuple(int(size) for size in shape)
    size = dtype.itemsize
    for length in shape:
        size *= length
    return TensorSpec(name, shape, str(dtype).removeprefix("torch."), size, role, shared)


class Place:
    """Where a module stands in the model: names its memories and hands out its tensors.

    Attributes:
        name: the module's path.  context_length: tokens of a context, for costs that grow with it.
    """

    def __init__(self, name: str, module: nn.Module, inventory: Any) -> None:
        self.name, self.module, self._inventory = name, module, inventory
        self.context_length: int = inventory.context_length

    def path(self, relative: str = "") -> str:
        """The full name of something inside the module; of the module itself without an argument."""
        return ".".join(part for part in (self.name, relative) if part) or type(self.module).__name__.lower()

    def has(self, child: str) -> bool:
        """Whether the module has this child (not None)."""
        try:
            return isinstance(self.module.get_submodule(child), nn.Module)
        except AttributeError:
            return False

    def below(self) -> dict[str, nn.Module]:
        """Every module under this one by its name relative to it, wrappers looked through."""
        start = f"{self.name}." if self.name else ""
        return {n.removeprefix(start): m for n, m in self._inventory.modules.items() if n and n.startswith(start)}

    def tensors(self, *names: str) -> tuple[TensorSpec, ...]:
        """The module's own parameters and buffers of these names (all if none is given); they count as described.

        A name may reach into a child ("initial.0.1"). None and missing ones are left out.
        """
        names = names or tuple(n for n, _ in self._own())
        return tuple(
            self._inventory.claim(self.path(n), tensor) for n in names if (tensor := self._find(n)) is not None
        )

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_parameters(recurse=False, remove_duplicate=False)
        yield from self.module.named_buffers(recurse=False, remove_duplicate=False)

    def _find(self, name: str) -> Tensor | None:
        parent, _, last = name.rpartition(".")
        try:
            module = self.module.get_submodule(parent)
        except AttributeError:
            return None
        return {**module._parameters, **module._buffers}.get(last)

    def subtree(self) -> tuple[TensorSpec, ...]:
        """Every parameter and buffer at and below the module; its children are not read on their own any more."""
        self._inventory.consume(self.name)
        below = self._inventory.below(self.name)
        return tuple(self._inventory.claim(name, tensor) for name, tensor in below)

    def state(self, name: str, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> TensorSpec:
        """A tensor that one sequence's state holds."""
        return spec(self.path(name), shape, dtype, "state")

    def set_frequency(self, relative: str, frequency: Frequency) -> None:
        """Everything trained under this path is updated this often, whatever the optimiser's own step."""
        self._inventory.frequencies[self.path(relative)] = frequency

    def initial_state(self, relative: str) -> None:
        """What lies under this path is only the initial state of another memory, which carries the costs."""
        self._inventory.initial.add(self.path(relative))

    def weights(
        self,
        kind: str,
        names: tuple[str, ...] | None = (),
        *,
        retrieval: str,
        macs: int,
        name: str = "",
        read_bytes: int | None = None,
        keys: str = "x, the layer's input",
        values: str = "u = −∂L/∂y, its local error signal",
        objective: str = "⟨y, ∂L/∂y⟩ + |W − Wₜ|² / 2η  (NL Eqs. 19, 31)",
        note: str = "",
    ) -> AssociativeMemory:
        """Weights that the outer loop trains: a memory from the layer's inputs to its local errors (NL Eqs. 8, 9, 31).

        Args:
            kind: what it is.  names: of the module's own tensors; () takes all, None those of its children too.
            retrieval: its forward.  macs: multiply-adds for one token.
            name: of the memory, relative to the module.
            read_bytes: bytes read for one token, all of them unless given.
        """
        tensors = self.subtree() if names is None else self.tensors(*names)
        size = sum(t.bytes for t in tensors)
        own = [t for t in tensors if t.shared_with is None]
        cost = Cost(
            parameters=sum(t.numel for t in own if t.role == "parameter"),
            state_bytes=sum(t.bytes for t in own),
            read_macs=macs,
            read_bytes=size if read_bytes is None else read_bytes,
            write_macs=2 * macs,  # its own gradient, and the error it hands to the layer below
        )
        feasible = " × ".join(f"ℝ^{'×'.join(map(str, t.shape)) or 1}" for t in tensors)
        return AssociativeMemory(
            self.path(name), kind, keys, values, objective, retrieval, context="training data", feasible=feasible,
            tensors=tensors, cost=cost, note=note,
        )  # fmt: skip
