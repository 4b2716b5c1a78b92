"""The site, as far as it can be seen without Sphinx: a complete reference, and the formulas of docstrings as TeX."""

import ast
import inspect
import pydoc
import re
from collections import Counter
from pathlib import Path
from typing import Any

import formulas
import pytest

import adam_fn
from adam_fn import backward, checkpoint, diagnostics, interop, masks, presets, schedules

ROOT = Path(__file__).parents[2]
REFERENCE = {
    page.stem: re.findall(r"^\.\. auto\w+:: (\S+)$", page.read_text(), re.MULTILINE)
    for page in sorted((ROOT / "docs/api").glob("*.rst"))
}


def _public() -> dict[str, Any]:
    """Everything that a user may import, by name."""
    found = {f"adam_fn.{name}": getattr(adam_fn, name) for name in adam_fn.__all__}
    found |= {f"adam_fn.interop.{name}": getattr(interop, name) for name in interop.__all__}
    for module in (backward, checkpoint, diagnostics, masks, presets, schedules):
        for name, thing in vars(module).items():
            own = (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith(module.__name__)
            if own and not name.startswith("_"):
                found[f"{module.__name__}.{name}"] = thing
    return found


def test_the_reference_has_every_public_name_once() -> None:
    documented = Counter(id(pydoc.locate(name)) for names in REFERENCE.values() for name in names)
    public = _public()
    assert not [name for name, thing in public.items() if documented[id(thing)] != 1]
    assert max(documented.values()) == 1


def _tex(source: str, *, fractions: bool = True) -> str:
    return formulas.Formula(source, fractions=fractions).sequence()


def test_every_formula_in_a_docstring_becomes_tex() -> None:
    nodes = (node for file in (ROOT / "adam_fn").rglob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    seen = 0
    for node in nodes:
        docstring = (isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)) or ""
        for block in re.findall(r"::\n\n((?:    .*\n|\n)+)", docstring + "\n"):
            if formulas.is_block(code := inspect.cleandoc(block)):
                seen += 1
                assert all(map(_tex, re.split(r"\s{2,}|\n", code)))
        for text in re.findall(r"``(.+?)``", docstring, re.DOTALL):
            if formulas.is_inline(text):
                seen += 1
                assert _tex(text, fractions=False)
    assert seen > 150


@pytest.mark.parametrize(
    ("source", "tex"),
    [
        ("m̂ / (√(v̂ + ε_root) + ε)", r"\frac{\hat{m}}{\sqrt{\hat{v}+ε_{\text{root}}}+ε}"),
        ("r = √((ρ-4)ρ∞ / (ρ∞ρ))", r"r=\sqrt{\frac{(ρ-4)ρ_{∞}}{ρ_{∞}ρ}}"),
        ("u = (m/w₁) / v", r"u=\frac{\frac{m}{w_{1}}}{v}"),
        ("2tβ₂ᵗ/(1-β₂ᵗ) - 1", r"\frac{2tβ_{2}^{t}}{1-β_{2}^{t}}-1"),
        ("(1-β)/w · (u - p̄)", r"\frac{1-β}{w}·(u-\bar{p})"),
        ("clip(g / max(√v, ε), ±c)", r"\operatorname{clip}\left(\frac{g}{\max (\sqrt{v},\ ε)},\ ±c\right)"),
        ("|λ/k - γ| < tolerance", r"\left|\frac{λ}{k}-γ\right|<\text{tolerance}"),
        ("u·u / (-u·g)", r"\frac{u·u}{-u·g}"),
        ("⌊bits(c)/2⌋, a ≠ ‖β_t²‖", r"\left\lfloor \frac{\operatorname{bits}(c)}{2}\right\rfloor ,\ a≠\|β_{t}^{2}\|"),
        ("or 0 without `sgd_x`", r"\text{or}\ 0\ \text{without}\ \texttt{sgd_x}"),
        ("where ρ/2 ≥ x's half", r"\text{where}\ \frac{ρ}{2}≥\text{x's}\ \text{half}"),
    ],
)
def test_a_formula_becomes_tex(source: str, tex: str) -> None:
    assert _tex(source) == tex


def test_formulas_within_a_sentence_stay_on_one_line() -> None:
    assert _tex("α_t/√t ≥ 0.96^(tψ)/(2w)", fractions=False) == r"α_{t}/\sqrt{t}≥0.96^{tψ}/(2w)"


@pytest.mark.parametrize("source", ["m ⊗ v", "√", "(m + v", "m + v)", "m̃", "m_", "a/", "/a", "a[1]"])
def test_a_formula_that_cannot_be_parsed_is_an_error(source: str) -> None:
    with pytest.raises(ValueError, match=r"no place|ends|closed"):
        _tex(source)


def test_code_is_not_taken_for_a_formula() -> None:
    assert not formulas.is_block("tx = optax.chain(adam_fn.adam(1e-3), adam_fn.average_params(0.999))\n...")
    assert not any(map(formulas.is_inline, ["b1 = 0", "transform(a >> b)", "jit(f, out=…)", "optax.chain(g(λ))"]))
