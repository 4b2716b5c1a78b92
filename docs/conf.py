"""The site: `sphinx-build --fail-on-warning --keep-going docs docs/_build` needs no network."""

import pathlib
import sys

import adam_fn

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_ext"))

project = "adam_fn"
author = "the adam_fn authors"
version = release = adam_fn.__version__
html_title = f"adam_fn {version}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "api",
    "pages",
]
exclude_patterns = ["_build"]
nitpicky = True
# Without a network nothing of JAX and optax can be looked up, and arguments in single backticks are no links.
nitpick_ignore_regex = [("py:.*", r"(?!adam_fn\.).*")]
# The reference is of what is public.
nitpick_ignore = [("py:obj", "adam_fn.storage.noise")]

default_role = "py:obj"
add_module_names = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_use_type_comments = False
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
python_use_unqualified_type_names = True

myst_enable_extensions = ["deflist", "dollarmath"]  # Definitions can be read on GitHub, too; formulas are as there.
myst_heading_anchors = 4  # The fragments that GitHub gives to headings.

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "friendly"
mathjax3_config = {
    "tex": {"packages": {"[-]": ["noundefined"]}},
    "options": {"enableMenu": False},
    "chtml": {"matchFontHeight": False, "scale": 1.08},
}
