"""Search spaces as text."""

import pytest

from nestling.tuning import DEFAULTS, Choice, Range, Space
from nestling.tuning.space import text_of, value_of


def test_what_is_written_is_meant():
    space = Space.parse(["lr=1e-4:1e-1:log", "alpha=0:1", "ns_steps=3:7:int", "periods=1|1,16", "name=muon"])
    assert space == {
        "lr": Range(1e-4, 0.1, "log"),
        "alpha": Range(0.0, 1.0),
        "ns_steps": Range(3, 7, "int"),
        "periods": Choice(("1", "1,16")),
        "name": Choice(("muon",)),
    }
    assert Space.parse([f"{name}={kind}" for name, kind in space.items()]) == space


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "NAME=LOW:HIGH"),
        ("lr=", "NAME=LOW:HIGH"),
        ("lr=a:b", "with numbers"),
        ("lr=1:1e-3", "must rise"),
        ("lr=0:1:log", "above 0"),
        ("lr=0:1:lgo", "did you mean 'log'"),
        ("n=0.5:3:int", "whole ends"),
        ("lr=0:inf", "finite"),
    ],
)
def test_a_bad_range_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        Space.parse([text])


def test_a_search_begins_with_the_defaults_if_they_fit():
    assert DEFAULTS.start() == {"lr": 3e-3, "alpha": 0.5, "periods": "1,16"}
    assert Space.parse(["lr=1e-2:1e-1:log"]).start() == {}
    assert Space.parse(["lr=1e-3:1e-1:log", "momentum=0:1"]).start() == {}


def test_values_and_their_texts():
    assert text_of((1, 16)) == "1,16"
    assert value_of("periods", "1,16") == (1, 16)
    assert value_of("coefficients", "muon") == "muon"
    assert value_of("nesterov", "true") is True
    assert value_of("lr", 0.5) == 0.5
    with pytest.raises(ValueError, match="periods must be whole"):
        value_of("periods", "1;16")
