"""What Sphinx needs to know of the Markdown pages: where links lead that leave `docs`, and how tables are laid out."""

import pathlib
import posixpath
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

#: Pages of the site that are files of their own elsewhere.
PAGES = {"../CHANGELOG.md": "changelog.md", "../README.md": "index.md", "../examples/README.md": "examples.md"}
SHORT, LONG = 20, 40  # Characters of a cell.


def relative(source: str, folder: str) -> str:
    """Markdown of a file in `folder`, which is relative to `docs`, with its links as they are from `docs`."""

    def link(match: re.Match[str]) -> str:
        path, mark, fragment = match[1].partition("#")
        if ":" in path or not path:
            return match[0]
        path = posixpath.relpath(posixpath.join("docs", folder, path), "docs")
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("..") and path.endswith(".md"):
            path, mark, fragment = f"path:{path}", "", ""  # A file to download, and no page.
        return f"]({path}{mark}{fragment})"

    return re.sub(r"\]\(([^)\s]+)\)", link, source)


def _page(app: Sphinx, docname: str, content: list[str]) -> None:
    if app.env.doc2path(docname).suffix == ".md":
        content[0] = relative(content[0], posixpath.dirname(docname))


def _included(app: Sphinx, path: pathlib.Path, docname: str, content: list[str]) -> None:
    content[0] = relative(content[0], path.parent.as_posix())


class Columns(SphinxTransform):
    """Tells the style sheet which columns of a table are too short to break and which are text."""

    default_priority = 500

    def apply(self, **kwargs: object) -> None:
        for body in self.document.findall(nodes.tbody):
            rows = [row.children for row in body.children if isinstance(row, nodes.row)]
            for column in zip(*rows, strict=False):
                longest = max(len(cell.astext()) for cell in column)
                kind = "short" if longest <= SHORT else "long" if longest > LONG else "middle"
                for cell in column:
                    if isinstance(cell, nodes.entry):
                        cell["classes"].append(kind)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _page)
    app.connect("include-read", _included)
    app.add_transform(Columns)
    return {"parallel_read_safe": True}
