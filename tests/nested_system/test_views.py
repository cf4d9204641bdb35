"""Table, picture and page: that they fit, that nothing overlaps, and that the page works in a real browser."""

import html
import json
import re
import subprocess
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

import nestling.nested_system
from nestling.nested_system.drawing.figure import THEMES, bends, marks
from nestling.nested_system.drawing.groups import groups, short
from nestling.nested_system.drawing.layout import layout
from nestling.nested_system.drawing.shapes import BOX_HEIGHT, clip, text_width
from nestling.nested_system.drawing.table import WIDTH
from nestling.nested_system.gallery import EXHIBITS


@pytest.fixture(scope="module")
def systems():
    return {exhibit.name: exhibit.build() for exhibit in EXHIBITS}


@pytest.fixture(scope="module")
def crowded():
    """Every kind of memory at once: a deep name, unknown modules, many levels."""
    from nestling.models import HopeConfig, HopeForCausalLM

    levels = [{"chunk_size": 16}, {"chunk_size": None}, {"chunk_size": 4096}, {"chunk_size": "inf"}]
    hope = HopeForCausalLM(HopeConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, cms_levels=levels))
    odd = nn.Module()
    odd.a_parameter_with_a_rather_long_name_of_its_own = nn.Parameter(torch.zeros(2))
    model = nn.ModuleDict({"hope": hope, "rnn": nn.LSTM(2, 2), "norm": nn.BatchNorm1d(2), "odd": odd})
    average = torch.optim.swa_utils.AveragedModel(model)
    return nestling.levels(model, torch.optim.AdamW(model.parameters()), average=average, accumulation=2)


@pytest.fixture(params=[exhibit.name for exhibit in EXHIBITS] + ["crowded"])
def system(request, systems, crowded):
    return crowded if request.param == "crowded" else systems[request.param]


def test_the_table_fits_a_hundred_columns(system):
    lines = str(system).splitlines()
    assert max(map(len, lines)) <= WIDTH
    heads = [line.split("   ")[:2] for line in lines if line.startswith("Level ")]
    assert [head[0] for head in heads] == [f"Level {level.index}" for level in system.levels]
    assert all(str(level.frequency) in head[1] for head, level in zip(heads, system.levels, strict=True))


@pytest.mark.parametrize("coarse", [False, True])
def test_every_memory_is_in_one_group_and_every_transfer_in_one_link(system, coarse):
    found, links = groups(system, coarse=coarse)
    assert sorted(m.name for g in found for m in g.memories) == sorted(m.name for m in system.memories)
    home = {m.name: g.key for g in found for m in g.memories}
    inside = sum(home[t.source] == home[t.target] for t in system.transfers)
    assert sum(link.count for link in links) + inside == len(system.transfers)


def test_boxes_lie_in_their_bands_and_do_not_overlap(system):
    plan = layout(system)
    for band in plan.bands:
        mine = [box for box in plan.boxes if box.group.level == band.level.index]
        assert sum(len(box.group.memories) for box in mine) == len(band.level.memories)
        for box in mine:
            assert band.top < box.y - BOX_HEIGHT / 2 and box.y + BOX_HEIGHT / 2 < band.top + band.height
    for i, a in enumerate(plan.boxes):
        assert a.x > a.width / 2 and a.x + a.width / 2 < plan.width
        for b in plan.boxes[:i]:
            assert abs(a.x - b.x) >= (a.width + b.width) / 2 or abs(a.y - b.y) >= BOX_HEIGHT
    for upper, lower in zip(plan.bands, plan.bands[1:]):
        assert upper.top + upper.height < lower.top


def test_texts_fit_their_boxes_and_the_picture(system):
    from nestling.nested_system.drawing.figure import TEXTS

    plan = layout(system)
    for box in plan.boxes:
        for text, style in zip(box.lines, ("kind", "maps", "where"), strict=True):
            size, bold, _ = TEXTS[style]
            assert text_width(text, size, bold) <= box.width - 18
    for mark in marks(plan):
        if mark[0] == "text":
            _, x, y, text, style = mark
            assert x + text_width(text, TEXTS[style][0], TEXTS[style][1]) <= plan.width + 1
            assert 0 < y < plan.height


def points_on(curve):
    """The curve, finely."""
    start = curve.points[0]
    for a, b, end in bends(curve.points):
        for i in range(1, 20):
            t = i / 20
            yield tuple(
                (1 - t) ** 3 * p + 3 * (1 - t) ** 2 * t * q + 3 * (1 - t) * t * t * r + t**3 * s
                for p, q, r, s in zip(start, a, b, end, strict=True)
            )
        start = end


def test_no_curve_runs_through_a_box(system):
    plan = layout(system)
    assert bool(plan.curves) == (len(system.levels) > 1)
    for curve in plan.curves:
        for x, y in points_on(curve):
            inside = [b for b in plan.boxes if abs(x - b.x) < b.width / 2 - 1 and abs(y - b.y) < BOX_HEIGHT / 2 - 1]
            assert not inside, f"{curve.link} through {inside[0].lines[0]}"


def test_every_transfer_between_levels_is_drawn(system):
    plan = layout(system)
    found, links = groups(system, coarse=True)
    level = {g.key: g.level for g in found}
    between = sum(link.count for link in links if level[link.source] != level[link.target])
    assert sum(curve.link.count for curve in plan.curves) == between


def test_a_picture_is_well_formed_and_follows_the_theme(system, tmp_path):
    svg = system.figure(tmp_path / "levels.svg")
    assert (tmp_path / "levels.svg").read_text() == svg
    ET.fromstring(svg)
    assert "prefers-color-scheme:dark" in svg
    assert not re.search(r'(src|href)="http', svg)


def contrast(a, b):
    """The contrast of two colours as WCAG defines it."""

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_colours_can_be_told_from_their_ground(theme):
    colours = THEMES[theme]
    for ground in ("paper", "band", "card"):
        assert contrast(colours["ink"], colours[ground]) > 7
        assert contrast(colours["muted"], colours[ground]) > 4.5
    for kind in ("parametric", "non-parametric", "backpropagation", "initialization", "generation"):
        assert contrast(colours[kind], colours["paper"]) > 4 and contrast(colours[kind], colours["band"]) > 4


def test_other_formats_and_what_is_refused(systems, tmp_path):
    system = systems["ada-transformer"]
    for name, head in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
        system.figure(tmp_path / "new" / name, theme="dark")
        assert (tmp_path / "new" / name).read_bytes().startswith(head)
    with pytest.raises(ValueError, match="no ending"):
        system.figure(tmp_path / "a")
    with pytest.raises(ValueError, match="theme must be"):
        system.figure(theme="sepia")


def test_short_numbers_and_texts():
    assert [short(n) for n in (0, 7, 1234, 1_500_000, 2e9, 3e12)] == ["0", "7", "1.23k", "1.5M", "2G", "3T"]
    assert clip("short", 12, 100) == "short"
    cut = clip("a rather long text that does not fit", 12, 100)
    assert cut.endswith("…") and text_width(cut, 12) <= 100


def opened(browser, page, tmp_path, script="", address=""):
    """The page as the browser has it after a script: its panel's text, and what the whole became."""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"file://{path}{address}"], capture_output=True, text=True, timeout=120, check=True
    )
    panel = re.search(r'<aside id="panel"[^>]*>(.*?)</aside>', done.stdout, re.DOTALL)[1]
    return html.unescape(re.sub(r"<[^>]+>", " ", panel)), done.stdout


PRESSED = 'role="button" aria-pressed="true"'
CLICK = "document.querySelector('[data-key={}]').dispatchEvent(new MouseEvent('click', {{bubbles: true}}));"


def test_in_a_browser_a_click_tells_all_of_a_memory(browser, systems, tmp_path):
    system = systems["hope-m3"]
    found, _ = groups(system, coarse=True)
    group = next(g for g in found if g.kind == "in-context memory")
    text, whole = opened(browser, system.page(), tmp_path, CLICK.format(group.key))
    memory = group.first
    for part in (
        "in-context memory ×2",
        "Level 2, updated 1 / token",
        memory.retrieval,
        memory.objective,
        "32,768 bytes",
    ):
        assert part in text
    assert "start.0 [4, 16, 16] float32" in text and memory.name in text
    assert "initialization from" in text and "parametric to" in text
    assert whole.count(PRESSED) == 1
    drawn = re.findall(r'<path class="curve [^"]*\bon\b[^"]*"[^>]*data-source="(\w+)" data-target="(\w+)"', whole)
    assert drawn and all(group.key in pair for pair in drawn)


def test_in_a_browser_every_memory_opens_by_mouse_and_keyboard(browser, crowded, tmp_path):
    found, _ = groups(crowded, coarse=True)
    tell = "said.push(panel.querySelector('h1').textContent);"
    press = "dispatchEvent(new KeyboardEvent('keydown', {key: 'KEY', bubbles: true}));"
    script = "const said = [];" + "".join(CLICK.format(g.key) + tell for g in found)
    script += CLICK.format("g0") + "panel.querySelector('button').click();" + tell
    script += "document." + press.replace("KEY", "Escape") + tell
    script += "document.querySelector('[data-key=g1]')." + press.replace("KEY", "Enter") + tell
    _, whole = opened(browser, crowded.page(), tmp_path, script + "document.title = JSON.stringify(said);")
    said = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", whole)[1]))
    titles = [g.kind + (f" ×{len(g.memories)}" if len(g.memories) > 1 else "") for g in found]
    *every, jumped, left, pressed = said
    assert every == titles
    assert jumped in titles and jumped != titles[0]  # a transfer's other end
    assert left == crowded.title and pressed == titles[1]


def test_in_a_browser_a_page_opens_at_an_address(browser, systems, tmp_path):
    text, whole = opened(browser, systems["linear-momentum"].page(), tmp_path, address="#g1")
    assert text.strip().startswith("linear map") and "SGD with momentum, lr 0.1" in text
    assert whole.count(PRESSED) == 1


def test_a_page_is_one_file_that_no_name_can_break(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("</script><b>&amp;", nn.Linear(2, 2))

    page = nestling.levels(Net()).page(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
    assert "</script><b>" not in page and not re.search(r'(src|href)="', page)
