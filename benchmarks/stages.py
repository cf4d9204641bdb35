"""What two stages of chunks are worth (`schedule.chunk_factor`): held-out loss and processor time at equal steps.

python -m benchmarks.stages BOOKS --json benchmarks/results/stages.json     # about half an hour on one core
python -m benchmarks.stages --tables benchmarks/results/stages.json         # the table of docs/training.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from nestling.training import TrainConfig, Trainer
from nestling.training.levels import longer_chunks

CHUNK, FACTOR, SEEDS = 16, 8, (0, 1)
ARMS = {  # the factor, and the part of the steps it holds for
    f"{CHUNK}": (1, 0.0),
    f"{CHUNK * FACTOR}, in the last fifth {CHUNK}": (FACTOR, 0.8),
    f"{CHUNK * FACTOR}": (FACTOR, 1.0),
}
RUN = {
    "steps": 300,
    "device": "cpu",
    "threads": 1,
    "model": {
        "name": "tiny",
        "options": {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 288,
            "mixer": "selfmod", "mixer_options": {"chunk_size": CHUNK},
        },
    },
    "data": {"seq_len": 512, "batch_size": 4},
    "optim": {"name": "adamw", "lr": 5e-3},
    "logging": {"eval_batches": 24},
}  # fmt: skip


def measure(texts: list[str], folder: str, arm: str, seed: int) -> dict:
    """One run: its held-out losses, with the model's own chunks and the long ones, and what a step took."""
    factor, until = ARMS[arm]
    config = TrainConfig.from_dict({**RUN, "out": folder, "seed": seed})
    stages = {"schedule.chunk_factor": factor, "schedule.chunk_until": until}
    run = Trainer(config.changed(**{"data.text": texts}, **stages))
    seconds = []
    while run.step < config.steps:
        begun = time.process_time()
        run.train_step()
        seconds.append(time.process_time() - begun)
    own = run.evaluate().bits_per_byte
    with longer_chunks(run.model, FACTOR):
        long = run.evaluate().bits_per_byte
    return {"arm": arm, "seed": seed, "own": own, "long": long, "seconds": sum(seconds)}


def tables(result: dict) -> str:
    """The figures as Markdown."""
    lines = [
        f"| chunks in training | bits per byte, read in chunks of {CHUNK} | in chunks of {CHUNK * FACTOR} | "
        "processor seconds |",
        "| --- | ---: | ---: | ---: |",
    ]
    for arm in ARMS:
        rows = [row for row in result["rows"] if row["arm"] == arm]
        losses = [" / ".join(f"{row[name]:.4f}" for row in rows) for name in ("own", "long")]
        lines.append(f"| {arm} | {losses[0]} | {losses[1]} | {statistics.mean(r['seconds'] for r in rows):.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="text files or folders")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, action="append", help=f"in place of {SEEDS}; joins the rows in --json")
    parser.add_argument("--tables", type=Path)
    given = parser.parse_args()
    if given.tables:
        print(tables(json.loads(given.tables.read_text(encoding="utf-8"))), end="")
        return
    result = {"run": RUN, "torch": torch.__version__, "rows": []}
    if given.seed and given.json and given.json.exists():
        before = json.loads(given.json.read_text(encoding="utf-8"))
        result["rows"] = [row for row in before["rows"] if row["seed"] not in given.seed]
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seed or SEEDS:
            for arm in ARMS:
                result["rows"].append(measure(given.texts, folder, arm, seed))
                print(json.dumps(result["rows"][-1]), flush=True)
                if given.json:  # after every run: one that is stopped has its figures
                    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
