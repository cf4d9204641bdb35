"""Optimisers compared by training: which runs are called for, what a run is, where images come from."""

import gzip
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from experiments.language import experiment as language
from experiments.m3 import experiment as m3
from experiments.shared.optimizers import comparison, images
from experiments.shared.optimizers.comparison import ComparisonJob
from experiments.shared.optimizers.contenders import OptimizerContender, Together, check, five, make, split
from experiments.shared.optimizers.search import propose
from experiments.shared.optimizers.vit import ViT
from experiments.shared.run import run_experiment
from experiments.vision import experiment as vision


class Rows(dict):
    """Results by job."""

    def done(self, job, loss, **more):
        self[job] = {"lr": job.lr, "steps": job.steps, "failed": False, "worst": 2.3, "end": {"loss": loss},
                     "model_seconds": 0.03, "optimizer_seconds": 0.01} | more  # fmt: skip


@pytest.fixture
def settings():
    chosen = [c for c in five() if c.name in ("AdamW", "Muon")]
    return vision.Vision(contenders=chosen, seeds=[0, 1], models=[comparison.Model("vit", trials=2, steps=100)])


def _plan(settings, rows):
    return comparison.plan(settings, settings.contenders, rows.get)


def test_search_then_seeds_then_equal_time(settings):
    rows = Rows()
    for trial in range(2):
        jobs = _plan(settings, rows)
        assert [(j.contender, j.kind, j.trial) for j in jobs] == [(n, "search", trial) for n in ("AdamW", "Muon")]
        assert {j.seed for j in jobs} == {settings.search_seed}
        for job in jobs:
            rows.done(job, 1.0 + trial * (1 if job.contender == "AdamW" else -1) * 0.1)
    finals = _plan(settings, rows)
    assert [(j.contender, j.kind, j.seed) for j in finals] == [
        (n, "final", s) for s in (0, 1) for n in ("AdamW", "Muon")
    ]
    assert finals[0].lr < finals[1].lr  # AdamW's first trial was its best, Muon's second
    for job in finals:
        rows.done(job, 0.5, optimizer_seconds=0.01 if job.contender == "AdamW" else 0.05)
    timed = [j for j in _plan(settings, rows) if j.kind == "time"]
    assert [(j.contender, j.seed) for j in timed] == [("Muon", 0), ("Muon", 1)]
    assert {j.steps for j in timed} == {50}  # half as many steps of twice the time


def test_a_longer_search_that_finds_a_better_rate_is_run_again(settings):
    rows, contender = Rows(), settings.contender("AdamW")
    for loss in (1.0, 1.1, 0.5):
        settings = settings.changed(models=[{"name": "vit", "trials": len(rows) + 1, "steps": 100}])
        before = comparison.final(settings, settings.models[0], contender, 0, rows.get)
        rows.done(next(j for j in _plan(settings, rows) if j.contender == "AdamW"), loss)
        after = comparison.final(settings, settings.models[0], contender, 0, rows.get)
        assert before is None
    first = comparison.ComparisonJob("AdamW", "vit", "final", 0, next(iter(rows.values()))["lr"], 100)
    assert after.lr != first.lr
    assert after.key != first.key  # results are kept by key


def test_a_failed_trial_is_never_chosen(settings):
    rows = Rows()
    for failed in (True, False):
        job = next(j for j in _plan(settings, rows) if j.contender == "AdamW")
        rows.done(job, None if failed else 2.0, failed=failed)
    found = comparison.final(settings, settings.models[0], settings.contender("AdamW"), 0, rows.get)
    assert found.lr == [r["lr"] for r in rows.values()][1]


def test_a_change_takes_the_defaults_rate():
    settings, rows = m3.defaults(), Rows()
    while True:
        search = [j for j in _plan(settings, rows) if j.kind == "search"]
        if not search:
            break
        assert {j.contender for j in search} <= set(m3.SEARCHED)
        for job in search:
            rows.done(job, abs(job.lr - 0.01))
    model = settings.models[0]
    lrs = {c.name: comparison.best_lr(settings, model, c, rows.get) for c in settings.contenders}
    assert lrs["alpha 1"] == lrs["default"]


def test_a_search_homes_in():
    tried = ()
    for _ in range(7):
        lr = propose(tried, 1e-4, 1e-1)
        assert 1e-4 <= lr <= 1e-1
        tried += ((lr, (np.log(lr) - np.log(2e-3)) ** 2),)
    assert 1e-3 < min(tried, key=lambda t: t[1])[0] < 4e-3
    assert propose(tried[:5], 1e-4, 1e-1) == tried[5][0]  # a function of what was tried


def _tiny():
    return ViT(side=28, patch=7, width=16, layers=1, heads=2)


def test_the_split_leaves_out_head_and_vectors():
    model = _tiny()
    matrices, rest = split(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in matrices} == {n for n in names.values() if n.endswith("weight") and "norm" not in n
                                                 and n != "head.weight"}  # fmt: skip
    assert len(matrices) + len(rest) == len(names)


@pytest.mark.parametrize("contender", five(), ids=lambda c: c.name)
def test_every_optimiser_learns(contender):
    settings = vision.defaults().smoke().changed(batch_size=32, models=[
        {"name": "vit", "options": {"width": 16, "layers": 1, "heads": 2}, "steps": 25}])  # fmt: skip
    task = vision.ImageTask(settings, images.synthetic())
    job = ComparisonJob(contender.name, "vit", "final", 0, 0.01, 25)
    row = comparison.train(task, settings, job)
    assert not row["failed"]
    assert row["end"]["loss"] < row["curve"][0][1] - 0.3
    assert [step for step, _ in row["evaluated"]][-1] == 25
    json.dumps(row)


def test_runs_of_one_seed_differ_in_the_optimiser_alone():
    settings = vision.defaults().smoke()
    task = vision.ImageTask(settings, images.synthetic())
    first = {
        name: comparison.train(task, settings, ComparisonJob(name, "vit", "final", seed, 1e-3, 1))["curve"][0]
        for name, seed in (("AdamW", 0), ("M3", 0), ("Muon", 1))
    }
    assert first["AdamW"] == first["M3"] != first["Muon"]


def test_a_run_that_explodes_is_a_failure():
    settings = vision.defaults().smoke().changed(clip=0.0)
    task = vision.ImageTask(settings, images.synthetic())
    row = comparison.train(task, settings, ComparisonJob("AdamW", "vit", "final", 0, 1e30, 6))
    assert row["failed"]
    assert row["train"] is None


def test_vit_sees_where_a_patch_lies():
    torch.manual_seed(0)
    model, image = _tiny(), torch.zeros(2, 28, 28)
    image[0, :7, :7] = image[1, -7:, -7:] = torch.randn(7, 7)
    out = model(image)
    assert out.shape == (2, 10)
    assert not torch.allclose(out[0], out[1])
    with pytest.raises(ValueError, match="patch 5"):
        ViT(patch=5)


def _write(folder, name, values):
    head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    (folder / name).write_bytes(gzip.compress(head + values.tobytes()))


def test_images_are_read_and_normalised(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("t10k", 3)):
        _write(tmp_path, f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        _write(tmp_path, f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    found = images.load_images(str(images.find_folder(tmp_path)))
    pixels, labels = found.train
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert pixels.shape == (6, 28, 28)
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-4)
    assert float(pixels.std()) == pytest.approx(1, abs=1e-2)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"not idx!"))
    images.load_images.cache_clear()
    with pytest.raises(ValueError, match="not an idx file"):
        images.load_images(str(tmp_path))


def test_a_wrong_option_is_an_error_before_the_first_run():
    with pytest.raises(ValueError, match="contender 'x'.*peri0ds"):
        check(OptimizerContender("x", "m3", {"peri0ds": [1]}))
    with pytest.raises(ValueError, match="did you mean 'muon'"):
        vision.Vision(contenders=[OptimizerContender("x", "moun")])
    with pytest.raises(ValueError, match="unknown contender 'M4'"):
        vision.defaults().changed(searched=["M4"])


def test_optimisers_of_two_rules_step_as_one():
    model = _tiny()
    optimizer = make(OptimizerContender("Muon", "muon"), model, 1e-2)
    assert isinstance(optimizer, Together)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(4, 28, 28)).square().sum().backward()
    optimizer.step()
    assert all((a != b).any() for a, b in zip(before, model.parameters()))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_vision_smoke(tmp_path):
    options = {"workers": 0, "show": False, "smoke": True, "only": ["AdamW", "AdEMAMix"]}
    summary = run_experiment("vision", tmp_path, **options)
    assert summary["missing"] == []
    first, second = (next(c for c in summary["contenders"] if c["contender"] == n) for n in ("AdamW", "AdEMAMix"))
    assert first["difference"] is None
    expected = [b - a for a, b in zip(first["loss"]["values"], second["loss"]["values"])]
    assert second["difference"]["values"] == pytest.approx(expected)
    assert "AdEMAMix" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_language_trains_on_text(folder):
    settings = language.defaults().smoke().changed(test_text="book1.txt", val_fraction=0.2, seq_len=16)
    task = language.work(settings, folder, False).task()
    row = comparison.train(task, settings, ComparisonJob("AdamW", "transformer", "search", 0, 1e-2, 4))
    assert not row["failed"]
    assert 0 < row["end"]["loss"] < task.worst + 0.5
    assert task.evaluate(task.model("hope"), "test", True)["loss"] > 0


def test_data_that_is_missing_is_named(tmp_path):
    from nestling.cli.main import app

    for arguments, message in [
        (["vision"], "fashion-mnist"),
        (["m3", "--data", str(tmp_path)], "lacks train-images"),
        (["language"], "NESTLING_DATA"),
        (["vision", "--smoke", "--only", "Adam"], "did you mean 'AdamW'"),
    ]:
        failed = CliRunner().invoke(app, ["eval", *arguments, "--workers", "0", "--out", str(tmp_path / "o")])
        assert failed.exit_code == 2, failed.output
        assert message in failed.output
