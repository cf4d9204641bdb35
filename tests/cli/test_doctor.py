import json

import torch

from nestling.bench import correctness, doctor


def test_one_screen(call, monkeypatch):
    checks = [doctor.Check("a", 1e-9, 1e-8, True), doctor.Check("b", None, 1e-8, True, "no GPU")]
    monkeypatch.setattr(doctor, "fast_forms", lambda: checks)
    result = call("doctor")
    assert result.exit_code == 0, result.output
    for words in (
        "torch",
        "C++ compiler",
        "Fast forms against their definitions",
        "off by",
        "cache",
        "nestling[track]",
    ):
        assert words in result.stdout
    assert len(result.stdout.splitlines()) <= 45


def test_json_and_a_form_that_disagrees(call, monkeypatch):
    monkeypatch.setattr(correctness, "definition", lambda dtype, *_, **__: 0.5 if dtype == torch.float32 else 0.0)
    result = call("doctor", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["agrees"]
    assert [c["difference"] for c in found["checks"] if not c["agrees"]] == [0.5]


def test_what_cannot_run_or_is_not_finite_disagrees():
    def fails():
        raise RuntimeError("no")

    assert not doctor._check("a", fails, 1.0).agrees
    assert not doctor._check("a", lambda: float("nan"), 1.0).agrees
    assert doctor._check("a", fails, 1.0, "off").agrees
