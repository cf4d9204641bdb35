"""The report: one HTML file with everything in it."""

from __future__ import annotations

import html
from importlib import resources
from itertools import groupby
from typing import Any

import numpy as np

from experiments.demo import figures, words
from experiments.demo.config import HOPE, TRANSFORMER

SHADES = 6  # of the text, `.h1` to `.h6` in the style sheet


def build(result: dict[str, Any]) -> str:
    """The page of a result (what report.json holds)."""
    style = (resources.files("experiments.demo") / "style.css").read_text(encoding="utf-8")
    sections = [_head(result), _curves(result), _positions(result), _states(result), _memory(result), _samples(result)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>nestling demo: Hope beside a Transformer</title>\n"
        f"<style>\n{style}{_tab_rules(result)}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}{_foot(result)}</main>\n</body>\n</html>\n"
    )


def _head(result: dict[str, Any]) -> str:
    check, head = result["check"], words.headline(result)
    hope, transformer = (head["models"][name] for name in (HOPE, TRANSFORMER))
    said, _, rest = words.verdict(result).partition(": ")
    text = result["text"]
    stopped = (
        f'<p class="means">The training was stopped at step {result["steps"]} of {result["planned_steps"]}: a whole '
        "run, in which the learning rate comes down, ends lower.</p>\n"
        if result["stopped"]
        else ""
    )
    before, after, speed = ("bits_per_byte_before", "bits_per_byte_after", "tokens_per_second")
    rows = [
        ("bits per byte, before", _bits(hope[before]), _bits(transformer[before]), ""),
        ("bits per byte, after", _bits(hope[after]), _bits(transformer[after]), "main"),
        ("parameters", f"{hope['parameters']:,}", f"{transformer['parameters']:,}", ""),
        ("training, bytes per second", f"{hope[speed]:,.0f}", f"{transformer[speed]:,.0f}", ""),
    ]
    for tokens in hope["state_bytes"]:
        sizes = (words.size(model["state_bytes"][tokens]) for model in (hope, transformer))
        rows.append((f"state after {int(tokens):,} bytes", *sizes, ""))
    body = "".join(
        f'<tr class="{kind}"><th scope="row">{label}</th><td class="hope">{a}</td><td class="transformer">{b}</td></tr>'
        for label, a, b, kind in rows
    )
    failed = "" if check["passed"] else " failed"
    heads = "".join(f'<th class="{name.lower()}" scope="col">{name}</th>' for name in (HOPE, TRANSFORMER))
    return (
        "<h1>A small Hope beside a Transformer of its size</h1>\n"
        f'<p class="lead">Both read the same {head["bytes_read"] / 1000:,.0f} thousand bytes of '
        f"{html.escape(text['name'])}, in the same order, in {result['steps']:,} steps. Losses below are of text that "
        "neither was trained on, unless they say otherwise.</p>\n"
        '<p class="muted">Inside each layer Hope has small networks that go on learning while it reads: they set their '
        "own learning rate, decay and targets, byte by byte. The Transformer looks back at every byte it read.</p>\n"
        f'<p class="verdict{failed}"><strong>{said}:</strong> {rest}</p>\n{stopped}'
        f"<table>\n<thead><tr><th></th>{heads}</tr></thead>\n<tbody>{body}</tbody>\n</table>\n"
        f"<p>{words.about_result(result)}</p>\n"
    )


def _curves(result: dict[str, Any]) -> str:
    return _section(
        "Learning curves",
        "Points: loss on held-out text. Faint lines: the loss on the training text, smoothed. "
        + words.about_curves(result),
        figures.both(figures.curves, result, "Bits per byte of both models by bytes read and by seconds", "curves"),
    )


def _positions(result: dict[str, Any]) -> str:
    return _section(
        "Loss by position in the context",
        "Who uses what was read predicts later bytes better. Bands: twice the standard error over the shared windows. "
        + words.about_positions(result),
        figures.both(figures.positions, result, "Bits per byte of both models by position in the context", "positions"),
    )


def _states(result: dict[str, Any]) -> str:
    return _section(
        "What is carried along",
        "Between two bytes a model keeps a state: Hope its memories' weights, the Transformer every key and value. "
        + words.about_states(result),
        figures.both(figures.states, result, "Bytes of state of both models by length of the text", "states"),
    )


def _memory(result: dict[str, Any]) -> str:
    return _section(
        "Inside Hope's memories, over one held-out text",
        f'{words.about_memory(result)}</p>\n<p class="means">{words.about_settings(result)}',
        figures.both(figures.memory, result, "Inner loss, learning rate, horizon and norm along a text", "memory")
        + _shaded(result)
        + f'<p class="means" style="margin-top:14px">{words.about_surprise(result)}</p>',
    )


def _samples(result: dict[str, Any]) -> str:
    pairs = []
    for i in range(len(result["models"][HOPE]["samples"])):
        columns = []
        for name, model in result["models"].items():
            item = model["samples"][i]
            columns.append(
                f'<div><h3 class="{name.lower()}">{name}</h3><pre><span class="prompt">{_plain(item["prompt"])}</span>'
                f"{_plain(item['text'])}</pre></div>"
            )
        pairs.append(f'<div class="samples">{"".join(columns)}</div>')
    temperature = result["config"]["temperature"]
    intro = f"Grey: the prompt; then what each model writes (temperature {temperature:g}). "
    return _section("Samples", intro + words.about_samples(result), "".join(pairs))


def _section(title: str, means: str, body: str) -> str:
    return f'<section>\n<h2>{title}</h2>\n<p class="means">{means}</p>\n<figure>{body}</figure>\n</section>\n'


def _shaded(result: dict[str, Any]) -> str:
    """The text, a row for each chunk of the memory, shaded by a figure that can be chosen."""
    memory = result["models"][HOPE]["memory"]
    chunk = result["models"][HOPE]["chunk"] or 64
    row = chunk if chunk <= 64 else 64
    chosen = _choices(result)
    inputs, panels = [], []
    for i, (name, values) in enumerate(chosen):
        checked = " checked" if i == 0 else ""
        inputs.append(f'<input type="radio" name="shade" id="shade-{i}"{checked}><label for="shade-{i}">{name}</label>')
        panels.append(
            f'<div class="panel" id="panel-{i}"><div class="text">{_rows(memory["text"], values, row)}</div></div>'
        )
    steps = "".join(f'<i class="h{i}"></i>' for i in range(1, SHADES + 1))
    rows = "memory chunk" if row == chunk else f"{row} bytes"
    return (
        f'<div class="tabs">{"".join(inputs)}{"".join(panels)}</div>\n'
        f'<p class="scale">low <i></i>{steps} high (each shade is given to as many bytes). One row is one {rows}.</p>\n'
    )


def _choices(result: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    memory = result["models"][HOPE]["memory"]
    inner = [(f"inner loss, layer {layer['layer']}", layer["loss"]) for layer in memory["layers"]]
    rates = [(f"learning rate, layer {layer['layer']}", layer["eta"]) for layer in memory["layers"]]
    return [*inner, *rates, ("the model's own surprise", memory["bits"])]


def _tab_rules(result: dict[str, Any]) -> str:
    return "".join(f"#shade-{i}:checked ~ #panel-{i} {{ display: block; }}\n" for i in range(len(_choices(result))))


def _rows(text: list[int], values: list[float | None], row: int) -> str:
    """Lines of `row` bytes with their offsets, in halves that narrow pages put one under the other.

    Neighbours of one shade share an element.
    """
    known = np.array([np.nan if v is None else v for v in values], float)
    bounds = np.nanquantile(known, np.arange(1, SHADES + 1) / (SHADES + 1))
    shades = [0 if np.isnan(v) else int(np.searchsorted(bounds, v, side="right")) for v in known]
    letters, lines = _letters(text), []

    def part(start: int, stop: int) -> str:
        pieces = []
        for shade, run in groupby(range(start, min(stop, len(text))), key=shades.__getitem__):
            run = html.escape("".join(letters[i] for i in run))
            pieces.append(f'<i class="h{shade}">{run}</i>' if shade else run)
        return f"<span>{''.join(pieces)}</span>"

    for start in range(0, len(text), row):
        halves = part(start, start + row // 2) + part(start + row // 2, start + row)
        lines.append(f'<div><span class="at">{start}</span>{halves}</div>')
    return "".join(lines)


def _letters(text: list[int]) -> list[str]:
    """One visible letter for each byte: line ends as an arrow, the later bytes of a character as a dot."""
    letters = []
    for i, byte in enumerate(text):
        if byte == 10:
            letters.append("↵")
        elif byte == 9:
            letters.append("→")
        elif 32 <= byte < 127:
            letters.append(chr(byte))
        else:
            width = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            whole = bytes(text[i : i + width]).decode("utf-8", "ignore")
            letters.append(whole if len(whole) == 1 and whole.isprintable() else "·")
    return letters


def _plain(text: str) -> str:
    """Text for a page: control characters would make it invalid."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "·" for c in text))


def _bits(value: float | None) -> str:
    return "not finite" if value is None or not np.isfinite(value) else f"{value:.3f}"


def _foot(result: dict[str, Any]) -> str:
    config, machine, text = result["config"], result["machine"], result["text"]
    hope, transformer = (result["models"][name] for name in (HOPE, TRANSFORMER))
    where = (
        f"{text['held_out_files']} whole files of {text['files'] + text['held_out_files']}"
        if text["held_out_files"]
        else "the last tenth of every file"
    )
    threads = f"{config['threads']} thread{'s' if config['threads'] > 1 else ''}"
    return (
        f"<footer>\n<p>Hope: width {hope['width']}, sequence layers {', '.join(hope['mixers'])}, "
        f"{hope['heads']} heads, MLPs of {hope['mlp_width']}, memory chunks of {hope['chunk']} bytes. "
        "Transformer: the same with softmax attention over all of the past in every layer, "
        f"{transformer['heads']} heads, and MLPs of {transformer['mlp_width']} to have as many parameters; it has a "
        "short convolution and an output gate too. "
        f"Both: bytes as tokens, {config['batch_size']} windows of {config['seq_len']} per step, "
        f"{config['optimizer']}, learning rate {config['lr']:g}, seed {config['seed']}, {threads} each.</p>\n"
        f"<p>Text: {text['train_bytes'] / 1e6:.2f} MB to train on; held out are {where} "
        f"({text['held_out_bytes'] / 1e6:.2f} MB). Machine: {machine['cores']} cores, "
        f"{html.escape(machine['processor'])}, Python {machine['python']}, torch {machine['torch']}. "
        f"{result['seconds']:.0f} s from start to report.</p>\n"
        "<p>All numbers are in <code>report.json</code>. To go on writing: "
        f'<code>nestling generate {html.escape(config["out"])}/hope --prompt "def "</code></p>\n</footer>\n'
    )
