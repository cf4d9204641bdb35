"""Levels and their schedule (decision D10)."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.schedule import Level, Schedule


def test_kinds_follow_context_and_outer_step():
    schedule = Schedule(
        [Level(16), Level(64), Level(), Level(1024), Level(math.inf)], context_length=128, tokens_per_step=512
    )
    assert schedule.kinds == ("fast", "fast", "outer", "slow", "frozen")
    assert (schedule.fast, schedule.slow, schedule.frozen) == ((0, 1), (3,), (4,))
    assert schedule.segment == 16


def test_a_context_as_long_as_the_chunk_is_not_longer():
    assert Schedule([Level(128)], 128, 128).kinds == ("outer",)
    assert Schedule([Level(128)], 129, 129).kinds == ("fast",)
    assert Schedule([Level(128)], 128, 127).kinds == ("slow",)


def test_a_learning_rate_of_zero_freezes():
    assert Schedule([Level(16, lr=0.0), Level(32)], 64, 64).kinds == ("frozen", "fast")
    assert Schedule([Level(None, lr=0.0)], 64, 64).due(0, 64) == ()


def test_segment_is_the_context_without_fast_levels():
    assert Schedule([Level(), Level(1024)], 128, 512).segment == 128


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(2, 5)),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=30),
)
def test_due_counts_every_crossed_boundary_once(sizes, steps):
    """However the stream is cut, a level is due in a call exactly if a multiple of its chunk size lies in it."""
    fast, slow = sizes[0], sizes[0] * sizes[1]
    schedule = Schedule([Level(fast), Level(slow)], context_length=slow + 1, tokens_per_step=slow + 1)
    at = 0
    for step in steps:
        expected = tuple(
            i for i, chunk in enumerate((fast, slow)) if any(t % chunk == 0 for t in range(at + 1, at + step + 1))
        )
        assert schedule.due(at, at + step) == expected
        at += step


def test_a_slow_level_steps_once_per_chunk_whatever_the_step_size():
    schedule = Schedule([Level(), Level(300), Level(900)], context_length=32, tokens_per_step=128)
    count = [0, 0, 0]
    for step in range(90):
        for level in schedule.due(step * 128, step * 128 + 128):
            count[level] += 1
    assert count == [90, 90 * 128 // 300, 90 * 128 // 900]


def test_table_names_every_level():
    schedule = Schedule([Level(16, lr=0.5), Level(), Level(2048), Level(math.inf)], 64, 512)
    lines = str(schedule).splitlines()
    assert lines[0].split()[:3] == ["level", "kind", "chunk_size"]
    assert "4 per sequence of 64 tokens" in lines[1]
    assert "every outer step" in lines[2]
    assert "every 4 outer steps" in lines[3]
    assert "never" in lines[4]


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ([], "empty"),
        ([Level(16), Level(16)], "one frequency"),
        ([Level(), Level()], "one frequency"),
        ([Level(32), Level(16)], "sort"),
        ([Level(16), Level(40)], "not a multiple"),
        ([Level(128)], "can never be updated every 128 tokens"),
        ([Level(), Level(512)], "a frequency of its own"),
        ([Level(), Level(16)], "a frequency of its own"),
        ([Level(8192)], "never be updated: chunk_size 8192"),
        ([{"chunk_sise": 16}], "no field 'chunk_sise'"),
    ],
)
def test_impossible_levels_are_refused(levels, says):
    with pytest.raises(ValueError, match=says):
        Schedule(levels, context_length=64, tokens_per_step=512, total_tokens=4096)


@pytest.mark.parametrize(("before", "after"), [(4, 3), (-1, 2)])
def test_the_stream_does_not_go_back(before, after):
    with pytest.raises(ValueError, match="forward"):
        Schedule([Level(16)], 64, 64).due(before, after)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"chunk_size": 0}, ValueError, "at least 1"),
        ({"chunk_size": 1.5}, TypeError, "whole number"),
        ({"chunk_size": True}, TypeError, "whole number"),
        ({"chunk_size": -math.inf}, TypeError, "whole number"),
        ({"chunk_size": "16"}, TypeError, "whole number"),
        ({"lr": -1.0}, ValueError, "not negative"),
        ({"lr": math.nan}, ValueError, "finite"),
        ({"lr": "fast"}, TypeError, "number"),
        ({"optimizer": "sgdx"}, ValueError, "one of gd"),
    ],
)
def test_a_level_checks_its_fields(fields, error, says):
    with pytest.raises(error, match=says):
        Level(**fields)


@pytest.mark.parametrize("level", [Level(16, lr=0.3), Level(), Level(math.inf), Level(512.0)])
def test_a_level_survives_json(level):
    assert Level.from_dict(json.loads(json.dumps(level.to_dict(), allow_nan=False))) == level
