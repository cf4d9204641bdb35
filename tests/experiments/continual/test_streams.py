"""The experiment with long streams: its parts, its slow level, its figures."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments.shared.continual.study import LearnerContender
from experiments.streams import report, texts
from experiments.streams.experiment import defaults, plan, summarize
from experiments.streams.prompted import QUERY, Prompted
from experiments.streams.reader import FIRST, Reader
from experiments.streams.remedies import TOKEN_BYTES, Consolidation, nats
from nestling.training.tokenizers import byte_tokenizer

LEVEL = {"chunk_size": 16, "lr": 0.05, "optimizer": "spectral", "rank": 4, "decay": 0.1}


def test_parts_follow_each_other_and_tuning_reads_elsewhere(tmp_path):
    tokenizer, places = byte_tokenizer(), texts.SMOKE
    orders = set()
    for seed in (0, 1, 2, texts.TUNING_SEED):
        found = texts.draw(places, tmp_path, tokenizer, seed, (96, 64, 32))
        orders.add(tuple(d.name for d in found))
        for domain in found:
            text = texts.whole(places[domain.name], str(tmp_path))
            at = text.index(tokenizer.decode(domain.first + domain.back + domain.probe)) / len(text)
            assert [len(domain.first), len(domain.back), len(domain.probe)] == [96, 64, 32]
            assert (at > 0.5) == (seed >= texts.TUNING_SEED)
    assert len(orders) > 1
    with pytest.raises(ValueError, match="read less"):
        texts.tokens("python/shelve.py", tmp_path, tokenizer, 0.9, 10**6)


@pytest.fixture
def plain(model):
    return AutoModelForCausalLM.from_pretrained(model).eval().requires_grad_(False)


def streams(count):
    return torch.tensor([[1, *b"the cat sat on the mat; "], [1, *b"a bird sang in the tree "]]).repeat(1, count)


def test_losses_are_of_the_next_token_and_a_context_is_bounded(plain):
    row = streams(3)[:, :65]
    none = Reader(plain, LearnerContender("no levels", "none"), 32)
    lost = none.read(row)
    logs = torch.cat([plain(row[:, at : at + 32]).logits for at in (0, 32)], 1).log_softmax(-1)
    assert torch.allclose(lost, -logs.gather(-1, row[:, 1:, None])[..., 0], atol=1e-5)
    still = Reader(plain, LearnerContender("still", "levels", [LEVEL | {"lr": 1e-9}], {}, {}), 32)
    assert torch.allclose(still.read(row), lost, atol=1e-5)
    assert none.nbytes == 0


def test_a_slow_average_that_never_moves_is_one_level_and_one_that_follows_at_once_keeps_all(plain):
    """Share 0: the fast level alone. Share 1 at every chunk: what is learned never fades."""
    row = streams(6)[:, :129]

    def learned(options, level=LEVEL):
        reader = Reader(plain, LearnerContender("x", "levels", [level], {}, options), 64)
        reader.read(row)
        return reader, reader.cache.levels.levels[0].deltas

    for options, same in (({"slow": 32, "share": 0.0}, LEVEL), ({"slow": 16, "share": 1.0}, LEVEL | {"decay": 0.0})):
        reader, found = learned(options)
        _, expected = learned({}, same)
        assert max(float(d.abs().max()) for d in expected) > 1e-3
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert reader.nbytes == reader.cache.nbytes + sum(d.nbytes for d in found)


def test_with_sessions_the_slow_level_alone_stays(plain):
    reader = Reader(
        plain, LearnerContender("x", "levels", [LEVEL], {}, {"slow": 32, "share": 0.5, "sessions": True}), 64
    )
    reader.read(streams(6)[:, :129])
    before = reader.cache.levels.levels[0].deltas
    reader.end_part()
    after = reader.cache.levels.levels[0].deltas
    assert all(torch.equal(a, s) for a, s in zip(after, reader.slow.held, strict=True))
    assert not torch.equal(before[0], after[0])
    reader.read(streams(6)[:, 128:])  # it goes on


def test_each_stream_goes_on_with_the_snapshot_that_predicts_it_best(plain):
    """Two streams read two kinds of text in opposite order; each takes up its own snapshot of what comes back."""
    level = {"chunk_size": 16, "lr": 0.02, "optimizer": "adamw", "rank": 4, "decay": 0.0}
    kinds = [torch.tensor([*b"the cat sat on a mat; "] * 9)[:192], torch.tensor([*b"0=1;7=4;96:7|40=1;7=4;"] * 9)[:192]]
    reader = Reader(plain, LearnerContender("x", "levels", [level], {}, {"snapshots": True}), 64, 1)
    for order in ((0, 1), (1, 0)):
        reader.read(torch.stack([torch.cat([torch.tensor([1]), kinds[k]]) for k in order]))
        reader.end_part()
    held = reader.snapshots.held
    reader.read(torch.stack([kinds[0][: FIRST + 2]] * 2))
    reader.snapshots.recall(reader, torch.stack([kinds[0][:FIRST]] * 2))
    now = reader.cache.levels.levels[0].deltas
    assert all(torch.equal(d[0], first[0]) and torch.equal(d[1], second[1]) for d, first, second in zip(now, *held))
    rows = torch.stack([kinds[0][:128]] * 2)
    lost = reader.known(rows)
    without = reader.losses(rows, None)
    assert torch.equal(lost[:, :FIRST], reader.snapshots.losses(reader, rows)[0, :, :FIRST])
    assert torch.allclose(lost[:, :FIRST], without[:, :FIRST], atol=1e-5)
    assert (lost[:, FIRST:].sum(1) < without[:, FIRST:].sum(1)).all()
    assert reader.nbytes == reader.cache.nbytes + 2 * sum(d.nbytes for d in now)


def test_with_replay_what_was_read_is_read_again(plain):
    """Of a stream of one context, replay is the context read twice; its losses are those of the first reading."""
    row = streams(3)[:, :66]
    readers = [Reader(plain, LearnerContender("x", "levels", [LEVEL], {}, o), 64) for o in ({}, {"replay": 1})]
    lost = [reader.read(row[:, :65]) for reader in readers]
    readers[0].read(row[:, :65])
    once, again = ([*r.cache.levels.levels[0].deltas] for r in readers)
    assert torch.allclose(lost[0], lost[1], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(once, again, strict=True))
    assert readers[1].nbytes == readers[0].nbytes + 2 * 65 * TOKEN_BYTES


def test_consolidation_holds_what_mattered_where_it_was(plain):
    """Each stream's Fisher information is of its own passages; the pull lies between the anchor and the step."""
    level = {"chunk_size": 16, "lr": 0.01, "optimizer": "adamw", "rank": None, "decay": 0.0}
    reader = Reader(plain, LearnerContender("x", "levels", [level], {}, {"ewc": 1e3, "fisher": 1}), 64, 1)
    row = streams(6)[:, :129]
    reader.read(row)
    reader.end_part()
    held = reader.held
    # one passage as long as all that is read: its gradient is the text's
    whole = Consolidation(1.0, 1, 127)
    whole.keep(row[:, 1:])
    deltas = reader.cache.levels.levels[0].deltas
    whole.consolidate(reader.model, deltas)
    for stream in (0, 1):
        alone = Consolidation(1.0, 1, 127)
        alone.keep(row[stream : stream + 1, 1:])
        alone.consolidate(reader.model, tuple(d[stream : stream + 1] for d in deltas))
        for a, b in zip(whole.fisher, alone.fisher, strict=True):
            assert torch.allclose(a[stream], b[0], rtol=1e-3, atol=1e-9)
    moved = tuple(d + 0.1 for d in deltas)
    for d, m, f, p in zip(deltas, moved, held.fisher, held.pulled(moved), strict=True):
        assert torch.allclose(p, d + 0.1 / (1 + 1e3 * f), atol=1e-6) and float(f.min()) >= 0 < float(f.max())
        assert not torch.equal(p, m)
    assert whole.text == [] and held.nbytes == 2 * sum(d.nbytes for d in deltas)


def test_a_long_context_and_a_search_put_what_was_read_first(plain):
    row, decode = streams(20)[:, :257], byte_tokenizer().decode
    options = {"piece": 16, "latest": 32, "passages": 0, "size": 0}
    long = Prompted(plain, options, decode, 1)
    lost = long.read(row)
    begun = torch.cat([torch.ones(2, 1, dtype=torch.long), row[:, 209:257]], 1)  # 32 latest, then the last piece
    assert torch.allclose(lost[:, -16:], nats(plain(begun[:, :-1]).logits, begun[:, 1:])[:, -16:], atol=1e-5)
    asked = torch.cat([torch.ones(2, 1, dtype=torch.long), row[:, -31:], torch.ones(2, 1, dtype=torch.long),
                       row[:, 1:17]], 1)  # fmt: skip
    known = long.known(row[:, 1:17])
    assert torch.allclose(known, nats(plain(asked[:, :-1]).logits, asked[:, 1:])[:, -16:], atol=1e-5)
    assert long.nbytes == 2 * 32 * TOKEN_BYTES

    search = Prompted(plain, options | {"latest": QUERY, "passages": 1, "size": 8}, decode, 1)
    head = torch.tensor([1, *b"quince. the rest is other text about something else and so on, without that fruit. "])
    search.read(torch.stack([head[:81]] * 2))
    question = torch.tensor([[*b"what? quince? " * 6]] * 2)
    found = search.known(question)
    near = torch.cat([torch.tensor([[1, 1, *b"quince."]] * 2), question[:, :80]], 1)
    assert torch.allclose(found[:, 64:80], nats(plain(near[:, :-1]).logits, near[:, 1:])[:, -16:], atol=1e-5)
    assert search.nbytes == 2 * 81 * TOKEN_BYTES


def test_figures_are_differences_to_the_model_without_levels(tmp_path):
    settings = defaults().changed(seeds=[0, 1])

    def row(job):
        gain = {report.BASE: 0.0, report.DEFAULT: 0.2}.get(job.contender, 0.1)
        learns = job.contender != report.BASE
        times = range(8 if learns else 1)
        return {
            "tokens": 196_608, "state_bytes": 7_000_000, "wall_seconds": 9.0,
            "windows": [[2.0 - gain, 3.0 - 2 * gain]] * (settings.sight + 8),
            "known": [[[2.0 - gain * t, 2.0 - gain * t]] * 5 for t in times],
            "other": [[[1.0 + 0.01 * t, 1.0]] * 2 for t in times],
        }  # fmt: skip

    summary = summarize(settings, settings.contenders, row)
    assert len(plan(settings, settings.contenders, row)) == 2 * len(settings.contenders)
    first = {c["contender"]: c for c in summary["found"][0]["contenders"]}
    default, other = first[report.DEFAULT], first["2 levels"]
    assert default["stream"]["values"] == pytest.approx([0.2, 0.4])
    assert other["stream above default"]["values"] == pytest.approx([-0.1, -0.2])
    assert default["learned"]["mean"] == pytest.approx(0.2 * (1 + 2 + 3 + 4) / 4)
    assert default["kept"]["mean"] == pytest.approx(0.2 * 5) and default["end"]["mean"] == pytest.approx(0.2 * 7)
    assert default["harm"]["values"] == pytest.approx([0.07, 0.0]) and default["worst harm"] == pytest.approx(0.07)
    assert "| default | smollm2-135m | 196,608 | 0.300 ± 0.141 |" in report.table(summary)
    report.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
