"""The notebooks run at a small size, agree with their ``.py`` halves and keep their outputs."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
README = (FOLDER / "README.md").read_text()


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute, badges = script("execute"), script("badges")
REPOSITORY = badges.address() or badges.PLACEHOLDER

SMALL = {
    "quickstart": {"WIDTH": 32, "DEPTH": 3, "STEPS": 3, "BATCH": 16, "EXAMPLES": 4},
    "dynamical_isometry": {"LAYERS": 6, "WIDTH": 16, "EVERY": 3, "EXAMPLES": 2, "AI_STEPS": 10},
    "density_theory": {"SIZE": 32, "MATRICES": 5, "SIZES": (16, 32)},
    "deep_networks": {"LAYERS": 6, "WIDTH": 16, "STEPS": 3, "BATCH": 16},
    "pruning_methods": {
        "WIDTH": 16,
        "DEPTH": 4,
        "SYNFLOW_STEPS": 4,
        "AI_STEPS": 10,
        "STEPS": 3,
        "BATCH": 16,
    },
    "convolutions_and_taps": {"CHANNELS": 4, "LAYERS": 2, "PIXELS": 6},
    "reinforcement_learning": {
        "WIDTH": 16,
        "STEPS": 1024,
        "ENVIRONMENTS": 2,
        "SEEDS": 2,
        "POINTS": 2,
    },
    "faster_with_blocks": {"SIZE": 64, "BLOCK": 8, "BATCH": 16, "REPEATS": 2, "STEPS": 3},
    "attention": {
        **{"WIDTH": 16, "HEADS": 2, "DEPTH": 2, "LENGTH": 8},
        **{"BATCH": 4, "STEPS": 5},
    },
    "many_devices": {"SIZE": 64, "WIDTH": 32, "STEPS": 3},
}
each = pytest.mark.parametrize("name", execute.NAMES)


def stored(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def pictures(cell):
    return [out for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]


def test_every_notebook_is_listed():
    for suffix in (".ipynb", ".py"):
        found = {path.stem for path in FOLDER.glob(f"*{suffix}")} - {"execute", "badges"}
        assert found == set(execute.NAMES) == set(SMALL)


@pytest.mark.slow
@each
def test_executes_at_a_small_size(name, monkeypatch):
    if name == "reinforcement_learning":
        pytest.importorskip("gymnax", reason="needs the extra rl: pip install -e '.[rl]'")
    # Nearly all time is compiling, and what is tested is that the cells run: do not optimize.
    flags = f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0"
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = execute.execute(name, SMALL[name])
    complaints = [out.text for out in outputs(notebook) if out.get("name") == "stderr"]
    assert complaints == []
    kept = stored(name)
    assert sum(map(len, map(pictures, notebook.cells))) == sum(map(len, map(pictures, kept.cells)))


@each
def test_small_sizes_replace_defaults(name):
    notebook = jupytext.read(FOLDER / f"{name}.py")
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    defaults = {}
    exec(cell.source, defaults)
    for key, value in SMALL[name].items():
        assert type(defaults[key]) is type(value)
        assert value < defaults[key]


@each
def test_pair_agrees(name):
    code, kept = jupytext.read(FOLDER / f"{name}.py"), stored(name)
    assert [cell.cell_type for cell in code.cells] == [cell.cell_type for cell in kept.cells]
    for cell, other in zip(code.cells, kept.cells, strict=True):
        assert cell.source == other.source
        assert cell.metadata.get("tags") == other.metadata.get("tags")
    assert kept.metadata.jupytext.formats == "ipynb,py:percent"


@each
def test_kept_outputs(name):
    kept = stored(name)
    nbformat.validate(kept)
    counts = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # executed in order, in one go
    assert {out.output_type for out in outputs(kept)} <= {"stream", "display_data"}
    assert all(out.name == "stdout" for out in outputs(kept) if out.output_type == "stream")
    assert all("execution" not in cell.metadata for cell in kept.cells)
    text = json.dumps([out.get("text", "") for out in outputs(kept)])
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|usr)/", text)
    assert len((FOLDER / f"{name}.ipynb").read_bytes()) < 600 * 1024


@each
def test_figures_are_followed_by_what_is_seen(name):
    cells = stored(name).cells
    drawn = [place for place, cell in enumerate(cells) if pictures(cell)]
    assert len(drawn) >= 3
    assert all(cells[place + 1].cell_type == "markdown" for place in drawn)
    assert all(not cells[place + 1].source.startswith("#") for place in drawn)


@each
def test_header_and_install_cell(name):
    first, install = stored(name).cells[:2]
    assert first.source.startswith("# ")
    assert f"[{name}]({name}.ipynb)" in README
    for device in ("TPU", "GPU", "CPU"):
        assert device in first.source
    assert f'REPOSITORY = "{REPOSITORY}"' in install.source


def test_badges_are_those_of_the_address_in_setup_cfg():
    for path in badges.pages():
        assert badges.with_address(path, path.read_text(), badges.address()) == path.read_text()
    texts = [path.read_text() for path in FOLDER.parent.rglob("*.md") if ".venv" not in str(path)]
    has_badges = any(
        "badge" in target for text in texts for target in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    )
    assert has_badges == (badges.address() is not None)


def test_an_address_gives_every_notebook_its_badge():
    for path in badges.pages():
        text = badges.with_address(path, path.read_text(), None)
        with_badges = badges.with_address(path, text, "https://github.com/SOME/where")
        assert with_badges.count(badges.BADGE) == (
            len(execute.NAMES) if path.suffix == ".md" else 1
        )
        names = execute.NAMES if path.suffix == ".md" else [path.stem]
        for name in names:
            assert f"github/SOME/where/blob/main/notebooks/{name}.ipynb" in with_badges
        assert badges.with_address(path, with_badges, None) == text


def test_no_other_address_and_no_bare_install():
    for path in [FOLDER / "README.md", *FOLDER.glob("*.py"), *FOLDER.glob("*.ipynb")]:
        text = path.read_text()
        assert set(re.findall(r"https://github\.com/[\w-]+/[\w-]+", text)) <= {REPOSITORY}
        assert not re.search(r"pip install\b[^\n]*[ '\"]eoi_jax", text)


@each
def test_install_cell_installs_on_colab_only(name, monkeypatch):
    cells, calls = stored(name).cells, []
    monkeypatch.setattr("subprocess.run", lambda command, **options: calls.append(command))
    monkeypatch.setattr("sys.path", [])
    exec(cells[1].source, {})
    assert calls == []
    reads_the_checkout = any("from experiments" in cell.source for cell in cells)
    assert sys.path == [".."] * reads_the_checkout
    monkeypatch.setitem(sys.modules, "google.colab", object())
    exec(cells[1].source, {})
    *clone, install = calls
    assert install[1:4] == ["-m", "pip", "install"]
    if reads_the_checkout:
        [[*command, address, folder]] = clone
        assert (command[:2], address) == (["git", "clone"], REPOSITORY)
        assert install[-1] == f"{folder}[experiments]"
        assert sys.path[-1] == folder
    else:
        assert clone == []
        assert install[-1] == f"eoi_jax[experiments] @ git+{REPOSITORY}"
