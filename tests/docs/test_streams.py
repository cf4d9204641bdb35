"""The code of pages that say so runs, block after block; so does README's."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["docs/streams.md", "README.md"])
def test_the_code_of_the_page_runs(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    names: dict = {}
    try:
        for block in blocks:
            exec(compile(block, page, "exec"), names)
    finally:
        torch.set_grad_enabled(True)
