"""All tables and figures as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Sequence
from html import escape

from experiments.reporting.figures import Figure
from experiments.reporting.tables import Table, label

__all__ = ["Section", "page"]

STYLE = """
:root { color-scheme: light dark; --line: #8886; --mark: #0072b222; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
nav ul { columns: 16rem; padding-left: 1.2rem; }
pre { overflow-x: auto; white-space: pre-wrap; background: var(--mark); padding: .6rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: bold; padding-bottom: .3rem; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .7rem; white-space: nowrap; }
tbody th { text-align: left; font-weight: normal; }
td { text-align: right; }
tbody tr:hover { background: var(--mark); }
th button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0;
  cursor: pointer; padding: .2rem 0; text-align: left; }
th button::after { content: " ↕"; opacity: .5; }
th[aria-sort=ascending] button::after { content: " ↑"; opacity: 1; }
th[aria-sort=descending] button::after { content: " ↓"; opacity: 1; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: white; }
.note, figcaption { max-width: 50rem; }
"""

# Buttons are reached and pressed by keyboard without further ado. Empty cells stay last.
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const value = row => row.cells[column].dataset.value;
    const compare = (one, other) => {
      const a = value(one), b = value(other);
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      return down ? -order : order;
    };
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort(compare));
  }));
}
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """What one config module reports.

    Attributes:
        name: of the module.
        about: its docstring.
        items: its tables and figures.
    """

    name: str
    about: str
    items: Sequence[Table | Figure]


def page(title: str, sections: Sequence[Section]) -> str:
    """Write the page.

    Returns:
        HTML with its images, style and script inside: tables sort by a click on a column's head.
    """
    links = "\n".join(
        f'<li><a href="#{escape(item.name)}">{escape(item.title)}</a></li>'
        for section in sections
        for item in section.items
    )
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<nav><ul>
{links}
</ul></nav>
<main>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _section(section: Section) -> str:
    head, _, about = section.about.strip().partition("\n")
    more = f"<pre>{escape(about.strip())}</pre>" if about.strip() else ""
    items = "\n".join(
        _table(item) if isinstance(item, Table) else _figure(item) for item in section.items
    )
    return f"<section>\n<h2>{escape(head)}</h2>\n{more}\n{items}\n</section>"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png()).decode()
    return (
        f'<figure id="{escape(figure.name)}">\n'
        f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"
    )


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(text)}</button></th>'
        for text in table.titles()
    )
    lines = []
    for line, cells in table.body():
        parts = [
            f'<th scope="row" data-value="{escape(_sortable(value))}">'
            f"{escape(label(value, table.names))}</th>"
            for value in line
        ]
        for text, cell, bold in cells:
            shown = f"<strong>{escape(text)}</strong>" if bold else escape(text)
            parts.append(f'<td data-value="{_sortable(cell.mean if cell else None)}">{shown}</td>')
        lines.append(f"<tr>{''.join(parts)}</tr>")
    rows = "\n".join(lines)
    return (
        f'<div class="wide" id="{escape(table.name)}">\n<table>\n'
        f"<caption>{escape(table.title)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n"
        f'<p class="note">{escape(table.caption)} {escape(table.note())}</p>'
    )


def _sortable(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"  # as JavaScript spells it
    return repr(value) if isinstance(value, float) else str(value)
