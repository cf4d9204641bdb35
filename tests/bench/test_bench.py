"""The benchmark: a red check prints no figure; every part runs; figures mean what they say. No times are asserted."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nestling import bench
from nestling.bench import correctness, layers, measure, memory, peak, peers, show
from nestling.bench.decode import state_bytes
from nestling.bench.flops import count_flops
from nestling.bench.modules import AttentionBlock
from nestling.cli.main import app

SMALL = bench.BenchSettings(
    **(bench.QUICK | dict(repeats=1, memory_lengths=(16, 32), lengths=(16, 32), loop_tokens=16))
)


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_checks_are_green():
    assert correctness.check() == []


@pytest.mark.parametrize("damage", ["value", "gradient", "nan", "crash"])
def test_a_wrong_fast_form_is_caught(damage, monkeypatch):
    exact = correctness.delta_rule

    def wrong(weight, keys, *args, **kwargs):
        if damage == "crash":
            raise RuntimeError("no such kernel")
        factor = {"value": 1 + 1e-6, "gradient": 1.0, "nan": float("nan")}[damage]
        if damage == "gradient":
            keys = keys.detach()
        result = exact(weight, keys, *args, **kwargs)
        return result._replace(weight=result.weight * factor)

    monkeypatch.setattr(correctness, "delta_rule", wrong)
    failures = correctness.check()
    assert len(failures) == 4
    assert all("delta rule" in failure for failure in failures)


def test_red_means_no_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "check", lambda device: ["chunk form: off by 1e-3"])
    monkeypatch.setattr(measure, "interleave", lambda *a: pytest.fail("timed although the check is red"))
    out = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", "--quick", "--json", str(out), "--plot", str(tmp_path / "bench.png")])
    assert result.exit_code == 1
    assert "off by 1e-3" in result.output
    assert "tokens/s" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", bench.GROUPS["layers"])
def test_every_part_gives_rows_of_one_shape(name, monkeypatch):
    monkeypatch.setattr(memory, "peak_growth", lambda settings, tokens, segment_size: tokens * 1000)
    table = bench.PARTS[name](SMALL)
    assert table.rows
    for row in table.rows:
        assert list(row) == list(table.rows[0])
        for column, value in row.items():
            if value is None or isinstance(value, str):
                continue
            assert value == value, (column, row)
            assert value >= 0, (column, row)
    json.dumps(table.rows)


@pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="processes: NESTLING_SLOW_TESTS=1 runs it")
def test_memory_is_measured_in_a_process_of_its_own():
    """A step over 4,096 tokens that keeps everything needs more than one that keeps boundary states."""
    settings = bench.BenchSettings(**(bench.QUICK | dict(dim=16, memory_lengths=(16, 4096))))
    sizes = dict(dim=16, heads=settings.heads, tokens=4096, segment_size=0)
    everything = sizes | dict(device="cpu", dtype=settings.dtype, threads=1, warm=16)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        whole = pool.submit(peak.main, everything).result()
    assert whole > memory.peak_growth(settings, 4096, 512) > 0


def test_a_model_is_measured(monkeypatch):
    from nestling.models import sizes

    monkeypatch.setitem(sizes._SIZES, "tiny", (16, 8, 1, None))
    settings = bench.BenchSettings(**(bench.QUICK | dict(model="tiny", model_tokens=16, repeats=1)))
    result = bench.run(settings)
    assert list(result["parts"]) == ["model"]
    rows = result["parts"]["model"]["rows"]
    assert [row["mixer"] for row in rows] == ["hope", "selfmod", "attention"]
    assert abs(rows[0]["parameters"] - rows[1]["parameters"]) <= 0.02 * rows[0]["parameters"]


def test_the_command_writes_figures_and_a_picture(tmp_path):
    out, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    command = ["bench", "--quick", "--repeats", "1", "--only", "mixers, decode"]
    result = CliRunner().invoke(app, [*command, "--json", str(out), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert list(found["parts"]) == ["mixers", "decode"]
    assert found["environment"]["threads"] == 1
    assert {"cpu", "load", "load after", "torch", "python"} <= set(found["environment"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    silent = CliRunner().invoke(app, [*command[:-1], "decode", "--json", "-"])
    assert list(json.loads(silent.stdout)["parts"]) == ["decode"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--only", "speed"], "parts are"),
        (["--only", ","], "parts are"),
        (["--threads", "0"], "threads"),
        (["--repeats", "0"], "repeats"),
        (["--dtype", "int8"], "dtype"),
        (["--device", "abacus"], "device"),
        (["--model", "huge"], "model"),
    ],
)
def test_wrong_options_are_named(arguments, word):
    result = CliRunner().invoke(app, ["bench", "--quick", *arguments])
    assert result.exit_code == 2
    assert word in result.output


def test_absent_peers_are_named(monkeypatch):
    def absent(settings, x):
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    monkeypatch.setattr(peers, "PEERS", {"elsewhere 1.0": absent})
    table = peers.peers(SMALL)
    assert [row["layer"] for row in table.rows] == ["selfmod"]
    assert table.notes == ["elsewhere 1.0: skipped, elsewhere is not installed."]


def test_rounds_are_interleaved_and_ratios_paired(monkeypatch):
    calls = []
    timing = measure.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, SMALL)
    assert calls == ["a", "b"] * (1 + timing.rounds)
    paired = measure.Timing({"a": [1.0, 2.0, 4.0], "b": [3.0, 4.0, 4.0]})
    assert paired.ratio("a", "b") == 2.0
    assert paired.spread("a", "b") == (1.0, 3.0)
    assert paired.median("a") == 2.0


def test_operations_are_counted_as_on_paper():
    dim, tokens = 32, 24
    block, x = AttentionBlock(dim, 2), torch.randn(1, tokens, dim)
    projections = 2 * 12 * dim * dim * tokens
    assert count_flops(lambda: block(x)) == projections + 2 * tokens * tokens * dim
    a, b = torch.randn(3, 5, 4), torch.randn(3, 4, 6)
    assert count_flops(lambda: torch.zeros(3, 5, 6).baddbmm_(a, b)) == 2 * 3 * 5 * 4 * 6
    system = torch.eye(4).expand(3, 4, 4)
    solve = count_flops(lambda: torch.linalg.solve_triangular(system, b, upper=False, unitriangular=True))
    assert solve == 3 * 4 * 4 * 6


def test_where_the_lines_cross():
    rows = [{"tokens": 512, "ratio": 0.25}, {"tokens": 1024, "ratio": 0.5}, {"tokens": 4096, "ratio": 2.0}]
    assert layers.crossing(rows) == pytest.approx(2048)
    assert layers.crossing(rows[:2]) is None
    assert layers.crossing(rows[2:]) == 4096


def test_state_bytes_count_storage_once():
    state = torch.zeros(2, 3)
    assert state_bytes((state, state.view(3, 2), torch.zeros(4, dtype=torch.int64))) == 24 + 32


def test_numbers_and_tables():
    assert [show.number(v) for v in (None, 1234567, 1234.5, 0.12345, 12.345, "x")] == [
        "-", "1,234,567", "1,234", "0.123", "12.3", "x",
    ]  # fmt: skip
    part = {"title": "T", "rows": [{"a": "x", "n": 2}, {"a": "y", "n": 0.5}], "notes": ["So it is."]}
    text = show.markdown(part)
    assert "| x | 2 |" in text
    assert text.endswith("So it is.")
    page = "before\n<!-- bench cpu decode -->\nold\n<!-- end -->\nafter"
    new = show.update_page(page, {"cpu": {"parts": {"decode": part}}})
    assert "old" not in new
    assert new.startswith("before\n")
    assert new.endswith("<!-- end -->\nafter")
    assert show.update_page(new, {"cpu": {"parts": {"decode": part}}}) == new
    with pytest.raises(ValueError, match="decode"):
        show.update_page(page, {"cpu": {"parts": {}}})


@pytest.mark.parametrize("name", ["docs/benchmarks.md", "docs/continuum.md", "README.md"])
def test_the_page_says_what_the_results_say(name):
    """No page holds a figure that is not in the committed results."""
    root = Path(__file__).parents[2]
    results = {path.stem: json.loads(path.read_text()) for path in (root / "benchmarks" / "results").glob("*.json")}
    page = (root / name).read_text()
    assert results
    assert show.update_page(page, results) == page
