"""Build sdist and wheel, install the wheel in a clean environment and run the README there.

``make release-check`` runs it; what it built stands in ``dist/``. It downloads the requirements.

Example:
    python .ci/release_check.py --tag v0.1.0
"""

from __future__ import annotations

import argparse
import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(*command: object, folder: Path = ROOT) -> None:
    """Run a command; stop here if it fails."""
    subprocess.run([str(part) for part in command], cwd=folder, check=True)


def require(condition: bool, problem: str) -> None:
    """Stop with a sentence unless something holds."""
    if not condition:
        raise SystemExit(f"release-check: {problem}")


def build(dist: Path) -> tuple[Path, Path]:
    """Build from what git tracks, so that no file of the checkout gets in."""
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory() as clean:
        tracked = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        for name in filter(None, tracked.stdout.split("\0")):
            (Path(clean) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(clean) / name)
        run(sys.executable, "-m", "build", "--outdir", dist, clean)
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


def check_files(sdist: Path, wheel: Path) -> str:
    """Check contents, licence and metadata; return the version."""
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "README.md", "setup.cfg", "pyproject.toml", "eoi_jax/__init__.py"):
        require(name in inside, f"{name} is missing in {sdist.name}.")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [place] = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(place).decode())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    require(tops == {"eoi_jax"}, f"the wheel holds {sorted(tops)}, not eoi_jax alone.")
    require(any(name.endswith("/LICENSE") for name in names), "the wheel has no LICENSE.")
    licence = metadata["License-Expression"] or metadata["License"]
    require(licence == "Apache-2.0", f"the licence of the metadata is {licence!r}.")
    payload = metadata.get_payload()
    text = (ROOT / "README.md").read_text().strip()
    require(str(payload).strip() == text, "the long description is not README.md.")
    return str(metadata["Version"])


def check_version(version: str, tag: str | None) -> None:
    """Require one version everywhere, and for a tag a dated section of the changelog."""
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    require(cited is not None and cited[1] == version, f"CITATION.cff is not of {version}.")
    heading = re.search(rf"^## {re.escape(version)} – (\S+)$", _changelog(), re.MULTILINE)
    require(heading is not None, f"CHANGELOG.md has no section {version}.")
    if tag is not None:
        require(tag == f"v{version}", f"the tag is {tag}, the version {version}.")
        require(heading is not None and heading[1] != "unreleased", "CHANGELOG.md has no date.")
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        require("project_urls" in config["metadata"], "setup.cfg names no project_urls.")


def _changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text()


def check_installed(wheel: Path) -> None:
    """Run the README's first block without extras, and all of them with Flax."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv.create(place / "environment", with_pip=True)
        python = place / "environment" / "bin" / "python"
        for extra, blocks in (([], BLOCKS[:1]), (["flax"], BLOCKS)):
            run(python, "-m", "pip", "install", "--quiet", wheel, *extra, folder=place)
            for number, block in enumerate(blocks):
                print(f"block {number} of the README, with {extra or 'no extras'}", flush=True)
                run(python, "-I", "-c", block, folder=place)


def main() -> None:
    """Check everything, the cheapest first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="the tag that is to be released, such as v0.1.0")
    tag = parser.parse_args().tag
    sdist, wheel = build(ROOT / "dist")
    version = check_files(sdist, wheel)
    check_version(version, tag)
    check_installed(wheel)
    print(f"{sdist.name} and {wheel.name} are fit to be released.")


if __name__ == "__main__":
    main()
