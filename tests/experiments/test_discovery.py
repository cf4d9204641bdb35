"""Experiments are found by folder, whatever else is called `experiments`; what is committed belongs to today's code."""

import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from experiments import catalog
from experiments.classes.experiment import ClassesWork
from experiments.shared.interface import entries, find
from experiments.shared.run import load
from nestling.cli.laboratory import find_experiments

ROOT = Path(__file__).parents[2]

# of the data that the committed results were made with, as `Work` computes them
BOOKS = {"charles-dickens--bleak-house": 1988084, "george-eliot--middlemarch": 1812870,
         "herman-melville--moby-dick": 1215917, "leo-tolstoy--war-and-peace": 3278050,
         "samuel-pepys--the-diary": 6149810}  # fmt: skip
SIZES = [f"{name}.txt {size}" for name, size in BOOKS.items()]
CORPUS = "1326ce835c1af927-77a938d4c9bb4bab+cb94ddbe97b470ef-77a938d4c9bb4bab"
INTENTS = {"clinc150": "6b80c0be16ea", "banking77": "527da1576009"}
DATA = {
    "cost": CORPUS, "quality": CORPUS, "quality_2m": CORPUS, "stability": CORPUS, "language": CORPUS,
    "positions": CORPUS, "babilong": "a57f87463dc0",
    "vision": "9186ed07dbbc", "m3": "9186ed07dbbc",
    "domains": ",".join(SIZES), "frequencies": ", ".join(SIZES), "knowledge": SIZES[3],
    **dict.fromkeys(("ablation", "choice"), "8e722667726f2363-77a938d4c9bb4bab"), "needles": "a57f87463dc0",
    "translation": "galela 846809,uma 778732",
}  # fmt: skip
# contenders that have not run on every stream or text, as the experiment's page says
NOT_RUN = {
    **{name: {c.name for c in find(name).defaults().contenders} for name in ("ablation", "aliases", "mad")},
    "defaults": {c.name for c in find("defaults").defaults().contenders},
    "classes": {
        "2 levels",
        "fine-tuning, same weights, M3, in context",
        "default",
        "default, replay",
        "default, snapshots",
        "exact memory",
    },
    "endless": {"default"},
    "knowledge": {
        "default",
        "default, fast",
        "default, as notes",
        "default, sleep",
        "default, sleep, anchored",
    },
    "languages": {c.name for c in find("languages").defaults().contenders},
    "quality_2m": {"gated deltanet and window", "transformer + conv"},
    "quality": {
        "gated deltanet",
        "gated deltanet, muon",
        "gated deltanet and window",
        "transformer, muon",
        "hope, hybrid, m3",
        "transformer + conv, m3",
    },
    "needles": {c.name for c in find("needles").defaults().contenders},
    **{name: {c.name for c in find(name).defaults().contenders} for name in ("babilong", "positions")},
    "streams_200k": {
        "retrieval",
        "long context",
        "snapshots",
    },
    "streams": {c.name for c in find("streams").defaults().contenders},
}


@pytest.mark.parametrize("name", catalog.names())
def test_every_experiment_has_the_whole_interface(name):
    experiment = find(name)
    assert experiment.GROUP
    assert experiment.QUESTION.endswith("?")
    assert all(callable(getattr(experiment, f)) for f in ("defaults", "work", "plan", "summarize", "table", "plot"))
    settings = experiment.defaults()
    assert settings.name == name
    assert settings.smoke().contenders
    assert entries(experiment, json.loads((ROOT / "experiments" / name / "summary.json").read_text()))


@pytest.mark.parametrize("name", catalog.names())
def test_committed_rows_belong_to_the_present_settings(name, monkeypatch):
    experiment, folder = find(name), ROOT / "experiments" / name
    settings = load(name, folder, {})
    work = object.__new__(typing.get_type_hints(experiment.work)["return"])  # without the data
    work.settings = work.experiment = settings
    work.data = work.corpus = DATA.get(name, "")
    monkeypatch.setattr(ClassesWork, "load", lambda self, name: type("", (), {"fingerprint": INTENTS[name]}))
    job_class = typing.get_args(typing.get_type_hints(experiment.plan)["return"])[0]
    fields = [f.name for f in dataclasses.fields(job_class)]
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        job = job_class(**{name: row[name] for name in fields if name in row})  # older rows lack a later field
        assert (job.key, work.fingerprint(job)) == (row["key"], row["fingerprint"])
        found[job.kind, job.key] = row
    # and they are all that the experiment calls for
    jobs = experiment.plan(settings, settings.contenders, lambda job: found.get((job.kind, job.key)))
    lacking = {job.contender for job in jobs if (job.kind, job.key) not in found}
    assert lacking <= NOT_RUN.get(name, set())


def _nestling(arguments, cwd, path, **options):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-m", "nestling", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, **options)


@pytest.fixture
def elsewhere(tmp_path):
    """A project with a package `experiments` of its own."""
    package = tmp_path / "project" / "experiments"
    (package / "shared").mkdir(parents=True)
    for path in (package / "__init__.py", package / "shared" / "__init__.py", package / "shared" / "run.py"):
        path.write_text("raise SystemExit('the wrong experiments')\n")
    return tmp_path / "project"


@pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="processes: NESTLING_SLOW_TESTS=1 runs it")
def test_a_run_from_another_projects_folder(elsewhere):
    """Worker processes too find the checkout's experiments."""
    options = ["--smoke", "--only", "SGD momentum", "--json", "--out", "out"]
    done = _nestling(["eval", "span", *options, "--workers", "1"], elsewhere, ROOT / "src")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failed"] == {}
    assert (elsewhere / "out" / "plot.png").is_file()


def test_an_installed_library_finds_them_by_option_or_says_how(elsewhere, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "nestling").symlink_to(ROOT / "src" / "nestling")
    code = (
        "import sys; sys.argv[0] = 'nestling'; import nestling.cli.laboratory as l; l.__file__ = 'a/b/c/d/e.py'; "
        "from nestling.cli.main import app; app()"
    )
    environment = dict(os.environ, PYTHONPATH=str(tmp_path / "site"))

    def call(*arguments, cwd):
        command = [sys.executable, "-c", code, "eval", *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    refused = call("--list", cwd=elsewhere)
    assert refused.returncode == 2
    assert "clone the repository" in refused.stderr
    assert "span" in call("--list", "--experiments", str(ROOT / "experiments"), cwd=elsewhere).stdout
    assert "span" in call("--list", cwd=ROOT / "docs").stdout  # below a checkout


def test_only_a_marked_folder_is_taken(elsewhere):
    assert find_experiments() == ROOT / "experiments"
    assert find_experiments(ROOT / "experiments") == ROOT / "experiments"
    with pytest.raises(ValueError, match="does not hold them"):
        find_experiments(elsewhere / "experiments")


def test_names_are_folders(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "experiment.py").write_text('GROUP = "New"\nQUESTION = "Does it?"\n')
    assert catalog.by_group(tmp_path) == {"New": {"mine": "Does it?"}}
    assert catalog.listing(tmp_path) == "New:\n  mine  Does it?"
