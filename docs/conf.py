"""Sphinx configuration of the documentation: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import docstrings  # noqa: E402
import generate  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

from flash_attn import __version__  # noqa: E402

generate.write_all(HERE / "_generated")

project = "flash_attn"
version = release = __version__
language = "en"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_generated"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
highlight_language = "text"
default_role = "py:obj"  # docstrings name functions in single backquotes
add_module_names = False
python_display_short_literal_types = True
maximum_signature_line_length = 90
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"flash_attn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1d4ed8", "color-brand-content": "#1d4ed8"},
    "dark_css_variables": {"color-brand-primary": "#7dabff", "color-brand-content": "#7dabff"},
}


def setup(app: Sphinx) -> None:
    docstrings.setup(app)
