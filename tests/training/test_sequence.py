"""Windows that are cut over processes give the loss and the gradients of one process, whatever state is handed on."""

import pytest
import torch

from nestling.models.hope import HopeConfig, HopeForCausalLM
from nestling.training import TrainConfig, checkpoint
from nestling.training.evaluation import token_losses
from nestling.training.handover import Spec, joined, parted, put_together, taken_apart
from nestling.training.parallelize import find_mode
from nestling.training.sequence import SequencePipeline
from nestling.utils.ranks import Ranks, find_ranks
from processes import on_ranks
from slowly import ASKED
from training.test_parallel import FAST, losses, trainer

SMALL = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
CASES = {
    "a window's keys, and a memory beside them": {"mixer_options": {"window": 12, "chunk_size": 4}},
    "weights of deep memories, and an open chunk": {"mixer": "selfmod", "mixer_options": {"chunk_size": 4}},
    "a matrix": {"mixer": "gated_deltanet", "mixer_options": {"chunk_size": 4}},
    "all keys": {"mixer": "attention"},
    "levels that learn": {"cms_levels": FAST, "cms_meta_grad": "full", "num_hidden_layers": 1},
}
READ_AGAIN = list(CASES)[1:2]
WORLDS = [2, pytest.param(4, marks=pytest.mark.skipif(not ASKED, reason="NESTLING_SLOW_TESTS=1 runs it"))]


def model_of(options: dict) -> HopeForCausalLM:
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig(**SMALL | options)).double().train()
    model.set_context_length(1000)
    return model


def windows() -> torch.Tensor:
    """Three windows of an odd length: no cut lies between two chunks."""
    return torch.randint(0, 32, (3, 30), generator=torch.Generator().manual_seed(0))


def by_name(model: HopeForCausalLM) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(expected: dict[str, tuple[float, dict]]) -> None:
    """On every rank: the loss and gradients of one process."""
    ranks = find_ranks()
    for name, (loss, gradients) in expected.items():
        for rows, recompute in ((2, False), (1, True)) if name in READ_AGAIN else ((2, False),):
            model = model_of(CASES[name])
            pipeline = SequencePipeline(model, ranks.size, rows, torch.device("cpu"), "float32", recompute)
            found = ranks.mean(pipeline.backward(windows()))
            pipeline.exchange()
            assert found == pytest.approx(loss, abs=1e-10, rel=0), (name, rows)
            for parameter, gradient in by_name(model).items():
                assert (gradient is None) == (gradients[parameter] is None), (name, parameter)
                if gradient is not None:
                    torch.testing.assert_close(gradient, gradients[parameter], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("world", WORLDS)
def test_loss_and_gradients_are_those_of_one_process(world):
    expected = {}
    for name, options in CASES.items():
        model = model_of(options)
        loss = token_losses(model, windows()).mean()
        loss.backward()
        expected[name] = loss.item(), by_name(model)
    on_ranks(world, compare, expected)


def compare_rounded(expected: dict[str, tuple[str, float, dict]], distance: dict[str, float]) -> None:
    """On every rank: in bfloat16 the gradients of one process, nearer than these are to those of float32."""
    for name, (kind, loss, gradients) in expected.items():
        model = model_of(CASES[kind]).to(torch.bfloat16 if name.endswith("weights") else torch.float32)
        pipeline = SequencePipeline(model, 2, 2, torch.device("cpu"), "float32" if name.endswith("weights") else "bf16")
        found = find_ranks().mean(pipeline.backward(windows()))
        pipeline.exchange()
        assert found == pytest.approx(loss, rel=2**-8), name
        assert apart(by_name(model), gradients) < distance[name] / 2, name


def apart(found: dict, expected: dict) -> float:
    """The norm of the difference of all gradients over theirs."""
    a, b = (torch.cat([g.double().flatten() for g in x.values() if g is not None]) for x in (found, expected))
    return ((a - b).norm() / b.norm()).item()


def test_bfloat16_is_handed_on_as_it_is():
    expected, distance = {}, {}
    for kind in list(CASES)[:2]:
        exact = model_of(CASES[kind])
        token_losses(exact, windows()).mean().backward()
        for name, dtype, precision in (("autocast", torch.float32, "bf16"), ("weights", torch.bfloat16, "float32")):
            model = model_of(CASES[kind]).to(dtype)
            loss = token_losses(model, windows(), precision).mean()
            loss.backward()
            expected[f"{kind}, {name}"] = kind, loss.item(), by_name(model)
            distance[f"{kind}, {name}"] = apart(by_name(model), by_name(exact))
    on_ranks(2, compare_rounded, expected, distance)


def go_on(values: dict, steps: int, expected: list[float]) -> None:
    """On every rank: a run, or its continuation, with the losses of one process, and a checkpoint."""
    run = trainer(TrainConfig.from_dict(values), resume=checkpoint.list_checkpoints(values["out"]) != [])
    assert [run.train_step().loss for _ in range(steps)] == pytest.approx(expected, abs=1e-10, rel=0)
    run.save()


def test_a_run_and_its_continuation_in_one_process(config):
    levels = [{"chunk_size": None}, {"chunk_size": 2 * 128}]
    config = config.changed(**{"model.options": {**config.model.options, "cms_levels": levels}, "optim.name": "m3"})
    config = config.changed(**{"steps": 8, "data.batch_size": 4, "optim.accumulate": 2})
    expected = losses(config, 3)
    on_ranks(2, go_on, config.changed(**{"parallel.sequence": 2}).to_dict(), 2, expected[:2])
    go_on(config.to_dict(), 1, expected[2:3])


@pytest.mark.skipif(not ASKED, reason="NESTLING_SLOW_TESTS=1 runs it")
def test_two_rows_of_two_ranks(config):
    config = config.changed(**{"steps": 8, "data.batch_size": 4, "data.seq_len": 45, "optim.accumulate": 2})
    expected = losses(config, 4)
    on_ranks(4, go_on, config.changed(**{"parallel.sequence": 2}).to_dict(), 3, expected[:3])
    on_ranks(3, go_on, config.changed(**{"parallel.sequence": 3}).to_dict(), 1, expected[3:4])


def test_what_is_in_a_state_twice_travels_once():
    base = torch.arange(6.0, requires_grad=True) * 1
    state = {"n": 3, "twice": (base, base), "views": [base.view(2, 3).T, base.view(2, 3).T], "cut": base.detach()}
    state |= {"flags": torch.tensor([True, False, True]), "none": torch.empty(2, 0), "one": torch.tensor(4)}
    apart = taken_apart(state)
    assert len(apart.tensors) == 6
    specs = [Spec.of(tensor) for tensor in apart.tensors]
    again = put_together(apart._replace(tensors=parted(joined(apart.tensors, torch.device("cpu")), specs)))
    assert again["twice"][0] is again["twice"][1]
    assert again["views"][0] is again["views"][1]
    assert again["n"] == 3
    for name in ("cut", "flags", "none", "one"):
        torch.testing.assert_close(again[name], state[name])
    torch.testing.assert_close(again["views"][0], state["views"][0])
    assert [t.requires_grad for t in (again["twice"][0], again["cut"])] == [True, False]
    assert again["twice"][0].is_leaf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.sequence": 3}, "parallel.sequence 3 must divide the number of processes, and 2 run"),
        ({"parallel.sequence": 2, "parallel.mode": "fsdp"}, "parallel.sequence 2 goes with parallel.mode ddp"),
        ({"parallel.sequence": 2, "compile": True}, "compile was not made to go with parallel.sequence 2"),
        ({"parallel.sequence": 2, "data.documents": "apart"}, 'and data.documents "apart" begins anew'),
        ({"parallel.sequence": 2, "data.seq_len": 1}, "data.seq_len 1 cannot be cut"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, changes, message):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(ValueError, match=message):
        find_mode(TrainConfig().changed(**changes), Ranks(0, 2))
