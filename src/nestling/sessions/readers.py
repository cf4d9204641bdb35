"""Files that are not plain text, as the text a person would read in them: by their ending, each by its library."""

from __future__ import annotations

import importlib
import io
import json
import posixpath
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from nestling.training.texts import open_text

IGNORE = (".gitignore", ".ignore")  # files that say which others of a folder are not read, as git has it


def open_document(path: Path) -> BinaryIO:
    """A file at the beginning of its text, in UTF-8; one of another format is converted whole.

    Raises:
        ValueError: it cannot be opened or is damaged; the library that reads it is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        return open_text(path)
    with open_text(path) as file:  # says what is wrong with a file that cannot be read at all
        file.seek(0)
        content = file.read()
    try:
        return io.BytesIO(READERS[suffix](content).encode("utf-8", "replace"))
    except MissingReader as error:
        raise ValueError(f"{path} is read by {error}: pip install 'nestling[readers]', or leave it out") from None
    except Exception as error:  # whatever a library raises for a damaged file
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} cannot be read as {suffix} ({said}): mend it, or leave it out") from error


class MissingReader(ImportError):
    """A library of the extra `readers` is not installed; its name is the message."""


def _library(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingReader(package) from None


def html(content: bytes | str) -> str:
    """The text of a page, a line for each of its blocks; scripts and styles are left out."""
    soup = _library("bs4", "beautifulsoup4").BeautifulSoup(content, "html.parser")
    for unseen in soup(["script", "style", "template", "noscript"]):
        unseen.decompose()
    for block in soup(["p", "div", "br", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "title", "section"]):
        block.append("\n")
    lines = (" ".join(line.split()) for line in soup.get_text().splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def pdf(content: bytes) -> str:
    """The text of the pages, one after another."""
    reader = _library("pypdf", "pypdf").PdfReader(io.BytesIO(content))
    return "\n\n".join(page.extract_text().strip() for page in reader.pages) + "\n"


def docx(content: bytes) -> str:
    """Paragraphs and tables in their order, the cells of a row with tabs between them."""
    document = _library("docx", "python-docx").Document(io.BytesIO(content))
    lines = []
    for part in document.iter_inner_content():
        if hasattr(part, "rows"):
            lines += ["\t".join(cell.text for cell in row.cells) for row in part.rows]
        else:
            lines.append(part.text)
    return "\n".join(lines) + "\n"


def epub(content: bytes) -> str:
    """The chapters of a book in the order of its spine."""
    with zipfile.ZipFile(io.BytesIO(content)) as book:
        container = ElementTree.fromstring(book.read("META-INF/container.xml"))
        place = next(e.attrib["full-path"] for e in container.iter() if e.tag.endswith("}rootfile"))
        package = list(ElementTree.fromstring(book.read(place)).iter())
        files = {e.attrib["id"]: e.attrib["href"] for e in package if e.tag.endswith("}item")}
        spine = [files[e.attrib["idref"]] for e in package if e.tag.endswith("}itemref")]
        folder = posixpath.dirname(place)
        return "\n".join(html(book.read(posixpath.normpath(posixpath.join(folder, name)))) for name in spine)


def jsonl(content: bytes) -> str:
    """Of each line its text, with an empty line between two: a string, the field `text` or `content` of an object, the
    turns of its `messages`, else all strings in it."""
    return "\n\n".join(_said(json.loads(line)) for line in content.decode("utf-8-sig").splitlines() if line.strip())


def _said(value: Any) -> str:
    if isinstance(value, dict):
        for name in ("text", "content"):
            if isinstance(value.get(name), str):
                return value[name]
        value = value["messages"] if isinstance(value.get("messages"), list) else list(value.values())
    if isinstance(value, list):
        return "\n".join(said for part in value if (said := _said(part)))
    return value if isinstance(value, str) else ""


READERS: dict[str, Callable[[bytes], str]] = {
    ".html": html, ".htm": html, ".pdf": pdf, ".docx": docx, ".epub": epub, ".jsonl": jsonl,
}  # fmt: skip


def not_ignored(folder: Path, files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    """The files (name, path) that no .gitignore or .ignore between the folder and them leaves out."""
    from pathspec import GitIgnoreSpec

    rules: dict[Path, GitIgnoreSpec | None] = {}
    for name, path in files:
        parents = [parent for parent in path.parents if parent == folder or folder in parent.parents]
        for parent in parents:
            if parent not in rules:
                lines = [
                    line for rule in IGNORE if (file := parent / rule).is_file()
                    for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
                ]  # fmt: skip
                rules[parent] = GitIgnoreSpec.from_lines(lines) if lines else None
        # the rules nearest to a file decide; those further up where these say nothing
        checks = (spec.check_file(path.relative_to(parent)).include for parent in parents if (spec := rules[parent]))
        if not next((said for said in checks if said is not None), False):
            yield name, path
