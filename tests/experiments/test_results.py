"""Results survive kills; runs depend on their settings alone."""

import json
import math

import pytest
import torch

from experiments.shared.models.runs import execute, weights_path
from experiments.shared.models.study import TrainingJob
from experiments.shared.results import Results

SKIP = ("seconds", "tokens_per_second")


def _row(job, **values):
    return {"kind": job.kind, "key": job.key, "fingerprint": "f", **values}


def test_rows_are_read_back_without_what_a_kill_cut_off(tmp_path):
    path, job = tmp_path / "deep" / "results.jsonl", TrainingJob("a", 1e-3, 0)
    results = Results(path)
    results.add(_row(job, value=math.nan, nested=[{"x": math.inf}]))
    assert results.get(job, "f")["value"] is None
    with open(path, "a") as file:
        file.write('{"kind": "train", "key": "a lr=0.0')
    again, other = Results(path), TrainingJob("b", 1e-3, 0)
    assert len(again) == 1
    again.add(_row(other, value=1))
    last = Results(path)
    assert last.get(job, "f") == {"kind": "train", "key": job.key, "fingerprint": "f", "value": None} | {
        "nested": [{"x": None}]
    }
    assert last.get(other, "f")["value"] == 1
    assert last.get(job, "another") is None
    assert last.get(TrainingJob("a", 1e-3, 0, kind="test"), "f") is None


def _figures(row):
    return {k: v for k, v in row.items() if k not in SKIP}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_is_the_same_every_time(tiny, texts, precision):
    experiment = tiny(contenders=[{"name": "hope", "options": {"chunk_size": 8}}], long_context=3)
    job = TrainingJob("hope", 1e-2, 1, precision)
    threads, told = torch.get_num_threads(), []
    row = execute(experiment, job, texts(experiment), lambda *step: told.append(step))
    assert torch.get_num_threads() == threads
    torch.rand(1)
    assert _figures(execute(experiment, job, texts(experiment))) == _figures(row)
    json.dumps(row)
    assert [step for step, _ in told] == [1, 2, 3]
    assert (row["steps"], row["tokens"], row["skipped"], row["nan_losses"]) == (3, 96, 0, 0)
    assert row["long_context"]["tokens"] == 48
    assert row["loss_by_position"][-1]["last"] == 16
    assert row["bits_per_byte"] > 0
    other = execute(experiment, TrainingJob("hope", 1e-2, 2, precision), texts(experiment))
    assert other["bits_per_byte"] != row["bits_per_byte"]


def test_the_test_reads_the_trained_weights_and_only_the_held_out_file(tiny, texts, folder):
    experiment, job = tiny(), TrainingJob("deltanet", 1e-2, 0)
    loaded = texts(experiment)
    row = execute(experiment, job, loaded)
    path = weights_path(experiment, job, row["fingerprint"])
    assert path.is_file()
    test = TrainingJob("deltanet", 1e-2, 0, kind="test")
    tested = execute(experiment, test, loaded)
    assert not path.exists()
    assert tested["bits_per_byte"] != row["bits_per_byte"]
    # without the weights the run is repeated, to the same end
    assert _figures(execute(experiment, test, loaded)) == _figures(tested)
    assert len(loaded.test) == (folder / "book1.txt").stat().st_size + 1  # and the end-of-text token
    whole = sum((folder / f"book{i}.txt").stat().st_size + 2 for i in (0, 2))
    assert len(loaded.corpus.train) + len(loaded.corpus.val) <= whole


def test_a_run_whose_gradients_stay_infinite_is_given_up(tiny, texts, monkeypatch):
    from experiments.shared.models import runs

    def explode(*args, **kwargs):
        return type("Report", (), {"loss": math.nan, "skipped": True})()

    monkeypatch.setattr(runs.Trainer, "train_step", explode)
    row = execute(tiny(steps=50, max_skips=4), TrainingJob("deltanet", 1e-2, 0), texts(tiny()))
    assert row["diverged"]
    assert row["nan_losses"] == 4
    assert row["skipped_in_a_row"] == 4
