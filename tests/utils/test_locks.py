"""Everything that is read, changed and written has one writer at a time, from before the reading on."""

import errno
import multiprocessing
import os
import signal
import threading
from types import SimpleNamespace

import filelock._unix
import pytest

from experiments.demo import run as run_demo
from experiments.shared.run import run_experiment
from nestling.cms.files import save_stacked
from nestling.training import DataConfig, TrainConfig, Trainer, load_corpus, train
from nestling.tuning import tune
from nestling.utils.locks import sole_writer


def refused(call):
    """A call while another thread holds the lock of what it wants."""
    with pytest.raises(ValueError, match="is being written by another session or run"):
        call()


def test_who_comes_second_is_refused_and_nothing_stays(tmp_path):
    path = tmp_path / "new" / "deep" / "my.state"
    with sole_writer(path):
        refused(lambda: sole_writer(path).__enter__())
        link = tmp_path / "link.state"
        link.symlink_to(path)
        refused(lambda: sole_writer(link).__enter__())
    assert [p.name for p in tmp_path.iterdir()] == ["link.state"]
    with sole_writer(path):
        pass


def test_one_that_may_wait_waits(tmp_path):
    order = []

    def second():
        with sole_writer(tmp_path / "cache", wait=True):
            order.append("second")

    with sole_writer(tmp_path / "cache"):
        thread = threading.Thread(target=second)
        thread.start()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def hold(path, pipe):
    lock = sole_writer(path)
    lock.__enter__()
    pipe.send("held")
    signal.pause()


def test_a_killed_process_blocks_nobody(tmp_path):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "run", there))
    process.start()
    assert here.recv() == "held"
    refused(lambda: sole_writer(tmp_path / "run").__enter__())
    process.kill()
    process.join()
    assert (tmp_path / "run.lock").exists()
    with sole_writer(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOLCK, "without locks.*local disk.*NESTLING_LOCKS=0"), (errno.ENOSYS, "without locks"),
     (errno.EROFS, "cannot be written.*name another place")],
)  # fmt: skip
def test_places_without_locks_are_named_and_can_be_used_all_the_same(tmp_path, monkeypatch, code, words):
    def fails(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock._unix, "lock_fd_nonblocking", fails)
    with pytest.raises(OSError, match=words), sole_writer(tmp_path / "x"):
        pass
    monkeypatch.setenv("NESTLING_LOCKS", "0")
    with sole_writer(tmp_path / "x"):
        pass


def run_config(text, tmp_path, **more):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return TrainConfig.from_dict(
        {"out": str(tmp_path / "run"), "steps": 1, "threads": 1, "model": {"options": small},
         "data": {"text": [str(text)], "seq_len": 8, "batch_size": 1, "cache_dir": str(tmp_path / "cache")},
         "logging": {"progress": False}, **more}
    )  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat.\n" * 40)
    return path


def test_two_runs_in_one_folder(text, tmp_path):
    config = run_config(text, tmp_path)
    with sole_writer(config.out):
        refused(lambda: train(config))
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()  # before it read anything
    first, second = Trainer(config), Trainer(config)
    first.run()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another run wrote into"):
        second.run()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_searches_experiments_demos_and_conversions(tmp_path):
    def never(trial):
        raise AssertionError

    out = tmp_path / "place"
    config = SimpleNamespace(out=str(out))
    with sole_writer(out):
        refused(lambda: tune(never, out, space=None))
        refused(lambda: run_experiment("span", out, smoke=True, workers=0, show=False))
        refused(lambda: run_demo(config, None))
        from nestling.cms.stacked_model import StackedForCausalLM

        refused(lambda: save_stacked(object.__new__(StackedForCausalLM), out))
    assert not list(tmp_path.iterdir())


def test_a_search_after_a_kill_does_not_wait_for_the_lock_of_the_library(tmp_path):
    (tmp_path / "study.journal.lock").symlink_to(tmp_path / "study.journal")
    assert tune(lambda trial: trial.suggest_float("x", 0, 1), tmp_path, trials=1).finished == 1


def test_two_processes_make_a_token_file_once(text, tmp_path, monkeypatch):
    from nestling.training import data

    config = DataConfig(text=[str(text)], seq_len=8, cache_dir=str(tmp_path / "cache"))
    made, build = [], data._build

    def slow(folder, *arguments):
        made.append(folder)
        build(folder, *arguments)

    monkeypatch.setattr(data, "_build", slow)
    threads = [threading.Thread(target=load_corpus, args=(config,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
