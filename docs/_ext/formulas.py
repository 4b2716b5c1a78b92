r"""The Unicode formulas of docstrings as TeX: ``m̂/(√v̂ + ε)`` becomes ``\frac{\hat{m}}{\sqrt{\hat{v}}+ε}``.

`help` shows a docstring as it is written, the site shows this. MathJax knows Greek letters and most signs as they are;
roots, fractions, accents, scripts, words and code need TeX. ``/`` divides all that is multiplied before it by the one
factor after it. An unknown character is an error: no formula is shown half converted.
"""

import ast
import re
import unicodedata

ACCENTS = {"\u0302": r"\hat", "\u0304": r"\bar"}
FENCES = {"(": ")()", "|": "|||", "‖": ("‖", r"\|", r"\|"), "⌊": ("⌋", r"\lfloor ", r"\rfloor ")}
NAMES = {"max": r"\max ", "min": r"\min ", "ln": r"\ln ", "Σ": r"\textstyle\sum ", "atan2": r"\text{atan2}"}
SIGNS = {**{sign: sign for sign in "+-=<>:,;←≤≥±…"}, "=\u0338": "≠", "<<": r"\mathbin{<<}", ">>": r"\mathbin{>>}"}
LOW, HIGH = "₀₁₂₃₄₅₆₇₈₉₊₋ᵢₜ∞", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵗⁱᵏ"
WORD = re.compile(r"`[^`]+`|(?!(?:max|min|ln)\b)[A-Za-z]{2,}\w*(?:'s)?|[A-Za-z]'s", re.ASCII)
LETTER = "([A-Za-zα-ωΔΛ])([\u0302\u0304]?)('?)"
SCRIPT = re.compile(rf"_{{([\w+-]+)}}|_(\w{{2,}})|_(\w)|([{LOW}]+)|([{HIGH}]+)|\^", re.ASCII)
NUMBER = r"\d+(?:\.\d+)?|[·½]"
TOKEN = re.compile(rf"(\s*)({WORD.pattern}|max|min|ln|{LETTER}|{NUMBER}|{SCRIPT.pattern}|=\u0338|<<|>>|\S)", re.ASCII)


class Formula:
    """Recursive descent over the tokens of a formula, with fractions built up or in one line."""

    def __init__(self, source: str, *, fractions: bool) -> None:
        found = TOKEN.finditer(unicodedata.normalize("NFD", source.strip()))
        self.tokens = [(match[1], match[2]) for match in found][::-1]  # Each with the space before it, the next last.
        self.fractions = fractions

    def sequence(self, closing: str = "") -> str:
        """Products, and the signs and words between them, to the end or a closing fence."""
        done, product, before = "", list[str](), ","
        while self.tokens and self.tokens[-1][1] != closing:
            space, text = self.tokens[-1]
            if text == "/" and product:
                self.tokens.pop()
                above, below = "".join(product), self.factor()
                built = rf"\frac{{{_bare(*product)}}}{{{_bare(below)}}}"
                product = [built if self.fractions else f"{above}/{below}"]
            elif text in SIGNS:
                self.tokens.pop()
                gap = r"\ " if text in ",;" and self.tokens and self.tokens[-1][0] else ""
                done, product = done + "".join(product) + SIGNS[text] + gap, []
            else:
                word = WORD.fullmatch(before) or WORD.fullmatch(text)
                if space and word and not {before, text} & {"·", *SIGNS}:
                    done, product = done + "".join(product) + r"\ ", []
                product.append(self.factor())
            before = text
        return done + "".join(product)

    def factor(self) -> str:
        """A letter, a number, a word, a root, a function of a factor or what stands in fences, with its scripts."""
        if not self.tokens:
            raise ValueError("the formula ends where a factor should stand")
        _, text = self.tokens.pop()
        if text == "√":
            return rf"\sqrt{{{_bare(self.factor())}}}"
        if text in NAMES:
            return NAMES[text] + self.factor()
        if WORD.fullmatch(text) and self.tokens[-1:] == [("", "(")]:
            return rf"\operatorname{{{text}}}{self.factor()}"
        if text in FENCES:
            closing, left, right = FENCES[text]
            inside = self.sequence(closing)
            if not self.tokens:
                raise ValueError(f"{text!r} is not closed")
            self.tokens.pop()
            tex = rf"\left{left}{inside}\right{right}" if r"\frac" in inside else f"{left}{inside}{right}"
        elif WORD.fullmatch(text):
            tex = rf"\texttt{{{text[1:-1]}}}" if text[0] == "`" else rf"\text{{{text}}}"
        elif letter := re.fullmatch(LETTER, text):
            tex = (f"{ACCENTS[letter[2]]}{{{letter[1]}}}" if letter[2] else letter[1]) + letter[3]
        elif re.fullmatch(NUMBER, text):
            tex = text.replace("½", r"\tfrac12 ")
        else:
            raise ValueError(f"{text!r} (U+{ord(text[0]):04X}) has no place in a formula here")
        return tex + self.scripts()

    def scripts(self) -> str:
        tex = ""
        while self.tokens and (script := SCRIPT.fullmatch(self.tokens[-1][1])):
            self.tokens.pop()
            group, name, letter, low, high = script.groups()
            if low or high:
                tex += f"{'_' if low else '^'}{{{unicodedata.normalize('NFKD', low or high)}}}"
            elif script[0] == "^":
                tex += f"^{{{_bare(self.factor())}}}"
            else:
                tex += rf"_{{\text{{{name}}}}}" if name else f"_{{{group or letter}}}"
        return tex


def _bare(*product: str) -> str:
    """A product without the parentheses around it, where it is one factor and has them."""
    inside = re.fullmatch(r"(?:\\left)?\((.*?)(?:\\right)?\)", product[0]) if len(product) == 1 else None
    return inside[1] if inside else "".join(product)


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
