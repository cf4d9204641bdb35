"""Configurations at the paper's size: equal parameters, and what `nestling train` reads."""

import pytest
from typer.testing import CliRunner

from experiments.quality import experiment as quality
from experiments.shared.models.paper import PaperRun, write
from nestling.cli.main import app
from nestling.models import sizes
from nestling.training.config import TrainConfig

LARGE = quality.paper()


@pytest.mark.parametrize("name", ["hope", "hope, self-modifying", "gated deltanet and window", "transformer"])
def test_a_contender_has_the_parameters_of_the_others(name):
    """At a size that is built in no time; the large ones have the same contenders and options."""
    assert [run.contenders for run in LARGE] == [LARGE[0].contenders] * 2
    run = PaperRun("mini", 1e8, LARGE[0].contenders, LARGE[0].train)
    config, parameters = run.configuration(name)
    reference = sizes.config("mini")
    assert parameters == pytest.approx(sizes.parameters(reference), rel=0.02)
    assert sizes.parameters(sizes.config(config.model.name, **config.model.options)) == parameters
    assert config.steps == pytest.approx(1e8 / (4096 * 16 * 8), abs=1)


def test_what_is_written_is_read_by_train(tmp_path):
    table = write([PaperRun("tiny", 1e6, {"hope": {}, "a, b": {"mixer": "attention"}}, {"optim.lr": 1e-4})], tmp_path)
    assert table == (tmp_path / "table.md").read_text()
    config = TrainConfig.load(tmp_path / "tiny" / "a-b.json")
    assert (config.out, config.optim.lr) == ("runs/tiny/a-b", 1e-4)
    assert sizes.config(config.model.name, **config.model.options).mixer_names == ["attention"] * 3
    assert "tiny/a-b.json" in table and "tiny/hope.json" in table


def test_an_experiment_without_them_says_which_has_them():
    found = CliRunner().invoke(app, ["eval", "span", "--paper"])
    assert found.exit_code != 0
    assert "quality has" in str(found.exception or "") + found.output
