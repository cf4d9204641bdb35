"""Every test runs on one thread, offline, from the same seeds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

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
