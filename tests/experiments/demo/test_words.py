"""The text follows the numbers: change a number, and the sentence says something else."""

import numpy as np
import pytest

from experiments.demo import words
from experiments.demo.config import HOPE, TRANSFORMER


def _shift(model, by):
    row = model["held_out"][-1]
    row["windows"] = [w + by for w in row["windows"]]
    row["bits"] += by


def test_worse_better_and_undecided(result):
    """The comparison names the better one, or says that nothing can be told."""
    assert "Hope is worse by 0.200" in words.about_result(result)
    _shift(result["models"][HOPE], -0.5)
    assert "Hope is better by 0.300" in words.about_result(result)
    noisy = np.random.default_rng(0).normal(2.3, 0.5, 12)
    result["models"][HOPE]["held_out"][-1]["windows"] = noisy.tolist()
    assert "cannot be told apart" in words.about_result(result)


def test_verdict_names_who_missed_the_bar(result):
    """It says that it learned only if the check passed."""
    assert words.verdict(result).startswith("It learned: Hope 2.500 and the Transformer 2.300")
    result["check"] |= {"passed": False, "learned": {HOPE: False, TRANSFORMER: True}}
    said = words.verdict(result)
    assert said.startswith("It did not learn enough")
    assert said.endswith("; Hope missed it.")
    assert "It learned" not in said


def test_curves_say_who_is_slower(result):
    """Time per byte, and where Hope stood when the Transformer was done."""
    said = words.about_curves(result)
    assert "2.0 times" in said
    assert "Hope stood at 3.500" in said  # half the time: the middle measurement
    for row in result["models"][HOPE]["curve"] + result["models"][HOPE]["held_out"]:
        row["seconds"] /= 4
    assert "0.50 of the Transformer's time" in words.about_curves(result)


def test_positions_say_what_happens_beyond_the_trained_length(result):
    """Falls, holds or rises."""
    assert words.about_positions(result).count("falls further beyond") == 2
    for row in result["models"][TRANSFORMER]["positions"]["windows"]:
        row[2] += 1.0
    said = words.about_positions(result)
    assert "Hope: 3.02 in the first 16 bytes, 2.65 in bytes 17–32, and falls further" in said
    assert "but rises beyond the trained length (3.38)" in said


def test_states(result):
    """One is constant, the other grows; where they cross."""
    said = words.about_states(result)
    assert "Hope's state is 1.0 kB however long" in said
    assert "grows 8.0-fold" in said
    assert "Hope's is the smaller one from 512 bytes on" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda layer: None, "So every memory clearly comes"),
        (lambda layer: layer.update(loss=[1.0] * 128), "So no memory clearly comes"),
        (lambda layer: layer.update(norm=[20 - i / 8 for i in range(128)]), "fading, not only fitting). So no memory"),
        (lambda layer: layer.update(loss=[0.1 * i for i in range(128)]), "layer 2 rises from 0.75 to 12"),
    ],
)
def test_memory(result, change, says):
    """A falling loss counts for learning only if the weights did not fade with it."""
    for layer in result["models"][HOPE]["memory"]["layers"]:
        change(layer)
    assert says in words.about_memory(result)


def test_settings_and_surprise(result):
    """Ranges and correlations are those of the arrays."""
    said = words.about_settings(result)
    assert "learns at 0.5 to 0.51, forgets over 100 bytes, norm +0%" in said
    memory = result["models"][HOPE]["memory"]
    memory["layers"][0]["loss"] = [0.0, *memory["bits"][1:]]
    assert "layer 1 +1.00 (higher at surprises)" in words.about_surprise(result)


def test_samples_without_words(result):
    """A model that wrote no word is not given a share."""
    assert "Hope 50%, Transformer 50%" in words.about_samples(result)
    result["models"][HOPE]["samples"][0]["known_words"] = None
    assert "Hope wrote none" in words.about_samples(result)


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1_234, "1.2 kB"), (456_000, "456 kB"), (16.9e6, "16.9 MB")])
def test_sizes(count, text):
    """Bytes for people."""
    assert words.size(count) == text


def test_correlation_of_constants_is_none():
    """No division by zero."""
    assert words.correlation(np.ones(5), np.arange(5)) == 0.0
    assert words.correlation(np.arange(5), -np.arange(5)) == pytest.approx(-1)
