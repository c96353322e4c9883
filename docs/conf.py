"""How the site is built: `python -m sphinx -W --keep-going -j 2 docs docs/_build`.

Code cells are executed, and a warning is an error.
"""

import os
import sys
from pathlib import Path

import xnor_jax

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
# The kernels that execute the pages inherit these: most of a page is XLA compiling.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Names that are imported when they are used; autodoc reads the module's own.
for _name in xnor_jax.train.__all__:
    getattr(xnor_jax.train, _name)

project = "xnor_jax"
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
# The address of the repository, where whoever publishes the site gives it.
if repository := os.environ.get("XNOR_JAX_URL"):
    html_theme_options = {
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

# A word in backticks is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_use_rtype = False
