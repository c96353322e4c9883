"""Sphinx configuration.

`python -m sphinx -W --keep-going -j 2 docs docs/_build` builds the site, executes its
code cells and treats warnings as errors.
"""

import os
import sys
from pathlib import Path

import xnor_jax

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
# The kernels that execute the pages inherit these; most of their time is compilation.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# These names are imported on first use, but autodoc reads the module's namespace.
for _name in xnor_jax.train.__all__:
    getattr(xnor_jax.train, _name)

project = "xnor_jax"
author = copyright = "the xnor_jax developers"
version = release = xnor_jax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "markdown_tables",
    "coverage_check",
    "mathml",
]
html_math_renderer = "mathml"
exclude_patterns = ["_build"]

html_theme = "sphinx_book_theme"
html_title = "xnor_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options: dict = {"navbar_persistent": []}  # The sidebar has the search box.
# The repository's URL, if the publisher of the site sets it.
if repository := os.environ.get("XNOR_JAX_URL"):
    html_theme_options |= {
        "repository_url": repository,
        "use_repository_button": True,
        "path_to_docs": "docs",
    }

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_show_tb = True

# Text in single backticks is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_use_rtype = False
