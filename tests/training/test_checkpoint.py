import errno
import json
import os
import shutil

import pytest
import torch

from nestling.training import checkpoint
from nestling.training.checkpoint import CheckpointError, newest, resolve, save_checkpoint, verify
from nestling.training.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory, llama):
    """A run with checkpoints of steps 1, 2 and 3, for all tests: they get copies."""
    model, run = llama(), tmp_path_factory.mktemp("saved") / "run"
    for step in (1, 2, 3):
        save_checkpoint(run, step, model, byte_tokenizer(), {"step": step, "x": torch.ones(3)}, keep=3)
    return run


@pytest.fixture
def saved(saved_once, tmp_path):
    """A test's own run with checkpoints of steps 1, 2 and 3."""
    return shutil.copytree(saved_once, tmp_path / "run", symlinks=True)


def test_whole_checkpoints_verify_and_latest_points_at_the_newest(saved):
    path, problems = newest(saved)
    assert path.name == "step-00000003"
    assert problems == []
    assert (saved / "latest").resolve() == path.resolve()
    assert verify(path)["step"] == 3
    assert checkpoint.load_trainer_state(path)["step"] == 3
    assert resolve(saved) == path
    assert resolve(saved / "latest") == saved / "latest"


def test_only_the_newest_are_kept(saved, llama):
    save_checkpoint(saved, 4, llama(), byte_tokenizer(), {}, keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(saved)] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_damage_is_named_and_the_previous_one_used(saved, file, damage):
    bad = saved / "checkpoints" / "step-00000003" / file
    content = bytearray(bad.read_bytes())
    if damage == "missing":
        bad.unlink()
    elif damage == "truncated":
        bad.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        bad.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        resolve(saved / "checkpoints" / "step-00000003")
    for word in (file, "step-00000003", "the previous good checkpoint is", "step-00000002"):
        assert word in str(error.value)
    path, problems = newest(saved)
    assert path.name == "step-00000002"
    assert file in problems[0]


def test_foreign_folders_are_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no model at"):
        resolve(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model"):
        resolve(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        newest(tmp_path / "empty")
    manifest = saved / "checkpoints" / "step-00000003" / "manifest.json"
    content = json.loads(manifest.read_text())
    for change, words in (({"kind": "other"}, "kind 'other'"), ({"format": 99}, "format 99")):
        manifest.write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=words):
            verify(manifest.parent)
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        verify(manifest.parent)
    manifest.unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint of `nestling train`"):
        verify(manifest.parent)


def test_trainer_state_cannot_run_code(saved):
    class Evil:
        def __reduce__(self):
            return os.system, ("false",)

    file = saved / "checkpoints" / "step-00000003" / "trainer.pt"
    torch.save({"step": Evil()}, file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_trainer_state(file.parent)


@pytest.mark.parametrize("place", ["fsync", "replace", "mkdtemp", "save"])
def test_a_full_disk_loses_nothing(saved, llama, monkeypatch, place):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        module = {"mkdtemp": "tempfile", "save": "torch"}.get(place, "os")
        patch.setattr(f"{module}.{place}", full)
        with pytest.raises(OSError, match=r"the disk is full: .*step-00000004 was not written"):
            save_checkpoint(saved, 4, llama(), byte_tokenizer(), {}, keep=1)
    assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before
    save_checkpoint(saved, 4, llama(), byte_tokenizer(), {}, keep=1)
    assert newest(saved)[0].name == "step-00000004"


def test_leftovers_of_a_kill_are_removed(saved):
    leftover = saved / "checkpoints" / ".step-00000004.abc.tmp"
    leftover.mkdir()
    assert newest(saved)[0].name == "step-00000003"
    checkpoint.clean(saved)
    assert not leftover.exists()


def test_random_state_round_trip():
    import random

    import numpy as np

    state = checkpoint.random_state()
    draws = torch.rand(3), random.random(), np.random.rand(3)  # noqa: NPY002
    checkpoint.set_random_state(state)
    again = torch.rand(3), random.random(), np.random.rand(3)  # noqa: NPY002
    assert torch.equal(draws[0], again[0])
    assert draws[1] == again[1]
    assert (draws[2] == again[2]).all()
