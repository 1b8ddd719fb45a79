"""Write the address of the repository into the notebooks: badges and install cells.

The address stands in one place, as ``Source`` among ``project_urls`` of setup.cfg. As long as there
is none, no page has a badge, and install cells name a placeholder.

Example:
    python notebooks/badges.py
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

__all__ = ["BADGE", "PLACEHOLDER", "address", "pages", "with_address"]

FOLDER = Path(__file__).resolve().parent
PLACEHOLDER = "https://github.com/OWNER/eoi_jax"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def address() -> str | None:
    """Return the address that setup.cfg names, or None."""
    config = configparser.ConfigParser()
    config.read(FOLDER.parent / "setup.cfg")
    lines = config["metadata"].get("project_urls", "").splitlines()
    urls = dict(re.split(r"\s*=\s*", line.strip(), maxsplit=1) for line in lines if line.strip())
    return urls.get("Source")


def pages() -> list[Path]:
    """Return what has badges or install cells: both halves of the notebooks, and their table."""
    notebooks = sorted(FOLDER.glob("*.ipynb"))
    return [FOLDER / "README.md", *notebooks, *(path.with_suffix(".py") for path in notebooks)]


def with_address(path: Path, text: str, address: str | None) -> str:
    """Return a page's text with the badges and install cells of an address.

    Args:
        path: The page, one of :func:`pages`.
        text: What it says now.
        address: That of the repository on GitHub, or None for no badges and a placeholder.
    """
    text = re.sub(
        r'^# \[!\[Open in Colab\].*\n#\n|^ *"\[!\[Open.*\n *"\\n",\n', "", text, flags=re.M
    )
    text = re.sub(r" \[!\[Open in Colab\][^|\n]*\)(?= \|)", "", text)
    text = re.sub(
        r'(REPOSITORY = \\?")https://github\.com/[\w-]+/[\w-]+',
        rf"\1{address or PLACEHOLDER}",
        text,
    )
    if address is None:
        return text
    place = address.removeprefix("https://github.com/")

    def badge(name: str) -> str:
        page = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}.ipynb"
        return f"[![Open in Colab]({BADGE})]({page})"

    if path.suffix == ".md":
        return re.sub(r"\[(\w+)\]\(\w+\.ipynb\)(?= \|)", lambda m: f"{m[0]} {badge(m[1])}", text)
    if path.suffix == ".py":
        return re.sub(
            r"^# # .*\n#\n", lambda m: f"{m[0]}# {badge(path.stem)}\n#\n", text, flags=re.M
        )
    before = r'^    "# .*\n    "\\n",\n'
    line = f'    "{badge(path.stem)}\\n",\n    "\\n",\n'
    return re.sub(before, lambda m: m[0] + line, text, count=1, flags=re.M)


if __name__ == "__main__":
    for page in pages():
        page.write_text(with_address(page, page.read_text(), address()))
