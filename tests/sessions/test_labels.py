"""Labels learned from examples: any order, none forgotten but those that are to be, a file that is checked."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nestling import HopeConfig, HopeForCausalLM
from nestling.sessions.labels import LONGEST, Labels, examples

KINDS = {"animal": "the cat sat, the dog ran", "sum": "1+2=3; 4+5=9", "shout": "HELLO! STOP! GO!"}
TEXTS = [f"{text}{' ' * n}{text[:n]}" for text in KINDS.values() for n in range(1, 5)]
NAMES = [name for name in KINDS for _ in range(4)]


@pytest.fixture
def plain():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def hope():
    torch.manual_seed(0)
    return HopeForCausalLM(
        HopeConfig(vocab_size=259, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    ).eval()


def known(model, tokenizer, texts=TEXTS, names=NAMES):
    found = Labels(model, tokenizer)
    found.learn(texts, names)
    return found


@pytest.mark.parametrize("kind", ["plain", "hope", "model"])
def test_examples_are_known_and_the_model_is_as_it_was(kind, tokenizer, request):
    model = request.getfixturevalue(kind)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = known(model, tokenizer)
    answers = found.answer(TEXTS, top=9)
    assert [a.labels[0] for a in answers] == NAMES and all(len(a.labels) == 3 for a in answers)
    assert all(0 <= b <= 1 and a.beliefs == sorted(a.beliefs, reverse=True) for a in answers for b in a.beliefs)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_levels_learn_nothing_of_what_is_labelled(model, tokenizer):
    """A text longer than the level's chunk has the same key whatever stands beside it."""
    found = Labels(model, tokenizer)
    long = "a text of more than one chunk of the fast level " * 3
    torch.testing.assert_close(found.keys([long]), found.keys([long, long, "x"])[:1])
    with model.adapted(model._new_cache()):
        states = model(torch.tensor([tokenizer(long).input_ids]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.keys([long])[0, :16], states[1][0].double().mean(0))


def test_groups_in_any_order_are_one(plain, tokenizer):
    apart, order = Labels(plain, tokenizer), [5, 0, 9, 11, 2, 7, 1, 10, 4, 6, 3, 8]
    for at in order:
        apart.learn([TEXTS[at]], [NAMES[at]])
    for a, b in zip(apart.answer(TEXTS, 3), known(plain, tokenizer).answer(TEXTS, 3), strict=True):
        assert a.labels == b.labels and a.beliefs == pytest.approx(b.beliefs, abs=1e-6)


def test_what_is_forgotten_was_never_there(plain, tokenizer):
    found = known(plain, tokenizer)
    found.forget(TEXTS[:2] + TEXTS[4:6], NAMES[:2] + NAMES[4:6])
    other = known(plain, tokenizer, TEXTS[2:4] + TEXTS[6:], NAMES[2:4] + NAMES[6:])
    for a, b in zip(found.answer(TEXTS, 3), other.answer(TEXTS, 3), strict=True):
        assert dict(zip(a.labels, a.beliefs)) == pytest.approx(dict(zip(b.labels, b.beliefs)), abs=1e-6)
    with pytest.raises(ValueError, match="'colour' was learned"):
        found.forget(["red"], ["colour"])


def test_a_file_goes_on_and_is_checked(plain, hope, tokenizer, tmp_path):
    path, first = tmp_path / "a.labels", known(plain, tokenizer, TEXTS[:8], NAMES[:8])
    first.save(path)
    second = Labels(plain, tokenizer)
    second.load(path)
    for found in (first, second):
        found.learn(TEXTS[8:], NAMES[8:])
    assert [a.labels for a in first.answer(TEXTS, 3)] == [a.labels for a in second.answer(TEXTS, 3)]
    for name, tensor in first.memory.sums().items():
        torch.testing.assert_close(second.memory.sums()[name], tensor)
    with pytest.raises(ValueError, match="of another model"):
        Labels(hope, tokenizer).load(path)
    with pytest.raises(ValueError, match="no labels at"):
        second.load(tmp_path / "b.labels")
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(ValueError, match="does not match its digest"):
        second.load(path)
    path.write_bytes(whole[:40])
    with pytest.raises(ValueError, match="damaged or holds no labels"):
        second.load(path)


def test_texts_that_are_too_much_and_none(plain, tokenizer):
    found = Labels(plain, tokenizer)
    long = "abcd" * LONGEST
    assert torch.equal(found.keys([long]), found.keys([long[:LONGEST]]))
    for texts, said in (([], "no text"), (["a", ""], "text 2 is empty")):
        with pytest.raises(ValueError, match=said):
            found.keys(texts)
    with pytest.raises(ValueError, match="no label was learned"):
        found.answer(["a"])


def test_examples_are_read_from_tables_and_lines(tmp_path):
    rows = [("a, b\nc", "x"), ("d", " y ")]
    (tmp_path / "a.csv").write_text('text,label\n"a, b\nc",x\nd, y \n')
    (tmp_path / "a.tsv").write_text('id\tsaid\tof\n1\t"a, b\nc"\tx\n2\td\ty\n')
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "label": n}) for t, n in rows) + "\n\n")
    wanted = (["a, b\nc", "d"], ["x", "y"])
    assert examples(tmp_path / "a.csv") == examples(tmp_path / "a.jsonl") == wanted
    assert examples(tmp_path / "a.tsv", ("said", "of")) == wanted


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "x", "no .csv, .tsv or .jsonl"), ("a.csv", "text,label\n", "holds no example"),
        ("a.csv", "text,label\na,\n", "line 2: no 'label'"),
        ("a.csv", "said,label\na,b\n", "said, label: name the columns"),
        ("a.jsonl", '{"text": "a"\n', "cannot be read as .jsonl"), ("a.jsonl", "[1]\n", "line 1 is no object"),
        ("a.jsonl", '{"text": "a", "label": 3}\n', "line 1: no 'label'"),
        ("a.csv", b"text,label\n\xff,b\n", "cannot be read"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        examples(tmp_path / name)
