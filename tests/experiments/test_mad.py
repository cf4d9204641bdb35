"""MAD's tasks: what is asked follows from what was read; equal parameters; one run of each kind and its table."""

import pytest
import torch

from experiments.mad import experiment
from experiments.mad.tasks import TASKS, fuzzy
from experiments.shared.models import tasks, tasks_report
from nestling.models import sizes

IGNORED = tasks.IGNORED


def drawn(name, count=6, seed=0):
    return TASKS[name].draw(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TASKS)
def test_tokens_are_classes_and_something_is_asked(name):
    tokens, targets = drawn(name)
    assert tokens.shape == targets.shape
    assert tokens.min() >= 0 and tokens.max() < TASKS[name].classes
    assert ((targets == IGNORED) | ((targets >= 0) & (targets < TASKS[name].classes))).all()
    assert (targets != IGNORED).any(1).all()
    again = drawn(name)
    assert torch.equal(tokens, again[0]) and not torch.equal(tokens, drawn(name, seed=1)[0])


def test_recall_asks_for_what_stood_behind_the_key():
    for words, asked in zip(*(t.tolist() for t in drawn("recall"))):
        known = {}
        for place in range(0, len(words), 2):
            key, value = words[place : place + 2]
            assert asked[place] == known.get(key, IGNORED) and asked[place + 1] == IGNORED
            assert known.setdefault(key, value) == value


@pytest.mark.parametrize("whole", [False, True])
def test_fuzzy_recall_asks_for_all_of_a_value_whose_key_was_read(whole):
    tokens, targets = fuzzy(6, torch.Generator().manual_seed(0), whole=whole)
    repeated = 0
    for words, asked in zip(tokens.tolist(), targets.tolist()):
        start = next(i for i, word in enumerate(words) if word != 15)
        assert set(asked[:start]) <= {IGNORED}
        place, known = start, {}
        while place < len(words):
            middle = next(i for i in range(place, len(words)) if words[i] >= 7)
            end = next((i for i in range(middle, len(words)) if words[i] < 7), len(words))
            key, value = tuple(words[place:middle]), words[middle:end]
            assert 1 <= len(key) <= 3 and 1 <= len(value) <= 3 and (len(key) == 3 or not whole)
            named = [a for a in asked[place:end] if a != IGNORED]
            assert named == (value if key in known else [])
            if named:  # each by the output before it
                assert asked[middle - 1 : end - 1] == value
                repeated += 1
            assert known.setdefault(key, value) == value
            place = end
    assert repeated > 20


def test_copying_asks_for_the_strewn_tokens_in_their_order():
    for words, asked in zip(*(t.tolist() for t in drawn("selective copying"))):
        sign = words.index(15)
        strewn = [word for word in words[:sign] if word != 14]
        assert len(strewn) == 16 and asked == [IGNORED] * (sign + 1) + strewn
        assert set(words[sign + 1 :]) == {14}


def test_memorization_is_one_mapping_in_all_sequences():
    tokens, targets = drawn("memorization", 200)
    pairs = {tuple(pair) for pair in torch.stack([tokens[:, ::2], targets[:, 1::2]], -1).flatten(0, 1).tolist()}
    assert len(pairs) == len({key for key, _ in pairs}) == len({value for _, value in pairs}) == 127
    assert (tokens[:, 1::2] == 255).all()


def test_a_compressor_sees_the_last_output_alone():
    settings = experiment.defaults().smoke()
    reader = tasks.HopeForCausalLM(tasks.configuration(settings, settings.contender("attention"), 16))
    seen = []
    reader.model.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state.requires_grad_()))
    model = tasks.Compressor(reader, 8)
    logits = model(drawn("compression")[0][:, :8])
    assert logits.shape == (6, 8, 16)
    grad = torch.autograd.grad(logits[:, 0].sum(), seen[0])[0]
    assert (grad[:, :-1] == 0).all() and (grad[:, -1] != 0).any()


def test_contenders_have_equal_parameters():
    settings = experiment.defaults()
    for contender in settings.contenders:
        found = sizes.parameters(tasks.configuration(settings, contender, 16))
        assert found - 2 * 16 * settings.width == pytest.approx(settings.parameters, rel=0.025)
    with pytest.raises(ValueError, match="contender 'Hope'"):
        tasks.TaskWork(settings).check([tasks.TaskContender("Hope", options={"chunk": 3})])


def test_a_run_and_its_table(tmp_path):
    settings = experiment.defaults().smoke().changed(tasks=["compression", "recall"])
    rows = {}
    for name in ("Hope", "attention"):
        for job in tasks.plan(settings, [settings.contender(name)], lambda _: None):
            rows[job] = tasks.TaskWork(settings).run(job, None)
    assert tasks.TaskWork(settings).run(next(iter(rows)), None) == next(iter(rows.values()))
    summary = tasks_report.summarize(settings, settings.contenders, rows.get)
    assert [c["contender"] for c in summary["contenders"]] == ["Hope", "attention"]
    assert tasks_report.table(summary).count("| attention |") == 1
    tasks_report.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_run_does_not_depend_on_how_many_seeds_or_tasks_there_are():
    settings = experiment.defaults()
    job = tasks.TaskJob("attention", "recall", 0)
    fewer = settings.changed(
        contenders=[c | {"runs": [0]} for c in settings.to_dict()["contenders"]], tasks=["recall"]
    )  # fmt: skip
    first, second, third = (
        tasks.TaskWork(s).fingerprint(job) for s in (settings, fewer, settings.changed(steps=1))
    )  # fmt: skip
    assert first == second != third
