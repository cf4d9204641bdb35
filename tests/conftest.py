"""Every test runs on one thread, offline, from the same seeds."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

import processes
import slowly

torch.set_num_threads(1)
processes.fork_instead_of_spawn()

settings.register_profile("nestling", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nestling")


@pytest.fixture(autouse=True)
def _same_seeds():
    """Seed every generator before each test, and undo a changed default dtype after it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["compiled", "torch"], scope="module")
def form(request):
    """Both ways the chunk forms can run: compiled from C++, and in PyTorch as where there is no compiler."""
    from nestling.ops import compiled

    if request.param == "compiled" and compiled.native() is None:
        pytest.skip("needs a C++ compiler (g++, clang++ or $CXX): PyTorch's forms are tested alone")
    with compiled.disabled() if request.param == "torch" else nullcontext():
        yield request.param


def pytest_collection_modifyitems(config, items):
    """What takes long and has a sibling that stays waits for NESTLING_SLOW_TESTS=1."""
    for item in items:
        if not slowly.ASKED and item.nodeid.removeprefix("tests/").startswith(slowly.LONG):
            item.add_marker(pytest.mark.skip(reason="takes long: NESTLING_SLOW_TESTS=1 runs it"))


def pytest_collection_finish(session):
    """What is imported is never looked at again for garbage: a twentieth of the time of the tests."""
    gc.freeze()


def pytest_configure(config):
    """The marks of transformers' own tests (tests/suites)."""
    for mark in (
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "torch_compile_test",
        "torch_export_test",
        "flex_attention_test",
        "generate",
        "slow",
    ):
        config.addinivalue_line("markers", f"{mark}: of transformers' tests")
