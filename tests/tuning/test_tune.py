"""Searches: of a command, a function and a training run; stopped, gone on with, failing."""

import json
import math
import shlex
import sys

import optuna
import pytest
import typer
from typer.testing import CliRunner

from nestling.cli import tune as cli_tune
from nestling.cli.common import friendly
from nestling.training.config import TrainConfig
from nestling.tuning import Command, Space, TrainingRun, tune
from nestling.tuning.objectives import load_callable
from nestling.tuning.study import _open

BOWL = "import math, sys; print('noise'); print(math.log(float(sys.argv[1]) / 0.01) ** 2)"


def command(code, *words, **options):
    """A command line that runs Python code."""
    return Command(shlex.join([sys.executable, "-c", code.replace("{", "{{").replace("}", "}}"), *words]), **options)


def lines(path):
    return path.read_text().splitlines()


def test_a_command_is_searched_and_gone_on_with(tmp_path):
    said = []
    bowl = command(BOWL, "{lr}")
    found = tune(bowl, tmp_path, space=Space.parse(["lr=1e-4:1:log"]), trials=4, say=said.append)
    assert (found.finished, found.failed) == (4, 0)
    assert found.first == pytest.approx(math.log(0.3) ** 2)
    assert found.value <= found.first
    assert found.value == pytest.approx(math.log(found.best["lr"] / 0.01) ** 2, rel=1e-4)
    assert found.paste.endswith(f" {found.best['lr']:.6g}")
    assert len(said) == 4
    again = tune(bowl, tmp_path, space=Space.parse(["lr=1e-4:1:log"]), trials=6, say=said.append)
    assert again.finished == 6
    assert len(said) == 6
    assert len(set(said)) == 6
    json.dumps(again.to_dict())


def test_a_trial_that_was_cut_off_is_done_again(tmp_path):
    space, bowl = Space.parse(["lr=1e-4:1:log"]), command(BOWL, "{lr}")
    done = tune(bowl, tmp_path, space=space, trials=1)
    cut_off = _open(optuna, tmp_path, False, True, 0).ask()  # as a kill leaves it: running
    lr = space.suggest(cut_off)["lr"]
    said = []
    found = tune(bowl, tmp_path, space=space, trials=2, say=said.append)
    assert (done.finished, found.finished, found.failed) == (1, 2, 1)
    assert f"lr {lr:.6g} " in said[0]


def test_a_search_that_is_stopped_goes_on(tmp_path):
    calls = []

    def goal(trial):
        calls.append(trial.suggest_float("x", 0, 1))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    found = tune(goal, tmp_path, trials=3)
    assert found.interrupted
    assert found.finished == 1
    assert tune(goal, tmp_path, trials=3).finished == 3
    assert calls[2] == calls[1]


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    tune(command(BOWL, "{lr}"), tmp_path, trials=1)
    with pytest.raises(ValueError, match="another space"):
        tune(command(BOWL, "{lr}"), tmp_path, space=Space.parse(["lr=1e-4:1:log"]), trials=1)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('loss is low')", "printed no figure.*'loss is low'"),
        ("import sys; sys.exit('out of memory')", "code 1: out of memory"),
        ("print('nan')", "figure is nan"),
        ("print('{\"accuracy\": 1}')", "printed no figure"),
    ],
)
def test_a_command_that_fails_at_once_is_an_error(tmp_path, code, message):
    with pytest.raises(ValueError, match=message):
        tune(command(code, "{lr}"), tmp_path, trials=3)


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(ValueError, match="no-such-program"):
        tune(Command("no-such-program {lr}"), tmp_path, trials=1)


def test_a_later_failure_is_passed_over(tmp_path):
    code = "import sys; x = float(sys.argv[1]); sys.exit('too hot') if x > 0.02 else print(x)"
    said = []
    space = Space.parse(["lr=1e-3:0.1:log"])
    found = tune(command(code, "{lr}"), tmp_path, trials=6, space=space, say=said.append)
    assert found.finished == 6
    assert found.failed == len(found.errors) == sum("too hot" in line for line in said) > 0


def test_json_lines_report_on_the_way_and_prune(tmp_path):
    code = (
        "import json, sys, time\nx = float(sys.argv[1])\n"
        "for i in range(3): print(json.dumps({'step': i, 'loss': x + 1 / (i + 1)}), flush=True)\n"
        "open(sys.argv[2], 'a').write('end\\n')"
    )
    target = tmp_path / "ends"
    options = {"space": Space.parse(["lr=1e-4:1:log"]), "trials": 14}
    found = tune(command(code, "{lr}", str(target)), tmp_path / "study", **options)
    assert found.pruned > 0
    assert found.finished + found.pruned == 14
    assert found.value == pytest.approx(found.best["lr"] + 1 / 3, rel=1e-4)


def test_placeholders_and_ranges_must_agree():
    with pytest.raises(ValueError, match="no placeholder"):
        Command("train.py --lr 1")
    with pytest.raises(ValueError, match="write {{ and }}"):
        Command("train.py {lr")
    given = Command("train.py {lr} {depth} '{{}}'")
    with pytest.raises(ValueError, match="--space depth=LOW:HIGH"):
        tune(given, "unused")
    with pytest.raises(ValueError, match="no {alpha}"):
        tune(given, "unused", space=Space.parse(["alpha=0:1", "depth=1:3:int"]))
    assert given.filled({"lr": 0.001, "depth": 2}) == ["train.py", "0.001", "2", "{}"]


def test_a_function_of_a_trial(tmp_path, monkeypatch):
    code = "def goal(trial):\n    return trial.suggest_float('x', 0, 1)\nnumber = 3\n"
    (tmp_path / "mine_to_tune.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    found = tune(load_callable("mine_to_tune:goal"), tmp_path / "study", trials=5, maximize=True)
    assert found.value == found.best["x"] > 0.3
    wrong = {"mine_to_tune": "module:function", "mine_to_tune:number": "no function", "none:f": "none"}
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            load_callable(name)


@pytest.fixture
def run(tmp_path):
    """A training run of seconds."""
    text = tmp_path / "book.txt"
    text.write_text("the cat sat on the mat. the dog ran to the log! " * 60)
    model = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mixer": "attention"}
    return TrainConfig.from_dict(
        {
            "steps": 6,
            "model": {"options": model},
            "data": {"text": [str(text)], "seq_len": 16, "batch_size": 2, "cache_dir": str(tmp_path / "cache")},
            "optim": {"name": "m3"},
            "logging": {"eval_batches": 2},
        }
    )


def test_a_training_run(tmp_path, run):
    space = Space.parse(["lr=1e-3:1e-1:log", "periods=1|1,4", "schedule.warmup=0:0.2"])
    found = tune(TrainingRun(run), tmp_path / "study", space=space, trials=3)
    assert found.finished + found.pruned == 3
    assert 0 < found.value < 12
    words = shlex.split(found.paste)
    assert words[:2] == ["--optimizer", "m3"]
    assert json.loads(words[words.index("--optimizer-options") + 1])["periods"][0] == 1
    assert words[-1].startswith("schedule.warmup=")
    with pytest.raises(ValueError, match="another run"):
        tune(TrainingRun(run.changed(steps=7)), tmp_path / "study", space=space, trials=3)
    with pytest.raises(ValueError, match="unknown option.*momentun"):
        tune(TrainingRun(run), tmp_path / "other", space=Space.parse(["momentun=0:1"]), trials=1)
    with pytest.raises(ValueError, match="schedule.warm"):
        tune(TrainingRun(run), tmp_path / "third", space=Space.parse(["schedule.warmupp=0:1"]), trials=1)


def test_the_command(tmp_path):
    app = typer.Typer()
    app.command()(friendly(cli_tune.main))
    runner, bowl = CliRunner(), command(BOWL, "{lr}").template
    common = ["--out", str(tmp_path / "s"), "--trials", "2"]
    done = runner.invoke(app, ["--command", bowl, *common, "--json", "-q"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["finished"] == 2
    done = runner.invoke(app, ["--command", bowl, *common])
    assert "to use it:" in done.output
    for arguments, message in [
        ([], "nothing is named to tune"),
        (["--command", bowl, "--call", "a:b"], "exclude each other"),
        (["--command", bowl, "-s", "lr=1"], "holds a search with another space"),
        (["--command", bowl, "-o", "steps=3"], "a command takes its options itself"),
        (["--call", "nothing"], "module:function"),
        (["--command", bowl, "--trials", "0"], "at least 1"),
    ]:
        failed = runner.invoke(app, [*common, *arguments])
        assert failed.exit_code == 2, failed.output
        assert message in failed.output
