"""The cost of DGD: every contender is a row, and figures mean what they say. No times are asserted."""

from nestling.bench import QUICK, BenchSettings
from nestling.bench.dgd import dgd


def test_every_optimizer_is_a_row_beside_sgd():
    table = dgd(BenchSettings(**(QUICK | dict(repeats=1, dim=8, tokens=8))))
    assert [row["optimizer"] for row in table.rows] == ["SGD", "SGD with momentum", "DGD", "DGD with momentum"]
    assert table.rows[0]["times SGD"] == 1
    assert all(row["low"] <= row["times SGD"] <= row["high"] for row in table.rows)
    assert "12 layers of width 16" in table.title
