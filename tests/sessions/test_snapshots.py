"""What was known at documents' ends is kept, and taken up again where it predicts best."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from nestling import Level
from nestling.cms.cache import LevelsCache
from nestling.generation import load_state
from nestling.sessions.scores import score
from nestling.sessions.snapshots import AHEAD, NOTHING, nearest, recall_nearest

KINDS = {"a": "the cat sat on a mat. ", "b": "0=1;7=4;96:7|40=1;7=4;"}
LEVELS = (Level(16, lr=0.02, optimizer="adamw"),)


@pytest.fixture
def model(small_model):
    return small_model(LEVELS)


@pytest.fixture
def shelf(tmp_path):
    """Documents of two kinds, and one of the first kind again."""
    paths = []
    for name, kind in (("1.txt", "a"), ("2.txt", "b"), ("3.txt", "a")):
        path = tmp_path / name
        path.write_text(KINDS[kind] * 6)
        paths.append(path)
    return paths


def learned(cache):
    return [t for s in cache.levels.levels for t in tree_leaves((s.deltas, s.slots)) if isinstance(t, torch.Tensor)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(learned(a), learned(b), strict=True))


def test_a_document_begins_with_what_was_known_of_its_kind(model, session, shelf, tokenizer):
    made = session(model, shelf, snapshots=4, probe=64)
    rows = made.run()["documents"]
    assert [row["recalled"] for row in rows] == [None, NOTHING, "1.txt"]
    plain = session(model, shelf, "plain.state", probe=64).run()["documents"]
    assert rows[2]["before"]["bits_per_byte"] < plain[2]["before"]["bits_per_byte"]
    assert list(made.cache.snapshots) == ["1.txt", "2.txt", "3.txt"]
    assert not made.cache.levels.tokens.shape[1] and made.cache.get_seq_length() == made.result()["tokens"]
    ids = tokenizer(KINDS["b"], add_special_tokens=False).input_ids
    kept = load_state(made.path, model)
    assert recall_nearest(model, kept, ids, 257, nothing=False) == "2.txt"
    assert same(kept, made.cache.snapshots["2.txt"])


def test_what_was_learned_is_taken_only_where_it_is_surely_ahead(model, session, shelf, tokenizer):
    made = session(model, shelf[:1], probe=0)
    made.run()
    known, other = (tokenizer(KINDS[kind], add_special_tokens=False).input_ids for kind in "ab")
    assert nearest(model, made.cache, known, 257) is None and nearest(model, made.cache, other, 257) == NOTHING
    ahead = (score(model, made.cache, known, 257, None) - score(model, None, known, 257, None)).cumsum(0)
    few = int((ahead < AHEAD).sum())  # tokens that it is ahead on, but by less
    assert few and ahead[few - 1] > 0
    assert nearest(model, made.cache, known[:few], 257) == NOTHING
    assert nearest(model, made.cache, known[: few + 1], 257) is None
    assert nearest(model, made.cache, other, 257, nothing=False) is None
    # what is read and not counted decides nothing
    assert nearest(model, made.cache, known[: few + 1], 257, given=few + 1) == NOTHING
    assert nearest(model, made.cache, known[: few + 1], 257, given=0) is None
    assert nearest(model, LevelsCache(), other, 257) is None and nearest(model, made.cache, [], 257) is None


def test_of_two_alike_the_earlier_goes_and_snapshots_go_into_the_next_session(model, session, shelf, write):
    first = session(model, shelf, snapshots=2, probe=0)
    first.run()
    assert list(first.cache.snapshots) == list(first.result()["snapshots"]) == ["2.txt", "3.txt"]
    again = session(model, [write("4.txt", 300)], snapshots=2, probe=0)
    again.run()
    assert len(again.cache.snapshots) == 2 and list(again.cache.snapshots)[-1] == "4.txt"


def test_killed_anywhere_snapshots_are_the_same(small_model, session, shelf):
    whole = session(small_model(LEVELS), shelf, "whole.state", snapshots=3, save_every=1)
    expected = whole.run()
    assert 300 < expected["tokens"] < 900

    def stop(after):
        def show(made):
            if made.notes.tokens > after:
                raise KeyboardInterrupt

        return show

    for after in (100, 140, 250, 300):
        with pytest.raises(KeyboardInterrupt):
            session(small_model(LEVELS), shelf, snapshots=3, save_every=5, show=stop(after)).run()
    last = session(small_model(LEVELS), shelf, snapshots=3, save_every=5)
    result = last.run()
    assert last.resumed and list(last.cache.snapshots) == list(whole.cache.snapshots)
    assert same(last.cache, whole.cache)
    for name, kept in whole.cache.snapshots.items():
        assert same(kept, last.cache.snapshots[name])
    assert [r["recalled"] for r in result["documents"]] == [r["recalled"] for r in expected["documents"]]
    assert [r["after"] for r in result["documents"]] == [r["after"] for r in expected["documents"]]


def test_bad_numbers_are_refused(model, session, shelf):
    with pytest.raises(ValueError, match="snapshots must not be negative"):
        session(model, shelf, snapshots=-1)
