"""The site shows the experiments' own pages, which stand beside their code: experiments/NAME/README.md and plot.png."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=[)\s])")


def on_files(files, config):
    """Add them to the site, under the paths that they have in the repository."""
    for pattern in ("experiments/*/README.md", "experiments/*/plot.png"):
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between docs/ and experiments/ as the site has them, which has no folder docs/."""
    uri = page.file.src_uri
    here = posixpath.dirname(uri if uri.startswith("experiments/") else f"docs/{uri}")

    def moved(match):
        target = posixpath.normpath(posixpath.join(here, match[2]))
        if here.startswith("docs") == target.startswith("docs/"):
            return match[0]  # both ends move together
        site = posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(uri) or ".")
        return f"{match[1]}{site}{match[3] or ''}"

    return LINK.sub(moved, markdown)


def on_serve(server, config, builder):
    """`mkdocs serve` looks at the experiments as well."""
    server.watch(str(ROOT / "experiments"))
