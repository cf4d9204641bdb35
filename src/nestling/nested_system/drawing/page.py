"""An interactive page of a system: one file of HTML that needs no network; a memory that is clicked tells all it is."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from nestling.nested_system.drawing.figure import THEMES, style_sheet, to_svg
from nestling.nested_system.drawing.groups import ViewGroup, groups, short
from nestling.nested_system.drawing.layout import layout
from nestling.nested_system.formalism import Cost
from nestling.nested_system.system import NestedSystem
from nestling.utils.files import write_text


def page(system: NestedSystem, path: str | Path | None = None) -> str:
    """The page as text; written to `path` if given."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    plan = layout(system)
    parts = {
        "TITLE": escape(system.title),
        "FIGURE_STYLE": style_sheet(variables=False),
        "LIGHT": _variables("light"),
        "DARK": _variables("dark"),
        "FIGURE": to_svg(plan, style=False),
        "DATA": json.dumps(_data(system, plan.subtitle), ensure_ascii=False).replace("</", "<\\/"),
    }
    for name, text in parts.items():
        template = template.replace(name, text, 1)
    if path is not None:
        write_text(path, template)
    return template


def _variables(theme: str) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in THEMES[theme].items())


def _data(system: NestedSystem, subtitle: str) -> dict[str, Any]:
    found, links = groups(system, coarse=True)
    flows = {flow.name: flow for flow in system.flows}
    findings: dict[str, list[str]] = {}
    for finding in system.findings:
        findings.setdefault(finding.memory, []).append(f"{finding.kind}: {finding.message}")
    levels = []
    for level in system.levels:
        kinds = dict.fromkeys(g.kind for g in found if g.level == level.index)
        levels.append({"index": level.index, "frequency": str(level.frequency), "text": ", ".join(kinds)})
    return {
        "title": system.title,
        "subtitle": subtitle,
        "levels": levels,
        "flows": [str(flow) for flow in system.flows],
        "notes": [f"{f.kind}: {f.memory}: {f.message}" for f in system.findings] + list(system.notes),
        "groups": {g.key: _group(g, flows, findings) for g in found},
        "links": [{"source": l.source, "target": l.target, "kind": l.kind, "what": l.what} for l in links],
    }


def _group(group: ViewGroup, flows: dict, findings: dict[str, list[str]]) -> dict[str, Any]:
    first, many = group.first, len(group.memories)
    shapes: dict[str, None] = {}
    for memory in group.memories:
        for t in memory.tensors:
            shared = f", is {t.shared_with}" if t.shared_with else ""
            shapes[f"{t.name.removeprefix(memory.name + '.')} {list(t.shape)} {t.dtype}{shared}"] = None
    flow = flows.get(first.context)
    return {
        "title": group.kind + (f" ×{many}" if many > 1 else ""),
        "level": group.level,
        "frequency": str(first.frequency),
        "retrieval": _joined(group, "retrieval"),
        "update": _joined(group, "update"),
        "objective": first.objective,
        "keys": first.keys,
        "values": first.values,
        "context": first.context + (f": {flow.elements}" if flow else ""),
        "solver": str(first.solver),
        "feasible": first.feasible,
        "lifetime": {"context": "one sequence", "training": "the training run", "model": "as long as the model"}[
            first.lifetime
        ],
        "note": first.note,
        "cost": _cost(group.cost),
        "measured": [f"{m.name}: {m.measured}" for m in group.memories if m.measured],
        "tensors": list(shapes),
        "members": [memory.name for memory in group.memories],
        "findings": [text for memory in group.memories for text in findings.get(memory.name, [])],
    }


def _joined(group: ViewGroup, field: str) -> str:
    """What the group's memories say, once each."""
    return "; ".join(list(dict.fromkeys(getattr(m, field) for m in group.memories))[:4])


def _cost(cost: Cost) -> list[list[str]]:
    work = "{} multiply-adds, {}B moved"
    rows = [
        ["parameters", f"{cost.parameters:,}" if cost.parameters else ""],
        ["holds", f"{cost.state_bytes:,} bytes" if cost.state_bytes else ""],
    ]
    for name, macs, moved in (
        ("to read, per token", cost.read_macs, cost.read_bytes),
        ("to learn, per token", cost.write_macs, cost.write_bytes),
        ("to learn, per update", cost.step_macs, cost.step_bytes),
    ):
        rows.append([name, work.format(short(macs), short(moved)) if macs or moved else ""])
    return rows
