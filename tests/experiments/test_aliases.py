"""Aliases: answers follow from the names that were given last; the halves of a test are those of the training."""

import pytest
import torch

from experiments.ablation import experiment as ablation
from experiments.aliases import experiment
from experiments.aliases.tasks import KEYS, NAMES, aliases
from experiments.choice import study
from experiments.shared.models import tasks
from nestling.models import sizes

IGNORED = tasks.IGNORED


@pytest.mark.parametrize("things", [2, 4, 6])
def test_a_key_asks_for_what_its_name_was_told_last(things):
    tokens, targets = aliases(20, torch.Generator().manual_seed(things), things=things)
    assert tokens.shape == targets.shape == (20, 9 * things)
    for words, asked in zip(tokens.tolist(), targets.tolist()):
        meant, told, place, answers, names = {}, {}, 0, 0, set()
        while place < len(words):
            first, second = words[place], words[place + 1] if place + 1 < len(words) else -1
            if first >= NAMES:  # a question
                assert asked[place] == told[first]
                answers, place = answers + 1, place + 1
                continue
            assert asked[place : place + 2] == [IGNORED, IGNORED]
            if second < NAMES + KEYS:
                assert first not in names  # a name is given once
                names.add(first)
                meant[first] = second
            else:
                told[meant[first]] = second
            place += 2
        assert answers == 2 * things
        assert len(told) == things and len(names) == things + things // 2


def test_the_halves_are_asked_for_apart():
    halves = [aliases(5, torch.Generator().manual_seed(0), asked=asked) for asked in ("", "first", "drift")]
    assert all(torch.equal(halves[0][0], tokens) for tokens, _ in halves)
    (_, whole), (_, first), (_, drift) = halves
    assert torch.equal(whole, torch.where(first == IGNORED, drift, first))
    assert ((first == IGNORED) | (drift == IGNORED)).all()
    assert (first != IGNORED).sum() == (drift != IGNORED).sum() == 20


def test_contenders_have_equal_parameters_whatever_their_layers():
    settings = experiment.defaults()
    for contender in settings.contenders:
        config = tasks.configuration(settings, contender, 36)
        assert config.num_hidden_layers == (contender.layers or 1)
        assert sizes.parameters(config) - 2 * 36 * settings.width == pytest.approx(settings.parameters, rel=0.025)


def test_more_steps_are_another_run():
    settings = experiment.defaults()
    found = {
        name: tasks.TaskWork(settings).fingerprint(tasks.TaskJob(name, "aliases", 0))
        for name in ("static", "static, 4000 steps")
    }
    assert len(set(found.values())) == 2
    static = settings.contender("static")
    small = settings.smoke().changed(steps=1)
    task = settings.known["aliases"]
    static.steps = 3
    assert tasks.run(small, static, task, 0, None)["curve"][-1][0] == 3


@pytest.mark.parametrize("name", [c.name for c in ablation.defaults().contenders])
def test_the_rule_without_a_part_is_still_a_model(name):
    settings = ablation.defaults()
    config = study.small_config(settings, settings.contender(name), "parity")
    assert config.mixer_names[-1] == ("window_attention" if name == "no memory" else "memory_and_attention")
    assert study.text_config(settings, settings.contender(name)).num_hidden_layers == 2
