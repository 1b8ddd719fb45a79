"""The Python blocks of pages run, each in a namespace of its own; what pages link to exists."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md", *DOCS]
PAGES.append("notebooks/README.md")
BLOCKS = {
    f"{page}, block {number}": block
    for page in ("README.md", *DOCS)
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    )
    if "import sbx" not in block  # tests/test_rl.py runs it, where SBX is
}


def test_the_front_page_has_blocks_and_is_short():
    assert sum(name.startswith("README.md") for name in BLOCKS) >= 2
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_block_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[name], name, "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_run_exist(page):
    for name in re.findall(r"python3? -m (experiments[\w.]*)", (ROOT / page).read_text()):
        assert importlib.util.find_spec(name), name
