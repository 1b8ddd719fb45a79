"""The site: `make docs` builds it into build/site, and a warning is an error."""

import base64
import functools
import importlib
import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import eoi_jax  # noqa: E402

project = "eoi_jax"
copyright = "the eoi_jax contributors"
release = version = eoi_jax.__version__

# Furo: search, light and dark, one column on a phone, and no framework of scripts.
html_theme = "furo"
html_title = "eoi_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"

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
    """Bring the notebooks in, and tell Sphinx what to leave out."""
    app.connect("config-inited", lambda app, config: _bring_notebooks(Path(app.srcdir)))
    app.connect("autodoc-skip-member", _is_field_of_tuple)
    app.connect("env-check-consistency", lambda app, env: _miss_no_name(env))
    app.connect("build-finished", _write_llms_txt)
    app.add_html_math_renderer(
        "mathml",
        (functools.partial(_write_mathml, "inline"), None),
        (functools.partial(_write_mathml, "block"), None),
    )


def _write_mathml(display: str, translator: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers show without a script."""
    source = re.sub(r"\\arg\b", r"\\operatorname{arg}", node.astext())  # the converter lacks it
    formula = latex2mathml.converter.convert(source, display=display)
    if unknown := re.findall(r">(\\\w+)", formula):
        message = "the converter to MathML does not know %s. Write it otherwise."
        logging.getLogger(__name__).warning(message, ", ".join(unknown), location=node)
    tag = "span" if display == "inline" else "div"
    translator.body.append(f'<{tag} class="math">{formula}</{tag}>')
    raise nodes.SkipNode


def _write_llms_txt(app: Any, exception: Exception | None) -> None:
    """Write llms.txt: what the site is, and each page with its first paragraph, section by section.

    The format is that of https://llmstxt.org.
    """
    if exception is not None or app.builder.format != "html":
        return
    env, root = app.env, app.config.root_doc

    def about(name: str) -> str:
        paragraph = next(iter(env.get_doctree(name).findall(nodes.paragraph)), None)
        return " ".join(paragraph.astext().split()) if paragraph is not None else ""

    def entry(name: str) -> str:
        return f"- [{env.titles[name].astext()}]({app.builder.get_target_uri(name)}): {about(name)}"

    lines = [f"# {env.titles[root].astext()}", "", f"> {about(root)}"]
    for name in env.toctree_includes[root]:
        pages = env.toctree_includes.get(name, [])
        lines += ["", f"## {env.titles[name].astext()}", "", *map(entry, [name, *pages])]
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _bring_notebooks(docs: Path) -> None:
    """Write docs/notebooks: copies, thumbnails, and a page with a card for each.

    A page's picture is the first that its notebook drew. Badges stay out: the site is read where
    nothing can be downloaded.
    """
    folder, cards = docs / "notebooks", []
    folder.mkdir(exist_ok=True)
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"), key=lambda path: path.stem != "quickstart")
    for path in paths:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        first = notebook["cells"][0]
        text = "".join(first["source"])
        text = re.sub(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)\n*", "", text)
        first["source"] = text
        title, about = (text + "\n\n").split("\n\n")[:2]
        sentence = re.split(r"(?<=[.:]) ", " ".join(about.split()))[0].rstrip(":.") + "."
        outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
        picture = next(o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {}))
        _update(folder / f"{path.stem}.png", base64.b64decode("".join(picture)))
        _update(folder / path.name, json.dumps(notebook).encode())
        cards.append(
            f":::{{grid-item-card}} {title.removeprefix('# ')}\n:link: {path.stem}\n"
            f":link-type: doc\n:img-top: {path.stem}.png\n\n{sentence}\n:::\n"
        )
    names = "\n".join(path.stem for path in paths)
    page = (
        "# Notebooks\n\nEach runs in under two minutes on two CPU cores and downloads no "
        "data. They are in the folder `notebooks` of the repository.\n\n"
        "::::{grid} 1 2 2 2\n:gutter: 3\n\n"
        + "\n".join(cards)
        + f"::::\n\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"
    )
    _update(folder / "index.md", page.encode())


def _miss_no_name(env: Any) -> None:
    """Warn of a public name that no page documents, for want of a docstring, say."""
    documented = set(env.domains.python_domain.objects)
    for module in pkgutil.iter_modules(eoi_jax.__path__, "eoi_jax."):
        if not module.name.endswith("._internal"):
            for name in importlib.import_module(module.name).__all__:
                if f"{module.name}.{name}" not in documented:
                    logging.getLogger(__name__).warning(
                        "%s.%s is on no page. Give it a docstring.", module.name, name
                    )


def _update(path: Path, content: bytes) -> None:
    """Write a file if that changes it, so that Sphinx reads again what is new alone."""
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def _is_field_of_tuple(app: Any, what: str, name: str, obj: object, skip: bool, _: Any) -> bool:
    """Skip "Alias for field number 0": the class has described its fields."""
    return skip or (inspect.getdoc(obj) or "").startswith("Alias for field number")
