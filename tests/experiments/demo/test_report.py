"""The page: every section, nothing from outside, nothing unescaped, and the numbers of the result."""

import re
from html.parser import HTMLParser

import pytest

from experiments.demo.config import HOPE, TRANSFORMER
from experiments.demo.report import build
from slowly import some

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Checks that elements close in order, and collects ids, links and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """One more open element."""
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attrs):
        """An element without content."""
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        """It must be the one opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Visible text (and styles)."""
        self.text += data


def test_every_section_is_there_and_the_page_is_whole(page):
    """Elements close, ids are unique, links stay inside the page."""
    parsed = Page(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.links
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.links)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert len(headings) == 5
    for word in ("curves", "position", "carried", "memories", "Samples"):
        assert any(word in heading for heading in headings)
    for says in ("inner loss", "learning rate η", "horizon", "norm of the weights", "byte frequencies alone"):
        assert says in parsed.text


def test_nothing_comes_from_the_network_and_nothing_runs(page):
    """No address but the names of the SVG dialects, no script."""
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in page
    assert "@import" not in page
    assert "&lt;script&gt;" in page  # the sample's, as text
    assert "a &lt;b&gt; text" in page


def test_figures_take_their_colours_from_the_page(page):
    """No colour of the drawing code is left, so that the dark page can change them all."""
    assert not re.findall(r"#0\d0\d0\d\b", page)
    assert "var(--hope)" in page
    assert "prefers-color-scheme: dark" in page


def test_table_shows_the_result(page):
    """The numbers stand in the table."""
    row = re.search(r"bits per byte, after</th>(.*?)</tr>", page).group(1)
    assert "2.500" in row
    assert "2.300" in row
    assert "100</td>" in re.search(r"bytes per second</th>(.*?)</tr>", page).group(1)
    assert "4.8 kB" in re.search(r"state after 512 bytes</th>(.*?)</tr>", page).group(1)


@pytest.mark.filterwarnings("error::UserWarning")
@some("bits", [1.0, 7.9], [1.0, 4.5, 7.9])
def test_figures_have_room_wherever_the_losses_end(result, bits):
    """Far below the frequencies of the bytes, at them, or above: nothing falls out of the axes."""
    for model in result["models"].values():
        model["held_out"][-1]["bits"] = bits
    assert f"Hope {bits:.2f}" in build(result)


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of the time of a page."""
    monkeypatch.setattr("experiments.demo.figures.both", lambda *arguments: "")


def test_failure_and_early_end_are_said(result, no_figures):
    """A page of a run that missed the bar never says that it learned."""
    result["check"] |= {"passed": False, "learned": {HOPE: False, TRANSFORMER: True}}
    result |= {"stopped": True, "steps": 7, "planned_steps": 20}
    page = build(result)
    assert "It learned" not in page
    assert "It did not learn enough" in page
    assert "stopped at step 7 of 20" in page


def test_a_loss_that_is_not_finite_is_shown_as_such(result):
    """Training that diverged is reported, not hidden by a crash."""
    row = result["models"][HOPE]["held_out"][-1]
    row["bits"], row["windows"] = float("nan"), [float("nan")] * len(row["windows"])
    for step in result["models"][HOPE]["curve"][-5:]:
        step["bits"] = float("nan")
    result["check"] |= {"passed": False, "learned": {HOPE: False, TRANSFORMER: True}}
    page = build(result)
    assert "Hope not finite" in page


def test_text_rows_cover_every_byte(result, no_figures):
    """Each byte stands in the shaded text, line ends and broken characters included."""
    result["models"][HOPE]["memory"]["text"] = [*b"a\n\tz", *"é".encode(), 0xFF, 0, *b"x" * 120]
    page = build(result)
    panel = re.search(r'id="panel-0">(.*?)</div></div>', page).group(1)
    plain = re.sub(r"<[^>]+>", "", re.sub(r'<span class="at">\d+</span>', "", panel))
    assert plain.startswith("a↵→zé···xxx")
    assert len(plain) == 128
