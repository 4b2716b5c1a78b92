"""What Sphinx needs to know of this package: signatures as they are written, and formulas typeset (see `formulas`)."""

import ast
import inspect
import re
import textwrap
from typing import Any

import formulas
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

from adam_fn import options

LATER = r"^[\"'](.+)[\"']$|[\"']([A-Z]\w+)[\"']"  # A type that comes later in its file is quoted.
LONG = 40  # Characters of a formula in a sentence, above which a line may end before an equality or arrow in it.


class AsWritten(str):
    """Source that `inspect.Signature` shows as it is."""

    __repr__ = str.__str__


def _written(thing: Any) -> dict[str, tuple[AsWritten, AsWritten]]:  # noqa: ANN401
    """Annotation and default of the arguments of a function, or of the fields and of `__init__` of a class."""
    source = textwrap.dedent(inspect.getsource(thing))
    (node,) = ast.parse(source).body
    found: dict[str, tuple[ast.expr | None, ast.expr | None]] = {}
    for part in node.body if isinstance(node, ast.ClassDef) else [node]:
        if isinstance(part, ast.AnnAssign):
            found[ast.unparse(part.target)] = (part.annotation, part.value)
        elif isinstance(part, ast.FunctionDef) and (part is node or part.name == "__init__"):
            found |= {x.arg: (x.annotation, None) for x in ast.walk(part.args) if isinstance(x, ast.arg)}
            found["return"] = (part.returns, None)
            positional = zip(part.args.args[::-1], part.args.defaults[::-1], strict=False)
            for argument, default in (*positional, *zip(part.args.kwonlyargs, part.args.kw_defaults, strict=True)):
                found[argument.arg] = (argument.annotation, default)

    def text(part: ast.expr | None) -> AsWritten:
        return AsWritten(" ".join(((part and ast.get_source_segment(source, part)) or "").split()))

    return {name: (AsWritten(re.sub(LATER, r"\1\2", text(hint))), text(value)) for name, (hint, value) in found.items()}


def signature(app: Sphinx, *event: Any) -> tuple[str | None, str | None]:  # noqa: ANN401
    """The runtime signature with annotations and defaults as they are written: `Hyper` and not what it stands for."""
    what, _, thing, _, arguments, returns = event
    if what not in ("function", "class", "method") or arguments is None or not thing.__module__.startswith("adam_fn"):
        return arguments, returns
    sources = [options.built, inspect.unwrap(thing)]
    if what == "class":
        sources = [x for x in reversed(thing.__mro__) if x.__module__.startswith("adam_fn")]
    written = {name: texts for source in sources for name, texts in _written(source).items()}
    parameters = []
    for parameter in inspect.signature(thing).parameters.values():
        hint, default = written.get(parameter.name, ("", ""))
        default = parameter.default if not default or "field(" in default else default
        parameters += [parameter.replace(annotation=hint, default=default)] if hint else []
    text = str(inspect.Signature(parameters)) if parameters or what != "class" else ""
    return text, written["return"][0] if what != "class" and returns not in (None, "None") else None


def link(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement) -> nodes.Node | None:
    """A link from the name of a type in a signature to where it is documented, under the name of its module."""
    for name, place in env.domains.python_domain.objects.items():
        if node["reftype"] == "class" and name.endswith(f".{node['reftarget']}"):
            return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, content, name)
    return None


class Typeset(SphinxTransform):
    """Formulas of docstrings: literal blocks that are not Python, and inline code with mathematical signs."""

    default_priority = 500

    def apply(self, **kwargs: object) -> None:
        if not self.env.docname.startswith("api/"):
            return
        blocks, codes = self.document.findall(nodes.literal_block), self.document.findall(nodes.literal)
        found = [(x, _block) for x in blocks if "language" not in x and formulas.is_block(x.astext())]
        found += [(x, _inline) for x in codes if formulas.is_inline(x.astext())]
        for code, typeset in found:
            try:
                code.replace_self(typeset(code.astext()))
            except ValueError as error:
                logging.getLogger(__name__).warning("formula %r: %s", code.astext(), error, location=code)
        for alias in [x for x in self.document.findall(nodes.paragraph) if x.astext().startswith("alias of ")]:
            alias.parent.remove(alias)  # What a type's own documentation says better.


def _inline(text: str) -> nodes.Element:
    parts = re.split(r"(?<!^p)\s(?=[=←≤≥] )", text) if len(text) > LONG else [text]
    found = [nodes.math("", formulas.Formula(part, fractions=False).sequence()) for part in parts]
    return nodes.inline("", "", *[node for math in found for node in (nodes.Text(" "), math)][1:])


def _block(text: str) -> nodes.Element:
    """The lines of a block, in which two spaces or more set statements apart."""
    lines = nodes.container(classes=["formula"])
    for line in text.splitlines():
        row = nodes.paragraph(classes=["continued"] if line.startswith(" ") else [])
        for statement in re.split(r"\s{2,}", line.strip()):
            tex = formulas.Formula(statement, fractions=True).sequence().replace(r"\frac", r"\dfrac")
            row += nodes.inline("", "", nodes.math("", tex), classes=["statement"])
        lines += row
    return lines


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-signature", signature)
    app.connect("missing-reference", link)
    app.add_transform(Typeset)
    return {"parallel_read_safe": True}
