"""What Sphinx needs to know of the Markdown pages: links that leave `docs`, names of the reference, tables."""

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


def _reference(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Makes code that is a public name, or a call of one, a link to the reference."""
    if docname.startswith("api/"):
        return
    objects = app.env.domains.python_domain.objects
    for code in list(doctree.findall(nodes.literal)):
        called = re.fullmatch(r"(?:adam_fn\.)?([a-zA-Z_][\w.]*)(?:\(.*\))?", code.astext())
        names = (
            [f"adam_fn.{module}{called[1]}" for module in ("", "presets.", "schedules.", "interop.")] if called else []
        )
        name = next((name for name in names if name in objects), None)
        if name and not isinstance(code.parent, (nodes.reference, nodes.title)):
            place = objects[name]
            uri = f"{app.builder.get_relative_uri(docname, place.docname)}#{place.node_id}"
            code.replace_self(nodes.reference("", "", code.deepcopy(), internal=True, refuri=uri, reftitle=name))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _page)
    app.connect("include-read", _included)
    app.connect("doctree-resolved", _reference)
    app.add_transform(Columns)
    return {"parallel_read_safe": True}
