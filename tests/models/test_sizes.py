"""Named sizes hold what their names say, and equal sizes are equal."""

import pytest

from nestling.layers.mixers import MIXERS
from nestling.models import sizes


@pytest.mark.parametrize("name", sizes.NAMES)
def test_parameters_are_what_the_name_says(name):
    unit = {"m": 1e6, "b": 1e9}
    expected = {"tiny": 1.9e6, "mini": 4.2e6}.get(name) or float(name[:-1]) * unit[name[-1]]
    count = sizes.parameters(sizes.config(name))
    assert abs(count / expected - 1) < 0.05, count


@pytest.mark.parametrize("mixer", MIXERS)
def test_matched_models_are_of_one_size(mixer):
    hope = sizes.config("tiny")
    other = sizes.matched_config(hope, mixer)
    assert other.mixer == mixer
    assert other.hidden_size == hope.hidden_size
    assert abs(sizes.parameters(other) / sizes.parameters(hope) - 1) <= 0.02


def test_matched_keeps_what_it_is_not_told_to_change():
    base = sizes.config("tiny", mixer="attention", mixer_options={"window": 16}, vocab_size=300, cms_levels=[{}])
    same = sizes.matched_config(base, num_hidden_layers=2)
    assert (same.mixer_options, same.vocab_size, same.num_hidden_layers) == ({"window": 16}, 300, 2)
    assert same.intermediate_size > base.intermediate_size
    plain = sizes.matched_config(base, "attention", {"conv_size": 0})
    assert plain.mixer_options == {"conv_size": 0}


def test_a_pattern_of_mixers_is_matched_both_ways():
    hope, pattern = sizes.config("tiny"), ["selfmod", {"mixer": "window_attention", "window": 32}]
    hybrid = sizes.matched_config(hope, mixers=pattern)
    assert hybrid.mixers == pattern
    assert sizes.matched_config(hybrid, num_hidden_layers=2).mixers == pattern
    back = sizes.matched_config(hybrid, "attention")
    assert (back.mixer, back.mixers) == ("attention", None)
    for config, model in ((hybrid, hope), (back, hybrid)):
        assert abs(sizes.parameters(config) / sizes.parameters(model) - 1) <= 0.02


def test_what_cannot_be_matched_is_an_error():
    with pytest.raises(ValueError, match="no intermediate_size gives"):
        sizes.matched_config(sizes.config("tiny"), "attention", num_hidden_layers=40)
    with pytest.raises(ValueError, match="known are tiny"):
        sizes.config("huge")
    with pytest.raises(ValueError, match="did you mean hidden_size"):
        sizes.config("tiny", hiden_size=3)
