"""The formal languages: what may follow is what the language says, and one run of each kind."""

import itertools
import random

import pytest
import torch

from experiments.languages import experiment, report, study
from experiments.languages.words import END, IGNORED, LANGUAGES, batch

BELONGS = {
    "parity": lambda w: w.count("1") % 2 == 0,
    "(aa)*": lambda w: len(w) % 2 == 0,
    "(abab)*": lambda w: len(w) % 4 == 0 and w == "abab" * (len(w) // 4),
    "a^n b^n": lambda w: w == "a" * (len(w) // 2) + "b" * (len(w) // 2),
    "a^n b^n c^n": lambda w: w == "".join(letter * (len(w) // 3) for letter in "abc"),
    "shuffle-2": lambda w: all(_balanced([c for c in w if c in kind]) for kind in ("()", "[]")),
}


def _balanced(brackets):
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in "([" else -1
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize("name", LANGUAGES)
def test_what_may_follow_is_what_the_language_says(name):
    """Against the plain definition: a letter may follow a beginning if some word of the language goes on with it."""
    language, belongs, length = LANGUAGES[name], BELONGS[name], 8
    known = ["".join(w) for n in range(1, length + 1) for w in itertools.product(language.letters, repeat=n)]
    begun = {w[:n] for w in filter(belongs, known) for n in range(length + 1)}
    rng = random.Random(0)
    for word in {language.draw(rng, 2, 4) for _ in range(40)}:
        sets = list(language.follow(word))
        assert len(sets) == len(word)
        for read, found in enumerate(sets, 1):
            start = word[:read]
            expected = {letter for letter in language.letters if start + letter in begun}
            assert found == expected | ({END} if belongs(start) else set()), (word, start)


@pytest.mark.parametrize("name", LANGUAGES)
def test_words_lie_in_their_bin_and_belong(name):
    rng = random.Random(1)
    for low, high in ((2, 50), (52, 100)):
        words = {LANGUAGES[name].draw(rng, low, high) for _ in range(200)}
        assert all(low <= len(w) <= high for w in words)
        assert len({len(w) for w in words}) > 8
        assert name == "parity" or all(map(BELONGS[name], words))


def test_a_batch_marks_what_lies_beyond_a_word():
    tokens, targets = batch(LANGUAGES["a^n b^n"], ["ab", "aabb"])
    assert tokens.tolist() == [[0, 1, 0, 0], [0, 0, 1, 1]]
    assert targets[0, :2].tolist() == [[1, 1, 0], [0, 0, 1]]
    assert (targets[0, 2:] == IGNORED).all() and (targets[1] != IGNORED).all()


class Known(torch.nn.Module):
    """Names what `batch` says, but for the letters at `wrong`."""

    def __init__(self, targets, wrong):
        super().__init__()
        self.scores = targets * 2 - 1
        for place in wrong:
            self.scores[place] *= -1

    def forward(self, tokens):
        return self.scores


def test_a_word_counts_only_if_all_of_it_is_right():
    drawn = batch(LANGUAGES["a^n b^n"], ["ab", "aabb"])
    assert study.accuracy(Known(drawn[1], []), drawn) == {"words": 1.0, "letters": 1.0}
    assert study.accuracy(Known(drawn[1], [(1, 3, 2)]), drawn) == {"words": 0.5, "letters": 5 / 6}
    assert study.accuracy(Known(drawn[1], [(0, 3, 2)]), drawn)["words"] == 1.0  # beyond the word


def test_contenders_have_equal_parameters():
    settings = experiment.defaults()
    for contender in map(settings.contender, ("Transformer", "Hope", "LSTM")):
        model = study.build(settings, contender, 4)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(settings.parameters, rel=0.02)
    with pytest.raises(ValueError, match="no width gives"):
        study.build(settings.changed(parameters=20_000), settings.contenders[0], 4)


def test_a_run_and_its_table(tmp_path):
    settings = experiment.defaults().smoke()
    rows = {}
    for name in ("fourth default", "LSTM"):
        contender = settings.contender(name)
        for language in settings.languages:
            rows[name, language] = study.run(settings, contender, language, 0, None)
    assert rows["LSTM", "parity"] == study.run(settings, settings.contender("LSTM"), "parity", 0, None)
    summary = report.summarize(settings, settings.contenders, lambda job: rows.get((job.contender, job.language)))
    assert [c["contender"] for c in summary["contenders"]] == ["fourth default", "LSTM"]
    assert report.table(summary).count("| LSTM |") == 2
    report.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_run_does_not_depend_on_how_many_seeds_its_contender_has():
    settings = experiment.defaults()
    job = study.LanguageJob("LSTM", "parity", 0)
    fewer = settings.changed(contenders=[c | {"runs": [0]} for c in settings.to_dict()["contenders"]])
    other = settings.changed(steps=1)
    first, second, third = (study.LanguagesWork(s).fingerprint(job) for s in (settings, fewer, other))
    assert first == second != third
