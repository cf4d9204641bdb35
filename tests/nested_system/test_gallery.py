"""The paper's decompositions, exactly: each level's frequency and what is on it."""

from collections import Counter
from pathlib import Path

import pytest

from nestling.nested_system.gallery import EXHIBITS, by_name, gallery_page, update_page

ROOT = Path(__file__).parents[2]
WEIGHTS = {"embedding": 1, "norm": 5, "convolution": 2, "gates": 2, "MLP block": 2, "linear map": 5}
GPT2 = {"embedding": 2, "norm": 5, "linear map": 5, "MLP block": 2}
IN_CONTEXT = [
    ("1 / token", {"in-context momentum": 10}),
    ("1 / token", {"in-context memory": 2}),
    ("1 / 64 tokens", {"in-context projection": 4, "in-context gate": 4}),
]
SMOLLM2 = {"embedding": 1, "norm": 61, "fixed positions": 1, "linear map": 121, "MLP block": 30}
MOMENTS = ("1 / step", {"first moment": 1, "second moment": 1})

EXPECTED = {
    "linear": [("1 / step", {"linear map": 1})],
    "linear-momentum": [("1 / step", {"momentum": 1}), ("1 / step", {"linear map": 1})],
    "linear-attention": [("1 / token", {"in-context memory": 1}), ("1 / step", {"linear map": 3})],
    "linear-attention-momentum": [
        ("1 / token", {"in-context memory": 1}),
        ("1 / step", {"momentum": 1}),
        ("1 / step", {"linear map": 3}),
    ],
    "mlp": [("1 / step", {"linear map": 2})],
    "ada-transformer": [("1 / token", {"in-context memory": 1}), ("1 / step", {"linear map": 3, "initial state": 1})],
    "transformer-adamw": [("∞", {"softmax attention": 2}), MOMENTS, ("1 / step", GPT2)],
    "transformer-muon": [
        ("∞", {"softmax attention": 2}),
        ("5 / step", {"orthogonalization": 1}),
        ("1 / step", {"momentum": 1, "first moment": 1, "second moment": 1}),
        ("1 / step", GPT2),
    ],
    "titans-adamw": [
        ("1 / token", {"in-context momentum": 2}),
        ("1 / token", {"in-context memory": 2}),
        MOMENTS,
        ("1 / step", WEIGHTS | {"initial state": 2}),
    ],
    "hope-m3": [
        *IN_CONTEXT,
        ("5 / step", {"orthogonalization": 1}),
        ("1 / step", {"momentum": 1, "second moment": 2, "first moment": 1}),
        ("1 / step", WEIGHTS | {"initial state": 4}),
        ("5 / 32,768 tokens", {"orthogonalization": 1}),  # of the block that steps once in 8 steps
        ("5 / 16 steps", {"slow momentum orthogonalization": 1}),
        ("1 / 32,768 tokens", {"momentum": 1, "second moment": 2, "first moment": 1}),
        ("1 / 32,768 tokens", {"MLP block": 2}),
        ("1 / 16 steps", {"slow momentum": 1}),
        ("5 / 524,288 tokens", {"slow momentum orthogonalization": 1}),
        ("1 / 524,288 tokens", {"slow momentum": 1}),
    ],
    "hope-deployed": [*IN_CONTEXT, ("0", WEIGHTS | {"initial state": 4})],
    "smollm2": [("∞", {"softmax attention": 30}), ("0", SMOLLM2)],
    "smollm2-stacked": [
        ("∞", {"softmax attention": 30}),
        ("1 / 64 tokens", {"in-context gradient sum": 2, "in-context level": 2}),
        ("1 / 512 tokens", {"in-context level": 2}),
        ("0", SMOLLM2),
    ],
}


@pytest.fixture(scope="module")
def built():
    return {exhibit.name: exhibit.build() for exhibit in EXHIBITS}


@pytest.mark.parametrize("name", [exhibit.name for exhibit in EXHIBITS])
def test_a_decomposition_is_exact(built, name):
    found = [(str(level.frequency), dict(Counter(m.kind for m in level.memories))) for level in built[name].levels]
    assert found == EXPECTED[name]
    assert built[name].coverage.complete
    assert built[name].associative


def test_an_adatransformer_is_an_mlp_with_one_more_level(built):
    mlp, ada = built["mlp"], built["ada-transformer"]
    assert len(ada.levels) == len(mlp.levels) + 1
    assert [level.frequency for level in ada.levels[1:]] == [level.frequency for level in mlp.levels]
    for memory in mlp.memories:  # what an MLP has, the other has too, of one shape and one level higher
        same = ada[memory.name]
        assert same.tensors == memory.tensors
        assert ada.level_of(memory.name) == mlp.level_of(memory.name) + 1
    ((source, target),) = [(t.source, t.target) for t in ada.transfers if t.kind == "initialization"]
    assert ada[source].kind == "initial state" and ada.level_of(target) == 1


def test_stacking_adds_levels_and_leaves_the_rest(built):
    before, after = built["smollm2"], built["smollm2-stacked"]
    assert before.cost.parameters == after.cost.parameters == 134_515_008
    assert {m.name: m for m in before.memories}.items() <= {m.name: m for m in after.memories}.items()
    begins = {t.target: t.source for t in after.transfers if t.kind == "initialization"}
    assert begins == {
        f"model.layers.{i}.mlp.levels.{level}": f"model.layers.{i}.mlp"
        for i, level in ((26, 1), (27, 1), (28, 0), (29, 0))
    }


def test_who_teaches_whom_in_sgd_with_momentum(built):
    transfers = {(t.source, t.target, t.kind) for t in built["linear-momentum"].transfers}
    memory = "SGD with momentum: momentum"
    assert transfers == {("linear", memory, "generation"), (memory, "linear", "parametric")}


def test_all_five_kinds_of_transfer_occur(built):
    kinds = {t.kind for system in built.values() for t in system.transfers}
    assert kinds == {"parametric", "non-parametric", "backpropagation", "initialization", "generation"}


def test_muon_and_adamw_serve_different_weights(built):
    system = built["transformer-muon"]
    teachers = {
        t.source for t in system.transfers if t.target == "transformer.h.0.attn.c_attn" and t.kind == "parametric"
    }
    assert teachers == {"Muon: orthogonalization", "AdamW: first moment", "AdamW: second moment"}  # AdamW's: the bias
    teachers = {t.source for t in system.transfers if t.target == "transformer.wte" and t.kind == "parametric"}
    assert teachers == {"AdamW: first moment", "AdamW: second moment"}
    assert system["Muon: orthogonalization"].solver.steps == 5


def test_an_unknown_exhibit_lists_those_there_are():
    with pytest.raises(ValueError, match="hope-m3"):
        by_name("hope-m4")


def test_the_committed_page_and_pictures_are_those_of_the_code(tmp_path, built):
    assert (ROOT / "docs" / "gallery.md").read_text() == gallery_page(built=built)
    for name, system in built.items():
        assert (ROOT / "docs" / "images" / "levels" / f"{name}.svg").read_text() == system.figure()


def test_the_committed_tables_are_those_of_the_code(built):
    page = (ROOT / "docs" / "levels.md").read_text()
    assert "<!-- levels " in page
    assert update_page(page) == page
