"""The site: `make docs` builds it into build/site, and a warning is an error."""

import inspect
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from eoi_jax._internal.version import __version__  # noqa: E402

project = "eoi_jax"
copyright = "the eoi_jax contributors"
release = version = __version__

# Furo: search, light and dark, one column on a phone, and no framework of scripts.
html_theme = "furo"
html_title = "eoi_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_static"]

# Pages are Markdown. Their Python blocks run as tests (tests/test_readme.py); notebooks are shown
# with the outputs that are stored in them, and the tests execute them at a smaller size.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False  # the signature has the type; a colon may stand in the sentence
napoleon_use_ivar = True  # the fields of a class stand in its own docstring, once
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# `make docs` downloads nothing, so names of other libraries and of Python stay text.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|dataclasses|flax|jax|json|jnp|np|numpy|optax|os|pathlib|typing)\..*"),
    (r"py:class", r"(.*\.)?_[A-Za-z]+|tuple\[.*"),  # names of signatures that are not public
]


def setup(app: Any) -> None:
    """Tell Sphinx what to leave out."""
    app.connect("autodoc-skip-member", _is_field_of_tuple)


def _is_field_of_tuple(app: Any, what: str, name: str, obj: object, skip: bool, _: Any) -> bool:
    """Skip "Alias for field number 0": the class has described its fields."""
    return skip or (inspect.getdoc(obj) or "").startswith("Alias for field number")
