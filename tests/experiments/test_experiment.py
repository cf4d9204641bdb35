"""A whole experiment: run, stopped, gone on with, reported; the command line."""

import json

import pytest
from typer.testing import CliRunner

from experiments.shared.models import runs
from experiments.shared.run import run_experiment, save


def _figures(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    skip = ("seconds", "tokens_per_second")
    return {(r["kind"], r["key"]): {k: v for k, v in r.items() if k not in skip} for r in rows}


def _prepare(experiment, folder, name):
    path = folder.parent / name
    path.mkdir()
    save(experiment, path / "config.json")
    return path


def test_an_experiment_goes_on_where_it_stopped(tiny, folder, monkeypatch):
    out = _prepare(tiny(contenders=[{"name": "transformer", "mixer": "attention"}]), folder, "quality")
    options = {"data": folder, "workers": 0, "show": False}
    done, execute = [], runs.execute

    def stop_after_two(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(args[1])
        return execute(*args)

    monkeypatch.setattr(runs, "execute", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run_experiment("quality", out, **options)
    assert len(_figures(out / "results.jsonl")) == 2

    monkeypatch.setattr(runs, "execute", lambda *args: done.append(args[1]) or execute(*args))
    summary = run_experiment("quality", out, **options)
    assert summary["missing"] == []
    assert summary["failed"] == {}
    assert len(done) == len(set(done)) == 2 + 1 + 2  # searches, the second seed, tests
    for found in summary["contenders"]:
        assert len(found["book"]["values"]) == len(found["tails"]["values"]) == 2
        assert found["search"][f"{found['lr']:g}"] == min(found["search"].values())
    assert (out / "plot.png").stat().st_size > 10_000
    assert "transformer" in (out / "table.md").read_text()
    assert len(list((out / "weights").glob("*"))) == 1  # of the learning rate not chosen: it is never tested

    before = (out / "results.jsonl").read_bytes()
    monkeypatch.setattr(runs, "execute", lambda *args: pytest.fail("ran again"))
    again = run_experiment("quality", out, **options)
    assert again["contenders"] == summary["contenders"]
    assert (out / "results.jsonl").read_bytes() == before


def test_worker_processes_give_what_this_process_gives(tiny, folder):
    experiment = tiny("stability", contenders=[{"name": "hope", "options": {"chunk_size": 8}}, {"name": "b"}])
    here = _prepare(experiment, folder, "here")
    there = _prepare(experiment, folder, "there")
    run_experiment("stability", here, data=folder, workers=0, show=False)
    run_experiment("stability", there, data=folder, workers=2, show=False)
    assert _figures(here / "results.jsonl") == _figures(there / "results.jsonl")
    assert len(_figures(here / "results.jsonl")) == 4


def test_a_failed_run_is_reported_and_tried_again(tiny, folder, monkeypatch):
    out = _prepare(tiny("stability", lrs=[1e-3]), folder, "stability")
    execute = runs.execute

    def fail_once(experiment, job, *rest):
        if job.seed == 1:
            raise RuntimeError("no luck")
        return execute(experiment, job, *rest)

    monkeypatch.setattr(runs, "execute", fail_once)
    summary = run_experiment("stability", out, data=folder, workers=0, show=False)
    assert [*summary["failed"].values()] == ["RuntimeError: no luck"]
    assert len(summary["missing"]) == 1
    monkeypatch.setattr(runs, "execute", execute)
    assert run_experiment("stability", out, data=folder, workers=0, show=False)["missing"] == []


def test_only_and_time_limit(tiny, folder):
    out = _prepare(tiny("cost", lrs=[1e-3], speed_rounds=1, speed_shape=[1, 8, 16, 2]), folder, "cost")
    options = {"data": folder, "workers": 0, "show": False}
    with pytest.raises(ValueError, match="no results"):
        run_experiment("cost", out, time_limit=0, **options)
    summary = run_experiment("cost", out, only=["deltanet"], **options)
    assert [s["setting"] for s in summary["settings"]] == ["deltanet"]
    summary = run_experiment("cost", out, time_limit=0, **options)
    assert len(summary["missing"]) == 2
    summary = run_experiment("cost", out, **options)
    assert [s["layer_speed_ratio"] > 0 for s in summary["settings"]] == [True, True]
    assert summary["cheapest_within_spread"] in ("deltanet", "transformer")
    with pytest.raises(ValueError, match="did you mean 'deltanet'"):
        run_experiment("cost", out, only=["deltanets"], **options)


def test_a_wrong_option_is_an_error_before_the_first_run(tiny, folder):
    broken = [{"name": "good"}, {"name": "bad", "options": {"chunk_sise": 8}}]
    out = _prepare(tiny("cost", contenders=broken), folder, "cost")
    with pytest.raises(ValueError, match="contender 'bad'.*chunk_sise"):
        run_experiment("cost", out, data=folder, workers=0, show=False)
    assert not (out / "results.jsonl").exists()


def test_the_command(tmp_path, folder):
    from nestling.cli.main import app

    runner = CliRunner()
    common = ["--out", str(tmp_path / "out"), "--workers", "0", "--quiet"]
    done = runner.invoke(app, ["eval", "stability", "--smoke", "-o", "seeds=[0]", "--json", *common])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["missing"] == []
    assert {g["precision"] for g in summary["groups"]} == {"float32", "bf16"}
    for arguments, message in [
        (["speling"], "unknown experiment 'speling'"),
        (["quality"], "NESTLING_DATA"),
        (["quality", "--data", str(tmp_path / "none")], "no folder"),
        (["quality", "--data", str(folder)], "test_text"),
        (["quality", "--data", str(folder), "-o", "test_text=book1.txt", "-o", "stepps=3"], "did you mean 'steps'"),
        (["quality", "--data", str(folder), "-o", "test_text=book1.txt", "--report-only"], "no results"),
        (["span", "--device", "cuda"], "runs on a CPU only"),
        (["languages", "--device", "cuda:99"], "not available here"),
    ]:
        failed = runner.invoke(app, ["eval", *arguments, *common[2:], "--out", str(tmp_path / "other")])
        assert failed.exit_code == 2, failed.output
        assert message in failed.output
