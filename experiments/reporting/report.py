"""Turn results into committed CSV files, and these into the tables and figures of the site.

The results of complete runs are merged into RESULTS/<config>.csv. Everything else is made from the
CSV files, so a machine without runs makes the same tables and figures. Tables are written between
``<!-- table:NAME -->`` and ``<!-- /table:NAME -->`` in the pages; text around them is written by
hand and does not change. For a config module without a page, ``PAGES/<config>.md`` is written.

Example:
    python -m experiments report table2
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from eoi_jax._internal.files import atomic_write, atomic_write_text
from experiments import models, runs
from experiments.config import digest, to_dict
from experiments.reporting import records
from experiments.reporting.figures import Curves, Figure
from experiments.reporting.tables import Table, Value
from experiments.runs import sweep

__all__ = [
    "Curves",
    "Figure",
    "Report",
    "Table",
    "Value",
    "build",
    "fill",
    "main",
    "new_page",
    "places",
]

STORED: tuple[sweep.Scale, ...] = ("paper", "small")  # scales whose results are committed
PLACE = re.compile(r"^(<!-- table:([\w.-]+) -->\n)(.*?)^(<!-- /table:\2 -->)$", re.DOTALL | re.M)


@dataclasses.dataclass(frozen=True)
class Report:
    """Arguments of the command."""

    config: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CONFIG")] = ()
    """Modules of experiments.configs; default: all."""
    runs: str = "runs"
    """Folder that holds the folders of all runs; it may be missing."""
    results: str = "experiments/results"
    """Folder of the CSV files."""
    images: str = "experiments/images"
    """Folder of the figures."""
    pages: str | None = "docs/results"
    """Folder of the pages, Markdown with places for tables."""
    prune: bool = False
    """Remove results that no longer belong to a config from the CSV files."""
    scale: sweep.Scale = "small"
    """Which configs; quick ones are reported into RUNS/quick, and the pages do not change."""


def build(name: str, results: str | Path, *, scale: sweep.Scale = "small") -> list[Table | Figure]:
    """Make the tables and figures of a config module from its CSV files.

    Its function ``report(rows)`` gets the rows of all configs of one scale, in their order.
    A config that did not run has one row, of its fields alone: it leaves a cell empty. If the
    function has a second argument, it gets the logged curves, with the fields of their configs; if
    the module says ``TIMED = True``, each with the ``seconds`` that its steps took until then.

    Args:
        name: of the module.
        results: folder of the CSV files.
        scale: which configs, as :func:`experiments.runs.sweep.grid_of` returns them.
    """
    module = sweep.find(name)
    grid = sweep.grid_of(module, scale)
    found = records.match(records.read(Path(results) / f"{name}.csv"), grid)
    rows, curves = [], []
    logged: dict[str, list[runs.Row]] = {}
    for row in records.read(_curves(Path(results), name)):
        logged.setdefault(row["digest"], []).append(row)
    for config, run in found.items():
        fields = to_dict(config)
        # The fields of this config: those of a run that stands in for it may lack newer ones.
        rows += [{**row, **fields} for row in run or [{"digest": digest(config)}]]
        for run_digest in dict.fromkeys(row["digest"] for row in run):
            curves += [{**row, **fields} for row in logged.get(run_digest, [])]
    items: list[Table | Figure] = (
        module.report(rows, curves) if _logs(module) else module.report(rows)
    )
    # Where nothing was logged there is nothing to draw.
    return [item for item in items if isinstance(item, Table) or item.panels]


def _logs(module: object) -> bool:
    return len(inspect.signature(module.report).parameters) > 1  # type: ignore[attr-defined]


def _curves(results: Path, name: str) -> Path:
    return results / f"{name}.curves.csv"  # no module has a dot in its name


def places(text: str) -> list[str]:
    r"""Return the names of the tables that a text has places for."""
    names = [match[2] for match in PLACE.finditer(text)]
    marks = re.findall(r"<!-- /?table:(.*?) -->", text)
    alone = sorted({mark for mark in marks if marks.count(mark) != 2 * names.count(mark)})
    if alone:
        raise ValueError(
            f"text has unpaired marks of the tables {alone}. Open each by a line "
            "'<!-- table:NAME -->' and close it by a line '<!-- /table:NAME -->'."
        )
    return names


def fill(text: str, tables: Mapping[str, Table]) -> str:
    """Write tables into their places in a text."""
    places(text)

    def replaced(match: re.Match[str]) -> str:
        name = match[2]
        return (
            match[1] + (tables[name].markdown() + "\n" if name in tables else match[3]) + match[4]
        )

    return PLACE.sub(replaced, text)


def new_page(about: str, items: Sequence[Table | Figure], images: str) -> str:
    """Write the page of a config module that has none yet.

    Args:
        about: the docstring of the module: a title, and what ran.
        items: its tables, for each of which the page has a place, and its figures.
        images: folder of the figures, from the page.
    """
    title, *paragraphs = about.strip().split("\n\n")
    parts = [f"# {' '.join(title.split()).removesuffix('.')}"]
    parts += [
        f"```text\n{text}\n```" if text.startswith("Command:") else text for text in paragraphs
    ]
    for item in items:
        if isinstance(item, Figure):
            parts.append(f"![{item.title}]({images}/{item.name}.png)")
        else:
            parts.append(f"<!-- table:{item.name} -->\n<!-- /table:{item.name} -->")
    return "\n\n".join(parts) + "\n"


def unique(items: Iterable[Table | Figure]) -> dict[str, Table | Figure]:
    """Return tables and figures by name; raise a ``ValueError`` if two have the same one."""
    found: dict[str, Table | Figure] = {}
    for item in items:
        if item.name in found:
            raise ValueError(f"name={item.name!r} is that of two tables or figures. Rename one.")
        found[item.name] = item
    return found


def _merge(options: Report, names: Sequence[str], console: Console) -> None:
    """Bring the CSV files up to date with the folder of runs."""
    results, all_rows = Path(options.results), runs.load_rows(options.runs)
    all_curves: list[runs.Row] | None = None
    for name in names:
        module = sweep.find(name)
        scales: tuple[sweep.Scale, ...] = ("quick",) if options.scale == "quick" else STORED
        grid = [config for scale in scales for config in sweep.grid_of(module, scale)]
        digests = {digest(config) for config in grid}
        path = results / f"{name}.csv"
        rows = records.merge(
            records.read(path), [row for row in all_rows if row["digest"] in digests]
        )
        used = {row["digest"] for run in records.match(rows, grid).values() for row in run}
        unused = {row["digest"] for row in rows} - used
        if unused and options.prune:
            rows = [row for row in rows if row["digest"] in used]
        elif unused:
            console.print(f"{path}: {len(unused)} runs belong to no config; --prune drops them")
        if rows or path.exists():
            results.mkdir(parents=True, exist_ok=True)
            _tell(console, path, records.save(path, rows))
        if not rows or not _logs(module):
            continue
        if all_curves is None:
            all_curves = runs.load_curves(options.runs)
        path = _curves(results, name)
        new = [row for row in all_curves if row["digest"] in digests]
        if not getattr(module, "TIMED", False):  # times are of one machine on one day
            new = [{key: row[key] for key in row if key != "seconds"} for row in new]
        logged = records.merge(records.read(path), new)
        kept = {row["digest"] for row in rows}
        _tell(console, path, records.save(path, [row for row in logged if row["digest"] in kept]))


def _tell(console: Console, path: Path, changed: bool) -> None:
    console.print(f"{path}: {'written' if changed else 'unchanged'}")


def _write(options: Report, names: Sequence[str], console: Console) -> None:
    """Write figures and pages from the CSV files."""
    results, images = Path(options.results), Path(options.images)
    reports = {}
    for name in names:
        if (results / f"{name}.csv").exists():
            reports[name] = build(name, results, scale=options.scale)
        else:
            console.print(f"{name}: nothing ran")
    found = unique(item for items in reports.values() for item in items)
    for item in found.values():
        if isinstance(item, Figure):
            images.mkdir(parents=True, exist_ok=True)
            path, png = images / f"{item.name}.png", item.png()
            changed = not path.exists() or path.read_bytes() != png
            if changed:
                atomic_write(path, operator.methodcaller("write", png))
            _tell(console, path, changed)
    if options.pages is not None:
        _write_pages(Path(options.pages), images, reports, console)


def _write_pages(
    folder: Path, images: Path, reports: Mapping[str, Sequence[Table | Figure]], console: Console
) -> None:
    """Write a page for each module that has none, and the tables of all pages."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
    if not texts:
        raise FileNotFoundError(f"pages={str(folder)!r} has no pages. Run from the checkout.")
    old = dict(texts)
    from_page = os.path.relpath(images, folder)
    for name, items in reports.items():
        path = folder / f"{name}.md"
        if items and path not in texts:
            about = inspect.getdoc(sweep.find(name)) or name
            texts[path] = new_page(about, items, Path(from_page).as_posix())
    tables = {i.name: i for items in reports.values() for i in items if isinstance(i, Table)}
    for path, text in texts.items():
        new = fill(text, tables)
        if new != old.get(path):
            atomic_write_text(path, new)
            _tell(console, path, True)
    shown = {name for text in texts.values() for name in places(text)}
    for module, items in reports.items():
        for item in items:
            if isinstance(item, Table) and item.name not in shown:
                console.print(
                    f"{folder / module}.md: no place for the table {item.name}: "
                    f"add <!-- table:{item.name} -->"
                )


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    prog = "python -m experiments report"
    options = tyro.cli(Report, args=arguments, description=__doc__, prog=prog)
    if options.scale == "quick":
        root = Path(options.runs) / "quick"
        options = dataclasses.replace(
            options, results=str(root / "results"), images=str(root / "images"), pages=None
        )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        known = sweep.names()
        chosen = [models.choose(n.replace("-", "_"), known, "config") for n in options.config]
        names = list(dict.fromkeys(chosen)) or list(known)
        _merge(options, names, console)
        _write(options, names, console)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
