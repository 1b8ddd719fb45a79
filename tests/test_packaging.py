"""The wheel holds the library alone, says what it needs, and runs with nothing else installed."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import eoi_jax

ROOT = Path(__file__).resolve().parent.parent
FIRST_BLOCK = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
OFFLINE = ("--no-index", "--disable-pip-version-check", "--quiet")


def pip(*arguments, python=sys.executable):
    command = [sys.executable, "-m", "pip", "--python", str(python), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy: a folder ``build`` of earlier days would go into the wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("eoi_jax", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__", "images", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    pip("wheel", source, "--wheel-dir", out, "--no-deps", "--no-build-isolation", *OFFLINE)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def metadata(wheel, names):
    [name] = [name for name in names if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())


def requirements(metadata):
    """What is installed without extras: the distributions' names."""
    parsed = map(Requirement, metadata.get_all("Requires-Dist", []))
    return {r.name for r in parsed if not r.marker or r.marker.evaluate({"extra": ""})}


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(names):
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"eoi_jax"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "eoi_jax").rglob("*.py")}
    assert modules <= set(names)
    assert "eoi_jax/py.typed" in names
    assert any(re.search(r"\.dist-info/.*LICENSE$", name) for name in names)


def test_metadata_are_complete(metadata):
    assert metadata["Name"] == "eoi_jax"
    assert metadata["Version"] == eoi_jax.__version__
    assert metadata["Author"] == "eoi_jax contributors"
    for field in ("Summary", "Keywords", "Classifier", "Requires-Python"):
        assert metadata[field], field
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    assert metadata.get_payload().startswith("# eoi_jax")
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_it_requires_what_it_imports(metadata):
    assert requirements(metadata) == {"jax", "numpy", "optax", "safetensors", "scipy"}


def closure(names):
    """The names with all that they require in turn."""
    found, ahead = {}, list(names)
    while ahead:
        distribution = importlib.metadata.distribution(ahead.pop())
        if distribution.name not in found:
            found[distribution.name] = distribution
            ahead += requirements(distribution.metadata)
    return found.values()


@pytest.mark.slow
def test_the_first_block_of_the_readme_runs_without_extras(wheel, metadata, tmp_path):
    # The environment shares the files of this one: of the requirements, and nothing else.
    venv.create(tmp_path / "environment")
    [python] = (tmp_path / "environment").glob("*/python3")
    [site] = (tmp_path / "environment").glob("lib/*/site-packages")
    required = closure(requirements(metadata))
    for distribution in required:
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            # Namespaces, as NVIDIA's, are of several distributions.
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    pip("install", wheel, *OFFLINE, python=python)  # fails where a requirement is not met
    for code in ("import eoi_jax", FIRST_BLOCK):
        command = [python, "-I", "-W", "error", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
    # Older versions of optax require chex.
    extras = {"chex", "experiments", "flax", "matplotlib", "orbax"}
    for absent in extras - {distribution.name for distribution in required}:
        found = f"import importlib.util as u; assert u.find_spec({absent!r}) is None"
        assert subprocess.run([python, "-I", "-c", found], cwd=tmp_path).returncode == 0, absent
