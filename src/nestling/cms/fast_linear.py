"""Linear layers that take a difference of their own for every stream of a batch, as an argument of the call.

What a call adds to the shared weights travels in a context variable, not in the layers: two threads, or two tasks, that
read with one model never see each other's, and nothing is left behind by a call that failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

JOIN = 32  # rows of x from which a second product costs more than a sum of two matrices


class Factors(NamedTuple):
    """A difference of low rank, D = B A: each stream's own weights over r fixed features of the input.

    Attributes:
        up: B [B, o, r].  down: A [r, i], orthonormal rows.
        part: tokens that share a B, if each part of the input has one of its own: `up` is [B parts, o, r] then. 0: all.
    """

    up: Tensor
    down: Tensor
    part: int = 0

    @property
    def product(self) -> Tensor:
        """D [B, o, i]."""
        return self.up @ self.down

    def to(self, dtype: torch.dtype) -> Factors:
        """Both in another type."""
        return self._replace(up=self.up.to(dtype), down=self.down.to(dtype))

    def of_parts(self, x: Tensor) -> Tensor:
        """B_p A x for each part p of the tokens, the last one perhaps shorter: [B, T, i] -> [B, T, o]."""
        batch, tokens = x.shape[:2]
        z = F.pad(F.linear(x, self.down.to(x.dtype)), (0, 0, 0, -tokens % self.part))
        y = z.reshape(-1, self.part, z.shape[-1]) @ self.up.to(x.dtype).mT
        return y.reshape(batch, -1, y.shape[-1])[:, :tokens]


Delta = Tensor | Factors  # what a layer of a batch of streams has learned


@cache
def features(rank: int, inputs: int, number: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The factor A of the layer with this number: [r, i] with orthonormal rows, drawn once and always the same."""
    draw = torch.Generator("cpu").manual_seed(number)
    with torch.inference_mode(False), torch.no_grad():
        drawn = torch.randn(inputs, rank, generator=draw, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(drawn)
        return (q * r.diagonal().sign()).mT.contiguous().to(device, dtype)


class Seen(NamedTuple):
    """What Delta Gradient Descent needs of a chunk: sums over its tokens.

    Attributes:
        products: of (D x) x^T, [B, o, i]; of factors (D x) z^T, [B, o, r], z = A x.
        norms: of |x|^2, [B]; of factors of |z|^2.
    """

    products: Tensor
    norms: Tensor


@dataclass(eq=False)
class Applied:
    """What one call gives its layers, and what it asks of them.

    Attributes:
        deltas: difference of each layer [B, o, i], or its factors; B = 1 for all rows of a batch; None for none.
        fixed: no gradient reaches the shared weights.
        watched: whether `seen` is taken.
    """

    deltas: Mapping[FastLinear, Delta | None]
    fixed: bool = False
    watched: bool = False
    seen: dict[FastLinear, Seen] = field(default_factory=dict)


_CALLS: ContextVar[Mapping[FastLinear, Applied]] = ContextVar("fast_weights", default=MappingProxyType({}))
# Calls that are open in any thread. A compiled layer is guarded by it: the graph of a plain forward is never taken
# where there may be differences.
_OPEN, _LOCK = 0, Lock()
# A compiler that traces differences takes those of one layer for another's: it guards neither context nor layer.
untraced = torch.compiler.disable(
    reason="what levels learn in a context is decided chunk by chunk in Python: compile without fullgraph=True, or "
    "with model.learning = False and outside model.adapted"
)


@contextmanager
def applied(
    modules: Sequence[FastLinear], deltas: Sequence[Delta | None], *, fixed: bool = False, watched: bool = False
) -> Iterator[Applied]:
    """Inside, in this thread or task, the modules use these differences, [B, o, i] or factors each, or None.

    fixed: their shared weights get no gradient.  watched: the call keeps what they have `seen`.
    """
    global _OPEN
    call = Applied(dict(zip(modules, deltas, strict=True)), fixed, watched)
    token = _CALLS.set({**_CALLS.get(), **dict.fromkeys(modules, call)})
    with _LOCK:
        _OPEN += 1
    try:
        yield call
    finally:
        with _LOCK:
            _OPEN -= 1
        _CALLS.reset(token)


class FastLinear(nn.Linear):
    """`nn.Linear` plus, while `applied`, a difference per stream: y_b = (W + D_b) x_b."""

    @classmethod
    def of(cls, module: nn.Linear) -> FastLinear:
        """A fast layer that shares everything with a linear one: parameters, hooks, mode.

        Raises:
            TypeError: its forward was replaced (accelerate's hooks do so).
            ValueError: another class than nn.Linear, whose forward is not W x + b.
        """
        if isinstance(module, cls):
            return module
        if type(module) is not nn.Linear:
            raise ValueError(f"only nn.Linear can become fast weights, not {type(module).__name__}")
        check_forward(module, "a linear layer")
        fast = cls.__new__(cls)
        vars(fast).update(vars(module))
        return fast

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, i] -> [B, T, o]."""
        return self._learned(x) if _OPEN else F.linear(x, self.weight, self.bias)

    @untraced
    def _learned(self, x: Tensor) -> Tensor:
        call = _CALLS.get().get(self)
        if call is None:
            return F.linear(x, self.weight, self.bias)
        weight, delta = self.weight.detach() if call.fixed else self.weight, call.deltas[self]
        if delta is None:
            return F.linear(x, weight, self.bias)
        factors = delta if isinstance(delta, Factors) else None
        if factors is not None and factors.part:
            return F.linear(x, weight, self.bias) + factors.of_parts(x)
        streams = delta.shape[0] if factors is None else factors.up.shape[0]
        if streams not in (1, x.shape[0]):
            raise ValueError(f"{streams} streams were read, but the input has {x.shape[0]} rows")
        # squeeze(0), whose gradient is a view: that of [0] fills a matrix with zeros first
        if factors is None and not call.watched and _joins(x, weight, delta):
            return F.linear(x, weight + delta.squeeze(0), self.bias)
        y = F.linear(x, weight, self.bias)
        if factors is not None:
            x, delta = F.linear(x, factors.down.to(x.dtype)), factors.up  # a dense one over z = A x
        small = delta.to(x.dtype)
        # one product for all rows is faster than a batch of products of one
        learned = F.linear(x, small.squeeze(0)) if streams == 1 else x @ small.transpose(-1, -2)
        if call.watched:
            a, b = learned.to(delta.dtype), x.to(delta.dtype)
            call.seen[self] = Seen(a.transpose(-1, -2) @ b, b.square().sum((-1, -2)))
        return y + learned


def _joins(x: Tensor, weight: Tensor, delta: Tensor) -> bool:
    """Whether W + D is made first: one product forward and one less backward, for a pass over the weights.

    Not in a smaller type, which would round D away.
    """
    return (
        delta.shape[0] == 1 and x.dtype == weight.dtype == delta.dtype
        and not torch.is_autocast_enabled(x.device.type) and x.shape[:-1].numel() >= JOIN
    )  # fmt: skip


def check_forward(module: nn.Module, what: str) -> None:
    """Raise TypeError if an instance's forward was replaced: levels could not reach what it computes."""
    if "forward" in vars(module):
        hook = vars(module).get("_hf_hook")
        name = "a forward of its own" if hook is None else f"the hook {type(hook).__name__}"
        raise TypeError(
            f"{what} ({type(module).__name__}) has {name} in place of its class's forward: stack levels first and "
            "prepare or hook the result (accelerate.hooks.remove_hook_from_module takes hooks off)"
        )


def check_uncompiled(model: nn.Module) -> None:
    """Raise TypeError if a model or a part of it is compiled: it would go on computing what it was compiled from."""
    for name, part in model.named_modules():
        if "_orig_mod" in part._modules or part._compiled_call_impl is not None:
            raise TypeError(
                f"{f'the part {name} of the model' if name else 'the model'} is compiled already: give levels to the "
                "model as it was before (torch.compile keeps it as compiled._orig_mod), and compile the result"
            )
