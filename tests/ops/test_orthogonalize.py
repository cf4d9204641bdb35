"""Newton-Schulz against the singular value decomposition, and its fast forms against the plain loop."""

import importlib
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.bench.flops import count_flops
from nestling.ops.orthogonalize import (
    COEFFICIENTS,
    SAFETY,
    multiply_adds,
    orthogonalize,
    orthogonalize_reference,
    table,
)
from slowly import examples

module = importlib.import_module("nestling.ops.orthogonalize")
BANDS = re.findall(r"^    (\w+) +(\d+) +(\S+) +(\S+) \.\. (\S+)$", module.__doc__, re.MULTILINE)
ERRORS = re.findall(r"^    (\w+) +(\de-\d) +(\de-\d)$", module.__doc__, re.MULTILINE)


def with_spectrum(rows, columns, condition, batch=(), seed=0):
    """A matrix [*batch, rows, columns] with singular values from 1 down to 1 / condition, and U, s, V."""
    g = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    u, v = (torch.randn(*batch, side, rank, generator=g, dtype=torch.float64) for side in (rows, columns))
    u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
    s = torch.logspace(0, -torch.log10(torch.tensor(condition)), rank, dtype=torch.float64)
    return (u * s) @ v.mT, u, s, v


def polynomial(s, name, steps):
    for a, b, c in table(name, steps):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize(("name", "steps", "above", "low", "high"), BANDS)
def test_the_bands_of_the_documentation(name, steps, above, low, high):
    s = torch.logspace(-9, 0, 100_001, dtype=torch.float64)
    y = polynomial(s, name, int(steps))
    inside = y[s >= float(above)]
    assert float(low) <= inside.min() <= float(low) + 0.02
    assert float(high) - 0.02 <= y.max() <= float(high)


def test_the_slope_of_the_documentation():
    assert round(table("muon", 5)[0][0] ** 5) == 485


@settings(max_examples=examples(60))
@given(
    name=st.sampled_from(BANDS),
    side=st.integers(1, 12),
    aspect=st.floats(1, 64),
    power=st.floats(0, 6),
    tall=st.booleans(),
    form=st.sampled_from(module.FORMS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_singular_vectors_stay_and_values_go_into_the_band(name, side, aspect, power, tall, form, dtype, seed):
    """Aspect ratios 1 to 64, condition numbers to 1e6: U^T O V is diagonal, and p(s) on the diagonal."""
    name, steps, above, low, high = name[0], int(name[1]), *map(float, name[2:])
    columns = max(side, round(side * aspect))
    matrix, u, s, v = with_spectrum(side, columns, 10**power, seed=seed)
    if tall:
        matrix, u, v = matrix.mT, v, u
    got = orthogonalize(matrix.to(dtype), steps, coefficients=name, form=form)
    assert got.shape == matrix.shape
    assert got.dtype == dtype
    mixed = u.mT @ got.double() @ v
    values = mixed.diagonal()
    tolerance = 1e-7 if dtype == torch.float64 else 5e-3
    assert (mixed - torch.diag(values)).abs().max() < tolerance
    normalised = s / s.norm()
    assert torch.allclose(values, polynomial(normalised, name, steps), atol=tolerance)
    assert values.max() <= high + tolerance
    well = values[normalised >= above]
    assert not len(well) or well.min() >= low - tolerance


@settings(max_examples=examples(40))
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    name=st.sampled_from(sorted(COEFFICIENTS)),
    steps=st.integers(1, 8),
    form=st.sampled_from(module.FORMS),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_every_form_is_the_plain_loop(shape, batch, name, steps, form, dtype):
    """The number of steps that share a Gram matrix is that of `dtype`; the arithmetic is float64."""
    matrix = torch.randn(*batch, *shape, dtype=torch.float64)
    want = orthogonalize_reference(matrix, steps, coefficients=name)
    epsilon = torch.finfo(dtype).eps
    with pytest.MonkeyPatch.context() as patch:
        if dtype != torch.float64:
            patch.setattr(module, "GROWTH", 0.03 * torch.finfo(torch.float64).eps / epsilon)
        got = orthogonalize(matrix, steps, coefficients=name, form=form)
    assert torch.allclose(got, want, atol=1e-9)


@pytest.mark.parametrize("shape", [(256, 256), (300, 500), (600, 257)])
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_symmetric_products_in_row_blocks_are_the_plain_loop(shape, form):
    matrix = torch.randn(2, *shape, dtype=torch.float64)
    assert torch.allclose(orthogonalize(matrix, form=form), orthogonalize_reference(matrix), atol=1e-9)


def test_a_batch_is_its_matrices(monkeypatch):
    monkeypatch.setattr(module, "CACHE", 100)  # five matrices pass in groups of two
    matrix = torch.randn(5, 4, 10)
    for got, one in zip(orthogonalize(matrix), matrix):
        assert torch.allclose(got, orthogonalize(one), atol=1e-6)


@pytest.mark.parametrize(("name", "plain", "gram"), ERRORS)
def test_the_accuracy_of_the_documentation(name, plain, gram):
    dtype, worst, mild = getattr(torch, name), {"plain": 0.0, "gram": 0.0}, 0.0
    for coefficients in ("muon", "polar_express"):
        for rows, columns in ((48, 48), (48, 192), (16, 1024)):
            for condition in (1e1, 1e3, 1e6):
                matrix, *_ = with_spectrum(rows, columns, condition, batch=(4,))
                want = orthogonalize_reference(matrix, coefficients=coefficients)
                for form in worst:
                    got = orthogonalize(matrix.float(), coefficients=coefficients, dtype=dtype, form=form).double()
                    error = float((got - want).norm() / want.norm())
                    worst[form] = max(worst[form], error)
                    mild = max(mild, error) if condition == 1e1 else mild
    for form, stated in (("plain", float(plain)), ("gram", float(gram))):
        assert stated / 10 < worst[form] <= stated
    if name == "bfloat16":
        assert 1e-2 < mild < 3e-2


def test_the_gram_form_restarts_before_the_rounding_of_the_type_grows():
    def lengths(dtype, columns=4, form="auto", name="muon", steps=5):
        return [len(part) for part in module.segments(table(name, steps), 1, columns, dtype, form)]

    assert lengths(torch.float32) == [5]
    assert lengths(torch.float16) == [2, 2, 1]
    assert lengths(torch.bfloat16) == [1, 1, 1, 1, 1]
    assert lengths(torch.float32, columns=1) == [1, 1, 1, 1, 1]
    assert lengths(torch.float32, columns=1, form="gram") == [5]
    assert lengths(torch.float32, form="plain") == [1, 1, 1, 1, 1]
    assert lengths(torch.float32, name="polar_express", steps=8) == [5, 3]


@pytest.mark.parametrize(("rows", "columns", "form"), [(20, 20, "auto"), (10, 60, "auto"), (60, 10, "plain")])
def test_multiply_adds_are_those_that_run(rows, columns, form):
    flops = count_flops(lambda: orthogonalize(torch.randn(rows, columns), form=form))
    assert flops == 2 * multiply_adds(5, rows, columns, form=form)
    assert multiply_adds(5, 512, 2048) < 0.6 * multiply_adds(5, 512, 2048, form="plain")


@pytest.mark.parametrize("form", ["plain", "gram"])
def test_row_blocks_run_the_multiply_adds_that_are_counted(form):
    flops = count_flops(lambda: orthogonalize(torch.randn(256, 512), 2, form=form))
    assert flops == 2 * multiply_adds(2, 256, 512, form=form, cut=True)


def optimal_quintic(low, high):
    """The odd quintic nearest to 1 on [low, high] in the largest error (Remez exchange), and that error."""
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    for _ in range(50):
        x = torch.tensor([low, *inner, high], dtype=torch.float64)
        system = torch.stack([x, x**3, x**5, torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)], 1)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        spread = (9 * b**2 - 20 * a * c) ** 0.5  # the roots of a + 3 b x^2 + 5 c x^4
        inner = [((-3 * b - spread) / (10 * c)) ** 0.5, ((-3 * b + spread) / (10 * c)) ** 0.5]
    return (a, b, c), error


def polar_express(low, steps, cushion):
    """The published recipe: compose the optimal quintics, never asking one for less than cushion times its interval."""
    high, triples = 1.0, []
    for _ in range(steps):
        (a, b, c), _ = optimal_quintic(max(low, cushion * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        scale = 2 / sum(ends) if cushion * high > low else 1.0
        triples.append((a * scale, b * scale, c * scale))
        low = ends[0] * scale
        high = 2 - low
    return triples


@pytest.mark.parametrize(("name", "low", "steps"), [("polar_express", 1e-3, 6), ("polar_express_4", 4e-3, 4)])
def test_polar_express_is_what_its_recipe_gives(name, low, steps):
    got = COEFFICIENTS[name][:steps]
    safe = got if name == "polar_express" else got[:-1]
    want = polar_express(low, steps, cushion=0.02407327424182761)
    for (a, b, c), wanted in zip(safe, want):
        assert (a * SAFETY, b * SAFETY**3, c * SAFETY**5) == pytest.approx(wanted, rel=1e-6)
    assert COEFFICIENTS["polar_express"][-1] == (1.875, -1.25, 0.375)
    assert COEFFICIENTS["polar_express_4"][-1] == pytest.approx(polar_express(4e-3, 4, 0.02407327424182761)[-1])


def test_zero_empty_and_damaged_matrices():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    for shape in ((0, 4), (3, 0), (0, 3, 4)):
        assert orthogonalize(torch.zeros(shape)).shape == shape
    for bad in (float("nan"), float("inf")):
        matrix = torch.randn(3, 4, 6)
        matrix[1, 2, 3] = bad
        got = orthogonalize(matrix)
        assert got[1].isnan().all()
        assert got[::2].isfinite().all()
    assert torch.allclose(orthogonalize(1e15 * matrix[0]), orthogonalize(matrix[0]), atol=1e-5)
    half = orthogonalize(torch.full((4, 4), 6e4, dtype=torch.float16))
    assert half.dtype == torch.float16
    assert half.isfinite().all()


def test_gradients_pass():
    matrix = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: orthogonalize(m, 2), matrix)
    with torch.no_grad():
        assert not orthogonalize(matrix).requires_grad


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"matrix": torch.ones(3)}, "matrix must be"),
        ({"steps": 0}, "steps must be"),
        ({"steps": 2.0}, "steps must be"),
        ({"coefficients": "muo"}, "muon, polar_express"),
        ({"coefficients": (1.0, 2.0)}, "triple"),
        ({"coefficients": ()}, "triple"),
        ({"form": "fast"}, "form must be one of auto"),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        orthogonalize(**{"matrix": torch.ones(3, 3), **arguments})


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        orthogonalize(torch.ones(3, 3, dtype=torch.int64))
