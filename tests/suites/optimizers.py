"""torch's own description of optimisers (`OptimizerInfo`) of ours, and what their tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from nestling.optim import DGD, M3, DeepMomentum, DeltaMomentum, PreconditionedMomentum
from suites.others import EVERY

LR = torch.tensor(0.01)
# kwargs of each that torch would list in its *_inputs functions
INPUTS: dict[type, dict[str, dict[str, Any]]] = {
    M3: {
        "second_moment": dict(second_moment=False),
        "sum": dict(accumulation="sum", rms_match=False),
        "two slow scales": dict(periods=(1, 2, 4)),
        "nesterov": dict(nesterov=False),
    },
    DeltaMomentum: {"literal": dict(form="literal"), "nesterov": dict(nesterov=True), "no erase": dict(erase=0.0)},
    DeepMomentum: {"erase": dict(erase=0.1), "hidden": dict(hidden=4)},
    PreconditionedMomentum: {"nesterov": dict(nesterov=True), "beta": dict(beta=0.9)},
    DGD: {"momentum": dict(momentum=0.9), "exact": dict(exact=True), "no erase": dict(erase=0.0)},
}


def _inputs(own: dict[str, dict[str, Any]]) -> Any:
    common = {"default": {}, "non-default lr": dict(lr=0.02), "Tensor lr": dict(lr=LR), "decay": dict(weight_decay=0.1)}
    every = [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in (common | own).items()]
    return lambda device, dtype=None: every


INFOS = [
    OptimizerInfo(
        kind, optim_inputs_func=_inputs(own), supports_complex=False, not_og_supported_flags=(),
        supported_impls=("foreach",) if kind is M3 else (),
        optim_error_inputs_func=None if kind is DGD else get_error_inputs_for_all_optims,
    )
    for kind, own in INPUTS.items()
]  # fmt: skip
CASES = [
    pytest.param(info, case.kwargs, id=f"{info.name}-{case.desc}")
    for info in INFOS
    for case in info.optim_inputs_func("cpu")
    if EVERY or case.desc in ("default", "Tensor lr")
]
optims = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
cases = pytest.mark.parametrize("info, kwargs", CASES)


class Model(nn.Sequential):
    """Two linear layers and a batch whose loss can fall."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.to(dtype)
        self.x, self.y = torch.randn(8, 4, dtype=dtype), torch.randn(8, 3, dtype=dtype)

    def loss(self) -> Tensor:
        return (self(self.x) - self.y).square().mean()


def build(info: OptimizerInfo, model: Model, params: Any = None, **kwargs: Any) -> torch.optim.Optimizer:
    kwargs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    if info.optim_cls is DGD:  # it learns from what layers see: it is given the model
        return DGD(model, params=params, **kwargs)
    return info.optim_cls(list(model.parameters()) if params is None else params, **kwargs)


def steps(model: Model, optimizer: torch.optim.Optimizer, count: int = 3) -> Iterator[float]:
    for _ in range(count):
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        optimizer.step()
        yield loss.item()


def same(ours: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for got, want in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want, **(tolerance or dict(rtol=0, atol=0)))


def equal(got: Any, want: Any) -> None:
    """The same values of the same types, whatever the order of a dict."""
    assert type(got) is type(want)
    if isinstance(got, Tensor):
        assert torch.equal(got, want) and got.dtype == want.dtype
    elif isinstance(got, dict):
        assert got.keys() == want.keys()
        for key in got:
            equal(got[key], want[key])
    elif isinstance(got, list | tuple):
        assert len(got) == len(want)
        for one, two in zip(got, want):
            equal(one, two)
    else:
        assert got == want
