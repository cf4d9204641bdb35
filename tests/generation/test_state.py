import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from nestling.generation import Sampling, TextGenerator, load_notes, load_state, save_state
from nestling.generation.state import _content_digest

GREEDY = Sampling(temperature=0)


def after(session, prompt, count=12):
    return "".join(session.stream(prompt, count, GREEDY))


@pytest.mark.parametrize("mixer", ["selfmod", "attention", "titans_linear"])
@pytest.mark.parametrize("length", [1, 9, 70])  # inside the first chunk, and past a chunk
def test_a_state_from_disk_goes_on_as_if_never_written(make_model, tokenizer, tmp_path, mixer, length):
    model, file = make_model(mixer), tmp_path / "a.state"
    session = TextGenerator(model, tokenizer)
    after(session, "x" * length, 0)
    save_state(file, session.state, model)
    loaded = load_state(file, model)
    assert loaded.get_seq_length() == length
    ids = torch.tensor([list(b" and then")])
    with torch.no_grad():
        wanted = model(ids, past_key_values=session.state, use_cache=True).logits
        got = model(ids, past_key_values=loaded, use_cache=True).logits
    assert torch.equal(wanted, got)


def test_other_models_caches_work_too(tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    session = TextGenerator(model, tokenizer)
    after(session, "Once upon", 0)
    save_state(tmp_path / "a.state", session.state, model)
    loaded = TextGenerator(model, tokenizer, load_state(tmp_path / "a.state", model))
    assert after(loaded, " a") == after(session, " a")


@pytest.fixture
def written(make_model, tokenizer, tmp_path):
    """A model and its state file."""
    model, file = make_model(), tmp_path / "a.state"
    session = TextGenerator(model, tokenizer)
    after(session, "Once upon a time", 0)
    save_state(file, session.state, model)
    return model, file, session.state


def test_the_state_of_another_model_is_refused(written, make_model):
    _, file, _ = written
    for other in (make_model(seed=1), make_model("attention")):
        with pytest.raises(ValueError, match="the state of another model"):
            load_state(file, other)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("layers", '[{"kind": "value"}]'),
        ("learned", '{"value": 0.5}'),
        ("layers", "7"),
        ("parts", "{}"),
    ],
)
@pytest.mark.parametrize("forged", [False, True])
def test_a_foreign_description_is_refused(written, name, text, forged):
    model, file, _ = written
    with safe_open(str(file), "pt") as content:
        metadata = content.metadata() | {name: text}
    if forged:
        metadata["content_digest"] = _content_digest(metadata)
    save_file(load_file(file), file, metadata)
    words = "holds no state that this version can read" if forged else "its description does not match"
    with pytest.raises(ValueError, match=words):
        load_state(file, model)


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "foreign"])
def test_a_damaged_state_is_refused(written, damage):
    model, file, _ = written
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-9])
    elif damage == "changed":
        content[-5] ^= 64
        file.write_bytes(content)
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        model.save_pretrained(file.parent)
        file = file.parent / "model.safetensors"
    with pytest.raises(ValueError, match=file.name):
        load_state(file, model)


def test_a_full_disk_keeps_the_old_state(written, monkeypatch):
    model, file, state = written
    before = file.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        save_state(file, state, model)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_state_that_cannot_be_kept_is_refused(written, tmp_path):
    model, _, _ = written
    with pytest.raises(ValueError, match="cannot be kept"):
        save_state(tmp_path / "b.state", DynamicCache(config=LlamaConfig(num_hidden_layers=1)), model)
    assert not (tmp_path / "b.state").exists()
    with pytest.raises(ValueError, match="no state at"):
        load_state(tmp_path / "none.state", model)


def test_notes_travel_with_a_state(tmp_path, stacked):
    model, cache = stacked
    save_state(tmp_path / "a.state", cache, model, notes={"read": [1, "é"]})
    assert load_notes(tmp_path / "a.state") == {"read": [1, "é"]}
    assert load_state(tmp_path / "a.state", model).levels.position == cache.levels.position
    content = (tmp_path / "a.state").read_bytes()
    (tmp_path / "b.state").write_bytes(content.replace(b"read", b"red "))
    with pytest.raises(ValueError, match="damaged"):
        load_notes(tmp_path / "b.state")


@pytest.fixture
def stacked():
    """A slow level that has not stepped yet: its tensors share memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from nestling import Level, stack_levels

    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = stack_levels(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), [Level(4), Level(64)])
    with torch.no_grad():
        return model, model(torch.arange(20)[None], use_cache=True).past_key_values
