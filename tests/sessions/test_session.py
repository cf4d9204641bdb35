import json
import math
import re

import pytest
import torch
from torch.utils._pytree import tree_leaves

from nestling import Level
from nestling.generation import TextGenerator, load_state, save_state
from nestling.models import HopeConfig, HopeForCausalLM
from nestling.sessions import Stopped, page
from nestling.sessions.series import Series


def tensors(session):
    """All tensors of a session's state."""
    layers = [(layer.keys, layer.values) for layer in session.cache.layers]
    levels = [vars(s) for s in session.cache.levels.levels if s is not None]
    return [t for t in tree_leaves((layers, levels, session.cache.levels.tokens)) if isinstance(t, torch.Tensor)]


def assert_same(a, b):
    ours, theirs = tensors(a), tensors(b)
    assert len(ours) == len(theirs) > 4
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs))


def measures(result):
    """A result without what depends on the clock and on the machine."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result["documents"]]
    return rows, result["levels"], result["held_out"], result["tokens"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Short texts of many pieces."""
    for name in ("PIECE", "PIPE_PIECE"):
        monkeypatch.setattr(f"nestling.sessions.session.{name}", 128)


class Killed(Exception):
    pass


def killer(after):
    """Raises after so many calls, as a kill between two checkpoints would."""
    calls = iter(range(after))

    def show(session):
        if next(calls, None) is None:
            raise Killed

    return show


def test_one_call_over_the_same_stream_gives_the_same_levels(model, tokenizer, write, session):
    paths = [write("a.txt"), write("b.txt", 300)]
    made = session(model, paths, context=64)
    result = made.run()
    stream = [i for path in paths for i in [tokenizer.eos_token_id, *path.read_bytes()]]
    with torch.no_grad():
        out = model(torch.tensor([stream]), use_cache=True)
        model.finish(out.past_key_values, torch.tensor([[tokenizer.eos_token_id]]))
    for ours, whole in zip(made.cache.levels.levels, out.past_key_values.levels.levels):
        assert ours.updates == whole.updates > 0
        for a, b in zip(ours.deltas, whole.deltas):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    logs = out.logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(stream[1:])[:, None])[:, 0]
    size = paths[0].stat().st_size
    first = -logs[:size].double().mean().item()
    assert result["documents"][0]["reading"]["nats_per_token"] == pytest.approx(first, rel=1e-5)
    assert result["documents"][0]["reading"]["bits_per_byte"] == pytest.approx(first / math.log(2), rel=1e-5)
    assert [row["tokens"] for row in result["documents"]] == [size, paths[1].stat().st_size]
    assert [level["updates"] for level in result["levels"]] == [s.updates for s in made.cache.levels.levels]
    assert result["tokens"] == len(stream)


def test_a_text_shorter_than_a_chunk_is_learned_too(small_model, tokenizer, write, session):
    model = small_model((Level(64, lr=0.3),))
    path = write("a.txt", 20)
    made = session(model, [path])
    row = made.run()["documents"][0]
    assert row["tokens"] < 64 and row["levels"][0]["updates"] == 1
    assert row["after"]["nats_per_token"] < row["before"]["nats_per_token"]
    more = session(model, [write("b.txt", 200)])  # goes on from there, with a chunk of its own
    assert more.run()["levels"][0]["updates"] == -(-(more.notes.tokens) // 64)


def test_before_after_and_control_are_scores_of_the_same_tokens(model, tokenizer, write, session, small_model):
    first, second = write("a.txt"), write("b.txt")
    result = session(model, [first, second], probe=100, control=True).run()
    a, b = result["documents"]
    assert a["before"] == a["control"] != a["after"]  # nothing was known yet
    assert b["before"] != b["control"]
    assert a["after"]["bits_per_byte"] < a["before"]["bits_per_byte"]
    assert a["probe_tokens"] == 100
    ids = [tokenizer.eos_token_id, *second.read_bytes()[:100]]
    plain = small_model()
    plain.learning = False
    with torch.no_grad():
        logs = plain(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])
    assert b["control"]["nats_per_token"] == pytest.approx(-logs.mean().item(), rel=1e-5)
    best = a["examples"][0]
    assert best["after"] > best["before"]
    assert session(model, [first], "other.state", probe=0).run()["documents"][0]["before"] is None


def test_a_held_out_text_is_scored_and_never_learned(model, write, session):
    held = list(write("h.txt").read_bytes()[:80])
    made = session(model, [write("a.txt"), write("b.txt")], held_out=held)
    rows = made.run()["held_out"]
    assert [row["behind"] for row in rows] == [None, "a.txt", "b.txt"]
    assert rows[2]["bits_per_byte"] < rows[0]["bits_per_byte"]
    assert rows[2]["examples"] and "examples" not in rows[1]
    other = session(model, [write("a.txt"), write("b.txt")], "other.state")
    other.run()
    assert_same(made, other)


@pytest.mark.parametrize("save_every", [1, 3])
def test_killed_anywhere_and_resumed_is_bit_for_bit_the_same(model, write, session, save_every, small_model):
    texts = [write("a.txt"), write("b.txt", 100), write("c.txt", 300)]
    options = dict(context=32, probe=40, control=True, save_every=save_every, held_out=[65, 66, 67])
    whole = session(model, texts, "whole.state", **options)
    expected = measures(whole.run())
    killed = session(model, texts, **options)
    calls = 0
    for after in (2, 15, 40, 1, 7, 10_000):
        killed = session(small_model(), texts, show=killer(after), **options)
        assert killed.resumed or not calls
        try:
            result = killed.run()
        except Killed:
            calls += after
    assert killed.resumed
    assert measures(result) == expected
    assert_same(killed, whole)


def test_a_killed_pipe_goes_on_from_its_journal(model, write, session, tmp_path):
    content = write("a.txt", 1200).read_bytes()
    whole = session(model, ["-"], "whole.state", piped=content, probe=30, save_every=25)
    expected = measures(whole.run())
    kept = session(model, ["-"], piped=content[:750], probe=30, save_every=25, show=killer(65))
    with pytest.raises(Killed):
        kept.run()
    journal = tmp_path / "my.state.journal"
    read = len(journal.read_bytes().split(b"\n", 1)[1])
    assert 8 * 65 < read <= 750
    again = session(model, ["-"], piped=content[read:], probe=30, save_every=25)
    assert again.resumed and 400 <= again.notes.tokens <= 8 * 65
    assert measures(again.run()) == expected
    assert_same(again, whole)
    assert not journal.exists()


def test_a_pipe_reads_as_the_file_does(model, write, session):
    path = write("a.txt", 700)
    file = session(model, [path], "file.state")
    pipe = session(model, ["-"], "pipe.state", piped=path.read_bytes())
    assert file.run()["tokens"] == pipe.run()["tokens"]
    assert_same(file, pipe)


def test_what_was_learned_goes_on_with_new_texts(model, tokenizer, write, session):
    a, b = write("a.txt"), write("b.txt")
    session(model, [a]).run()
    assert session(model, [a]).run()["resumed"]  # read already
    with pytest.raises(ValueError, match=r"has read these texts already with control False.*--new-session"):
        session(model, [a], control=True)
    second = session(model, [b])
    assert not second.resumed
    row = second.run()["documents"][0]
    cache, end = None, tokenizer.eos_token_id
    with torch.no_grad():  # the same by hand: each text is learned to its end, the second in the first's context
        for path in (a, b):
            cache = model(torch.tensor([[end, *path.read_bytes()]]), past_key_values=cache).past_key_values
            model.finish(cache, torch.tensor([[end]]))
    assert second.cache.levels.position == cache.levels.position
    for ours, whole in zip(second.cache.levels.levels, cache.levels.levels):
        assert ours.updates == whole.updates
        for mine, theirs in zip(ours.deltas, whole.deltas):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    again = session(model, [b], new=True)
    assert not again.resumed and again.run()["documents"][0]["before"]["bits_per_byte"] < row["before"]["bits_per_byte"]


def test_a_state_of_generate_is_gone_on_from_and_the_other_way_round(model, tokenizer, write, session, tmp_path):
    session(model, [write("a.txt")]).run()
    cache = load_state(tmp_path / "my.state", model)
    writer = TextGenerator(model, tokenizer, cache, seed=0)
    text = "".join(writer.stream("the cat", 12))
    assert text
    save_state(tmp_path / "my.state", writer.state, model)
    made = session(model, [write("b.txt")])
    assert not made.resumed and made.cache.levels.position > 300


def test_a_request_to_stop_leaves_a_checkpoint(model, write, session):
    class Stop:
        def is_set(self):
            return True

    texts = [write("a.txt")]
    with pytest.raises(Stopped):
        session(model, texts).run(Stop())
    again = session(model, texts)
    assert again.resumed and again.notes.tokens == 8
    whole = session(model, texts, "whole.state")
    assert measures(whole.run()) == measures(again.run())


def test_two_sessions_do_not_write_one_file(model, small_model, write, session):
    tried = []

    def intrude(first):
        before = first.path.read_bytes()
        with pytest.raises(ValueError, match="written by another session"):
            session(small_model(), [write("b.txt")], new=True).run()
        assert first.path.read_bytes() == before
        tried.append(first)

    session(model, [write("a.txt", 60)], show=intrude).run()
    assert tried
    session(small_model(), [write("b.txt")], new=True).run()  # now anybody may


def test_changed_texts_or_settings_are_refused(model, write, session):
    texts = [write("a.txt"), write("b.txt")]
    with pytest.raises(Killed):
        session(model, texts, save_every=1, show=killer(50)).run()
    with pytest.raises(ValueError, match=r"stopped in document 2 of 2 with probe 512, now given as 10"):
        session(model, texts, probe=10)
    with pytest.raises(ValueError, match=r"changed since \(c.txt\)"):
        session(model, [*texts, write("c.txt")])
    with pytest.raises(ValueError, match="their order"):
        session(model, texts[::-1])
    write("b.txt", seed=1)
    with pytest.raises(ValueError, match=r"changed since \(b.txt\).*--new-session"):
        session(model, texts)
    assert not session(model, texts, new=True).resumed


def test_bad_models_states_and_contexts_are_refused(model, write, session, tmp_path, small_model):
    a = write("a.txt")
    with pytest.raises(ValueError, match="no levels that learn"):
        session(small_model([Level(math.inf)]), [a])
    with pytest.raises(ValueError, match=r"no multiple of the fastest level's chunk_size 8: take 16"):
        session(model, [a], context=20)
    with pytest.raises(ValueError, match="max_position_embeddings 128"):
        session(model, [a], context=256)
    with pytest.raises(ValueError, match="probe must not be negative"):
        session(model, [a], probe=-1)
    with pytest.raises(ValueError, match="standard input is empty"):
        session(model, ["-"]).run()
    session(model, [a]).run()
    before = (tmp_path / "my.state").read_bytes()
    with pytest.raises(ValueError, match="another model"):
        session(small_model(seed=1), [a])
    (tmp_path / "my.state").write_bytes(before[:-9])
    with pytest.raises(ValueError, match="damaged"):
        session(model, [a])
    at = before.index(b"a.txt")
    (tmp_path / "my.state").write_bytes(before[:at] + b"b" + before[at + 1 :])
    with pytest.raises(ValueError, match="damaged"):
        session(model, [a])


def test_garbage_in_a_pipe_stops_there_and_keeps_the_state(model, write, session, tmp_path):
    text = write("a.txt").read_bytes()
    with pytest.raises(ValueError, match="standard input is no text: byte 0xff"):
        session(model, ["-"], piped=text + b"\xff", save_every=1, probe=0).run()
    assert session(model, ["-"], probe=0).notes.tokens > 128


def test_refused_updates_are_reported_and_change_nothing(write, session, small_model):
    model = small_model([Level(8, lr=0.3)])
    with torch.no_grad():  # one byte that makes everything after it, in its context, not a number
        model.model.embed_tokens.weight[ord("Z")] = math.nan
    good, bad = write("a.txt", 64), write("bad.txt", 64)
    bad.write_text("Z" + "a" * 62)
    made = session(model, [good, bad, write("c.txt", 64)], context=8, probe=8)
    result = made.run()
    rows = result["documents"]
    assert [row["levels"][0]["refused"] > 0 for row in rows] == [False, True, False]
    assert rows[1]["not_finite"] > 0 and rows[1]["before"] == {"nats_per_token": None, "bits_per_byte": None}
    assert rows[2]["after"]["bits_per_byte"] > 0
    assert all(d.isfinite().all() for d in made.cache.levels.levels[0].deltas)
    assert sum(p[4] for p in made.notes.norms[0].points) == result["levels"][0]["refused"]


def test_memory_and_state_are_bounded_by_the_context(model, write, session, tmp_path):
    made = session(model, [write("a.txt", 600)], context=32, save_every=20)
    lengths, sizes = [], []

    def show(session):
        lengths.append(max(layer.keys.shape[-2] for layer in session.cache.layers if layer.is_initialized))
        sizes.append(session.cache.nbytes)

    made._show = show
    result = made.run()
    assert max(lengths) <= 32 and len(set(sizes[8:])) == 1
    assert result["memory"]["first_half"] > 0 and result["memory"]["ratio"] > 0
    assert len(made.notes.loss.points) <= Series().limit


@pytest.mark.parametrize("mixer", ["attention", "selfmod", "window"])
def test_a_hope_model_that_was_killed_goes_on_bit_for_bit(write, session, mixer):
    levels = [{"chunk_size": 8, "lr": 0.1}, {"chunk_size": 16, "lr": 0.1, "surprise": 0.5}, {"chunk_size": None}]
    config = HopeConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, cms_levels=levels,
        **({"mixers": ["selfmod", "window_attention"]} if mixer == "window" else {"mixer": mixer}),
    )  # fmt: skip
    model, texts = HopeForCausalLM(config), [write("a.txt", 300), write("b.txt", 100)]
    whole = session(model, texts, "whole.state", save_every=4)
    expected = measures(whole.run())
    assert whole.notes.settings["context"] == (2048 if mixer == "attention" else 0)
    first, second = (level["updates"] for level in whole.result()["levels"])
    assert first == 51 and 6 <= second < 25  # the last of a few tokens; the second chooses its boundaries
    for after in (11, 23):
        with pytest.raises(Killed):
            session(model, texts, save_every=4, show=killer(after)).run()
    again = session(model, texts, save_every=4)
    assert again.resumed and again.notes.tokens > 200
    assert measures(again.run()) == expected
    for ours, theirs in zip(again.cache.levels.levels, whole.cache.levels.levels):
        assert ours is None or all(torch.equal(a, b) for a, b in zip(ours.deltas, theirs.deltas))


def test_the_page_has_what_was_measured_and_asks_for_nothing_else(model, write, session, tmp_path):
    held = list(write("h.txt").read_bytes()[:40])
    made = session(model, [write("a.txt"), write("b.txt")], held_out=held, control=True, probe=50)
    result = made.run()
    text = page(made, tmp_path / "a" / "page.html", "a </script> <model>")
    assert (tmp_path / "a" / "page.html").read_text() == text
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    values = json.loads(found[1])
    assert values["model"] == "a </script> <model>"
    assert [row["name"] for row in values["documents"]] == ["a.txt", "b.txt"]
    assert values["documents"][1]["after"] == result["documents"][1]["after"]
    assert len(values["held_out"]) == 3 and values["examples"][0]["title"].startswith("held-out")
    assert [level["updates"] for level in values["levels"]] == [level["updates"] for level in result["levels"]]
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text.replace(found[1], ""))
