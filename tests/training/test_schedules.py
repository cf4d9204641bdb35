import pytest

from nestling.training import ScheduleConfig
from nestling.training.schedules import lr_factor


def curve(name, steps=100, **options):
    return [lr_factor(s, steps, ScheduleConfig(name=name, **options)) for s in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(name):
    factors = curve(name, warmup=0.1)
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == pytest.approx(1.0)


def test_cosine_falls_to_the_final_factor():
    factors = curve("cosine", warmup=0.1, final=0.2)
    assert factors[-1] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[54] == pytest.approx(0.6, abs=0.02)


def test_wsd_is_stable_then_falls():
    factors = curve("wsd", warmup=0.1, decay=0.2, final=0.0)
    assert factors[10:79] == [1.0] * 69
    assert factors[-1] == pytest.approx(0.0)
    assert factors[89] == pytest.approx(0.5)


def test_constant_and_no_warm_up():
    assert curve("constant", warmup=0) == [1.0] * 100
    assert curve("cosine", steps=1, warmup=0) == [1.0]
