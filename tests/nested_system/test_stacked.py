"""Models with stacked levels: what their levels are, and that they do what is declared of them."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nestling.nested_system
from nestling import Level, stack_levels
from nestling.cms.state import shapes

RULES = {
    "gd": ([], {"in-context gradient sum"}),
    "momentum": (["in-context momentum"], {"in-context gradient sum", "in-context momentum"}),
    "adamw": (
        ["in-context first moment", "in-context second moment"],
        {"in-context gradient sum", "in-context first moment", "in-context second moment"},
    ),
}


def found(system, *kinds):
    return {f.memory for f in system.findings if f.kind in kinds}


def inner(system):
    return [m for m in system.memories if m.lifetime == "context" and m.kind != "softmax attention"]


@pytest.fixture(params=["depth", "width"])
def placement(request):
    return request.param


@pytest.fixture
def blocks(placement):
    """The shared weights of each level, by placement."""
    depth = {0: ["model.layers.1.mlp"], 1: ["model.layers.0.mlp"]}
    width = {i: [f"model.layers.{b}.mlp.added.{1 - i}" for b in range(2)] for i in range(2)}
    return depth if placement == "depth" else width


@pytest.mark.parametrize("rank", [None, 2])
def test_a_spectral_level_holds_what_its_state_holds(llama, rank):
    llama = stack_levels(llama, [Level(4, optimizer="spectral", rank=rank)])
    system = nestling.levels(llama)
    levels = [m for m in system.memories if m.kind == "in-context level"]
    held = sum(o * i for o, i in shapes(llama.learner.levels[0], llama.learner.modules[0]))
    assert system.coverage.complete and sum(t.numel for m in levels for t in m.tensors) == held
    assert all(("B (A x)" in m.retrieval) == (rank is not None) for m in levels)


@pytest.mark.parametrize("trained", [False, True])
def test_levels_stand_at_their_chunks_and_weights_where_they_were(llama, placement, blocks, trained):
    llama = stack_levels(llama, [Level(4), Level(8)], placement)
    system = nestling.levels(llama, torch.optim.SGD(llama.parameters(), lr=0.1) if trained else None)
    assert system.coverage.complete and system.associative
    assert not [note for note in system.notes if "by their parts" in note]
    slow = "1 / step" if trained else "0"
    for index, owners in blocks.items():
        for owner in owners:
            level, weights = system[f"{owner}.levels.{index}"], system[owner]
            assert (level.kind, weights.kind) == ("in-context level", "MLP block")
            assert str(level.frequency) == f"1 / {(4, 8)[index]} tokens" and str(weights.frequency) == slow
            names = [(t.name.removeprefix(f"{owner}."), t.shape) for t in weights.tensors]
            assert [(t.name.removeprefix(f"{level.name}."), t.shape) for t in level.tensors] == names
    kinds = {str(one.frequency): {m.kind for m in one.memories} for one in system.levels}
    assert kinds["∞"] == {"softmax attention"} and kinds["1 / 8 tokens"] == {"in-context level"}
    assert kinds["1 / 4 tokens"] == {"in-context level", "in-context gradient sum"}
    assert system["model.embed_tokens"].frequency == system["model.layers.0.self_attn.q_proj"].frequency
    assert str(system["model.embed_tokens"].frequency) == slow


def test_the_state_is_as_large_as_the_model_says(llama, placement):
    llama = stack_levels(llama, [Level(4, optimizer="momentum"), Level(8, optimizer="momentum")], placement)
    system = nestling.levels(llama)
    norms = 2 * 8  # each level's `written` and `refused`
    assert sum(m.cost.state_bytes for m in inner(system)) + norms == llama.state_bytes()


@torch.no_grad()
def test_reading_costs_what_torch_counts(llama, placement, ids):
    llama.set_attn_implementation("eager")

    def one_token(model):
        cache = model(ids[:, :9], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(ids[:, 9:10], past_key_values=cache, use_cache=True)
        return counter.get_total_flops() // 2 // len(ids)

    llama = stack_levels(llama, [Level(4), Level(8)], placement)
    declared, learned = sum(m.cost.read_macs for m in inner(nestling.levels(llama))), one_token(llama)
    llama.learning = False
    assert learned - one_token(llama) == declared


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trained", [False, True])
def test_measured_levels_agree_with_what_is_declared(llama, placement, rule, trained):
    needs, kinds = RULES[rule]
    ids = torch.randint(0, 40, (2, 24), generator=torch.Generator().manual_seed(0))
    llama = stack_levels(llama, [Level(4, optimizer=rule), Level(8, optimizer=rule)], placement, variant="nested")
    optimizer = torch.optim.AdamW(llama.parameters()) if trained else None
    system = nestling.levels(llama, optimizer, measure=ids, steps=2)
    assert {m.kind for m in inner(system)} == kinds | {"in-context level"}
    for memory in inner(system):
        assert memory.measured.updates == 24 * memory.frequency.rate and memory.measured.over == 24
        if memory.kind == "in-context level":
            assert [system[name].kind for name in memory.needs] == needs
    assert not found(system, "never moves", "another rate", "moves though frozen")


def test_a_level_that_does_not_learn_as_declared_is_found(llama, ids, monkeypatch):
    llama = stack_levels(llama, [Level(4), Level(8)])
    monkeypatch.setattr("nestling.cms.learner.Learner._step", lambda self, index, state, *rest: state)
    system = nestling.levels(llama, measure=ids, steps=1)
    assert {"model.layers.0.mlp.levels.1", "model.layers.1.mlp.levels.0"} <= found(system, "never moves")


@pytest.mark.parametrize("still", [Level(8, lr=0), Level(math.inf)])
def test_a_frozen_level_stands_still(llama, placement, blocks, ids, still):
    llama = stack_levels(llama, [Level(4), still], placement)
    weights = torch.optim.SGD(llama.parameters(), lr=0.1)
    system = nestling.levels(llama, weights, measure=ids, steps=1)
    assert not [m for m in system.memories if ".levels.1" in m.name]
    for index, rate in ((0, "1 / step"), (1, "0")):
        assert {str(system[owner].frequency) for owner in blocks[index]} == {rate}
    assert not found(system, "moves though frozen")  # though SGD was given them too


def test_an_outer_level_is_trained_as_any_weight(llama, placement, blocks):
    llama = stack_levels(llama, [Level(4), Level(None)], placement)
    system = nestling.levels(llama, torch.optim.SGD(llama.parameters(), lr=0.1))
    assert {m.name.rpartition(".")[2] for m in inner(system)} == {"0"}
    assert {str(system[owner].frequency) for owner in blocks[1]} == {"1 / step"}


def test_a_model_told_not_to_learn_has_no_levels_in_the_context(llama, ids):
    llama = stack_levels(llama, [Level(4), Level(8)])
    llama.learning = False
    assert not inner(nestling.levels(llama, measure=ids, steps=1))


def test_errors_run_down_the_chain_of_levels(llama, placement):
    llama = stack_levels(llama, [Level(4), Level(8)], placement, meta_grad="full")
    taught = nestling.levels(llama).transfers
    down = {(t.source, t.target) for t in taught if t.what == "error of the chunk's next tokens"}
    width = {(f"model.layers.{i}.mlp.added.1.levels.0", f"model.layers.{i}.mlp.added.0.levels.1") for i in range(2)}
    depth = {("model.layers.1.mlp.levels.0", "model.layers.0.mlp.levels.1")}
    assert down == (depth if placement == "depth" else width)
    assert {t.what for t in taught if "meta-gradient" in t.what} == {"meta-gradient, through every update"}


def test_a_stacked_model_inside_another_is_read(llama):
    outer = torch.nn.ModuleDict({"language": stack_levels(llama, [Level(4), Level(8)])})
    system = nestling.levels(outer)
    assert str(system["language.model.layers.1.mlp.levels.0"].frequency) == "1 / 4 tokens"
