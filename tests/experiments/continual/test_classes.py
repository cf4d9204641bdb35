"""Class-incremental streams, the constrained spelling of classes, the ways to learn, and the experiment as a whole."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.classes import experiment, intents
from experiments.classes.baselines import METHODS
from experiments.classes.constrain import Format, classify, prior
from experiments.classes.experiment import Classes, defaults, follow, forgetting
from experiments.classes.learner import Setup
from experiments.classes.small_models import Bytes
from experiments.shared.continual.streams import prefilled
from experiments.shared.continual.study import LearnerContender
from experiments.shared.run import run_experiment

LEVELS = [{"chunk_size": 16, "lr": 3e-3, "optimizer": "adamw"}]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def texts():
    return intents.letters()


@pytest.fixture
def form(texts):
    return Format(Bytes(), texts.labels)


def student(model, form, method, levels=(), **options):
    return METHODS[method](Setup(model, form, 256, batch=4), LearnerContender("c", method, list(levels), {}, options))


def test_a_stream_brings_every_class_once_and_keeps_its_parts_apart(texts):
    stream = intents.draw(texts, 2, 3, 2, seed=5)
    assert sorted(stream.seen(1)) == list(range(6))
    assert [len(g) for g in stream.groups] == [9, 9]
    assert [len(t) for t in stream.tests] == [6, 6]
    for classes, group, tests in zip(stream.classes, stream.groups, stream.tests):
        assert {e.label for e in group} == {e.label for e in tests} == set(classes)
        assert all(e.text in texts.train[e.label] for e in group)
        assert all(e.text in texts.test[e.label] for e in tests)
    assert intents.draw(texts, 2, 3, 2, seed=5) == stream
    assert intents.draw(texts, 2, 3, 2, seed=6).classes != stream.classes
    val = intents.draw(texts, 2, 3, 2, seed=5, part="val")
    assert all(e.text in texts.val[e.label] for t in val.tests for e in t)


def test_banking77_keeps_part_of_its_training_texts_for_validation(tmp_path):
    rows = [f"text {n},{label}" for label in ("b_c?", "A_d") for n in range(intents.HELD_OUT + 2)]
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text("text,category\n" + "\n".join(rows) + "\n", encoding="utf-8")
    found = intents.load(str(tmp_path), "banking77")
    assert found.labels == ["a d", "b c"]
    assert [len(t) for t in found.train] == [2, 2]
    assert not set(found.train[0]) & set(found.val[0])


def test_an_unknown_data_set_and_missing_data_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'clinc150'"):
        intents.find(tmp_path, "clinc")
    with pytest.raises(ValueError, match=r"lacks data_full\.json: get"):
        intents.find(tmp_path, "clinc150")
    monkeypatch.delenv("NESTLING_DATA", raising=False)
    with pytest.raises(ValueError, match="set NESTLING_DATA"):
        intents.find(None, "clinc150")


def spelt_by_hand(model, form, text, classes, given=None, context=()):
    """The greedy walk along the names, every step a forward of everything."""
    path = ()
    while True:
        left = [c for c in classes if tuple(form.names[c][: len(path)]) == path]
        if len(left) == 1:
            return left[0]
        options = sorted({form.names[c][len(path)] for c in left})
        logits = model(torch.tensor([[*context, *form.prompt(text), *path]])).logits[0, -1, options]
        scores = logits.log_softmax(-1)
        if given is not None and len(options) > 1:
            scores = scores - torch.tensor([given[path][o] for o in options])
        path += (options[int(scores.argmax())],)


@pytest.mark.parametrize("context", ["", "abc\nintent: x\n"])
def test_batches_spell_the_same_classes_as_one_text_at_a_time(model, context):
    form = Format(Bytes(), ["card lost", "card stolen", "cash", "cards"])
    classes, texts = [0, 1, 2, 3], ["who", "a longer text", "z", "some words here", "cash"]
    trie, before = form.trie(classes), list(context.encode())
    with torch.no_grad():
        shared = prefilled(model, before)
        given = prior(model, form, trie, shared, batch=3)
        found = classify(model, [form.prompt(t) for t in texts], trie, (None, given), shared, batch=2)
        for prior_, answers in zip((None, given), found):
            assert answers == [spelt_by_hand(model, form, t, classes, prior_, before) for t in texts]
    for path, shares in given.items():
        assert set(shares) == set(trie.next[path])
        assert sum(math.exp(v) for v in shares.values()) <= 1 + 1e-5  # a mean of logarithms


def test_names_that_begin_others_are_told_apart(model):
    form = Format(Bytes(), ["transfer", "transfer fee"])
    trie = form.trie([0, 1])
    assert len(set(trie.names.values())) == 2
    found = classify(model, [form.prompt("x")], trie)
    assert found[0][0] in (0, 1)


@pytest.mark.parametrize(
    ("method", "levels", "options"),
    [
        ("zero-shot", [], {}),
        ("in-context", [], {"choice": "latest"}),
        ("in-context", [], {"choice": "balanced"}),
        ("levels", LEVELS, {}),
        ("levels", LEVELS, {"choice": "balanced"}),
        ("levels", LEVELS, {"replay": 0.5, "buffer": 100}),
        ("levels", LEVELS, {"snapshots": True}),
        ("finetune", LEVELS, {"lr": 1e-3, "size": 16, "choice": "balanced"}),
        ("finetune", [], {"lr": 1e-3, "size": 16}),
        ("finetune", LEVELS, {"lr": 1e-3, "size": 16}),
        ("finetune", LEVELS, {"lr": 1e-3, "size": 16, "ewc": 10.0, "fisher": 2}),
        ("finetune", LEVELS, {"lr": 1e-3, "size": 16, "replay": 1.0, "buffer": 100}),
        ("probe", [], {"lr": 1.0}),
        ("class means", [], {}),
    ],
)
def test_every_way_to_learn_goes_through_a_stream_and_leaves_the_model_alone(
    model, texts, form, method, levels, options
):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stream = intents.draw(texts, 2, 3, 2, seed=0)
    learner = student(model, form, method, levels, **options)
    stages = follow(learner, stream, [0, 1])
    assert [s["classes"] for s in stages] == [3, 6]
    for stage in stages:
        assert all(0 <= a <= 1 for v in ("plain", "calibrated") for a in stage[v]["groups"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    tokens = sum(len(form.example(e.text, e.label)) for g in stream.groups for e in g)
    if method == "finetune":
        assert learner.forwards >= tokens
        assert learner.parameters == sum(p.numel() for p in learner.tuned)
    if "replay" in options:
        assert tokens < learner.forwards < 2 * tokens


def test_levels_and_fine_tuning_of_the_same_weights_change_as_many(model, form):
    levels = student(model, form, "levels", LEVELS)
    tuned = student(model, form, "finetune", LEVELS, lr=1e-3, size=16)
    assert levels.parameters == tuned.parameters > 0
    assert levels.share == tuned.share


def test_a_context_is_filled_up_to_the_window_and_balanced_over_classes(model, texts, form):
    stream = intents.draw(texts, 2, 3, 2, seed=0)
    latest, balanced = (
        student(model, form, "in-context", choice="latest"),
        student(model, form, "in-context", choice="balanced"),
    )
    for group in stream.groups:
        latest.learn(group)
        balanced.learn(group)
    told = bytes(latest.context()).decode()
    assert told.endswith(f"{stream.groups[-1][-1].text}\nintent: {texts.labels[stream.groups[-1][-1].label]}\n")
    assert len(told) <= 256 - 64
    shown = bytes(balanced.context()).decode()
    counts = [shown.count(f"intent: {label}\n") for label in texts.labels]
    assert max(counts) - min(counts) <= 1


def test_ewc_holds_weights_where_they_mattered(model, texts, form):
    stream = intents.draw(texts, 2, 3, 2, seed=0)
    moved = {}
    for strength in (0.0, 1e6):
        tuned = student(model, form, "finetune", LEVELS, lr=1e-3, size=16, ewc=strength, fisher=4)
        tuned.learn(stream.groups[0])
        first, fisher = [t.detach().clone() for t in tuned.anchor], tuned.fisher
        tuned.learn(stream.groups[1])
        drift = zip(fisher, tuned.tuned, first, strict=True)
        moved[strength] = sum(float((f * (w.detach() - a) ** 2).sum()) for f, w, a in drift)
    assert moved[1e6] < 0.5 * moved[0.0]


def test_class_means_find_separable_classes_again(model, texts, form):
    stream = intents.draw(texts, 2, 6, 4, seed=0)
    found = follow(student(model, form, "class means"), stream, [1])
    assert found[0]["plain"]["all"] > 0.5


def test_forgetting_is_the_best_earlier_accuracy_minus_the_last():
    stages = [{"plain": {"groups": g}} for g in ([0.8], [0.9, 0.6], [0.5, 0.7, 1.0])]
    assert forgetting(stages, "plain") == pytest.approx((0.4 - 0.1) / 2)
    assert forgetting(stages[:1], "plain") == 0


def test_settings_are_checked_and_stages_end_with_the_last_group():
    settings = defaults()
    assert Classes.from_dict(settings.to_dict()) == settings
    assert settings.stages(10)[-1] == 9
    assert settings.stages(7)[0] == 0
    with pytest.raises(ValueError, match="unknown method 'levles': did you mean 'levels'"):
        Classes(contenders=[LearnerContender("a", "levles")])
    with pytest.raises(ValueError, match="not a multiple"):
        Classes(contenders=[LearnerContender("a", "levels", [{"chunk_size": 8}, {"chunk_size": 12}])])


def test_the_experiment_runs_by_itself_without_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = run_experiment("classes", workers=0, smoke=True, show=False)
    assert summary["failed"] == {}
    assert summary["missing"] == []
    folder = tmp_path / "runs" / "classes-smoke"
    assert {"results.jsonl", "summary.json", "table.md", "plot.png"} <= {f.name for f in folder.iterdir()}
    names = {g["contender"] for g in summary["groups"]}
    assert "ours: levels" in names
    assert "| ours: levels |" in (folder / "table.md").read_text(encoding="utf-8")
    again = run_experiment("classes", workers=0, smoke=True, show=False, report_only=True)
    assert again["groups"] == summary["groups"]


def test_a_small_model_without_a_source_has_no_row():
    settings = experiment.defaults().smoke().changed(sources={})
    work = experiment.work(settings, None, smoke=True)
    summary = experiment.summarize(settings, settings.contenders, lambda job: work.fingerprint(job) and None)
    assert summary["groups"] == [] == experiment.plan(settings, settings.contenders, lambda job: None)
