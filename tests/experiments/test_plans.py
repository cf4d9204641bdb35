"""Which runs an experiment calls for, given the results so far; what their judgement is."""

import json
import math
from pathlib import Path

import pytest
import torch

from experiments.cost import experiment as cost
from experiments.quality import experiment as quality
from experiments.shared.models.runs import curve, judge, model_config
from experiments.shared.models.study import TrainingJob, TrainingStudy
from experiments.shared.report import bootstrap, pm, spread
from experiments.shared.run import load, save
from experiments.stability import experiment as stability
from nestling.models.sizes import parameters

MODELS = ("quality", "cost", "stability")
ROOT = Path(__file__).parents[2]


class Rows(dict):
    """Results by job."""

    def train(self, bits, *jobs, diverged=False):
        for job in jobs:
            self[job] = {"bits_per_byte": bits, "diverged": diverged}


@pytest.mark.parametrize("name", MODELS)
def test_every_contender_has_the_parameters_of_the_others(name):
    experiment = load(name, ROOT / "experiments" / name, {})
    sizes = [parameters(model_config(experiment, c.name, 259)) for c in experiment.contenders]
    first = sizes[0]
    assert first > 5_000
    assert all(abs(size - first) <= 0.03 * first for size in sizes)  # each within 2% of the reference
    assert experiment.contenders[0].mixer == "selfmod"


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_is_written_and_read_back(name, tmp_path):
    experiment = load(name, tmp_path, {"steps": 7, "seeds": [3]})
    save(experiment, tmp_path / "config.json")
    again = load(name, tmp_path, {})
    assert again.steps == 7
    assert again.seeds == [3]
    assert [c.name for c in again.contenders] == [c.name for c in experiment.contenders]
    assert again.fingerprint(TrainingJob(again.contenders[0].name, 1e-3, 3), "x") == experiment.fingerprint(
        TrainingJob(again.contenders[0].name, 1e-3, 3), "x"
    )
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_another_experiments_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"name": "cost"}))
    with pytest.raises(ValueError, match="'cost'"):
        load("quality", tmp_path, {})


def test_only_final_runs_at_the_best_rate_are_tested(tiny):
    experiment, rows = tiny(), Rows()
    contenders = experiment.contenders
    first = quality.plan(experiment, contenders, rows.get)
    assert {(j.contender, j.lr) for j in first} == {(c.name, lr) for c in contenders for lr in experiment.lrs}
    assert {(j.seed, j.kind) for j in first} == {(0, "train")}

    rows.train(2.5, TrainingJob("deltanet", 1e-3, 0))
    assert quality.plan(experiment, contenders, rows.get) == first  # half of a search chooses nothing

    rows.train(2.0, TrainingJob("deltanet", 1e-2, 0))
    later = quality.plan(experiment, contenders, rows.get)
    assert TrainingJob("deltanet", 1e-2, 1) in later
    assert [j for j in later if j.kind == "test"] == [TrainingJob("deltanet", 1e-2, 0, kind="test")]
    assert TrainingJob("deltanet", 1e-3, 1) not in later


def test_a_diverged_search_run_is_never_chosen(tiny):
    experiment, rows = tiny(), Rows()
    rows.train(1.0, TrainingJob("deltanet", 1e-3, 0), diverged=True)
    rows.train(2.0, TrainingJob("deltanet", 1e-2, 0))
    found = quality.final_jobs(experiment, experiment.contenders[0], rows.get)
    assert [j.lr for j in found] == [1e-2, 1e-2]
    rows.train(None, TrainingJob("deltanet", 1e-2, 0), diverged=True)
    assert quality.final_jobs(experiment, experiment.contenders[0], rows.get) == []


def test_a_diverged_run_is_repeated_with_the_transformer(tiny):
    experiment = tiny("stability", lrs=[1e-2], precisions=["float32", "bf16"])
    rows = Rows()
    jobs = stability.plan(experiment, experiment.contenders, rows.get)
    assert {j.contender for j in jobs} == {"deltanet"}
    assert len(jobs) == 4
    rows.train(None, TrainingJob("deltanet", 1e-2, 1, "bf16"), diverged=True)
    assert stability.plan(experiment, experiment.contenders, rows.get) == [
        *jobs,
        TrainingJob("transformer", 1e-2, 1, "bf16"),
    ]


def test_settings_of_the_cost_experiment_are_run_seed_by_seed(tiny):
    experiment = tiny("cost", contenders=[{"name": "default", "seeds": [0, 1, 2]}, {"name": "b"}])
    jobs = cost.plan(experiment, experiment.contenders, Rows().get)
    assert [(j.contender, j.seed) for j in jobs] == [
        ("default", 0), ("b", 0), ("default", 1), ("b", 1), ("default", 2),
    ]  # fmt: skip
    assert {j.lr for j in jobs} == {experiment.lrs[0]}


def test_the_cheapest_setting_is_within_the_spread_and_keeps_the_rule(tiny):
    options = {"small": {"expansion": 1}, "tiny": {"chunk_size": 8}, "other rule": {"dgd": False}}
    contenders = [{"name": "default"}, *({"name": n, "options": o} for n, o in options.items())]
    experiment, rows, speeds = tiny("cost", contenders=contenders), Rows(), {}
    bits = {"default": (2.0, 2.1), "small": (2.05, 2.12), "tiny": (2.2, 2.3), "other rule": (1.9, 1.9)}
    for name, values in bits.items():
        for seed, value in enumerate(values):
            rows[TrainingJob(name, 1e-3, seed)] = {
                "bits_per_byte": value, "diverged": False, "parameters": 1, "tokens_per_second": 1.0,
            }  # fmt: skip
        speeds[name] = {"tokens_per_second": 10.0, "ratio": {"default": 1.0, "small": 1.5}.get(name, 3.0)}
    summary = cost.summarize(experiment, experiment.contenders, rows.get, speeds)
    assert {s["setting"] for s in summary["settings"] if s["within_spread"]} == {"default", "small", "other rule"}
    assert summary["cheapest_within_spread"] == "small"
    small = next(s for s in summary["settings"] if s["setting"] == "small")
    assert small["difference"]["values"] == pytest.approx([0.05, 0.02])


def test_what_decides_a_result_is_in_its_fingerprint(tiny):
    job = TrainingJob("deltanet", 1e-3, 0)
    base = tiny().fingerprint(job, "text")
    assert tiny(out="elsewhere", device="cpu").fingerprint(job, "text") == base
    others = [
        tiny(steps=4).fingerprint(job, "text"),
        tiny(optim={"weight_decay": 0.0}).fingerprint(job, "text"),
        tiny(contenders=[{"name": "deltanet", "mixer": "retnet"}]).fingerprint(job, "text"),
        tiny().fingerprint(TrainingJob("deltanet", 1e-3, 1), "text"),
        tiny().fingerprint(job, "other text"),
    ]
    assert len({base, *others}) == 6


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([5.0 - 0.02 * i for i in range(200)], False),
        ([5.0 - 0.02 * i for i in range(150)] + [4.0] * 50, True),  # risen by far and stayed
        ([5.0 - 0.02 * i for i in range(198)] + [math.nan] * 2, True),
        ([3.0] * 90 + [math.nan] + [3.0] * 109, False),  # one bad step, recovered
        ([3.0] * 150, True),  # given up
    ],
)
def test_divergence(losses, diverged):
    found = judge(losses, 200, margin=0.5)
    assert found["diverged"] is diverged
    assert found["nan_losses"] == sum(math.isnan(v) for v in losses)


def test_a_curve_keeps_every_loss():
    assert curve([1.0, 3.0, 5.0], 2) == [[2, 2.0], [3, 5.0]]
    assert len(curve([1.0] * 1000, 60)) <= 60


def test_the_bootstraps_interval_holds_the_mean_and_narrows_with_more_windows():
    draw = torch.Generator().manual_seed(1)
    few, many = (bootstrap((0.1 + torch.randn(3, n, generator=draw)).tolist()) for n in (20, 2000))
    assert few[0] < 0.1 < few[1]
    assert many[0] < 0.1 < many[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 3
    assert bootstrap([[0.5] * 9] * 2) == pytest.approx([0.5, 0.5])
    assert bootstrap([]) is None


def test_spread():
    assert spread([None]) is None
    assert pm(spread([1.0])) == "1.000"
    assert pm(spread([1.0, None, 3.0]), 2) == "2.00 ± 1.41"
    assert pm(None) == "-"


def test_bad_configurations_are_named():
    with pytest.raises(ValueError, match="'a' occurs twice|a occurs twice"):
        TrainingStudy(contenders=TrainingStudy.from_dict({"contenders": [{"name": "a"}]}).contenders * 2)
    with pytest.raises(ValueError, match="lrs"):
        TrainingStudy(lrs=[])
    with pytest.raises(ValueError, match=r"did you mean"):
        TrainingStudy.from_dict({"contender": []})
