"""The same comparison at the paper's size: one `nestling train` configuration for each contender, checked, not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.shared.report import count, markdown
from nestling.models import sizes
from nestling.training.config import TrainConfig
from nestling.utils.files import write_text

H100 = 989e12 * 0.4  # bfloat16 operations a second at two fifths of the peak
NOTE = """
Operations: 6 x parameters x tokens, as of a Transformer. H100 days: of one, at 40% of its bfloat16 peak; layers of
memories reach far less (benchmarks/README.md). Nothing was trained. To run one:
`torchrun --nproc-per-node 8 -m nestling train TEXT --config FILE`.
"""


@dataclass(frozen=True)
class PaperRun:
    """A model size and how many tokens it reads; `contenders` are changes to the size's own Hope by name.

    Attributes:
        size: of `nestling.models.sizes`.
        tokens: of the whole training.
        train: further options of the training, by dotted name.
    """

    size: str
    tokens: float
    contenders: Mapping[str, dict[str, Any]]
    train: dict[str, Any] = field(default_factory=dict)

    def configuration(self, name: str) -> tuple[TrainConfig, int]:
        """A contender's training run, and its parameters, which are the others' within 2%; nothing is allocated.

        Raises:
            ValueError: no width of the MLPs gives it so many.
        """
        reference = sizes.config(self.size)
        config = sizes.matched_config(reference, **self.contenders[name]) if self.contenders[name] else reference
        kept = ("mixer", "mixer_options", "mixers", "cms_levels", "num_attention_heads", "intermediate_size")
        fields = {field: getattr(config, field) for field in kept}
        options = {field: value for field, value in fields.items() if value != getattr(sizes.config(self.size), field)}
        slug = name.lower().replace(", ", "-").replace(" ", "-")
        run = TrainConfig().changed(
            **{"out": f"runs/{self.size}/{slug}", "model.name": self.size, "model.options": options} | self.train
        )
        step = run.data.seq_len * run.data.batch_size * run.optim.accumulate
        return run.changed(steps=round(self.tokens / step)), sizes.parameters(config)


def write(runs: list[PaperRun], folder: Path) -> str:
    """One JSON file for each size and contender into `folder`, and what they are as Markdown."""
    lines = []
    for run in runs:
        for name in run.contenders:
            config, parameters = run.configuration(name)
            path = folder / run.size / f"{Path(config.out).name}.json"
            config.save(path)
            work = 6 * parameters * run.tokens
            figures = [count(parameters), f"{run.tokens:.0e}", count(config.steps), f"{work:.1e}"]
            days = f"{work / H100 / 86_400:.0f}"
            lines.append([run.size, name, *figures, days, str(path.relative_to(folder))])
    header = ["size", "contender", "parameters", "tokens", "steps", "operations", "H100 days", "configuration"]
    found = markdown(header, lines, left=2) + NOTE
    write_text(folder / "table.md", found)
    return found
