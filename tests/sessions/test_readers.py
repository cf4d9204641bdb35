import io
import json
import zipfile

import pytest

from nestling.sessions import find_texts
from nestling.sessions.readers import open_document

PAGE = (
    "<html><head><title>A</title><style>x{}</style></head>"
    "<body><p>the cat <b>sat</b></p><ul><li>one</li><li>two</li></ul></body></html>"
)


def text(path):
    with open_document(path) as file:
        return file.read().decode()


def a_pdf(words):
    """The smallest file of that format: one page that shows some words."""
    stream = f"BT /F1 12 Tf 72 720 Td ({words}) Tj ET".encode()
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    found, places = b"%PDF-1.4\n", []
    for n, part in enumerate(parts, 1):
        places.append(len(found))
        found += b"%d 0 obj\n%s\nendobj\n" % (n, part)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(found)
    return (
        found
        + b"xref\n0 5\n0000000000 65535 f \n"
        + table
        + b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start
    )


def a_docx():
    document = pytest.importorskip("docx").Document()
    document.add_paragraph("the cat sat")
    table = document.add_table(1, 2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "one", "two"
    document.add_paragraph("on the mat")
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def an_epub():
    """Two chapters whose order in the spine is not that of their names."""
    parts = {
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OPS/book.opf"/></rootfiles></container>',
        "OPS/book.opf": '<package xmlns="http://www.idpf.org/2007/opf">'
        '<manifest><item id="a" href="a.xhtml"/><item id="b" href="text/b.xhtml"/></manifest>'
        '<spine><itemref idref="b"/><itemref idref="a"/></spine></package>',
        "OPS/a.xhtml": "<p>the end</p>",
        "OPS/text/b.xhtml": "<p>the beginning</p>",
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as book:
        for name, part in parts.items():
            book.writestr(name, part)
    return file.getvalue()


def test_pages_documents_and_books_are_read_as_a_person_reads_them(tmp_path):
    for package in ("bs4", "pypdf"):
        pytest.importorskip(package)
    made = {
        "a.html": (PAGE.encode(), "A\nthe cat sat\none\ntwo\n"),
        "b.pdf": (a_pdf("the cat sat on the mat"), "the cat sat on the mat\n"),
        "c.docx": (a_docx(), "the cat sat\none\ttwo\non the mat\n"),
        "d.epub": (an_epub(), "the beginning\n\nthe end\n"),
    }
    for name, (content, wanted) in made.items():
        (tmp_path / name).write_bytes(content)
        assert text(tmp_path / name) == wanted
    found = find_texts([str(tmp_path)])
    assert [(t.name, t.size) for t in found] == [(name, len(wanted)) for name, (_, wanted) in made.items()]


def test_lines_of_json_are_their_texts(tmp_path):
    lines = [
        "é",
        {"text": "one", "id": "x"},
        {"messages": [{"role": "user", "content": "two"}]},
        {"a": "three", "n": 3},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert text(tmp_path / "a.jsonl") == "é\n\none\n\ntwo\n\nthree"


def test_a_damaged_file_and_a_missing_library_are_named(tmp_path, monkeypatch):
    for name, content in {"a.pdf": b"%PDF-1.4 no", "b.docx": b"no", "c.epub": b"no", "d.jsonl": b"{"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as .*mend it"):
            find_texts([str(tmp_path / name)])
    monkeypatch.setitem(__import__("sys").modules, "bs4", None)
    (tmp_path / "e.html").write_text(PAGE)
    with pytest.raises(ValueError, match=r"e.html is read by beautifulsoup4: pip install 'nestling\[readers\]'"):
        find_texts([str(tmp_path / "e.html")])


def test_a_folder_leaves_out_what_its_ignore_files_say(tmp_path):
    for name in ("a.py", "b.log", "keep.log", "build/c.py", "sub/d.tmp", "sub/e.py", "sub/keep.log", "sub/deep/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("*.log\n!/keep.log\nbuild/\n")
    (tmp_path / "sub" / ".ignore").write_text("*.tmp\n!keep.log\ndeep\n")
    assert [t.name for t in find_texts([str(tmp_path)])] == ["a.py", "keep.log", "sub/e.py", "sub/keep.log"]
    with pytest.raises(ValueError, match="left out by .gitignore"):
        find_texts([str(tmp_path)], "build/*")
    assert find_texts([str(tmp_path / "b.log")])  # named by itself


def test_a_session_reads_a_page(model, session, tmp_path):
    pytest.importorskip("bs4")
    (tmp_path / "a.html").write_text(PAGE)
    row = session(model, [tmp_path / "a.html"]).run()["documents"][0]
    assert row["bytes"] == len("A\nthe cat sat\none\ntwo\n")
