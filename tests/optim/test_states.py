"""States of other versions, other types and other optimisers: taken as what they are, or refused before a change."""

import copy
import warnings

import pytest
import torch
from torch import nn

from nestling.optim import DGD, M3, DeepMomentum, DeltaMomentum, PreconditionedMomentum, split_parameters

OPTIMIZERS = {
    "M3": lambda p: M3([(f"w{i}", x) for i, x in enumerate(p)], 0.05, periods=(1, 3)),
    "delta": lambda p: DeltaMomentum(p, 0.05),
    "deep": lambda p: DeepMomentum(p, 0.05, hidden=3),
    "diagonal": lambda p: PreconditionedMomentum(p, 0.05),
    "outer": lambda p: PreconditionedMomentum(p, 0.05, preconditioner="outer"),
}


@pytest.fixture(params=OPTIMIZERS)
def build(request):
    return OPTIMIZERS[request.param]


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s)) for s in [(4, 6), (3, 4, 5), (5,), ()]]


def drive(params, optimizer, steps):
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
    return [p.detach().clone() for p in params]


def resumed(build, change):
    """Two runs of four steps: one whole, one through a changed state dict in the middle."""
    params = parameters()
    whole = build(params)
    drive(params, whole, range(2))
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    saved = copy.deepcopy(whole.state_dict())
    change(saved)
    other = build(twins)
    other.load_state_dict(saved)
    return drive(params, whole, range(2, 5)), drive(twins, other, range(2, 5))


def numbers(saved):
    for state in saved["state"].values():
        state |= {name: v.item() for name, v in state.items() if v.ndim == 0 and name in ("step", "count")}


def lists(saved):
    for state in saved["state"].values():
        state |= {name: v.reshape(1) for name, v in state.items() if v.ndim == 0 and name in ("step", "count")}


def older(saved):
    """A checkpoint from before most options were there."""
    saved["param_groups"] = [{"params": g["params"], "lr": g["lr"]} for g in saved["param_groups"]]


@pytest.mark.parametrize("change", [numbers, lists, older])
def test_states_of_other_versions_go_on(build, change):
    for a, b in zip(*resumed(build, change)):
        assert torch.equal(a, b)


def test_states_of_other_optimizers_are_refused_before_any_change(build):
    params = parameters()
    foreign = [torch.optim.AdamW(params), torch.optim.SGD(params, momentum=0.9)]
    foreign += [make(params) for make in OPTIMIZERS.values() if make is not build]
    ours = build(params)
    drive(params, ours, range(2))
    before = copy.deepcopy(ours.state_dict())
    for other in foreign:
        drive(params, other, range(1))
        with pytest.raises(ValueError, match="saved by another|belongs to another model"):
            ours.load_state_dict(other.state_dict())
        for index, state in ours.state_dict()["state"].items():
            assert all(torch.equal(value, before["state"][index][name]) for name, value in state.items())
        assert ours.state_dict()["param_groups"] == before["param_groups"]


def test_hooks_of_torch_see_and_change_what_is_loaded(build):
    params = parameters()
    ours = build(params)
    drive(params, ours, range(1))
    ours.register_load_state_dict_pre_hook(
        lambda _, saved: saved | {"param_groups": [{**g, "lr": 0.5} for g in saved["param_groups"]]}
    )
    ours.register_load_state_dict_post_hook(lambda o: o.state[params[2]].clear())
    ours.load_state_dict(ours.state_dict())
    assert ours.param_groups[0]["lr"] == 0.5
    assert not ours.state[params[2]]
    assert ours.state[params[0]]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_in_a_tensor_steps_as_a_number(build, shape):
    def run(lr):
        params = parameters()
        optimizer = build(params)
        optimizer.param_groups[0]["lr"] = lr
        return drive(params, optimizer, range(2))

    for a, b in zip(run(0.03), run(torch.full(shape, 0.03))):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("exact", [False, True])
def test_a_learning_rate_in_a_tensor_for_dgd(shape, exact):
    def run(lr):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = DGD(model, lr, exact=exact, momentum=0.5)
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        return model.weight.detach(), model.bias.detach()

    for a, b in zip(run(0.03), run(torch.full(shape, 0.03))):
        assert torch.allclose(a, b, atol=1e-6)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(12, 4), nn.Linear(4, 12, bias=False)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def orthogonalised(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    for p in names:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {names[p] for p, state in optimizer.state.items() if "m1" in state}


@pytest.mark.parametrize("given", [lambda m: m, split_parameters, lambda m: m.named_parameters()])
def test_embeddings_and_heads_are_not_orthogonalised(given):
    model = Tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert orthogonalised(model, M3(given(model))) == {"layers.0.weight", "layers.1.weight"}


def test_a_whole_model_without_names_is_warned_of():
    model = Tiny()
    with pytest.warns(UserWarning, match="split_parameters"):
        M3(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        M3([model.layers[0].weight, model.layers[1].weight])  # matrices chosen by hand
        M3(model.layers[0].parameters())


def test_the_line_for_the_hugging_face_trainer(tmp_path):
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    model = Tiny()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model, arguments, optimizer_cls_and_kwargs=(M3, {"params": split_parameters(model), "lr": 1e-3}))
    assert orthogonalised(model, trainer.create_optimizer()) == {"layers.0.weight", "layers.1.weight"}
    AcceleratorState._reset_state(reset_partial_state=True)  # Trainer's is of the whole process
