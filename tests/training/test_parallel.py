"""A run on several processes (gloo) is the run of one: losses, weights, checkpoints."""

import itertools
import signal
import time
from pathlib import Path

import pytest
import torch

from nestling.cms import stack_levels
from nestling.schedule import Level
from nestling.training import TrainConfig, Trainer, checkpoint
from nestling.training.build import build_model, load_saved
from nestling.training.metrics import read_metrics
from nestling.training.parallelize import find_mode
from nestling.training.tokenizers import byte_tokenizer
from nestling.utils.ranks import Ranks
from processes import Command, as_torchrun, on_ranks
from slowly import ASKED

SLOWLY = pytest.mark.skipif(not ASKED, reason="processes: NESTLING_SLOW_TESTS=1 runs it")
FAST = [{"chunk_size": 4, "lr": 0.05}, {"chunk_size": 8, "lr": 0.05, "optimizer": "adamw"}, {"chunk_size": None}]
SLOW = [{"chunk_size": None}, {"chunk_size": 3 * 128}]  # 3 steps of 2 x 4 x 16 tokens
CASES = {
    "slow level": {"cms_levels": SLOW},
    "fast levels": {"cms_levels": FAST, "cms_meta_grad": "full"},
    "fast levels, no gradient of some": {"cms_levels": FAST, "cms_meta_grad": "none"},
}
OPTIMIZERS = {"adamw": {}, "m3": {"periods": [1, 2]}, "nestling.optim.DeltaMomentum": {}}
ALL = {mode: list(itertools.product(CASES, OPTIMIZERS)) for mode in ("ddp", "fsdp")}
SOME = {  # of every mode, case and optimiser; each optimiser on shards is in tests/optim/test_sharded.py
    "ddp": [("fast levels", "m3"), ("fast levels, no gradient of some", "adamw")],
    "fsdp": [("slow level", "adamw"), ("fast levels", "m3"), ("fast levels", "nestling.optim.DeltaMomentum")],
}


@pytest.fixture
def base(config):
    return config.changed(**{"steps": 6, "data.batch_size": 4, "optim.accumulate": 2, "optim.lr": 1e-2})


def trainer(config: TrainConfig, resume: bool = False) -> Trainer:
    """A run in float64, so that sums in another order are told from errors."""
    return Trainer(config, model=build_model(config.model, byte_tokenizer()).double(), resume=resume)


def losses(config: TrainConfig, steps: int, double: bool = True) -> list[float]:
    run = trainer(config) if double else Trainer(config)
    found = [run.train_step().loss for _ in range(steps)]
    return [*found, run.evaluate().loss]


def compare(
    configs: dict[str, dict],
    steps: int,
    expected: dict[str, list[float]],
    tolerance: float = 1e-10,
    double: bool = True,
    modes: tuple[str, ...] = ("ddp", "fsdp"),
) -> None:
    """On every rank: the losses of one process."""
    for name, values in configs.items():
        for mode in modes:
            found = losses(TrainConfig.from_dict(values).changed(**{"parallel.mode": mode}), steps, double)
            errors = [abs(a - b) for a, b in zip(found, expected[name], strict=True)]
            print(name, mode, double, max(errors))
            assert max(errors) < tolerance, (name, mode, errors)


def compare_all(runs: dict[tuple[str, str, str], tuple[dict, list[float]]], steps: int) -> None:
    """On every rank, of (mode, ...): a configuration and the losses that one process has with it."""
    for (mode, *rest), (values, expected) in runs.items():
        name = ", ".join(rest)
        compare({name: values}, steps, {name: expected}, modes=(mode,))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=SLOWLY)])
def test_losses_are_those_of_one_process(base, world):
    runs = {}
    for mode, cases in ALL.items() if ASKED else SOME.items():
        for case, name in cases:
            options = {**base.model.options, **CASES[case]}
            changed = base.changed(**{"model.options": options, "optim.name": name, "optim.options": OPTIMIZERS[name]})
            runs[mode, case, name] = changed.to_dict(), losses(changed, 4)
    on_ranks(world, compare_all, runs, 4)


@SLOWLY
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_compiled_losses_are_those_of_one_process(base, mode):
    expected = losses(base, 4, double=False)
    on_ranks(
        2, compare, {"compiled": base.changed(compile=True).to_dict()}, 4, {"compiled": expected}, 1e-5, False, (mode,)
    )


def refuses(values: dict, words: str) -> None:
    """On every rank: the run is refused in these words."""
    with pytest.raises(ValueError, match=words):
        Trainer(TrainConfig.from_dict(values))


def test_levels_that_learn_are_not_compiled_layer_by_layer(base):
    options = {**base.model.options, **CASES["fast levels"]}
    changed = base.changed(**{"model.options": options, "compile": True, "parallel.mode": "fsdp"})
    on_ranks(2, refuses, changed.to_dict(), "compile under parallel.mode fsdp is of single layers")


def go_on(values: dict, steps: int, expected: list[float]) -> None:
    """On every rank: some steps from the newest checkpoint, with the losses of the uninterrupted run, and a new one."""
    run = trainer(TrainConfig.from_dict(values), resume=checkpoint.list_checkpoints(values["out"]) != [])
    assert [run.train_step().loss for _ in range(steps)] == pytest.approx(expected, abs=1e-10, rel=0)
    run.save()


@SLOWLY
@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-10), (False, 1e-5)])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_fifty_steps(base, mode, double, tolerance):
    # rates at which one process does not enlarge a rounding of its weights in 50 steps: at ten times these 1e-15
    # becomes 0.03 in float64, 1e-7 becomes 0.01 in float32
    rate, inner = (1e-3, 0.005) if double else (1e-4, 0.001)
    levels = [{"chunk_size": 4, "lr": inner}, {"chunk_size": 8, "lr": inner}, {"chunk_size": None}]
    options = {**base.model.options, "cms_levels": levels, "cms_meta_grad": "full", "num_hidden_layers": 2}
    calm = {"optim.name": "m3", "optim.lr": rate, "steps": 50, "optim.accumulate": 1}
    base = base.changed(**{"model.options": options, **calm})
    expected = losses(base, 50, double)
    on_ranks(2, compare, {"fifty": base.to_dict()}, 50, {"fifty": expected}, tolerance, double, (mode,))


@SLOWLY
def test_a_model_that_was_given_levels(base, llama, tmp_path):
    levels = [Level(chunk_size=4, lr=0.05), Level(chunk_size=8, lr=0.05, optimizer="m3")]
    stacked = stack_levels(llama(), levels, placement="width")
    stacked.save_pretrained(tmp_path / "stacked")
    base = base.changed(**{"model.name": str(tmp_path / "stacked"), "model.options": {}, "data.tokenizer": "bytes"})
    configs = {trained: base.changed(trained=trained) for trained in ("all", "levels")}
    configs["less memory"] = base.changed(gradient_checkpointing=True)
    expected = {name: losses(config, 4) for name, config in configs.items()}
    on_ranks(2, compare, {name: config.to_dict() for name, config in configs.items()}, 4, expected)


@SLOWLY
@pytest.mark.parametrize(("options", "tolerance"), [({"param_dtype": "bf16"}, 0.05), ({"offload": True}, 1e-6)])
def test_options_of_fsdp(base, options, tolerance):
    expected = losses(base, 4, double=False)
    base = base.changed(**{f"parallel.{name}": value for name, value in (options | {"mode": "fsdp"}).items()})
    on_ranks(2, compare, {"options": base.to_dict()}, 4, {"options": expected}, tolerance, False, ("fsdp",))


def test_what_does_not_fit_is_refused():
    run = TrainConfig()
    with pytest.raises(ValueError, match="2 processes run: use ddp or fsdp"):
        find_mode(run.changed(**{"parallel.mode": "none"}), Ranks(0, 2))
    with pytest.raises(ValueError, match="needs the processes of torchrun"):
        find_mode(run.changed(**{"parallel.mode": "fsdp"}), Ranks())
    with pytest.raises(ValueError, match=r"parallel.offload and parallel.param_dtype are for parallel.mode fsdp"):
        find_mode(run.changed(**{"parallel.offload": True}), Ranks())
    assert find_mode(run, Ranks()) == "none"


BRIEF = [(2, "fsdp"), (4, "fsdp"), (1, "none")]
LONG = [*BRIEF, (2, "ddp"), (2, "fsdp"), (1, "none"), (4, "ddp")]


@pytest.mark.parametrize(
    ("optimizer", "path"),
    [
        ("m3", BRIEF),
        *(pytest.param(name, LONG, marks=SLOWLY) for name in ("m3", "muon", "nestling.optim.DeltaMomentum")),
    ],
)
def test_a_run_goes_on_at_another_number_of_processes(base, optimizer, path):
    options = {**base.model.options, "cms_levels": SLOW}
    base = base.changed(**{"model.options": options, "optim.name": optimizer, "steps": 8})
    expected = losses(base, len(path))
    for (world, mode), loss in zip(path, expected):
        values = base.changed(**{"parallel.mode": mode}).to_dict()
        if world > 1:
            on_ranks(world, go_on, values, 1, [loss])
        else:
            go_on(values, 1, [loss])
        saved = load_saved(checkpoint.resolve(base.out))  # always a Hugging Face folder
        assert saved.dtype == torch.float64


@pytest.fixture
def commands(config, tmp_path):
    """Starts `nestling train` on two processes, as torchrun does."""

    def start(*arguments: str) -> list[Command]:
        config.save(tmp_path / "config.json")
        words = ["train", "--config", tmp_path / "config.json", *arguments]
        return [Command(words, tmp_path / f"said{i}", environment=one) for i, one in enumerate(as_torchrun(2))]

    return start


@pytest.mark.parametrize("mode", ["fsdp", pytest.param("ddp", marks=SLOWLY)])
def test_a_signal_to_one_rank_ends_all_with_a_whole_checkpoint(commands, config, mode):
    processes = commands("--parallel", mode, "--steps", "100000", "--eval-every", "0", "--save-every", "0")
    metrics = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count('"train"') > 2):
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    (out, _), (out_1, said_1) = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert b"stopped at step" in out
    assert not out_1 + said_1
    rows = read_metrics(metrics)
    found = checkpoint.list_checkpoints(config.out)
    assert checkpoint.verify(found[-1])["step"] == rows[-1]["step"] == len(rows)
    assert not Path(f"{config.out}.lock").exists()


def test_what_is_wrong_is_said_once(commands, config):
    processes = commands("--batch-size", "3")
    (_, said), (_, said_1) = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert b"make it a multiple of 2" in said
    assert not said_1
    assert not Path(config.out).exists()
