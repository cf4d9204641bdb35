"""What only a process shows that has not imported nestling, or that the installed script started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestling.training.tokenizers import byte_tokenizer

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="a minute: NESTLING_SLOW_TESTS=1 runs it")
LOAD = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
import torch
for folder in sys.argv[1:3]:
    assert PreTrainedConfig.from_json_file(folder + "/config.json").architectures
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        raise SystemExit("loaded without a word")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
assert not any(name.split(".")[0] == "nestling" for name in sys.modules)
for folder in sys.argv[1:3]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(torch.arange(40)[None]).logits, torch.load(folder + "/logits.pt"))
    model.save_pretrained(sys.argv[3])
    AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
"""


def run(folder, *command):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_saved_models_load_where_nestling_is_not_imported(tmp_path):
    sizes = dict(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    stacked = stack_levels(LlamaForCausalLM(LlamaConfig(**sizes)), [Level(8, lr=0.5)], "width")
    for name, model in dict(hope=HopeForCausalLM(HopeConfig(**sizes, mixer="attention")), stacked=stacked).items():
        model.save_pretrained(tmp_path / name)
        model = type(model).from_pretrained(tmp_path / name)
        torch.save(model(torch.arange(40)[None]).logits, tmp_path / name / "logits.pt")
    run(tmp_path, sys.executable, "-c", LOAD, tmp_path / "hope", tmp_path / "stacked", tmp_path / "again")


@SLOW
def test_the_installed_script_goes_on_from_a_run(tmp_path):
    script = Path(sys.executable).with_name("nestling")
    if not script.exists():
        pytest.skip("nestling is not installed beside this Python")
    (tmp_path / "text.txt").write_text("a text to read, again and again. " * 400)
    train = [script, "train", tmp_path / "text.txt", "--steps", 2, "--batch-size", 2, "--seq-len", 32, "--quiet"]
    run(tmp_path, *train, "--set", "hidden_size=16", "--set", "num_hidden_layers=2", "--out", tmp_path / "run")
    run(tmp_path, *train, "--init", tmp_path / "run", "--out", tmp_path / "second")
    run(tmp_path, *train, "--init", tmp_path / "run", "--tokenizer", tmp_path / "run", "--out", tmp_path / "third")
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    run(
        tmp_path, *train, "--tokenizer", tmp_path / "run" / "latest", "--set", "hidden_size=16", "--out", tmp_path / "f"
    )


@SLOW
def test_a_run_that_a_fresh_process_goes_on_with_ends_bit_for_bit_the_same(tmp_path):
    for name, *stops in (("whole", 5), ("cut", 2, 5)):
        (tmp_path / name).mkdir()
        for n, stop in enumerate(stops):
            run(tmp_path, sys.executable, Path(__file__).with_name("go_on.py"), tmp_path / name, stop, *["resume"][:n])
    whole, cut = (torch.load(tmp_path / name / "5.pt") for name in ("whole", "cut"))
    assert len(whole) == 6
    for run_, weights in whole.items():
        assert all(torch.equal(weights[name], cut[run_][name]) for name in weights), run_
