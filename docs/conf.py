"""Sphinx: `sphinx-build --fail-on-warning --keep-going -q docs docs/_build` from the repository root."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import zoo  # noqa: E402

project = "paperzoo"
author = "the paperzoo authors"
copyright = "the paperzoo authors"
version = release = zoo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "zoo_tables"]
exclude_patterns = ["_build", "_ext", "gallery"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # Lightning's and torch's own texts refer to pages that are not here
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Source"]
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"paperzoo {version}"
html_static_path = ["_static"]
html_show_copyright = False
html_copy_source = False
