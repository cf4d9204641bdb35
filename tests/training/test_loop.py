import errno
import math
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nestling.training import TrainConfig, Trainer, checkpoint, train
from nestling.training.build import load_saved
from nestling.training.metrics import read_metrics
from nestling.training.resume import differences

SLOW_LEVEL = [{"chunk_size": None}, {"chunk_size": 5 * 64}]  # 5 steps of 2 x 2 x 16 tokens


@pytest.fixture
def hope(config):
    """A run of a tiny Hope with a slow level and gradient accumulation."""
    options = {**config.model.options, "cms_levels": SLOW_LEVEL}
    return config.changed(**{"model.options": options, "optim.accumulate": 2})


def weights(folder):
    return load_saved(checkpoint.resolve(folder)).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_leaves_a_hugging_face_model(config, llama):
    config = config.changed(**{"steps": 60, "optim.lr": 1e-2, "data.batch_size": 4})
    trainer = Trainer(config, model=llama())
    before = trainer.evaluate()
    result = trainer.run()
    assert result.evaluation.bits_per_byte < 0.7 * before.bits_per_byte
    assert result.step == 60
    assert result.tokens == 60 * 4 * 16
    assert not result.interrupted
    folder = f"{config.out}/latest"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert same(model.state_dict(), trainer.model.state_dict())
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [list(b"the cat")]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("the cat")


@pytest.mark.parametrize(("seq_len", "warns"), [(16, True), (17, False)])
def test_a_window_no_longer_than_a_chunk_is_said(config, seq_len, warns):
    options = {**config.model.options, "mixers": ["window_attention", {"mixer": "selfmod", "chunk_size": 16}]}
    options = {name: value for name, value in options.items() if name != "mixer_options"} | {"num_hidden_layers": 2}
    trainer = Trainer(config.changed(**{"model.options": options, "data.seq_len": seq_len}))
    assert [w for w in trainer.warnings if "not longer than a memory's chunk of 16" in w] == trainer.warnings
    assert bool(trainer.warnings) == warns


def test_figures_are_written(config, llama):
    Trainer(config, model=llama()).run()
    rows = read_metrics(f"{config.out}/metrics.jsonl")
    train_rows = [row for row in rows if row["kind"] == "train"]
    eval_rows = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in train_rows] == list(range(1, 13))
    assert [row["step"] for row in eval_rows] == [6, 12]
    assert {"loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "tokens", "skipped"} <= train_rows[
        0
    ].keys()
    assert eval_rows[0]["loss_by_position"][0]["first"] == 1
    assert eval_rows[0]["loss_by_position"][-1]["last"] == 16
    assert TrainConfig.load(f"{config.out}/run.json") == config


def test_two_runs_of_one_seed_are_one(hope, tmp_path):
    hope, results = hope.changed(steps=6), []
    for name in ("a", "b"):
        train(hope.changed(out=str(tmp_path / name)))
        results.append(weights(tmp_path / name))
    train(hope.changed(out=str(tmp_path / "c"), seed=1))
    assert same(*results)
    assert not same(results[0], weights(tmp_path / "c"))


@pytest.mark.parametrize("stop", [4, 8])  # neither is a boundary of the slow level
def test_a_resumed_run_ends_bit_for_bit_the_same(hope, tmp_path, stop):
    train(hope)
    other = hope.changed(out=str(tmp_path / "other"))
    trainer = Trainer(other)
    for _ in range(stop):
        trainer.train_step()
    slow = trainer.optimizers.groups[1]
    assert slow.level == 1
    assert slow.count == stop % 5
    trainer.save()
    for _ in range(2):  # steps that a kill loses
        trainer.train_step()
    torch.manual_seed(99)
    resumed = Trainer(other, resume=True)
    assert resumed.step == stop
    resumed.run()
    assert same(weights(hope.out), weights(other.out))
    assert resumed.optimizers.groups[1].steps == 2


def test_slow_levels_step_once_per_chunk_of_tokens(hope):
    trainer = Trainer(hope)
    assert trainer.schedule.slow == (1,)
    slow = {
        name for name, p in trainer.model.named_parameters() if any(p is q for q in trainer.optimizers.groups[1].params)
    }
    assert slow
    moved = []
    for _ in range(11):
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        report = trainer.train_step()
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        moved.append(bool(changed & slow))
        assert changed - slow
        assert bool(report.slow_levels) == moved[-1]
    assert [i + 1 for i, m in enumerate(moved) if m] == [5, 10]


def test_resume_refuses_what_would_change_the_result(config, text):
    train(config)
    with pytest.raises(ValueError, match=r"already holds a run.*--resume"):
        train(config)
    with pytest.raises(ValueError, match=r"cannot change optim.lr \(was 0.003, now 0.1\)"):
        train(config.changed(**{"optim.lr": 0.1}), resume=True)
    with pytest.raises(ValueError, match="steps must be at least 12"):
        train(config.changed(steps=3), resume=True)
    longer = config.changed(**{"steps": 14, "logging.log_every": 2})
    assert train(longer, resume=True).step == 14
    text.write_text(text.read_text() + "new text\n")
    with pytest.raises(ValueError, match="text or tokenizer changed"):
        train(longer, resume=True)


def test_a_damaged_newest_checkpoint_falls_back_to_the_previous(config, capsys):
    train(config)
    whole = weights(config.out)
    newest = checkpoint.list_checkpoints(config.out)[-1]
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    trainer = Trainer(config, resume=True)
    assert trainer.step == 8
    trainer.run()
    message = " ".join(capsys.readouterr().err.split())
    assert "truncated" in message
    assert "resuming from" in message
    assert same(weights(config.out), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_ends_after_the_step_with_a_checkpoint(config, monkeypatch, number):
    trainer = Trainer(config)
    take, before = trainer.train_step, signal.getsignal(signal.SIGINT)

    def step():
        report = take()
        if report.step == 7:
            signal.raise_signal(number)
        return report

    monkeypatch.setattr(trainer, "train_step", step)
    result = trainer.run()
    assert result.interrupted
    assert result.step == 7
    assert checkpoint.newest(config.out)[0].name == "step-00000007"
    assert signal.getsignal(signal.SIGINT) is before
    assert train(config, resume=True).step == 12


def test_figures_after_the_last_checkpoint_are_written_once(config):
    trainer = Trainer(config.changed(**{"logging.save_every": 0}))
    trainer.run()
    with open(f"{config.out}/metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 13, "loss": 1}\n{"kind": "tra')
    train(config.changed(**{"logging.save_every": 0, "steps": 15}), resume=True)
    steps = [row["step"] for row in read_metrics(f"{config.out}/metrics.jsonl") if row["kind"] == "train"]
    assert steps == list(range(1, 16))


def test_a_full_disk_on_the_way_does_not_end_the_run(config, monkeypatch, capsys):
    fsync, calls = os.fsync, []

    def sometimes(handle):
        calls.append(trainer.step)
        if trainer.step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    trainer = Trainer(config)
    monkeypatch.setattr(os, "fsync", sometimes)
    result = trainer.run()
    assert 4 in calls
    assert [p.name for p in checkpoint.list_checkpoints(config.out)] == ["step-00000008", "step-00000012"]
    assert result.step == 12
    assert "the disk is full" in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_at_the_end_is_an_error_and_the_last_checkpoint_stays(config, monkeypatch):
    trainer = Trainer(config)
    fsync = os.fsync

    def at_the_end(handle):
        if trainer.step == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", at_the_end)
        with pytest.raises(OSError, match="the disk is full"):
            trainer.run()
    assert checkpoint.newest(config.out)[0].name == "step-00000008"
    assert Trainer(config, resume=True).run().step == 12


def test_steps_without_a_finite_gradient_are_counted(config, llama, capsys):
    model = llama()
    trainer = Trainer(config, model=model)
    forward, seen = model.forward, []

    def sometimes(*args, **kwargs):
        output = forward(*args, **kwargs)
        seen.append(1)
        if len(seen) == 3:
            output.logits = output.logits * float("nan")
        return output

    model.forward = sometimes
    before = None
    for step in range(4):
        if step == 2:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
        report = trainer.train_step()
        assert report.skipped == (step == 2)
        if step == 2:
            assert same(dict(model.named_parameters()), before)
    assert trainer.skipped == 1
    result = trainer.run()
    assert result.skipped == 1
    assert torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).all()


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"optim.name": "muon", "optim.lr": 1e-2},
        {"schedule.name": "wsd"},
        {"data.tokenizer": "bpe:270"},
        {"data.val_fraction": 0.0},
        {"logging.trackers": ["tensorboard"]},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_options_train_and_resume(config, options):
    config = config.changed(**options)
    trainer = Trainer(config)
    losses = [trainer.train_step().loss for _ in range(4)]
    trainer.save()
    assert all(torch.isfinite(torch.tensor(losses)))
    result = Trainer(config, resume=True).run()
    assert result.step == 12
    assert (result.evaluation is None) == (config.data.val_fraction == 0)
    if config.logging.trackers:
        assert list((checkpoint.Path(config.out) / "tensorboard").iterdir())


def test_a_saved_model_is_trained_further_with_its_own_tokenizer(config, tmp_path):
    train(config.changed(**{"data.tokenizer": "bpe:270"}))
    further = config.changed(**{"out": str(tmp_path / "further"), "model.name": config.out, "model.options": {}})
    trainer = Trainer(further)
    assert len(trainer.corpus.tokenizer) == 270
    assert same(trainer.model.state_dict(), weights(config.out))
    trainer.run()
    with pytest.raises(ValueError, match="cannot change the saved model"):
        Trainer(further.changed(**{"out": str(tmp_path / "x"), "model.options": {"hidden_size": 8}}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model.name": "tinny"}, "unknown model 'tinny': did you mean 'tiny'"),
        ({"model.options": {"hiden_size": 8}}, "did you mean 'hidden_size'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"device": "gpu"}, "device 'gpu' is not available"),
        ({"logging.trackers": ["trakio"]}, "did you mean 'trackio'"),
        ({"data.seq_len": 100_000}, "the text is too short"),
        ({"optim.name": "adam"}, "did you mean 'adamw'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(config, options, words):
    with pytest.raises(ValueError, match=words):
        train(config.changed(**options))
    assert not os.path.exists(f"{config.out}/checkpoints")
    assert not os.path.exists(f"{config.out}/metrics.jsonl")


def test_a_model_with_too_small_a_vocabulary_is_refused(config, tmp_path, llama):
    llama(vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=3).save_pretrained(tmp_path / "small")
    options = {"model.name": str(tmp_path / "small"), "model.options": {}, "data.tokenizer": "bytes"}
    with pytest.raises(ValueError, match="vocabulary of 200, but the tokenizer makes 259"):
        train(config.changed(**options))


def test_differences():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}
    assert differences(old, new) == [("b.c", 2, 4), ("e", None, 5)]


def test_levels_learn_inside_a_context(config):
    levels = [{"chunk_size": 8}, {"chunk_size": None}]
    inside = config.changed(**{"model.options": {**config.model.options, "cms_levels": levels}})
    trainer = Trainer(inside)
    assert trainer.schedule.fast == (0,) and trainer.model.learner.fast == [0]
    assert trainer.model.config.context_length == inside.data.seq_len
    before = trainer.model.model.layers[0].memory.blocks[0].up_proj.weight.clone()
    assert math.isfinite(trainer.train_step().loss)
    assert not torch.equal(before, trainer.model.model.layers[0].memory.blocks[0].up_proj.weight)


def test_only_where_levels_begin_is_trained(config):
    levels = [{"chunk_size": 8}, {"chunk_size": None}]
    changes = {"trained": "levels", "model.options": {**config.model.options, "cms_levels": levels}}
    model = Trainer(config.changed(**changes)).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".memory.blocks.0." in name and "_proj." in name for name in trained)
    with pytest.raises(ValueError, match="convert one first"):
        Trainer(config.changed(trained="levels"))
