"""What torch checks of the states of its own optimisers, on ours: saved, loaded, copied."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from nestling.optim import DGD
from suites.optimizers import Model, build, cases, equal, optims, same, steps

pytestmark = pytest.mark.filterwarnings("ignore:M3 got parameters without names")


@cases
def test_state_dict_deterministic(info, kwargs):
    """Loaded into another optimiser, which then goes on bit for bit; also through a file, weights alone."""
    model = Model()
    optimizer = build(info, model, **kwargs)
    list(steps(model, optimizer, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    equal(read, saved)
    weights = copy.deepcopy(model.state_dict())
    want = list(steps(model, optimizer, 3))
    for state in (saved, read, pickle.loads(pickle.dumps(saved))):
        other = Model()
        other.load_state_dict(weights)
        again = build(info, other, **kwargs)
        again.load_state_dict(state)
        equal(state, saved)  # as it was
        assert list(steps(other, again, 3)) == want
        same(other, model)


@cases
def test_can_load_older_state_dict(info, kwargs):
    """A group without an option that came later takes its default."""
    model = Model()
    optimizer = build(info, model, **kwargs)
    list(steps(model, optimizer, 2))
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        group.pop("weight_decay")
    again = build(info, model, **kwargs)
    again.load_state_dict(old)
    list(steps(model, again, 1))


@optims
def test_load_state_dict_cross_dtype(info):
    """A state of one type under parameters of another is taken over as it is; the next step is finite and moves."""
    model, other = Model(torch.float64), Model(torch.float32)
    optimizer, again = build(info, model, lr=0.02), build(info, other, lr=0.02)
    list(steps(model, optimizer, 3))
    again.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(other)
    assert torch.tensor(list(steps(other, again, 3))).isfinite().all()
    assert all((p != q).any() for p, q in zip(other.parameters(), before.parameters()))
    assert all(p.dtype == torch.float32 for p in other.parameters())


@cases
def test_deepcopy_copies_all_public_attrs(info, kwargs):
    model = Model()
    optimizer = build(info, model, **kwargs)
    list(steps(model, optimizer, 2))

    def public(one: torch.optim.Optimizer) -> set[str]:
        return {name for name in vars(one) if not name.startswith("_")}

    if info.optim_cls is DGD:
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="tied to its model by hooks"):
                make(optimizer)
        pytest.xfail("DGD listens to a model's layers: a copy would listen to none, and is refused")
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(twin) is type(optimizer) and public(twin) == public(optimizer)
        equal(twin.state_dict(), optimizer.state_dict())
        twin.step()


@optims
def test_state_dict_hooks(info):
    model, seen = Model(), []
    optimizer = build(info, model)
    list(steps(model, optimizer, 1))

    def change(_, state):
        seen.append("changed")
        state = copy.copy(state)
        state["param_groups"] = [{**group, "lr": 0.5} for group in state["param_groups"]]
        return state

    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
    optimizer.register_state_dict_post_hook(change)
    state = optimizer.state_dict()
    assert seen == ["before", "changed"] and state["param_groups"][0]["lr"] == 0.5
    again = build(info, model)
    again.register_load_state_dict_pre_hook(change)
    again.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    again.load_state_dict(optimizer.state_dict())
    assert seen[-1] == "loaded" and again.param_groups[0]["lr"] == 0.5


@optims
def test_param_names_in_the_state_dict(info):
    if info.optim_cls is DGD:
        pytest.skip("DGD is given a model")
    model = Model()
    optimizer = info.optim_cls(list(model.named_parameters()), lr=0.02)
    list(steps(model, optimizer, 2))
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
    again = info.optim_cls(list(model.named_parameters()), lr=0.02)
    again.load_state_dict(state)
    equal(again.state_dict(), state)
