"""`nestling convert`: a pre-trained model made a continual learner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.common import a_folder, a_path, assignments, parse_value, print_json


def main(
    model: Annotated[
        Path,
        typer.Argument(
            parser=a_path,
            help="A saved Llama-family model: a folder, or one with a .gguf file; or a Hope's run or folder.",
        ),
    ],
    out: Annotated[Path, typer.Argument(parser=a_folder, help="A new folder for the converted model.")],
    level: Annotated[
        list[str] | None,
        typer.Option(
            "--level",
            "-l",
            metavar="CHUNK[,NAME=VALUE...]",
            help="A level, fastest first: its chunk size in tokens and options (lr, optimizer, rank, clip, decay) "
            "[one that is safe without a search].",
        ),
    ] = None,
    placement: Annotated[
        str, typer.Option(help="depth: the MLPs become the levels. width: a small block is added per level.")
    ] = "depth",
    blocks: Annotated[
        str | None, typer.Option(help="Decoder blocks that take part, e.g. 26,27,28,29 or -4: for the last four [all].")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Hidden width of an added block [model width / 16].")] = None,
    variant: Annotated[str, typer.Option(help="sequential, or nested: a slower level's update resets faster ones.")] = (
        "sequential"
    ),
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            "--calibrate",
            metavar="TEXTS",
            help="Refine the default rule for this model on a file or folder (may be repeated): a few rates and ranks "
            "are tried on parts of it, some minutes for a small model.",
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="The default rule in longer chunks, two steps in each: reads faster, learns a little less."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make a continual learner out of a pre-trained model.

    At first the converted model computes exactly what the original does; then its levels learn from what it reads. What
    they learn is a state of each text (see nestling generate --state), never a change of the model.

    [bold]Examples[/bold]

    One level of low rank over the MLPs of all blocks, a few megabytes for each text:
      nestling convert SmolLM2-135M runs/smol

    The same, its rate and rank refined on texts like those it will read (what was tried is written into the folder):
      nestling convert SmolLM2-135M runs/smol --calibrate notes/

    One that reads faster, and learns a little less:
      nestling convert SmolLM2-135M runs/smol --fast

    Two levels over the MLPs of the last four blocks:
      nestling convert SmolLM2-135M runs/smol -l 64,lr=0.1 -l 512,lr=0.05 --blocks=-4:

    A small added block per layer, updated by AdamW every 128 tokens:
      nestling convert SmolLM2-135M runs/smol -l 128,lr=1e-3,optimizer=adamw --placement width

    A Hope that was trained here, whose own MLPs then learn while it reads:
      nestling convert runs/notes runs/reader

    Then write with it, and let it remember:
      nestling generate runs/smol --prompt "..." --state smol.state
    """
    from nestling.cms import stack_levels
    from nestling.cms.defaults import default_blocks, default_levels, fast_levels
    from nestling.cms.files import save_new
    from nestling.cms.pretrained import load_pretrained
    from nestling.cms.state import shapes
    from nestling.models.hope.levels import give_levels, is_hope
    from nestling.sessions import find_texts
    from nestling.sessions.calibrate import as_text
    from nestling.utils.locks import sole_writer

    levels = [_level(text) for text in level or ()]
    if not levels and placement != "depth":
        raise ValueError(f"--placement {placement} has no default levels: name them with --level, e.g. -l 64,lr=0.1")
    if calibrate and (levels or placement != "depth"):
        raise ValueError("--calibrate refines the default rule: leave out --level and --placement")
    if fast and (levels or calibrate or placement != "depth"):
        raise ValueError("--fast is a rule of its own: leave out --level, --calibrate and --placement")
    texts = find_texts(calibrate) if calibrate else []
    with sole_writer(out):
        if out.exists():
            raise ValueError(f"{out} exists already: choose another folder, or remove it first")
    if is_hope(model):
        from nestling.generation.load import load_model

        if blocks is not None or width is not None or (placement, variant) != ("depth", "sequential"):
            raise ValueError(
                "--placement, --blocks, --width and --variant are for Llama-family models: the levels of a Hope are "
                "its own MLPs, in all layers"
            )
        loaded, tokenizer = load_model(model, "cpu")
        stacked = give_levels(loaded, fast_levels(loaded.config) if fast else levels or None)
    else:
        loaded, tokenizer = load_pretrained(model)
        chosen = None if blocks is None else _blocks(blocks, loaded.config.num_hidden_layers)
        if not levels:
            levels = (fast_levels if fast else default_levels)(loaded.config)
            chosen = default_blocks(loaded.config) if chosen is None else chosen
        stacked = stack_levels(loaded, levels, placement, blocks=chosen, width=width, variant=variant)
    found = _calibrated(stacked, tokenizer, texts, out, quiet) if texts else None
    save_new(stacked, out, tokenizer, found)
    _journal(out).unlink(missing_ok=True)
    made = {
        "folder": str(out),
        "parameters": sum(p.numel() for p in stacked.parameters()),
        "state_bytes": stacked.state_bytes(),
        "levels": [
            {**settings.to_dict(), "weights": sum(o * i for o, i in shapes(settings, modules))}
            for settings, modules in zip(stacked.learner.levels, stacked.learner.modules)
        ],
    }
    if found is not None:
        made["calibration"] = found
    if as_json:
        print_json(made)
        return
    if found is not None:
        typer.echo(as_text(found))
    for i, row in enumerate(made["levels"]):
        rule = f"{row['optimizer']} at lr {row['lr']:g}, {row['weights']:,} weights"
        steps = f", {row['steps']} steps" if row["steps"] > 1 else ""
        typer.echo(f"level {i}: every {row['chunk_size']} tokens{steps}, {rule}")
    typer.echo(f"one stream's state: {made['state_bytes'] / 1e6:,.1f} MB, beside {made['parameters']:,} shared weights")
    typer.echo(f"written: {out}")


def _calibrated(model: Any, tokenizer: Any, texts: list[Any], out: Path, quiet: bool) -> dict[str, Any]:
    """Set the model's rule to the best of those that were tried; what was tried is beside `out` until it is there."""
    from nestling.sessions.calibrate import MOST, Trials, calibrated
    from nestling.sessions.progress import TrialsProgress

    progress = TrialsProgress(MOST, shown=not quiet)
    try:
        return calibrated(Trials(model, tokenizer, texts, _journal(out), progress))
    finally:
        progress.close()


def _journal(out: Path) -> Path:
    return out.with_name(f"{out.name}.calibrating")


def _level(text: str) -> dict[str, Any]:
    size, *options = text.split(",")
    return {"chunk_size": parse_value(size), **assignments(options, "--level, after its chunk size,")}


def _blocks(text: str, count: int) -> list[int]:
    """Indices, or one slice as Python writes it."""
    try:
        if ":" in text:
            return list(range(count))[slice(*(int(part) if part else None for part in text.split(":")))]
        return [int(part) for part in text.split(",")]
    except (ValueError, TypeError):
        raise ValueError(f"--blocks takes indices (26,27) or a slice (-4:), not {text!r}") from None
