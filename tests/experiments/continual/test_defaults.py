"""The experiment that judges the default levels."""

import pytest

from experiments.defaults import report
from experiments.defaults import texts as sources
from experiments.defaults.experiment import BASE, DEFAULT, TextJob, bits_per_byte, defaults, plan, summarize
from experiments.defaults.texts import DEVELOPMENT, ELSEWHERE, JUDGED


def test_texts_for_choosing_are_not_those_for_judging():
    """No place of a text is read twice, but for parts of one file that lie apart."""
    chosen, judged = [*DEVELOPMENT, *ELSEWHERE["development"]], [*JUDGED, *ELSEWHERE["judged"]]
    assert len(JUDGED) == 20 and len({s.name for s in [*chosen, *judged]}) == len(chosen) + len(judged)
    for a in chosen:
        for b in judged:
            assert a.place != b.place or abs(a.start - b.start) >= 0.1, (a, b)
    kinds = {s.kind for s in JUDGED}
    assert {"prose", "code", "notes", "tables"} < kinds and len(kinds) == 7  # and three languages
    assert [s.tokens for s in JUDGED][-1] == max(s.tokens for s in JUDGED)


def test_a_text_is_taken_from_the_beginning_of_a_line(tmp_path):
    whole = sources.Source("a", "notes", "notes/boiler.txt", 0.0, 5).text(tmp_path, 10**6)
    part = sources.Source("a", "notes", "notes/boiler.txt", 0.4, 5).text(tmp_path, 80)
    at = whole.index(part)
    assert len(part) == 80 and whole[at - 1] == "\n" and at >= 0.4 * len(whole)
    assert sources.Source("b", "notes", "readme/typer", 0.0, 5).text(tmp_path, 50)


def rows_of(settings):
    """Results in which the default gains .5, AdamW .25, and both do harm of .01 and .03."""
    rows = {}
    for job in plan(settings, settings.contenders, rows.get):
        gain, harm = {BASE: (0, 0), DEFAULT: (0.5, 0.01)}.get(job.contender, (0.25, 0.03))
        levels = job.contender != BASE
        rows[job] = {
            "read": job.tokens, "text_kind": "notes", "text_bits": 2 - gain, "after_bits": 2 - gain / 2,
            "other_bits": {"x": 1.0 + harm, "y": 1.0}, "state_bytes": 7_000_000 * levels,
            "reading_seconds": 4.0 if levels else None, "plain_seconds": 2.0 if levels else None,
        }  # fmt: skip
        if job.contender == DEFAULT:  # taken to what was read and to x, not to y
            bits = {"text": 1.5, "x": 1.02, "y": 1.0}
            rows[job]["choice"] = {n: {"levels": n != "y", "without": 2.0 if n == "text" else 1.0, "bits": b}
                                   for n, b in bits.items()}  # fmt: skip
    return rows


def test_figures_are_differences_to_the_model_without_levels(tmp_path):
    settings = defaults()
    summary = summarize(settings, settings.contenders, rows_of(settings).get)
    first = summary["found"][0]["contenders"]
    assert (first[0]["contender"], first[0]["texts"], first[0]["worse"]) == (DEFAULT, 20, 0)
    assert first[0]["gain"] == pytest.approx(0.5) and first[0]["carried"] == pytest.approx(0.25)
    assert first[0]["harm"] == pytest.approx(0.005) and first[0]["worst_harm"] == pytest.approx(0.01)
    assert first[0]["chosen"] == pytest.approx({"gain": 0.5, "passed": 0, "harm": 0.01, "worst_harm": 0.02})
    assert first[1]["chosen"] is None
    assert first[0]["of_plain"] == 0.5 and first[1]["default_gain"] == pytest.approx(0.5)
    assert first[1]["default_shares"] == pytest.approx([2.0, 2.0])  # of a gain half as large
    assert first[-1]["texts"] < 20  # which reads short texts only
    text = report.table(summary)
    assert "| default | smollm2-135m | 20 | 20,000 | 0 | 0.500 |" in text
    report.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_what_a_small_model_reads_decides_with_how_it_was_trained():
    settings = defaults()
    jobs = [TextJob(DEFAULT, 0, "run", model, "boiler", 600) for model in ("smollm2-135m", "byte hope")]
    longer = settings.changed(steps=settings.steps + 1)
    assert settings.decisive(jobs[0]) == longer.decisive(jobs[0])
    assert settings.decisive(jobs[1]) != longer.decisive(jobs[1])


def test_bits_per_byte_are_those_of_the_models_own_loss(model):
    import math

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    ids = list(b"the cat sat on the mat")
    row = torch.tensor([[tokenizer.eos_token_id, *ids]])
    with torch.no_grad():
        assert bits_per_byte(plain, tokenizer, ids, 64) == pytest.approx(
            float(plain(row, labels=row).loss) / math.log(2), rel=1e-5
        )
        rest, first = bits_per_byte(plain, tokenizer, ids, 64, 5), bits_per_byte(plain, tokenizer, ids[:5], 64)
        assert 17 * rest + 5 * first == pytest.approx(22 * bits_per_byte(plain, tokenizer, ids, 64), rel=1e-5)
