import dataclasses
import inspect
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nestling.nested_system
from nestling.nested_system import AssociativeMemory, Frequency, NestedSystem, Solver, Transfer
from nestling.nested_system.frequency import ALWAYS, NEVER
from nestling.nested_system.reading.order import faster, order


def memory(name, frequency, needs=(), kind="memory", lifetime="model"):
    return AssociativeMemory(name, kind, "k", "v", "L", frequency=frequency, needs=needs, lifetime=lifetime)


def names(levels):
    return [{m.name for m in level.memories} for level in levels]


@pytest.mark.parametrize(
    ("frequency", "text"),
    [
        (Frequency.every(1), "1 / token"),
        (Frequency.every(64), "1 / 64 tokens"),
        (Frequency(5, "step"), "5 / step"),
        (Frequency.every(65536, "step"), "1 / 65,536 steps"),
        (Frequency(5, "step").times(Fraction(1, 16)), "5 / 16 steps"),
        (ALWAYS, "∞"),
        (NEVER, "0"),
        (Frequency.every(math.inf), "0"),
    ],
)
def test_a_frequency_reads_as_one_would_say_it(frequency, text):
    assert str(frequency) == text
    assert Frequency.from_json(frequency.to_json()) == frequency


@pytest.mark.parametrize(
    ("rate", "unit", "error"),
    [(-1, "token", ValueError), (1, "epoch", ValueError), (0.5, "token", TypeError), (True, "step", TypeError)],
)
def test_a_wrong_frequency_is_refused(rate, unit, error):
    with pytest.raises(error, match="rate|unit"):
        Frequency(rate, unit)


def test_steps_become_tokens_when_a_step_is_known():
    assert Frequency(5, "step").per_token(10) == Fraction(1, 2)
    assert Frequency(5, "step").per_token() is None
    assert ALWAYS.per_token() == math.inf


def test_order_is_by_frequency_then_by_who_needs_whom():
    m, v = memory("m", Frequency(1, "step")), memory("v", Frequency(1, "step"))
    w = memory("w", Frequency(1, "step"), needs=("m", "v"))
    fast = memory("fast", Frequency(1), lifetime="context")
    levels = order([w, m, memory("frozen", NEVER), v, memory("attention", ALWAYS), fast])
    assert names(levels) == [{"attention"}, {"fast"}, {"m", "v"}, {"w"}, {"frozen"}]
    assert [level.index for level in levels] == [1, 2, 3, 4, 5]


def test_equal_and_independent_memories_share_the_slowest_level_they_can():
    m = memory("m", Frequency(1, "step"), kind="momentum")
    plain, momentum = memory("plain", Frequency(1, "step")), memory("w", Frequency(1, "step"), needs=("m",))
    assert names(order([plain, m, momentum])) == [{"m"}, {"plain", "w"}]


def test_the_clock_of_steps_meets_that_of_a_context_in_no_case():
    inside = memory("inside", Frequency.every(64), lifetime="context")
    often, slow = memory("often", Frequency(500, "step")), memory("slow", Frequency.every(65))
    assert names(order([slow, often, inside])) == [{"inside"}, {"often"}, {"slow"}]


def test_what_waits_for_nothing_stands_with_most_of_its_speed():
    m = memory("m", Frequency(1, "step"), kind="momentum")
    weights = [memory(f"w{i}", Frequency(1, "step"), needs=("m",), kind="map") for i in range(3)]
    average = memory("average", Frequency(1, "step"), needs=("w0", "w1", "w2"), kind="average")
    statistics = memory("statistics", Frequency(1, "step"), kind="statistics")
    assert names(order([m, *weights, average, statistics])) == [{"m"}, {"w0", "w1", "w2", "statistics"}, {"average"}]


def test_a_kind_stays_together_where_its_needs_allow():
    a, b = memory("a", Frequency(1), kind="momentum"), memory("b", Frequency(1), kind="momentum")
    w = memory("w", Frequency(1), needs=("a",))  # nothing waits for b: alone it would stand beside w
    assert names(order([a, b, w])) == [{"a", "b"}, {"w"}]


def test_a_step_is_slower_than_a_context_and_faster_than_what_outlasts_one():
    inside = memory("inside", Frequency.every(64), lifetime="context")
    step, slow = memory("step", Frequency(1, "step")), memory("slow", Frequency.every(65536))
    assert names(order([slow, step, inside])) == [{"inside"}, {"step"}, {"slow"}]
    assert names(order([slow, step, inside], tokens_per_step=131072)) == [{"inside"}, {"slow"}, {"step"}]
    assert names(order([slow, step], tokens_per_step=65536)) == [{"slow", "step"}]


def test_faster_is_definition_2():
    m, w = memory("m", Frequency(1)), memory("w", Frequency(1), needs=("m",))
    assert faster(m, w) and not faster(w, m)
    assert not faster(m, memory("n", Frequency(1))) and faster(m, memory("n", Frequency.every(2)))


def test_memories_that_need_one_another_are_refused():
    a, b = memory("a", Frequency(1), needs=("b",)), memory("b", Frequency(1), needs=("a",))
    with pytest.raises(ValueError, match="needs its own state"):
        order([a, b])


@given(st.lists(st.tuples(st.sampled_from([1, 2, 64]), st.sampled_from(["token", "step"])), min_size=1, max_size=8))
def test_order_is_total_and_keeps_every_memory(periods):
    every = [Frequency.every(n, unit) for n, unit in periods]
    made = [memory(f"m{i}", f, needs=tuple(f"m{j}" for j in range(i))) for i, f in enumerate(every)]
    levels = order(made, tokens_per_step=7)
    assert sorted(m.name for level in levels for m in level.memories) == sorted(m.name for m in made)
    speeds = [level.frequency.per_token(7) for level in levels]
    assert speeds == sorted(speeds, reverse=True)
    at = {m.name: level.index for level in levels for m in level.memories}
    for m in made:
        for n in m.needs:
            if next(x for x in made if x.name == n).frequency.per_token(7) == m.frequency.per_token(7):
                assert at[n] < at[m.name]


def test_values_are_immutable_and_check_their_words():
    with pytest.raises(dataclasses.FrozenInstanceError):
        memory("m", NEVER).name = "other"
    with pytest.raises(ValueError, match="osmosis"):
        Transfer("a", "b", "osmosis")
    with pytest.raises(ValueError, match="guess"):
        Solver("guess")
    with pytest.raises(ValueError, match="forever"):
        memory("m", NEVER, lifetime="forever")
    with pytest.raises(ValueError, match="name"):
        memory("", NEVER)


def test_json_gives_an_equal_system_back(hope):
    system = nestling.levels(hope)
    again = NestedSystem.from_json(system.to_json())
    assert again == system
    assert again["model.layers.0.mixer.memory"] == system["model.layers.0.mixer.memory"]
    assert str(again) == str(system)


def test_json_of_something_else_is_refused():
    values = nestling.levels(nn.Linear(2, 2)).to_dict()
    values["level"] = values.pop("levels")
    with pytest.raises(ValueError, match="level, levels"):
        NestedSystem.from_dict(values)


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(KeyError, match="linear"):
        nestling.levels(nn.Linear(2, 2))["other"]


def test_levels_is_a_plain_function_of_the_package():
    from nestling.nested_system import analyze

    assert nestling.levels is analyze.levels is nestling.nested_system.levels
    assert inspect.isfunction(nestling.levels)
    assert {"levels", "Level", "Schedule", "stack_levels"} <= set(nestling.__all__)
