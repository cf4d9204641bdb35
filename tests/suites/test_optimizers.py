"""The checks that torch makes of its own optimisers, on ours.

The bodies of torch's tests are not in its wheel: each test here says in its name which of them it stands for.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    TensorTracker,
)
from torch.testing._internal.common_utils import TestCase as TorchCase

from nestling.optim import DGD
from suites.optimizers import INFOS, Model, build, cases, optims, same, steps

pytestmark = pytest.mark.filterwarnings("ignore:M3 got parameters without names")


@pytest.mark.parametrize("info", [i for i in INFOS if i.optim_error_inputs_func], ids=lambda info: info.name)
def test_errors(info):
    for error in info.optim_error_inputs_func("cpu", torch.float32):
        given = error.optimizer_error_input
        params = list(Model().parameters()) if given.params is None else given.params
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                info.optim_cls(params, **given.kwargs)
        elif "lr" in error.error_regex:  # by our own sentence, which names what it got
            with pytest.raises(error.error_type, match="lr as a tensor must hold one number"):
                info.optim_cls(params, **given.kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                info.optim_cls(params, **given.kwargs)


@optims
def test_flags_that_are_not_offered_are_refused(info):
    for flag in ("maximize", "capturable", "differentiable", "fused"):
        with pytest.raises(TypeError, match=flag):
            build(info, Model(), **{flag: True})


@optims
def test_complex_and_sparse_are_refused(info):
    assert not info.supports_complex and not info.supports_sparse
    model = Model()
    model[0].weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"real floating point"):
        build(info, model)
    model = Model()
    optimizer = build(info, model)
    model.loss().backward()
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    for got, want in zip(model.parameters(), before, strict=True):
        assert torch.equal(got, want)


@cases
def test_forloop_goes_right_direction(info, kwargs):
    model = Model()
    losses = list(steps(model, build(info, model, **kwargs), 40))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("schedule", [lambda o: StepLR(o, 2, 0.5), ReduceLROnPlateau], ids=["StepLR", "Plateau"])
@optims
def test_forloop_goes_right_direction_with_lrsched(info, schedule):
    for lr in (0.02, torch.tensor(0.02)):
        model = Model()
        optimizer = build(info, model, lr=lr)
        scheduler = schedule(optimizer)
        losses = []
        for loss in steps(model, optimizer, 30):
            losses.append(loss)
            scheduler.step(*[1.0] if isinstance(scheduler, ReduceLROnPlateau) else [])
        assert losses[-1] < losses[0]
        assert float(optimizer.param_groups[0]["lr"]) < 0.02
        assert isinstance(optimizer.param_groups[0]["lr"], type(lr))


@optims
def test_param_groups_lr_and_weight_decay(info):
    model = Model()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    optimizer = build(info, model, [dict(params=first, lr=0.0), dict(params=second, weight_decay=0.5)], lr=0.02)
    other = Model()
    list(steps(model, optimizer, 3))
    for got, want in zip(first, other[0].parameters(), strict=True):
        assert torch.equal(got, want)
    plain = Model()
    list(steps(plain, build(info, plain, [dict(params=list(plain[0].parameters()), lr=0.0),
                                          dict(params=list(plain[2].parameters()))], lr=0.02), 3))  # fmt: skip
    assert all((p != q).any() for p, q in zip(second, plain[2].parameters()))


@cases
def test_tensor_lr(info, kwargs):
    kwargs = {"lr": 0.02, **kwargs}
    model, other = Model(torch.float64), Model(torch.float64)
    list(steps(model, build(info, model, **kwargs)))
    for shape in ((), (1,)):
        other = Model(torch.float64)
        lr = torch.tensor(float(kwargs["lr"]), dtype=torch.float64).reshape(shape)
        list(steps(other, build(info, other, **{**kwargs, "lr": lr})))
        same(model, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", [c.kwargs for c in INFOS[0].optim_inputs_func("cpu")], ids=str)
def test_foreach_matches_forloop(kwargs, dtype):
    # bfloat16 rounds each product in one order here and in another there
    close = {torch.bfloat16: dict(rtol=2e-2, atol=2e-2), torch.float32: dict(rtol=1e-4, atol=1e-5)}.get(
        dtype, dict(rtol=1e-9, atol=1e-9)
    )
    (info,) = [info for info in INFOS if "foreach" in info.supported_impls]
    kept = TensorTracker(close)
    for foreach in (False, True):
        model = Model(dtype)
        optimizer = build(info, model, foreach=foreach, **kwargs)
        for _ in steps(model, optimizer, 5):
            for parameter in model.parameters():
                if foreach:
                    kept.pop_check_set(parameter, TorchCase())
                else:
                    kept.add(parameter)
    assert kept.all_popped()


@cases
def test_step_is_noop_when_params_have_no_grad(info, kwargs):
    model, before = Model(), Model()
    optimizer = build(info, model, **kwargs)
    assert optimizer.step(closure=lambda: torch.ones(1)) == 1
    optimizer.step()
    same(model, before)
    for parameter in list(model.parameters())[:2]:  # some have one
        parameter.grad = torch.randn_like(parameter)
    if info.optim_cls is not DGD:
        optimizer.step()
        same(model[2], before[2])


@cases
def test_step_is_noop_for_zero_grads(info, kwargs):
    kwargs = {**kwargs, "weight_decay": 0.0}
    model, before = Model(), Model()
    optimizer = build(info, model, **kwargs)
    for _ in range(3):
        optimizer.zero_grad()
        (0 * model.loss()).backward()
        optimizer.step(closure=lambda: torch.ones(1))
    if info.optim_cls is DGD and kwargs.get("erase", 1.0):
        with pytest.raises(AssertionError):
            same(model, before)
        pytest.xfail("DGD also erases what a layer answers to its inputs: W (I - eta x x^T), NL Eq. 56")
    same(model, before)


@cases
def test_grads_are_never_inplaced_into(info, kwargs):
    model = Model()
    optimizer = build(info, model, **kwargs)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss().backward()
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in model.parameters()]
        optimizer.step()
        for parameter, (held, value, version) in zip(model.parameters(), before):
            assert parameter.grad is held and torch.equal(held, value) and held._version == version


@optims
def test_optimizer_can_be_printed(info):
    shown = repr(build(info, Model(), lr=0.25))
    assert info.name in shown and "lr: 0.25" in shown


@optims
def test_step_hooks(info):
    model, seen = Model(), []
    optimizer = build(info, model)
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("post")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("all pre")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("all post")),
    ]
    list(steps(model, optimizer, 2))
    assert seen == ["all pre", "pre", "post", "all post"] * 2
    for handle in handles:
        handle.remove()
    list(steps(model, optimizer, 1))
    assert len(seen) == 8


@cases
def test_closure(info, kwargs):
    model, other = Model(), Model()
    optimizer, plain = build(info, model, **kwargs), build(info, other, **kwargs)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    got = [optimizer.step(closure).item() for _ in range(3)]
    assert got == list(steps(other, plain, 3))
    same(model, other)


@optims
def test_non_contiguous_and_empty_parameters(info):
    """torch's shapes with no dimension, with none of a dimension, and views that are not contiguous."""
    if info.optim_cls is DGD:
        pytest.skip("DGD learns for linear layers")
    parameters = [nn.Parameter(t) for t in (torch.tensor(1.0), torch.zeros(0, 3), torch.randn(3, 5).t(), torch.ones(2))]
    optimizer = info.optim_cls(parameters, lr=0.02)
    before = [p.detach().clone() for p in parameters]
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for parameter, old in zip(parameters, before):
        assert parameter.isfinite().all() and ((parameter != old).any() or not parameter.numel())
