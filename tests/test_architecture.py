"""What the tree promises beside its import contracts: an explicit face, documented in full."""

import importlib
import inspect
import pkgutil
import re
import symtable
from pathlib import Path

import pytest

import eoi_jax

PUBLIC = ["eoi_jax"] + [
    module.name
    for module in pkgutil.walk_packages(eoi_jax.__path__, "eoi_jax.")
    if "._internal" not in module.name
]


def test_the_face_is_an_explicit_list():
    assert len(eoi_jax.__all__) == len(set(eoi_jax.__all__))
    # Layers of Flax, which is optional: modules that only their user imports.
    layers = {"linen", "nnx"}
    shown = {name for name in vars(eoi_jax) if not name.startswith("_")} - layers
    assert set(eoi_jax.__all__) == shown | {"__version__"}
    for name in shown:
        assert f"``{name}``" in eoi_jax.__doc__
        # A function would hide a module of its name.
        is_module = f"eoi_jax.{name}" in PUBLIC
        assert inspect.ismodule(getattr(eoi_jax, name)) == is_module


@pytest.mark.parametrize("name", PUBLIC)
def test_what_a_public_module_defines_is_private_or_listed(name):
    module = importlib.import_module(name)
    source = Path(module.__file__).read_text()
    symbols = symtable.symtable(source, module.__file__, "exec").get_symbols()
    defined = {s.get_name() for s in symbols if s.is_assigned() and not s.is_imported()}
    shown = {symbol for symbol in defined if not symbol.startswith("_")}
    assert shown - set(module.__all__) == set()
    assert all(hasattr(module, symbol) for symbol in module.__all__)


def public_functions():
    for name in PUBLIC:
        module = importlib.import_module(name)
        for symbol in module.__all__:
            function = getattr(module, symbol)
            if inspect.isfunction(function) and function.__module__ == name:
                yield pytest.param(function, id=f"{name.removeprefix('eoi_jax.')}.{symbol}")


@pytest.mark.parametrize("function", public_functions())
def test_public_functions_are_documented_and_typed(function):
    doc = inspect.getdoc(function)
    assert doc, "no docstring"
    assert re.match(r"[A-Z].*\.$", doc.splitlines()[0]), "the first line is one sentence"
    signature = inspect.signature(function)
    arguments = doc.split("Args:")[1].split("Returns:")[0] if signature.parameters else ""
    for name in signature.parameters:
        assert re.search(rf"^\s+\*?\*?{name}:", arguments, re.MULTILINE), f"{name} is not described"
        assert signature.parameters[name].annotation is not inspect.Parameter.empty, name
    assert signature.return_annotation is not inspect.Signature.empty
    for section in ("Returns:", "Example:", ">>> "):
        assert section in doc, f"no {section}"
