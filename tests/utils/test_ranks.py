"""The processes of a run find each other, also where torchrun starts them again."""

import faulthandler
import multiprocessing
import os
import time

import torch
import torch.distributed as dist

from nestling.utils.ranks import process_group


def start(rank: int, port: int, dies: bool) -> None:
    """A process of torchrun's: it sums with the others, and dies or ends; the first one comes late."""
    faulthandler.dump_traceback_later(20, exit=True)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    time.sleep(0.0 if rank else 0.3)
    with process_group("cpu") as ranks:
        assert ranks.sum(torch.tensor(float(rank))).item() == 3
        if dies:
            os._exit(0)


def test_processes_that_start_again_on_one_store_do_not_wait_for_the_dead():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the agent's
    for dies in (True, False):
        context = multiprocessing.get_context("spawn")
        started = [context.Process(target=start, args=(rank, store.port, dies), daemon=True) for rank in range(3)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        assert [process.exitcode for process in started] == [0, 0, 0]
