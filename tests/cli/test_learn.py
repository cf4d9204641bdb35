import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from nestling import Level
from nestling.cms import stack_levels
from nestling.cms.files import save_stacked
from nestling.generation import load_state
from nestling.generation.load import load_model
from nestling.training.tokenizers import byte_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A small converted model."""
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=257, bos_token_id=256,
    )  # fmt: skip
    model = stack_levels(AutoModelForCausalLM.from_config(config), [Level(16, lr=0.3), Level(64, lr=0.1)])
    save_stacked(model, tmp_path / "model", byte_tokenizer())
    return tmp_path / "model"


@pytest.fixture
def short(tmp_path):
    """A text of a few hundred bytes."""
    path = tmp_path / "short.txt"
    path.write_text("the cat sat on the mat. the dog ran to the log!\n" * 8)
    return path


def test_reads_says_what_it_knew_and_writes_a_page(call, folder, short, tmp_path):
    state, page = tmp_path / "my.state", tmp_path / "page" / "session.html"
    result = call("learn", folder, short, "--state", state, "--control", "--page", page, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    for word in ("short.txt: 384 bytes", "reading", "control", "before", "after", "level 1, every 64 tokens: 6 upd"):
        assert word in result.stdout
    text = page.read_text()
    assert "short.txt" in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    again = call("learn", folder, short, "--state", state, "--control", "--json")
    assert "read already; --new-session" in again.stderr
    values = json.loads(again.stdout)
    assert values["documents"][0]["tokens"] == 384 and values["resumed"] is True
    written = call("generate", folder, "-p", "the", "-n", 5, "--state", state)
    assert written.exit_code == 0, written.stderr


def test_the_pipe_and_a_held_out_text(call, folder, short, tmp_path):
    options = ["--state", tmp_path / "my.state", "--held-out", short, "--json", "--quiet", "--dtype", "bfloat16"]
    result = call("learn", folder, "-", *options, input="the cat sat on the mat\n" * 20)
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["documents"][0]["name"] == "standard input"
    assert len(values["held_out"]) == 2
    assert result.stderr == ""


def test_other_models_are_refused(call, trained, short, tmp_path):
    result = call("learn", trained, short, "--state", tmp_path / "s")
    assert result.exit_code == 2
    assert "no levels that learn while it reads" in result.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16"),
        (["--threads", 0], "--threads must be at least 1"),
        (["--context", 20], "no multiple of the fastest level's chunk_size 16"),
        (["--held-out", "nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (["--held-out", "."], "--held-out takes a file"),
        (["--probe", 0, "--held-out", "nowhere.txt"], "raise --probe"),
        (["--save-every", -1], "save_every must not be negative"),
        (["--pattern", "*.rst", "."], "choose others with --pattern"),
    ],
)
def test_bad_options_are_one_clear_line(call, folder, short, tmp_path, arguments, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("learn", folder, short, "--state", tmp_path / "s", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "s").exists()


def test_a_damaged_state_is_refused_and_kept(call, folder, short, tmp_path):
    state = tmp_path / "s"
    state.write_bytes(b"no state")
    result = call("learn", folder, short, "--state", state)
    assert result.exit_code == 2
    assert "is damaged" in result.stderr
    assert state.read_bytes() == b"no state"
    result = call("learn", folder, short, "--state", tmp_path)
    assert result.exit_code == 2
    assert "is a folder: name a file" in result.stderr


def test_a_bfloat16_state_belongs_to_bfloat16_weights(call, folder, short, tmp_path):
    assert call("learn", folder, short, "--state", tmp_path / "s", "--dtype", "bfloat16").exit_code == 0
    result = call("learn", folder, short, "--state", tmp_path / "s")
    assert result.exit_code == 2
    assert "another model" in result.stderr


def test_stacked_weights_stay_as_they_were(call, folder, short, tmp_path):
    before = (folder / "model.safetensors").read_bytes()
    assert call("learn", folder, short, "--state", tmp_path / "s").exit_code == 0
    assert (folder / "model.safetensors").read_bytes() == before
    assert torch.is_grad_enabled()


FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "mistral": {"sliding_window": None}}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_any_option_it_converts_learns_and_answers(call, short, tmp_path, family):
    config = AutoConfig.for_model(
        family, vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=257, bos_token_id=256, **FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    byte_tokenizer().save_pretrained(tmp_path / "plain")
    made = json.loads(call("convert", tmp_path / "plain", tmp_path / "out", "--json").stdout)
    assert made["levels"][0]["rank"] == 16 and made["levels"][0]["optimizer"] == "spectral"
    read = json.loads(call("learn", tmp_path / "out", short, "--json", "--quiet").stdout)
    assert read["state_bytes"] == made["state_bytes"] and read["state"] == str(tmp_path / "out.state")
    document = read["documents"][0]
    assert document["after"]["bits_per_byte"] < document["before"]["bits_per_byte"]
    before = (tmp_path / "out.state").read_bytes()
    found = json.loads(call("ask", tmp_path / "out", "who sat?", "-n", 5, "--json", "--always").stdout)
    assert 0 < found["confidence"] <= 1 and 0 < found["without_levels"] <= 1
    assert found["confidence"] != found["without_levels"] and found["recalled"] is None
    other = json.loads(call("ask", tmp_path / "out", "0=1;7=4;96:7|40=1;7=4;" * 2, "-n", 5, "--json").stdout)
    assert other["recalled"] == "" and other["confidence"] == pytest.approx(other["without_levels"], rel=1e-5)
    assert (tmp_path / "out.state").read_bytes() == before
    assert "question is empty" in call("ask", tmp_path / "out", " ").stderr
    fast = json.loads(call("convert", tmp_path / "plain", tmp_path / "fast", "--fast", "--json").stdout)
    assert (fast["levels"][0]["chunk_size"], fast["levels"][0]["steps"]) == (128, 2)
    assert fast["state_bytes"] == made["state_bytes"]
    document = json.loads(call("learn", tmp_path / "fast", short, "--json", "--quiet").stdout)["documents"][0]
    assert document["after"]["bits_per_byte"] < document["before"]["bits_per_byte"]
    assert "rule of its own" in call("convert", tmp_path / "plain", tmp_path / "x", "--fast", "-l", "64").stderr
    assert "no levels" in call("ask", tmp_path / "plain", "who?", "--state", tmp_path / "out.state").stderr


def test_a_trained_hope_converts_and_learns(call, trained, short, tmp_path):
    made = json.loads(call("convert", trained, tmp_path / "out", "--json").stdout)
    assert made["levels"][0]["chunk_size"] == 8  # below the context of 16 that it was trained with
    read = json.loads(call("learn", tmp_path / "out", short, "--held-out", short, "--json", "--quiet").stdout)
    assert read["state_bytes"] == made["state_bytes"] > 0
    document = read["documents"][0]
    assert document["after"]["bits_per_byte"] < document["before"]["bits_per_byte"]
    assert "learn already" in call("convert", tmp_path / "out", tmp_path / "again").stderr
    assert "are for Llama-family models" in call("convert", trained, tmp_path / "again", "--blocks=0").stderr
    assert "take its default levels" in call("convert", trained, tmp_path / "again", "--fast").stderr
    assert "not below the model's context_length" in call("convert", trained, tmp_path / "again", "-l", "64").stderr
    assert not (tmp_path / "again").exists()


def test_a_forgotten_context_leaves_what_levels_learned(call, folder, short, tmp_path):
    state = tmp_path / "my.state"
    assert call("learn", folder, short, "--state", state, "--quiet").exit_code == 0
    kept, (model, _) = state.read_bytes(), load_model(folder, "cpu")
    before = load_state(state, model)
    options = ["-p", "t", "-n", 1, "--greedy", "--json"]
    for extra in ([], ["--forget-context"]):
        state.write_bytes(kept)
        result = call("generate", folder, *options, "--state", state, *extra)
        assert result.exit_code == 0 and json.loads(result.stdout)["results"][0]["text"], result.stderr
        after = load_state(state, model)
        # attention over the text read before is there or gone; no boundary is passed: the levels know what they knew
        seen = after.layers[0].get_seq_length() - (0 if extra else before.layers[0].get_seq_length())
        assert 1 <= seen <= 2
        for mine, theirs in zip(after.levels.levels, before.levels.levels, strict=True):
            assert mine.updates == theirs.updates > 0
            assert all(torch.equal(a, b) and a.any() for a, b in zip(mine.deltas, theirs.deltas, strict=True))
    assert "--state" in call("generate", folder, *options, "--forget-context").stderr


def test_a_checked_reading_writes_its_page(call, folder, tmp_path):
    text, page = tmp_path / "a.txt", tmp_path / "check.md"
    text.write_text("\n".join(f"The cat number {n} sat on the mat of row {n}." for n in range(20)))
    result = call("learn", folder, text, "--state", tmp_path / "s", "--check", page, "--json", "--quiet")
    check = json.loads(result.stdout)["documents"][0]["check"]
    assert f"| a.txt | {check['count']} |" in page.read_text() and check["count"] > 0
    assert "pipe cannot be checked" in call("learn", folder, "-", "--state", tmp_path / "t", "--check", page).stderr


def test_a_question_is_answered_by_a_snapshot(call, folder, short, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("0=1;7=4;96:7|40=1;7=4;" * 6)
    state = tmp_path / "my.state"
    read = call("learn", folder, short, other, "--state", state, "--snapshots", 2, "--probe", 0, "--threads", 1)
    assert read.exit_code == 0, read.stderr
    before = state.read_bytes()
    found = json.loads(call("ask", folder, "the cat sat", "--state", state, "-n", 3, "--json", "--always").stdout)
    assert found["recalled"] in ("short.txt", "other.txt", None) and state.read_bytes() == before
    assert list(load_state(state, load_model(folder, "cpu")[0]).snapshots) == ["short.txt", "other.txt"]
    refused = call("learn", folder, short, "--snapshots", -1)
    assert refused.exit_code == 2 and "snapshots must not be negative" in refused.stderr
