"""Every public module has its page; make docs checks names and links."""

import importlib
import pkgutil
import re
from pathlib import Path

import eoi_jax

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
API = DOCS / "api"
MODULES = {m.name for m in pkgutil.iter_modules(eoi_jax.__path__)} - {"_internal"}


def test_every_public_module_has_a_page():
    assert {path.stem for path in API.glob("*.md")} - {"index"} == MODULES
    listed = re.search(r"```\{toctree\}\n.*?\n\n(.*?)```", (API / "index.md").read_text(), re.S)[1]
    assert sorted(listed.split()) == sorted(MODULES)
    for module in MODULES:
        page = (API / f"{module}.md").read_text()
        assert f".. automodule:: eoi_jax.{module}\n   :members:\n" in page  # those of its __all__


def test_a_name_of_the_face_is_that_of_a_module():
    names = {}
    for module in sorted(MODULES):
        found = importlib.import_module(f"eoi_jax.{module}")
        names |= {id(getattr(found, name)): module for name in found.__all__}
    for name in set(eoi_jax.__all__) - MODULES - {"__version__"}:
        assert id(getattr(eoi_jax, name)) in names, name
