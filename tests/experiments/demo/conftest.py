"""A demo of a few seconds, and a made-up result whose numbers tests can change."""

import copy

import pytest

from experiments.demo import DemoConfig
from experiments.demo.config import HOPE, TRANSFORMER
from experiments.demo.report import build
from experiments.demo.text import Text

SENTENCES = "the cat sat on the mat. the dog ran to the log! a bird sang in the tree; one two three four five.\n"


@pytest.fixture(scope="session")
def small():
    """Makes the configuration of a demo that takes seconds; fields can be changed."""

    def make(out, **changes):
        fields = {
            "minutes": 0.02,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "seq_len": 32,
            "min_steps": 6,
            "max_steps": 12,
            "calibration_seconds": 0.01,
            "eval_at": (0.5, 1.0),
            "eval_windows": 4,
            "long_windows": 3,
            "long_context": 64,
            "first_bin": 16,
            "state_context": 768,
            "state_every": 384,
            "excerpt": 128,
            "sample_bytes": 12,
            "margin": -20.0,  # a few steps of a tiny model learn nothing: the bar lies where all pass
        }
        return DemoConfig(out=str(out), **{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small text in one file."""
    path = tmp_path_factory.mktemp("text") / "a <b> & c.txt"
    path.write_text(SENTENCES * 120)
    return Text(path.name, [str(path)], [])


def made_up() -> dict:
    """A finished result: Hope at 2.5, the Transformer at 2.3 bits per byte, twice as fast."""
    models = {}
    for name, bits, seconds, state in ((HOPE, 2.5, 100.0, [1000, 1000]), (TRANSFORMER, 2.3, 50.0, [600, 4800])):
        windows = [bits + 0.1 * (i % 3 - 1) + 0.001 * i for i in range(12)]
        rows = [(0, 8.0), (5_000, 3.5), (10_000, bits)]
        models[name] = {
            "parameters": 1000,
            "mixers": ["selfmod", "selfmod"],
            "layers": 2,
            "width": 16,
            "heads": 2,
            "mlp_width": 48,
            "chunk": 64 if name == HOPE else None,
            "curve": [
                {"step": i, "tokens": 500 * i, "seconds": seconds * i / 20, "bits": 8 - i / 4} for i in range(1, 21)
            ],
            "held_out": [
                {"step": t // 500, "tokens": t, "seconds": seconds * t / 10_000, "bits": b, "windows": windows}
                for t, b in rows
            ],
            "checkpoint": f"runs/demo/{name.lower()}/checkpoints/step-00000020",
            "positions": {
                "edges": [0, 16, 32, 64],
                "windows": [[3.0 + 0.01 * i, 2.6 + 0.02 * i, 2.4 - 0.01 * i] for i in range(6)],
            },
            "states": [{"tokens": 64, "bytes": state[0]}, {"tokens": 512, "bytes": state[1]}],
            "memory": {
                "text": list(b"def f(x):\n    return '<x> & y'\n".ljust(128, b"#")),
                "bits": [None, *(2 + (i % 7) / 7 for i in range(127))],
                "layers": [
                    {
                        "layer": number,
                        "loss": [2 / (1 + 0.1 * i) for i in range(128)],
                        "eta": [0.5 + 0.001 * (i % 10) for i in range(128)],
                        "alpha": [0.99] * 128,
                        "norm": [20.0] * 128,
                    }
                    for number in (1, 2)
                ]
                * (name == HOPE),
            },
            "samples": [{"prompt": "<script>", "text": "alert(1)</script>", "known_words": 0.5}],
        }
    return {
        "format": "nestling-demo-1",
        "text": {
            "name": "a <b> text",
            "train_bytes": 10_000,
            "held_out_bytes": 1_000,
            "byte_entropy": 4.5,
            "files": 1,
            "held_out_files": 0,
        },
        "config": {**DemoConfig(out="runs/demo").to_dict(), "seq_len": 32},
        "machine": {"cores": 2, "processor": "x", "system": "Linux", "python": "3.11", "torch": "2"},
        "models": models,
        "stopped": False,
        "steps": 20,
        "planned_steps": 20,
        "seconds": 160.0,
        "check": {
            "byte_entropy": 4.5,
            "margin": 0.75,
            "bar": 3.75,
            "learned": {HOPE: True, TRANSFORMER: True},
            "passed": True,
        },
    }


@pytest.fixture(scope="session")
def page():
    """The page of the made-up result."""
    return build(made_up())


@pytest.fixture
def result():
    """The made-up result, for this test to change."""
    return copy.deepcopy(made_up())
