r"""The Unicode formulas of docstrings as TeX: ``m̂/(√v̂ + ε)`` becomes ``\frac{\hat{m}}{\sqrt{\hat{v}}+\varepsilon}``.

`help` shows a docstring as it is written, the site shows this. Words are text, names in backticks are code, and
everything else is a formula, in which ``/`` divides all that is multiplied before it by the one factor after it. An
unknown character is an error: no formula is shown half converted.
"""

import ast
import itertools
import re
import unicodedata
from typing import Literal, NamedTuple, TypeAlias

GREEK = {
    **{"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "η": "eta", "λ": "lambda", "μ": "mu"},
    **{"π": "pi", "ρ": "rho", "φ": "varphi", "ψ": "psi", "Δ": "Delta", "Λ": "Lambda"},
}
LOW = {**dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ᵢₜ", "0123456789+-it", strict=True)), "∞": r"\infty"}
HIGH = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵗⁱᵏ", "0123456789+-tik", strict=True))
ACCENTS = {"\u0302": r"\hat", "\u0304": r"\bar"}
SIGNS = {
    **{sign: sign for sign in "+-=<>:,;"},
    **{"←": r"\leftarrow ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "·": r"\cdot ", "…": r"\dots "},
    **{"<<": r"\ll ", ">>": r"\gg "},
}
OPERATORS = {*SIGNS, "√", "/", "^", "**"} - {",", ";", ":"}
FENCES = {"(": "()", "[": "[]", "{": "{}", "⌊": "⌊⌋", "⌈": "⌈⌉", "|": "||", "‖": "‖‖"}
FENCE_TEX = {"{": r"\{", "}": r"\}", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "‖": r"\|"}
PREFIXES = {"max": r"\max ", "min": r"\min ", "ln": r"\ln ", "Σ": r"\textstyle\sum "}
LONG = 40
TOKEN = re.compile(
    rf"(?P<code>`[^`]+`)|(?P<space>\s+)|(?P<number>\d+(?:\.\d+)?|[½¼])"
    rf"|(?P<word>[A-Za-z]{{2,}}\w*(?:'s)?|[A-Za-z]'s)"
    rf"|(?P<letter>[A-Za-z{''.join(GREEK)}][{''.join(ACCENTS)}]*'?)"
    rf"|(?P<sub>_(?:\w+|{{[^}}]*}})|[{''.join(LOW)}]+)|(?P<sup>[{''.join(HIGH)}]+|\^|\*\*)|(?P<sign><<|>>|.)",
    re.DOTALL,
)


Kind: TypeAlias = Literal["math", "text", "code"]


class Piece(NamedTuple):
    """A part of a line."""

    kind: Kind
    content: str


class Token(NamedTuple):
    """A part of a formula, and how many spaces stand before it."""

    kind: str
    text: str
    spaces: int = 0


class Tex(NamedTuple):
    """TeX with fractions built up and in one line, and without the fences around it, if there are any."""

    tall: str
    flat: str
    inner: "Tex | None" = None

    @property
    def bare(self) -> "Tex":
        return self.inner or self


class Parser:
    """Recursive descent over the tokens of a formula."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens[::-1]  # The next one last.

    def next(self) -> Token:
        return self.tokens[-1] if self.tokens else Token("end", "")

    def sequence(self, closing: str = "") -> Tex:
        """Products and the signs between them, to the end or a closing fence."""
        parts = []
        while (token := self.next()).kind != "end" and token.text != closing:
            if token.text in SIGNS:
                self.tokens.pop()
                gap = r"\ " if token.text in ",;:" and self.next().spaces else ""
                parts.append(Tex(SIGNS[token.text] + gap, SIGNS[token.text] + gap))
            else:
                parts.append(self.product(closing))
        return Tex("".join(part.tall for part in parts), "".join(part.flat for part in parts))

    def product(self, closing: str) -> Tex:
        """Factors side by side, a slash under all before it; a dot without spaces is one of them."""
        last, found = self.next(), self.factor()
        while (token := self.next()).kind != "end" and token.text != closing:
            if token.text == "/":
                self.tokens.pop()
                below = self.factor()
                found = Tex(rf"\frac{{{found.bare.flat}}}{{{below.bare.flat}}}", f"{found.flat}/{below.flat}")
            elif token.text in SIGNS and (token.text != "·" or token.spaces):
                break
            else:
                between = SIGNS[self.tokens.pop().text] if token.text == "·" else ""
                if "word" in (last.kind, token.kind) and token.spaces:
                    between = r"\ "
                last, factor = token, self.factor()
                found = Tex(found.tall + between + factor.tall, found.flat + between + factor.flat)
        return found

    def factor(self) -> Tex:
        """A letter, a number, a word, a root, what stands in fences or a function of it, with its scripts."""
        if not self.tokens:
            raise ValueError("the formula ends where a factor should stand")
        kind, text, _ = self.tokens.pop()
        if text == "√":
            under = self.factor().bare
            return Tex(rf"\sqrt{{{under.tall}}}", rf"\sqrt{{{under.flat}}}")
        if text in PREFIXES:
            of = self.factor()
            return Tex(PREFIXES[text] + of.tall, PREFIXES[text] + of.flat)
        if text in FENCES:
            return self.scripted(self.fenced(*FENCES[text]))
        if kind == "word" and self.next().text in ("(", "[") and not self.next().spaces:
            of = self.factor()
            return Tex(rf"\operatorname{{{text}}}{of.tall}", rf"\operatorname{{{text}}}{of.flat}")
        if kind == "word":
            tex = rf"\text{{{text}}}"
        elif kind == "letter":
            tex = rf"\{GREEK[text[0]]} " if text[0] in GREEK else text[0]
            for accent in text[1:].rstrip("'"):
                tex = f"{ACCENTS[accent]}{{{tex}}}"
            tex += "'" * text.endswith("'")
        elif kind == "number":
            tex = {"½": r"\tfrac12 ", "¼": r"\tfrac14 "}.get(text, text)
        else:
            raise ValueError(f"{text!r} (U+{ord(text[0]):04X}) has no place in a formula here")
        return self.scripted(Tex(tex, tex))

    def fenced(self, left: str, right: str) -> Tex:
        inner = self.sequence(right)
        if not self.tokens:
            raise ValueError(f"{left!r} is not closed")
        self.tokens.pop()
        left, right = (FENCE_TEX.get(fence, fence) for fence in (left, right))
        tall = rf"\left{left}{inner.tall}\right{right}" if r"\frac" in inner.tall else f"{left}{inner.tall}{right}"
        return Tex(tall, f"{left}{inner.flat}{right}", inner)

    def scripted(self, base: Tex) -> Tex:
        scripts = ""
        while (token := self.next()).kind in ("sub", "sup"):
            text = self.tokens.pop().text
            if text in ("^", "**"):
                scripts += f"^{{{self.factor().bare.flat}}}"
            elif token.kind == "sup":
                scripts += f"^{{{''.join(HIGH[x] for x in text)}}}"
            elif text[0] == "_":
                name = text[1:].strip("{}")
                scripts += f"_{{{name}}}" if len(name) == 1 or text[1] == "{" else rf"_{{\text{{{name}}}}}"
            else:
                scripts += f"_{{{''.join(LOW[x] for x in text)}}}"
        return Tex(base.tall + scripts, base.flat + scripts) if scripts else base


def statements(line: str) -> list[list[Piece]]:
    """What two or more spaces set apart in a line of a formula block, with fractions built up."""
    groups: list[list[Token]] = []
    for token in _tokens(line.strip()):
        if not groups or token.spaces > 1:
            groups.append([])
        groups[-1].append(token)
    return [_pieces(group, tall=True) for group in groups]


def inline(source: str) -> list[Piece]:
    """A formula within a sentence: no fractions built up, and a long one in pieces, between which the line may end."""
    parts = re.split(r" (?=[=←≤≥] )", source) if len(source) > LONG else [source]
    return [piece for part in parts for piece in _pieces(_tokens(part), tall=False)]


def is_block(text: str) -> bool:
    """Whether a literal block is a formula: it is not Python."""
    try:
        ast.parse(text)
    except SyntaxError:
        return True
    return False


def is_inline(text: str) -> bool:
    """Whether inline code is a formula: it has signs that Python code of this package has not."""
    signs = any((not x.isascii() and x != "…") or x == "^" for x in text) or re.fullmatch(r"\|\w\|", text) is not None
    return signs and not re.search(r"\w\.[a-z]|[\"\[]", text)


def _tokens(source: str) -> list[Token]:
    source = unicodedata.normalize("NFD", source.replace("≠", "\0")).replace("\0", "≠")
    found, spaces = [], 0
    for match in TOKEN.finditer(source):
        if match.lastgroup == "space":
            spaces = len(match[0])
        else:
            found.append(Token(match.lastgroup or "", match[0], spaces))
            spaces = 0
    return found


def _pieces(tokens: list[Token], *, tall: bool) -> list[Piece]:
    """The formulas of a line, and the words between them: those outside of fences that are no operand."""
    kinds: list[Kind] = []
    inside: list[str] = []  # The fences that are to be closed.
    for before, token, after in zip([Token("end", ""), *tokens], tokens, [*tokens[1:], Token("end", "")], strict=False):
        if inside and token.text == inside[-1]:
            inside.pop()
        elif token.text in FENCES:
            inside.append(FENCES[token.text][-1])
        called = after.text in ("(", "[") and not after.spaces
        operand = (before.text in OPERATORS and (after.kind != "word" or not token.spaces)) or (
            after.text in OPERATORS and before.kind != "word"
        )
        if token.kind == "code":
            kinds.append("code")
        elif token.kind == "word" and not (inside or called or operand or token.text in PREFIXES):
            kinds.append("text")
        else:
            stop = token.text in (",", ";", ":") and kinds[-1:] not in ([], ["math"])
            kinds.append("text" if stop else "math")
    found: list[Piece] = []
    for kind, group in itertools.groupby(zip(kinds, tokens, strict=True), key=lambda pair: pair[0]):
        own = [token for _, token in group]
        if kind == "math":
            tex = Parser(own).sequence()
            found.append(Piece("math", tex.tall if tall else tex.flat))
        else:
            text = "".join(" " * (token.spaces > 0) + token.text for token in own).strip()
            found.append(Piece("code" if kind == "code" else "text", text.strip("`")))
    return found
