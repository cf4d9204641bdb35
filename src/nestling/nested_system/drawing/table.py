"""A system as a table of at most 100 columns."""

from __future__ import annotations

import io

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from nestling.nested_system.drawing.groups import ViewGroup, groups, per_token, short
from nestling.nested_system.formalism import Cost
from nestling.nested_system.frequency import Frequency
from nestling.nested_system.system import NestedSystem

WIDTH = 100


def table(system: NestedSystem, *, findings: int = 8) -> Group:
    """A rich renderable: one block per level, a row for each group of memories, then totals and findings.

    Args:
        findings: how many to spell out.
    """
    found, _ = groups(system)
    blocks: list = []
    for level in system.levels:
        rows = [group for group in found if group.level == level.index]
        head = Text(f"Level {level.index}", "bold")
        head.append(f"   {_often(level.frequency)}", "bold")
        head.append(f"   {'; '.join(dict.fromkeys(str(group.first.solver) for group in rows))}", "not bold dim")
        head.truncate(WIDTH, overflow="ellipsis")
        grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=level.index == 1, header_style="dim")
        widths = dict(memory=27, where=20, maps=24, numbers=7, reads=6, learns=6)
        for name, width in widths.items():
            right = name in ("numbers", "reads", "learns")
            grid.add_column(name, justify="right" if right else "left", width=width, no_wrap=True, overflow="ellipsis")
        for group in rows:
            grid.add_row(*_texts(group), *_costs(group.cost, level.frequency, system))
        blocks += [head, grid, ""]
    total = system.cost
    head = Text(system.title, "bold")
    head.append(f": {len(system.levels)} level{'s' * (len(system.levels) != 1)}, {len(system.memories)} ", "not bold")
    head.append(
        f"{'memories' if len(system.memories) != 1 else 'memory'}, {short(total.parameters)} parameters", "not bold"
    )
    return Group(head, "", *blocks, Text("\n".join(_foot(system, findings)), "dim"))


def _often(frequency: Frequency) -> str:
    words = {"∞": "∞ (found anew for every token)", "0": "0 (never updated)"}
    return words.get(str(frequency), f"{frequency}")


def _texts(group: ViewGroup) -> tuple[Text, Text, Text]:
    """What it is, where it stands, what it maps."""
    memory = group.first
    kind = Text(f"  {group.kind}", "red" if memory.unknown else "")
    if len(group.memories) > 1:
        kind.append(f" ×{len(group.memories)}", "dim")
    names = [name for name in group.members if not name.startswith(group.kind)]
    keys = "" if memory.keys == "—" else f"{memory.keys.split(',')[0]} → "
    return kind, Text(", ".join(names), "dim"), Text(keys + memory.values.split(",")[0].split(" = ")[0])


def _costs(cost: Cost, frequency: Frequency, system: NestedSystem) -> tuple[str, str, str]:
    """Numbers it holds, multiply-adds of a read and of learning."""
    rate = frequency.per_token(system.tokens_per_step)
    learn, _ = per_token(cost, rate)
    numbers = short(cost.parameters) if cost.parameters else f"{short(cost.state_bytes)}B" if cost.state_bytes else "–"
    text = short(learn) if learn else "–"
    if rate is None and cost.step_macs:  # work of a step, and the tokens of one are not known
        text = f"{short(cost.step_macs)}*" if not learn else f"{short(learn)}+"
    return numbers, short(cost.read_macs) if cost.read_macs else "–", text


def _foot(system: NestedSystem, limit: int) -> list[str]:
    lines = [
        f"reads, learns: multiply-adds per token, in a context of {system.context_length:,} tokens; numbers: "
        "parameters, or bytes (B) of state."
    ]
    if system.tokens_per_step is None:
        lines.append("*: per step; +: and more per step. tokens_per_step= tells it per token.")
    c = system.coverage
    lines.append(
        f"assigned to a level: {_of(c.parameters)} parameter tensors, {_of(c.buffers)} buffers, "
        f"{_of(c.optimizer_states)} optimiser states" + (f"; unknown: {len(c.unknown)}" if c.unknown else "")
    )
    lines += [f"note: {note}" for note in system.notes]
    kinds: dict[str, list] = {}
    for finding in system.findings:
        kinds.setdefault(finding.kind, []).append(finding)
    lines += [_finding(kind, some) for kind, some in list(kinds.items())[:limit]]
    return lines + ([f"and {len(kinds) - limit} more kinds of findings (.findings)"] if len(kinds) > limit else [])


def _finding(kind: str, some: list) -> str:
    """Findings of one kind in a line or two."""
    names = list(dict.fromkeys(f.memory for f in some))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{kind}: {', '.join(names[:3])}{more}: {some[0].message}" + (", ..." if len(some) > 1 else "")


def _of(pair: tuple[int, int]) -> str:
    return f"{pair[0]} of {pair[1]}"


def text(system: NestedSystem) -> str:
    """The table as plain text, without trailing blanks."""
    console = Console(width=WIDTH, file=io.StringIO(), color_system=None)
    console.print(table(system))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
