"""torchrun starts the processes again when one of them was killed, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nestling.training import checkpoint
from nestling.training.build import load_saved
from nestling.training.metrics import read_metrics

ASKED = pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="torchrun: NESTLING_SLOW_TESTS=1 runs it")


def torchrun(config, folder):
    """The run on two processes of torchrun, begun."""
    config.save(folder / "config.json")
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2", "-m", "nestling", "train", "--resume"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, "--config", folder / "config.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@ASKED
@pytest.mark.timeout(500)
@pytest.mark.parametrize(("mode", "killed"), [("fsdp", 1), ("ddp", 0)])
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(config, tmp_path, mode, killed):
    config = config.changed(
        **{"parallel.mode": mode, "steps": 400, "logging.save_every": 20, "logging.eval_every": 0, "optim.name": "m3"}
    )
    whole = torchrun(config.changed(out=str(tmp_path / "whole")), tmp_path)
    assert whole.wait() == 0, whole.communicate()[1]
    process = torchrun(config, tmp_path)
    metrics = Path(config.out) / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"train"') > 50):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {Path(f"/proc/{pid}/environ").read_bytes().split(b"\0RANK=")[1][:1]: int(pid) for pid in workers}
    os.kill(ranks[str(killed).encode()], signal.SIGKILL)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert "done at step 400" in out
    assert [row["step"] for row in read_metrics(metrics) if row["kind"] == "train"] == list(range(1, 401))
    a, b = (load_saved(checkpoint.resolve(path)).state_dict() for path in (config.out, tmp_path / "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)
