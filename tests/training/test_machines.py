"""Two machines, as two network namespaces joined by a virtual cable: one torchrun on each, one run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nestling.training.loop import train
from nestling.training.metrics import read_metrics

JOINED = """
set -e
ip link set lo up
unshare --net sleep 300 & other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add here type veth peer name there
ip link set there netns $other
ip addr add 10.77.0.1/24 dev here
ip link set here up
nsenter -t $other -n sh -c 'ip link set lo up; ip addr add 10.77.0.2/24 dev there; ip link set there up'
# names are known to no server here: who is the host, and where each is, said outright
export PET_RDZV_CONF=is_host=0 PET_LOCAL_ADDR=10.77.0.2 GLOO_SOCKET_IFNAME=there
nsenter -t $other -n "$@" & second=$!
export PET_RDZV_CONF=is_host=1 PET_LOCAL_ADDR=10.77.0.1 GLOO_SOCKET_IFNAME=here
"$@" || failed=1
wait $second || failed=1
kill $other
exit ${failed:-0}
"""


def may_join() -> bool:
    """Whether this user may make namespaces and a cable here."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    cable = ["unshare", "-rn", "ip", "link", "add", "here", "type", "veth", "peer", "name", "there"]
    return subprocess.run(cable, capture_output=True).returncode == 0


@pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="torchrun: NESTLING_SLOW_TESTS=1 runs it")
@pytest.mark.skipif(not may_join(), reason="needs network namespaces (Linux: unshare, nsenter, ip)")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_machines_train_as_one_process(config, tmp_path, mode):
    config = config.changed(**{"optim.name": "m3", "parallel.mode": mode})
    config.save(tmp_path / "config.json")
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500"]
    command = [sys.executable, "-m", "torch.distributed.run", *words, "-m", "nestling", "train"]
    ran = subprocess.run(
        ["unshare", "-rn", "bash", "-c", JOINED, "joined", *command, "--config", str(tmp_path / "config.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "done at step 12" in ran.stdout
    train(config.changed(out=str(tmp_path / "alone"), **{"parallel.mode": "none"}))
    joined, alone = (
        [row["loss"] for row in read_metrics(Path(folder) / "metrics.jsonl") if row["kind"] == "train"]
        for folder in (config.out, tmp_path / "alone")
    )
    assert joined == pytest.approx(alone, rel=1e-5)
