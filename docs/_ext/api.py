"""What Sphinx needs to know of this package: signatures as they are written, and formulas typeset (see `formulas`)."""

import ast
import functools
import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import formulas
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
#: Names in signatures that are documented under a longer one.
TYPES = {
    name: f"adam_fn.{module}.{name}"
    for module, names in {
        "algebra.hyper": ("Hyper", "Schedule", "Beta", "NonNegative"),
        "algebra.arithmetic": ("Scalar",),
        "algebra.slots": ("Slots",),
        "trees.leaves": ("Mask", "PyTree"),
        "storage.codec": ("Stored",),
        "storage.low_bit_codes": ("StorageLike", "StorageName"),
        "options": ("Complex", "DecayKind"),
        "wrappers.layered_model": ("Embed", "Head", "Layer"),
        "surgery": ("Second",),
        "interop.moments": ("Paths", "Transpose"),
        "interop.torch": ("StateDict",),
        "interop.keras": ("Variables",),
    }.items()
    for name in names
}


@functools.cache
def _written(module: ModuleType) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """The classes and functions of a module's source by qualified name."""
    found: dict[str, ast.ClassDef | ast.FunctionDef] = {}

    def collect(parent: ast.Module | ast.ClassDef, prefix: str) -> None:
        for node in parent.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                collect(node, f"{prefix}{node.name}.")

    collect(ast.parse(inspect.getsource(module)), "")
    return found


def _source(thing: Any, node: ast.expr | None) -> str:  # noqa: ANN401
    """An expression as it is written in the module of a thing, in one line."""
    text = ast.get_source_segment(inspect.getsource(inspect.getmodule(thing) or thing), node) if node else ""
    return " ".join((text or "").split())


def _node(thing: Any) -> ast.ClassDef | ast.FunctionDef | None:  # noqa: ANN401
    module = inspect.getmodule(thing)
    inside = module is not None and module.__name__.startswith("adam_fn")
    return _written(module).get(thing.__qualname__) if module and inside else None


def _fields(kind: type) -> dict[str, tuple[str, str]]:
    """Annotation and default, as written, of the fields of a class and of the classes that it comes from."""
    found: dict[str, tuple[str, str]] = {}
    node = _node(kind)
    if isinstance(node, ast.ClassDef):
        for base in reversed(node.bases):
            found |= _fields(getattr(inspect.getmodule(kind), ast.unparse(base), object))
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
                default = f" = {_source(kind, line.value)}" if line.value else ""
                found[ast.unparse(line.target)] = (_source(kind, line.annotation), default)
    return found


def _arguments(function: Any) -> tuple[dict[str, tuple[str, str]], str | None]:  # noqa: ANN401
    """The same of the parameters of a function, unpacked options included, and what it returns."""
    function = inspect.unwrap(function)
    node = _node(function)
    if not isinstance(node, ast.FunctionDef):
        return {}, None
    every = [*node.args.posonlyargs, *node.args.args]
    defaults = dict(zip((x.arg for x in reversed(every)), reversed(node.args.defaults), strict=False))
    every += [x for x in (node.args.vararg, *node.args.kwonlyargs, node.args.kwarg) if x is not None]
    defaults |= {x.arg: value for x, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value}
    found = {
        x.arg: (
            _source(function, x.annotation),
            f" = {_source(function, defaults[x.arg])}" if x.arg in defaults else "",
        )
        for x in every
    }
    rest = inspect.signature(function).parameters.get(node.args.kwarg.arg) if node.args.kwarg else None
    for options in getattr(rest.annotation if rest else None, "__args__", ()):
        found |= {name: (hint, "") for name, (hint, _) in _fields(options).items()}
    return found, _source(function, node.returns) or None


def _qualified(source: str) -> str:
    """An annotation with the documented names of its types, and without the quotes of what comes later in the file."""
    source = re.sub(r"([\"'])([A-Z]\w+)\1", r"\2", source.strip("\"'"))
    return re.sub(r"(?<![\w.\"'])[A-Z]\w+", lambda match: TYPES.get(match[0], match[0]), source)


def signature(
    app: Sphinx,
    what: str,
    name: str,
    thing: Any,  # noqa: ANN401
    options: object,
    arguments: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """The runtime signature, with annotations and defaults as they are written: `Hyper` and not what it stands for."""
    if what not in ("function", "class", "method") or arguments is None:
        return arguments, returns
    node = _node(thing)
    if what != "class":
        written, back = _arguments(thing)
    elif isinstance(node, ast.ClassDef) and any(getattr(line, "name", None) == "__init__" for line in node.body):
        written, back = _arguments(thing.__init__)
    else:
        written, back = _fields(thing), None
    if not written:  # Nothing that a reader would give it.
        return ("" if what == "class" else arguments), returns
    parts, keyword_only = [], False
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts += [] if parts and parts[-1].startswith("*") else ["*"]
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        hint, default = written[parameter.name]
        if not default and parameter.default is not parameter.empty:
            default = f" = {parameter.default!r}"
        parts.append(f"{stars}{parameter.name}: {_qualified(hint)}{default}")
    return f"({', '.join(parts)})", None if back in (None, "None") else _qualified(back)


class Typeset(SphinxTransform):
    """Formulas of docstrings: literal blocks that are not Python, and inline code with mathematical signs."""

    default_priority = 500

    def apply(self, **kwargs: object) -> None:
        if not self.env.docname.startswith("api/"):
            return
        for block in list(self.document.findall(nodes.literal_block)):
            if "language" not in block and formulas.is_block(block.astext()):
                self._replace(block, self._block)
        for code in list(self.document.findall(nodes.literal)):
            if formulas.is_inline(code.astext()):
                self._replace(code, self._inline)
        for math in list(self.document.findall(nodes.math)):
            self._keep_together(math)
        for alias in [x for x in self.document.findall(nodes.paragraph) if x.astext().startswith("alias of ")]:
            alias.parent.remove(alias)  # What a type's own documentation says better.
        for name in list(self.document.findall(nodes.field_name)):
            if name.astext() == "Variables":  # What Sphinx makes of "Attributes".
                name.replace_self(nodes.field_name("", "Attributes"))

    def _replace(self, old: nodes.Element, typeset: Callable[[str], list[nodes.Node]]) -> None:
        try:
            old.replace_self(typeset(old.astext()))
        except ValueError as error:
            LOGGER.warning("formula %r: %s", old.astext(), error, location=old)

    @staticmethod
    def _keep_together(math: nodes.math) -> None:
        """No line begins with the punctuation after a formula or ends with a parenthesis before it."""
        parent, place = math.parent, math.parent.index(math)
        before, after = ([*parent, nodes.Text("")][i] if i >= 0 else None for i in (place - 1, place + 1))
        kept = nodes.inline(classes=["together"])
        if isinstance(before, nodes.Text) and before.endswith("("):
            parent.replace(before, nodes.Text(before[:-1]))
            kept += nodes.Text("(")
        kept += math.deepcopy()
        if isinstance(after, nodes.Text) and (stop := re.match(r"[.,;:)]+", after)):
            parent.replace(after, nodes.Text(after[stop.end() :]))
            kept += nodes.Text(stop[0])
        if len(kept) > 1:
            parent.replace(math, kept)

    def _inline(self, text: str) -> list[nodes.Node]:
        return self._nodes(formulas.inline(text))

    def _block(self, text: str) -> list[nodes.Node]:
        lines = nodes.container(classes=["formula"])
        for line in text.splitlines():
            row = nodes.paragraph(classes=["continued"] if line.startswith(" ") else [])
            for pieces in formulas.statements(line):
                row += nodes.inline("", "", *self._nodes(pieces, r"\displaystyle "), classes=["statement"])
            lines += row
        return [lines]

    @staticmethod
    def _nodes(pieces: list[formulas.Piece], style: str = "") -> list[nodes.Node]:
        found: list[nodes.Node] = []
        for kind, content in pieces:
            if found:
                found.append(nodes.Text(" "))
            found.append(
                nodes.Text(content)
                if kind == "text"
                else nodes.literal("", content)
                if kind == "code"
                else nodes.math(content, style + content)
            )
        return found


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-signature", signature)
    app.add_transform(Typeset)
    return {"parallel_read_safe": True}
