"""The surface, the orthogonal tasks and the memory's span: their mathematics, and whole smoke runs."""

import math

import pytest
import torch

from experiments.orthogonal import experiment as orthogonal
from experiments.shared.optimizers.contenders import OptimizerContender
from experiments.shared.run import run_experiment
from experiments.span import experiment as span
from experiments.surface import experiment as surface


@pytest.mark.parametrize("k, a, w", [(1.0, 0.5, 2.0), (16.0, 1.0, 3.0)])
def test_the_slope_is_the_surfaces_gradient(k, a, w):
    place = torch.tensor([-3.5, 2.0], dtype=torch.float64, requires_grad=True)
    height = surface.value(place[0], place[1], k, a, w)
    height.backward()
    found = surface.slope(*place.tolist(), k, a, w)
    assert found == pytest.approx((height.item(), *place.grad.tolist()), rel=1e-12)
    assert surface.slope(0.0, 0.0, k, a, w) == (0.0, 0.0, -0.0)


def test_steps_are_counted_until_it_stays():
    settings = surface.defaults()
    job = surface.SurfaceJob("SGD", 1.0, 0.0, 1.0)  # a quadratic
    taken, way = surface.descend(settings, job, 0.1, [0.1, 0.1], keep=True)
    heights = [surface.slope(*place, 1.0, 0.0, 1.0)[0] for place in way]
    assert heights[taken] < settings.tolerance <= heights[taken - 1]
    assert surface.descend(settings, job, 100.0, [0.1, 0.1])[0] is None


@pytest.mark.parametrize("overlap", [0.0, 0.3])
def test_tasks_meet_at_the_given_cosine(overlap):
    settings = orthogonal.defaults().smoke().changed(tasks=3)
    drawn = orthogonal.Sequence.draw(settings, overlap, 0)
    one = torch.eye(settings.rank, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            torch.testing.assert_close(drawn.bases[i].T @ drawn.bases[j], one if i == j else overlap * one)
    assert drawn.losses(torch.zeros(settings.outputs, settings.inputs)).tolist() == pytest.approx([1.0] * 3)
    # one W solves all tasks
    spread = drawn.bases.mT.reshape(-1, settings.inputs).T
    wanted = torch.cat([s @ b for s, b in zip(drawn.solutions, drawn.bases)], 1)
    assert drawn.losses(wanted @ torch.linalg.pinv(spread)).max() < 1e-12


def test_gradient_descent_forgets_nothing_of_orthogonal_tasks():
    settings = orthogonal.defaults().changed(tasks=3, steps=30, probes=[5])
    for name, forgets in [("SGD", False), ("Adam", True)]:
        contender = settings.contender(name)
        job = orthogonal.OrthogonalJob(name, 0.0, False)
        found = orthogonal.learn(settings, contender, job, 0.1 if name == "SGD" else 0.01, 0)
        forgotten = orthogonal.measures(found["losses"])["forgotten"]
        assert (forgotten > 1e-3) is forgets
        assert (abs(forgotten) < 1e-6) is not forgets
        assert (found["backward"]["5"] > 1e-3) is forgets


def test_measures():
    found = orthogonal.measures([[0.1, 1.0], [0.3, 0.2]])
    assert found == pytest.approx({"final": 0.25, "learnt": 0.15, "forgotten": 0.2})


def test_a_diverging_run_is_no_result():
    settings = orthogonal.defaults().changed(tasks=2, steps=100)
    assert (
        orthogonal.learn(
            settings, OptimizerContender("SGD", "sgd"), orthogonal.OrthogonalJob("SGD", 0.0, True), 50.0, 0
        )
        is None
    )


@pytest.mark.parametrize("name", ["SGD momentum", "Adam, first moment", "M3, fast", "Delta Momentum"])
def test_the_measured_span_is_the_formulas(name):
    settings = span.defaults()
    weights = span.by_age(settings, span.SpanJob(name, 0.9, "orthogonal"), 140)
    assert weights[:30] == pytest.approx([0.1 * 0.9**j for j in range(30)], rel=1e-4)
    assert [span.span(weights, share) for share in span.SHARES] == [7, 44]
    assert [math.ceil(span.formula(0.9, share)) for share in span.SHARES] == [7, 44]


def test_the_slow_scale_holds_whole_periods():
    settings = span.defaults().changed(period=4)
    weights = span.by_age(settings, span.SpanJob("M3, slow", 0.5), 40)
    assert weights == pytest.approx([0.5 ** (1 + j // 4) / 4 for j in range(40)], rel=2e-3)


def test_delta_momentum_forgets_what_is_shown_again():
    settings = span.defaults()
    same, other = (span.by_age(settings, span.SpanJob("Delta Momentum", 0.9, f), 100) for f in ("same", "orthogonal"))
    assert span.span(same, 0.99) < span.span(other, 0.99)


@pytest.mark.parametrize("name, only", [("surface", "momentum"), ("orthogonal", "SGD"), ("span", "SGD momentum")])
def test_smoke_runs(tmp_path, name, only):
    options = {"workers": 0, "show": False, "smoke": True, "only": [only]}
    summary = run_experiment(name, tmp_path / name, **options)
    assert summary["missing"] == []
    assert summary["failed"] == {}
    assert only in (tmp_path / name / "table.md").read_text()
    assert (tmp_path / name / "plot.png").stat().st_size > 10_000
    before = (tmp_path / name / "results.jsonl").read_bytes()
    run_experiment(name, tmp_path / name, **options)
    assert (tmp_path / name / "results.jsonl").read_bytes() == before
