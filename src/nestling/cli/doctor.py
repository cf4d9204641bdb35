"""`nestling doctor`: what this machine has, and whether the fast forms are right on it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nestling.cli.common import print_json


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Look at this machine: what it has, whether the fast forms equal their definitions here, where things lie.

    The chunk forms run in C++, in PyTorch or as Triton kernels, whichever this machine can. Each one that runs is
    compared with the definition, token by token in float64, and the largest difference of values and gradients is
    shown. If one differs by more than rounding the exit code is 1: then nothing trained here is to be trusted;
    NESTLING_COMPILED=0 turns the C++ forms off, unsetting NESTLING_TRITON the kernels.

    [bold]Examples[/bold]

    Is all well here? Some seconds:
      nestling doctor

    For a report of a fault, or a script:
      nestling doctor --json > machine.json
    """
    from nestling.bench.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
    else:
        _show(found)
    if not found["agrees"]:
        raise typer.Exit(1)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, rows: list[tuple]) -> None:
        grid = Table.grid(padding=(0, 2))
        for row in rows:
            grid.add_row(*(escape(str(cell)) for cell in row))
        console.print(f"[bold]{title}[/bold]")
        console.print(grid)

    console, here = Console(), found["machine"]
    libraries = ("python", "torch", "transformers", "triton")
    versions = ", ".join(f"{name} {here[name]}" for name in libraries if here[name])
    cores = f"{here['cpu']}; {here['cores']} cores, {here['threads']} threads, load {here['load']}"
    gpus = ", ".join(here["gpus"]) or "none"
    table("Machine", [
        ("nestling", f"{here['nestling']} ({versions})"),
        ("processor", cores),
        ("memory", f"{_size(here['memory_bytes'])}, free {_size(here['memory_free_bytes'])}"),
        ("products by", here["blas"] or "unknown"),
        ("C++ compiler", here["compiler"] or "none: the chunk forms run in PyTorch, slower"),
        ("GPU", gpus),
    ])  # fmt: skip
    table("Fast forms against their definitions", [_verdict(check) for check in found["checks"]])
    places = found["places"]
    writable = "" if places["cache_writable"] else ", cannot be written"
    table("Places", [
        ("cache", f"{places['cache']} ({_size(places['cache_disk_free_bytes'])} free{writable})"),
        ("C++ forms", places["compiled"] or "none"),
        ("downloads", places["downloads"]),
        ("runs, states", f"{places['runs']}; {places['states']}"),
    ])  # fmt: skip
    table("Optional parts", [
        (row["extra"], row["for"], row["install"] or "here") for row in found["extras"]
    ])  # fmt: skip
    if not found["agrees"]:
        typer.secho("a fast form disagrees with its definition here: see above", fg="red", err=True)


def _verdict(check: dict[str, Any]) -> tuple[str, str, str]:
    difference = check["difference"]
    off = "not finite" if difference is None else f"off by {difference:.1e}, allowed {check['allowed']:.0e}"
    verdict = "WRONG" if not check["agrees"] else "-" if difference is None else "ok"
    return verdict, check["name"], check["note"] or off


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:,.1f} GB"
