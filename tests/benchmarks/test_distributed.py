import json
from pathlib import Path

import torch

from benchmarks import distributed, sequence_parallel
from nestling.models import sizes
from nestling.training.handover import Spec, taken_apart

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_committed_figures():
    result = json.loads((ROOT / "benchmarks" / "results" / "distributed.json").read_text())
    page = (ROOT / "docs" / "distributed.md").read_text()
    for name, table in distributed.tables(result).items():
        assert page.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0].strip() == table, name
    assert result["paper"] == distributed.on_paper()
    some = ("tiny", "35m")
    assert [row for row in result["sequence"]["paper"] if row["size"] in some] == sequence_parallel.on_paper(some)


def test_bytes_on_paper_are_those_of_a_state():
    for options in sequence_parallel.MIXERS.values():
        model = sequence_parallel.model_of(options)
        cache = model(torch.zeros(1, 128, dtype=torch.long), use_cache=True).past_key_values
        own = sum(Spec.of(tensor).nbytes for tensor in taken_apart(cache).tensors)
        assert own == sequence_parallel.state_bytes(sizes.config(sequence_parallel.SIZE, **options), 128), options
