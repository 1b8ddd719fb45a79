"""Results as committed CSV files, so that measurements are kept without the runs' folders.

A cell is JSON, except that strings have no quotes unless they would read as something else; an
empty cell is a missing value. Floats have six significant digits. Reading and writing again changes
nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eoi_jax._internal.files import atomic_write_text
from experiments.config import digest, to_dict
from experiments.runs import Row

__all__ = ["decode", "encode", "match", "merge", "read", "save"]


def encode(value: Any) -> str:
    """Write a value as the text of a cell.

    Returns:
        Its text; :func:`decode` inverts it, but for digits of floats after the sixth.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        # Line ends and the like are escaped too: a cell stays on its line.
        return value if decode(value) == value and value.isprintable() else json.dumps(value)
    if isinstance(value, float):
        value = float(f"{value:.6g}")
    return json.dumps(value)


def decode(text: str) -> Any:
    """Read the text of a cell.

    Args:
        text: what :func:`encode` wrote.
    """
    if not text:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read(path: Path) -> list[Row]:
    """Read a CSV file; a missing one has no rows.

    Raises:
        ValueError: If the file is damaged: cut, even within its last cell, or not of equal lines.
    """
    if not path.exists():
        return []

    def damaged(where: str) -> ValueError:
        return ValueError(f"{path}{where}. Take the file from version control again.")

    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise damaged(f" is not text in UTF-8 ({error})") from None
    if not text.endswith("\n"):
        raise damaged(": its last line has no line end, so the file was cut")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        columns = next(reader)
        for cells in reader:
            if len(cells) != len(columns):
                raise damaged(
                    f", line {reader.line_num}, has {len(cells)} cells, not {len(columns)}"
                )
            rows.append(dict(zip(columns, map(decode, cells), strict=True)))
    except csv.Error as error:
        raise damaged(f", line {reader.line_num}, is no line of CSV ({error})") from None
    return rows


def save(path: Path, rows: Sequence[Row]) -> bool:
    """Write rows as a CSV file, sorted; leave the file alone if nothing changes.

    Args:
        path: the file, in a folder that exists.
        rows: as :func:`merge` returns them; the first has all columns.
    """
    columns = list(rows[0]) if rows else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in sorted(rows, key=lambda row: [_rank(row[column]) for column in columns]):
        writer.writerow([encode(row[column]) for column in columns])
    if path.exists() and path.read_text(encoding="utf-8") == text.getvalue():
        return False
    atomic_write_text(path, text.getvalue())
    return True


def _rank(value: Any) -> tuple[int, float, str]:
    text = encode(value)
    number = decode(text)
    if isinstance(number, int | float) and number == number:  # NaN has no order
        return 1, number, ""
    return (2, 0.0, text) if text else (0, 0.0, "")


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Replace runs by newer results of the same config.

    Args:
        old: rows with a ``digest``.
        new: as ``old``; all rows of a digest that occurs here are taken from here.

    Returns:
        Rows of all columns; those of ``old`` come first.
    """
    newer = {row["digest"] for row in new}
    columns = dict.fromkeys(key for row in (*old, *new) for key in row)
    kept = [*(row for row in old if row["digest"] not in newer), *new]
    return [{column: row.get(column) for column in columns} for row in kept]


def match(rows: Iterable[Row], grid: Sequence[Any]) -> dict[Any, list[Row]]:
    """Find the rows of each config.

    They are those of its digest. Where there are none, a run of the same fields counts, even if it
    had a part of the seeds, or was made before the config had a field which is at its default now.

    Args:
        rows: with a ``digest`` and the fields of their configs.
        grid: configs.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["digest"], []).append(row)
    taken = {digest(config) for config in grid}
    others = [run for name, run in sorted(runs.items()) if name not in taken]
    # Of a grid, nearly all configs are of one class: each run is encoded once for it.
    encoded = {
        kind: [(run, _encoded(run[0], kind)) for run in others] for kind in set(map(type, grid))
    }
    found = {}
    for config in grid:
        run = runs.get(digest(config))
        if run is None:
            wanted = _encoded(to_dict(config), type(config))
            seeds = set(getattr(config, "seeds", ()))
            alike = (
                other
                for other, cells in encoded[type(config)]
                if cells == wanted and set(other[0].get("seeds") or ()) <= seeds
            )
            run = max(alike, key=len, default=[])
        found[config] = run
    return found


def _encoded(row: Mapping[str, Any], kind: type[Any]) -> tuple[str, ...] | None:
    """Return the class and the fields but the seeds that a row has of a class of configs, as text.

    Those that are at their defaults may be left out of it. None for a row that lacks others.
    """
    found = [encode(row.get("kind"))]
    for field in dataclasses.fields(kind):
        if field.name == "seeds":
            continue
        cell = row.get(field.name)
        cell = field.default if cell is None else cell
        if cell is dataclasses.MISSING:
            return None
        found.append(encode(cell))
    return tuple(found)
