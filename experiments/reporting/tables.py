"""Tables of repeated runs: n, mean ± standard deviation, the best of each group in bold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from experiments.runs import Row

__all__ = ["Cell", "Table", "Value", "collect", "label", "ordered"]

Key = TypeVar("Key", bound=Hashable)


class Cell(NamedTuple):
    """Number, mean and standard deviation (n − 1; NaN for one) of what was measured."""

    n: int
    mean: float
    deviation: float


@dataclasses.dataclass(frozen=True)
class Value:
    """A value shown in the cells of a table.

    Attributes:
        key: field of the rows.
        name: in words, with the unit.
        scale: factor, such as 100 for percent.
        fmt: format of the mean and the standard deviation.
        best: which mean is in bold; default: none.
        exact: show the number alone, which must be the same in every row of a cell.
    """

    key: str
    name: str
    scale: float = 1.0
    fmt: str = ".2f"
    best: Literal["highest", "lowest"] | None = None
    exact: bool = False

    def text(self, cell: Cell | None) -> str:
        """Write a cell; an empty one where nothing was measured."""
        if cell is None:
            return ""
        if self.exact:
            return self.number(cell.mean)
        spread = f" ± {self.number(cell.deviation)}" if cell.n > 1 else ""
        return f"{self.number(cell.mean)}{spread} (n = {cell.n})"

    def number(self, number: float) -> str:
        """Write a mean or a deviation, scaled."""
        return format(self.scale * number, self.fmt)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows in lines and columns.

    Attributes:
        name: short, unique among all reports; names the table's place in a text.
        title: of a few words.
        caption: settings, seeds, data and whatever is smaller than in the original.
        rows: of any number; those without the value make their line and column, empty.
        values: what cells show.
        lines: fields of which each combination that occurs is a line.
        columns: field of which each value that occurs is a column; default: the values are the
            columns.
        group: fields, a part of ``lines``; lines that agree in them share one best mean. Default:
            the whole table.
        names: how fields and their values are called, where not by themselves.
        order: for a field, the values that come first; default: as they occur.
    """

    name: str
    title: str
    caption: str
    rows: Sequence[Row] = dataclasses.field(repr=False)
    values: tuple[Value, ...]
    lines: tuple[str, ...]
    columns: str | None = None
    group: tuple[str, ...] = ()
    names: Mapping[Any, str] = dataclasses.field(default_factory=dict)
    order: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not set(self.group) <= set(self.lines):
            raise ValueError(
                f"group={self.group!r} is outside lines={self.lines!r}. Take fields of lines."
            )

    def line_keys(self) -> list[tuple[Any, ...]]:
        """Return the values of ``lines``, of each line."""
        found = dict.fromkeys(self._line(row) for row in self.rows)

        def rank(line: tuple[Any, ...]) -> list[int]:
            firsts = [list(self.order.get(field, ())) for field in self.lines]
            return [
                first.index(value) if value in first else len(first)
                for first, value in zip(firsts, line, strict=True)
            ]

        return sorted(found, key=rank)

    def heads(self) -> list[tuple[Any, Value]]:
        """Return the value of ``columns`` and the :class:`Value` of each column."""
        if self.columns is None:
            return [(None, value) for value in self.values]
        field = self.columns
        found = ordered((row.get(field) for row in self.rows), self.order.get(field, ()))
        return [(column, value) for column in found for value in self.values]

    def cells(self) -> dict[tuple[tuple[Any, ...], Any, Value], Cell]:
        """Return what was measured, by line, column and value."""
        found = {}
        for value in self.values:
            measured = collect(
                self.rows, value.key, lambda row: (self._line(row), row.get(self.columns or ""))
            )
            for (line, column), cell in measured.items():
                if value.exact and cell.n > 1 and cell.deviation:
                    raise ValueError(
                        f"values: {value.key!r} is not the same in all rows of the cell {line}, "
                        f"{column!r} of {self.name!r}. Leave out exact=True."
                    )
                found[line, column, value] = cell
        return found

    def bold(self) -> set[tuple[tuple[Any, ...], Any, Value]]:
        """Return the cells with the best mean of their group, as printed, so ties are seen."""
        groups: dict[Hashable, list[tuple[tuple[tuple[Any, ...], Any, Value], float]]] = {}
        for key, cell in self.cells().items():
            line, _, value = key
            if value.best and not math.isnan(cell.mean):
                members = tuple(line[self.lines.index(field)] for field in self.group)
                shown = float(value.number(cell.mean).replace(",", "").rstrip("%"))
                groups.setdefault((members, value), []).append((key, shown))
        best = set()
        for group in groups.values():
            choose = max if group[0][0][2].best == "highest" else min
            top = choose(number for _, number in group)
            if len(group) > 1:  # alone in its group, it is the best of nothing
                best |= {key for key, number in group if number == top}
        return best

    def titles(self) -> list[str]:
        """Return the heads of all columns as they are written."""
        return [*(label(field, self.names) for field in self.lines), *map(self._head, self.heads())]

    def body(self) -> Iterator[tuple[tuple[Any, ...], list[tuple[str, Cell | None, bool]]]]:
        """Yield the values of each line, and its cells: text, what was measured, whether bold."""
        cells, bold = self.cells(), self.bold()
        for line in self.line_keys():
            keys = [(line, column, value) for column, value in self.heads()]
            yield line, [(key[2].text(cells.get(key)), cells.get(key), key in bold) for key in keys]

    def _head(self, head: tuple[Any, Value]) -> str:
        column, value = head
        if self.columns is None:
            return value.name
        text = label(column, self.names)
        return text if len(self.values) == 1 else f"{text}: {value.name}"

    def note(self) -> str:
        """Say what the cells show."""
        notes = []
        if self.columns is not None and len(self.values) == 1:
            field = label(self.columns, self.names)
            notes.append(f"Columns: {field}; cells: {self.values[0].name}.")
        if not all(value.exact for value in self.values):
            notes.append("Mean ± standard deviation (n − 1) of n runs.")
        best = sorted({value.best for value in self.values if value.best})
        if best:
            of = " and ".join(label(field, self.names) for field in self.group)
            where = f"of each {of}" if of else "of all"
            notes.append(f"Bold: the {' or '.join(best)} mean {where}.")
        return " ".join([*notes, "Empty: not run, or not finite."])

    def markdown(self) -> str:
        r"""Write the table in Markdown."""
        rows = [self.titles()]
        for line, cells in self.body():
            texts = [f"**{text}**" if bold else text for text, _, bold in cells]
            rows.append([*(label(value, self.names) for value in line), *texts])
        head, *body = [
            "| " + " | ".join(text.replace("|", r"\|") for text in row) + " |" for row in rows
        ]
        rule = "|" + "---|" * len(self.lines) + "--:|" * (len(rows[0]) - len(self.lines))
        return "\n".join(
            [f"**{self.title}**", "", head, rule, *body, "", f"{self.caption} {self.note()}"]
        )

    def _line(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(field) for field in self.lines)


def collect(rows: Iterable[Row], field: str, key: Callable[[Row], Key]) -> dict[Key, Cell]:
    """Take mean and standard deviation of a field over the rows of each key.

    Returns:
        A :class:`Cell` for each key, in the order they occur.
    """
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        if row.get(field) is not None:
            groups.setdefault(key(row), []).append(row)
    cells = {}
    for name, group in groups.items():
        seeds = [row["seed"] for row in group if row.get("seed") is not None]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"field={field!r} would be averaged over rows of one seed that differ in "
                f"{_differing(group)}, in cell {name!r}. Make one of these a line, a column or a "
                "curve, or leave rows out."
            )
        numbers = np.array([row[field] for row in group], np.float64)
        with np.errstate(invalid="ignore"):  # an infinite loss is told as it is
            mean, deviation = numbers.mean(), numbers.std(ddof=1) if len(group) > 1 else math.nan
        if len(group) > 1 and (numbers == numbers[0]).all():
            mean, deviation = numbers[0], 0.0  # 0.1 three times is 0.1, without rounding
        cells[name] = Cell(len(group), float(mean), float(deviation))
    return cells


def _differing(rows: Sequence[Row]) -> list[str]:
    fields = dict.fromkeys(field for row in rows for field in row)
    return [
        field
        for field in fields
        if len({str(row.get(field)) for row in rows}) > 1 and field not in ("seed", "seeds")
    ]


def ordered(values: Iterable[Key], first: Sequence[Key] = ()) -> list[Key]:
    """Return each value once: first those named, where they occur, then the others in order."""
    found = dict.fromkeys(values)
    return [*(value for value in first if value in found), *(v for v in found if v not in first)]


def label(value: Any, names: Mapping[Any, str]) -> str:
    """Return how a field or a value is called."""
    if isinstance(value, Hashable) and value in names:
        return names[value]
    if isinstance(value, str):
        return value.replace("_", " ")
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
