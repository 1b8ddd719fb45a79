"""What the tree promises: floors, an explicit face, documentation that runs, files that fit."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import eoi_jax

ROOT = Path(eoi_jax.__file__).parent
FLOORS = {
    "typing": 0,
    "_checks": 0,
    "_free_power": 0,
    "_loops": 0,
    "_names": 0,
    "_schedule": 0,
    "_tree_checks": 0,
    "_selection": 0,
    "_version": 0,
    "givens": 1,
    "theory": 1,
    "mean_field": 1,
    "_flow": 1,
    "_krylov": 1,
    "_layers": 1,
    "_layerwise": 1,
    "_pruning": 1,
    "_sparse_file": 1,
    "masks": 1,
    "isometry": 1,
    "rotation": 2,
    "budgets": 2,
    "criteria": 2,
    "optim": 2,
    "_delta": 2,
    "_kernel_error": 2,
    "_kernel_spectrum": 2,
    "spectrum": 3,
    "serialization": 3,
    "dynamic": 3,
    "sparse_orthogonal": 3,
    "sao": 3,
    "initializers": 4,
    "_drawing": 4,
    "networks": 5,
}
# Within floor 0 the order is: typing and loops, then what checks, names, schedules and selects.
ALLOWED_ON_FLOOR_0 = {
    ("_checks", "typing"),
    ("_tree_checks", "typing"),
    ("_tree_checks", "_checks"),
    ("_names", "typing"),
    ("_names", "_checks"),
    ("_names", "_tree_checks"),
    ("_schedule", "typing"),
    ("_schedule", "_loops"),
    ("_selection", "_loops"),
}
PUBLIC = [name for name in FLOORS if not name.startswith("_")]


def imports_of(path):
    """Modules of eoi_jax, and top-level packages, that a file imports."""
    inner, packages = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            packages.add(node.module.split(".")[0])
            if node.module == "eoi_jax":
                inner |= {alias.name for alias in node.names}
            elif node.module.startswith("eoi_jax."):
                inner.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
            inner |= {a.name.split(".")[1] for a in node.names if a.name.startswith("eoi_jax.")}
    return inner, packages


def test_every_module_has_a_floor():
    assert {path.stem for path in ROOT.glob("*.py")} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_only_go_down(name):
    inner, packages = imports_of(ROOT / f"{name}.py")
    for other in inner:
        lower = FLOORS[other] < FLOORS[name] or (name, other) in ALLOWED_ON_FLOOR_0
        assert lower, f"{name} (floor {FLOORS[name]}) imports {other} (floor {FLOORS[other]})"
    assert "experiments" not in packages
    assert "flax" not in packages, "initializers and masks work for any framework"


def test_theory_is_not_traced():
    assert "jax" not in imports_of(ROOT / "theory.py")[1]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_a_module_holds_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400


def test_the_face_is_an_explicit_list():
    assert sorted(eoi_jax.__all__) == sorted(set(eoi_jax.__all__))
    for name in eoi_jax.__all__:
        assert hasattr(eoi_jax, name)
        assert name == "__version__" or f"``{name}``" in eoi_jax.__doc__
    functions = [n for n in eoi_jax.__all__ if inspect.isfunction(getattr(eoi_jax, n))]
    assert not set(functions) & set(FLOORS), "a module and a function of one name"


def public_functions():
    for name in PUBLIC:
        module = getattr(eoi_jax, name)
        for symbol in getattr(module, "__all__", []):
            if inspect.isfunction(getattr(module, symbol)):
                yield pytest.param(getattr(module, symbol), id=f"{name}.{symbol}")


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


@pytest.mark.parametrize("name", [*PUBLIC, "_checks", "_schedule"])
def test_modules_are_documented(name):
    assert inspect.getdoc(getattr(eoi_jax, name, None) or __import__(f"eoi_jax.{name}"))


def test_it_says_that_it_is_typed():
    assert (ROOT / "py.typed").exists()
