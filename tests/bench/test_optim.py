"""The optimisers in the benchmark: every part runs, averages are over a slow period, the model counts what runs."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nestling import bench
from nestling.bench import measure, optim, show
from nestling.bench.flops import count_flops
from nestling.bench.measure import Timing
from nestling.cli.main import app

PARTS = [name for name in bench.GROUPS["optim"] if name != "dgd"]
SMALL = bench.BenchSettings(**(bench.QUICK | dict(dim=8, repeats=1, product=16)))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(optim, "_thread_counts", lambda settings: [1])


@pytest.mark.parametrize("name", PARTS)
def test_every_part_gives_rows_of_one_shape(name):
    table = bench.PARTS[name](SMALL)
    assert table.rows
    for row in table.rows:
        assert list(row) == list(table.rows[0])
        assert all(value == value and value >= 0 for value in row.values() if not isinstance(value, str))
    json.dumps(table.rows)
    if name.startswith("optim"):
        assert [row["times Muon"] for row in table.rows if row["optimizer"] == optim.BASE] == pytest.approx(
            [1.0] * sum(row["optimizer"] == optim.BASE for row in table.rows)
        )


def test_m3_is_averaged_over_a_slow_period_and_layers_are_scaled(monkeypatch):
    def interleave(steps, settings):
        return Timing({key: [3.0, 5.0] if key[1] == "slow" else [1.0, 1.0] for key in steps})

    monkeypatch.setattr(measure, "interleave", interleave)
    found, _ = optim.optimizers("cpu")
    timing, _ = optim.time_steps({name: found[name] for name in ("M3", optim.BASE)}, 8, 4, SMALL)
    assert timing.seconds == {"M3": [12 / 4 * 18 / 16, 12 / 4 * 20 / 16], optim.BASE: [3.0, 3.0]}


def test_a_slow_step_is_one():
    found, _ = optim.optimizers("cpu")
    run = optim.OptimizerRun(found["M3"], 8, 1, "cpu")

    def directions():
        return torch.cat([state["o2"].float().flatten() for state in run.optimizer.state.values()])

    for p in run.params:
        p.grad = torch.randn_like(p)
    run.step()
    assert not directions().any()
    run.slow_step()
    assert directions().any()


def test_the_base_is_torchs_muon_in_float32():
    found, _ = optim.optimizers("cpu")
    specs = found[optim.BASE], optim.OptimizerSpec(found[optim.BASE].make)
    ours, stock = (optim.OptimizerRun(spec, 16, 1, "cpu") for spec in specs)
    for a, b in zip(ours.params, stock.params):
        assert not torch.equal(a, b)
        assert (a - b).abs().max() < 0.05 * optim.LR * 16
    again = optim.OptimizerRun(found["nestling.training.muon"], 16, 1, "cpu")
    for a, b in zip(ours.params, again.params):
        assert torch.allclose(a, b, atol=1e-7)


def test_the_cost_model_counts_the_products_that_run():
    found, _ = optim.optimizers("cpu")
    for name in ("M3", "M3, polar_express_4", optim.BASE, "nestling.training.muon", "AdamW, foreach"):
        run = optim.OptimizerRun(found[name], 32, 1, "cpu")
        flops = count_flops(run.step)
        if run.spec.period:
            flops = (15 * flops + count_flops(run.slow_step)) / 16
        count, seconds = optim.model_seconds(run.spec, 32, rate=1e9)
        assert 2 * count == pytest.approx(optim.LAYERS * flops)
        assert seconds == pytest.approx(optim.LAYERS * flops / 1e9)


def test_state_bytes_per_parameter():
    found, _ = optim.optimizers("cpu")
    sizes = {name: optim.OptimizerRun(spec, 8, 1, "cpu").state_bytes() for name, spec in found.items()}
    assert sizes["M3"] == 14
    assert sizes[optim.BASE] == 4
    assert sizes["AdamW, fused"] == sizes["AdamW, foreach"] == 8


def test_what_is_not_installed_is_said(monkeypatch):
    def missing(name):
        raise ImportError(name=name)

    monkeypatch.setattr(optim.importlib, "import_module", missing)
    found, notes = optim.optimizers("cpu")
    assert len(found) == 6
    assert [note.split(": ")[1] for note in notes] == [
        "skipped, pytorch_optimizer is not installed.", "skipped, nested_learning.optim.m3 is not installed."
    ]  # fmt: skip


def test_the_command_measures_the_optimisers(monkeypatch, tmp_path):
    asked = []

    def run(settings, parts, report):
        asked.append(parts)
        table = bench.PARTS["optim"](SMALL)
        report("optim", table)
        return {"environment": bench.environment(SMALL) | {"load after": [0.0]}, "parts": {"optim": vars(table)}}

    monkeypatch.setattr(bench, "run", run)
    out, picture = tmp_path / "optim.json", tmp_path / "optim.png"
    result = CliRunner().invoke(app, ["bench", "optim", "--quick", "--json", str(out), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert asked == [[*PARTS, "dgd"]]
    assert picture.read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(app, ["bench", "optimisers"])
    assert wrong.exit_code == 2


def test_the_page_says_what_the_results_say():
    """No page holds a figure that is not in the committed results."""
    root = Path(__file__).parents[2]
    page, result = (root / "docs" / "optimizers.md").read_text(), root / "benchmarks" / "results" / "optim.json"
    parts = {name: {"title": name, "rows": [{"x": 1}], "notes": []} for name in (*PARTS, "dgd")}
    empty = {"environment": bench.environment(SMALL) | {"load after": [0.0]}, "parts": parts}
    assert show.update_page(page, {"optim": empty}) != page  # every marker names a part
    if result.exists():
        assert show.update_page(page, {"optim": json.loads(result.read_text())}) == page
    else:
        assert page.count("-->\n<!-- end -->") == page.count("<!-- bench ")
