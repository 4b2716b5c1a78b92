"""What Sphinx needs to know of the Markdown pages: links that leave `docs`, names of the reference, tables."""

import pathlib
import posixpath
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

#: Pages of the site that are files of their own elsewhere.
PAGES = {"../CHANGELOG.md": "changelog.md", "../README.md": "index.md", "../examples/README.md": "examples.md"}
SHORT, LONG = 20, 40  # Characters of a cell.


def relative(source: str, folder: str) -> str:
    """Markdown of a file in `folder`, which is relative to `docs`, with its links as they are from `docs`."""

    def link(match: re.Match[str]) -> str:
        path, mark, fragment = match[1].partition("#")
        path = posixpath.relpath(posixpath.join("docs", folder, path), "docs")
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("..") and path.endswith(".md"):
            path, mark, fragment = f"path:{path}", "", ""  # A file to download, and no page.
        return f"]({path}{mark}{fragment})"

    return re.sub(r"\]\(([^)\s:#][^)\s:]*)\)", link, source)  # Neither addresses nor places of the same page.


def _page(app: Sphinx, docname: str, content: list[str]) -> None:
    if app.env.doc2path(docname).suffix == ".md":
        content[0] = relative(content[0], posixpath.dirname(docname))


def _included(app: Sphinx, path: pathlib.Path, docname: str, content: list[str]) -> None:
    content[0] = relative(content[0], path.parent.as_posix())


def _columns(app: Sphinx, doctree: nodes.document) -> None:
    """Tells the style sheet which columns of a table are too short to break and which are text."""
    for body in doctree.findall(nodes.tbody):
        for column in zip(*(row.findall(nodes.entry) for row in body.findall(nodes.row)), strict=False):
            longest = max(len(cell.astext()) for cell in column)
            for cell in column:
                cell["classes"].append("short" if longest <= SHORT else "long" if longest > LONG else "middle")


def _reference(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Makes code that is a public name, or a call of one, a link to the reference."""
    objects = app.env.domains.python_domain.objects
    for code in [] if docname.startswith("api/") else list(doctree.findall(nodes.literal)):
        called = re.fullmatch(r"(?:adam_fn\.)?([a-zA-Z_][\w.]*)(?:\(.*\))?", code.astext())
        if called and not isinstance(code.parent, (nodes.reference, nodes.title)):
            names = (f"adam_fn.{module}{called[1]}" for module in ("", "presets.", "schedules.", "interop."))
            if name := next((name for name in names if name in objects), None):
                at = objects[name]
                code.replace_self(make_refnode(app.builder, docname, at.docname, at.node_id, code.deepcopy(), name))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _page)
    app.connect("include-read", _included)
    app.connect("doctree-read", _columns)
    app.connect("doctree-resolved", _reference)
    return {"parallel_read_safe": True}
