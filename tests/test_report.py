import dataclasses
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import refuses
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

import experiments
from eoi_jax._internal.files import atomic_write_text
from experiments import config, runs
from experiments.reporting import records, report
from experiments.reporting.report import Curves, Figure, Table, Value
from experiments.reporting.tables import Cell, collect
from experiments.runs import sweep

RESULTS = Path(experiments.__file__).with_name("results")
PAGES = Path(experiments.__file__).resolve().parent.parent / "docs" / "results"


@dataclasses.dataclass(frozen=True)
class Made:
    """A config of a made table."""

    experiment: str = "made"
    method: str = "eoi"
    density: float = 0.1
    seeds: tuple[int, ...] = (1, 2, 3)


GRID = [Made(method=method, density=d) for d in (0.1, 0.05) for method in ("base", "ai", "eoi")]
SOURCE = '''
"""Made table: accuracy of methods.

Command: python -m experiments sweep made
"""
from experiments.reporting.report import Curves, Figure, Table, Value
from test_report import GRID

def sweep():
    return GRID

def quick():
    return GRID[:1]

def report(rows, curves):
    accuracy = Value("test_accuracy", "test accuracy (%)", 100, best="highest")
    names = {"base": "Base", "ai": "AI", "eoi": "EOI"}
    train = [row for row in curves if row["split"] == "train" and row["density"] == 0.1]
    panels = (
        Curves(rows, "density", "test_accuracy", "method", "density", "accuracy", names=names),
        Curves(train, "step", "loss", "method", "step", "loss", spread="band", names=names),
    )
    return [
        Table("made", "Accuracy <of> methods", "One epoch | made data.", rows, (accuracy,),
              ("density",), "method", ("density",), names),
        Figure("made_curves", "Accuracy & loss", "One epoch.", panels),
    ]
'''


def leave(made, root, shift=0.0):
    """Leave a complete run as a runner would."""
    folder = runs.folder_of(made, root)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "config.json", json.dumps(config.to_dict(made)))
    level = {"base": 0.5, "ai": 0.7, "eoi": 0.9}[made.method] + shift
    rows = [{"seed": s, "test_accuracy": level + s / 100, "density": 0.1001} for s in made.seeds]
    atomic_write_text(folder / "results.json", json.dumps(rows))
    lines = [
        {"step": step, "seed": seed, "split": split, "loss": 2.3 * math.exp(-level * step / 50)}
        for step in range(0, 50, 10)
        for seed in made.seeds
        for split in ("train", "validation")
    ]
    atomic_write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    atomic_write_text(folder / "done", "")
    return folder


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A folder with a package of one config module and a page; figures are not drawn."""
    monkeypatch.setattr(Figure, "png", lambda figure, dpi=120: figure.name.encode())
    package = tmp_path / "made_report_configs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "made.py").write_text(SOURCE)
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "made.md").write_text(
        "# Made\n\n<!-- table:made -->\n<!-- /table:made -->\n\nText after.\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_report", sys.modules[__name__])
    monkeypatch.setattr(sweep, "PACKAGE", "made_report_configs")
    monkeypatch.setattr(sys, "argv", ["test"])
    yield tmp_path
    for name in ("made_report_configs", "made_report_configs.made"):
        sys.modules.pop(name, None)


def command(place, *arguments):
    folders = {name: str(place / name) for name in ("runs", "results", "images", "pages")}
    options = [part for name, folder in folders.items() for part in (f"--{name}", folder)]
    report.main([*options, *arguments])


def contents(place):
    """All files but those of runs."""
    files = [p for p in place.rglob("*") if p.is_file() and "runs" not in p.parts]
    return {str(p.relative_to(place)): p.read_bytes() for p in files if "made_report" not in str(p)}


# ------------------------------------------------------------------------- CSV files

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(["80", "1e3", "true", "null", "NaN", "a\rb\n", "[1]", '"a"', "", " ", "a,b"])
)


@given(st.lists(st.tuples(scalars, scalars | st.lists(st.integers(), max_size=3)), max_size=5))
def test_csv_keeps_values(tmp_path_factory, values):
    """Up to six digits of floats; a second writing changes nothing."""
    path = tmp_path_factory.mktemp("csv") / "made.csv"
    rows = [{"digest": f"{i}e5", "a": a, "b, c": b} for i, (a, b) in enumerate(values)]
    records.save(path, rows)
    back = records.read(path)
    assert len(back) == len(rows)
    for row in back:
        for key, value in rows[int(row["digest"][:-2])].items():
            if isinstance(value, float):
                assert row[key] == float(f"{value:.6g}")
            else:
                assert (type(row[key]), row[key]) == (type(value), value)
    assert not records.save(path, list(reversed(back))) or not rows


def test_nan_and_infinity_are_kept(tmp_path):
    values = [float("nan"), float("inf"), -float("inf")]
    rows = [{"digest": str(i), "loss": value} for i, value in enumerate(values)]
    records.save(tmp_path / "made.csv", rows)
    assert records.save(tmp_path / "made.csv", records.read(tmp_path / "made.csv")) is False
    back = sorted(records.read(tmp_path / "made.csv"), key=lambda row: row["digest"])
    np.testing.assert_array_equal([row["loss"] for row in back], values)


def test_rows_are_sorted_by_number(tmp_path):
    rows = [{"density": d, "digest": "a"} for d in (0.1, 1, 0.05, 10, None, "dense")]
    records.save(tmp_path / "made.csv", rows)
    found = [row["density"] for row in records.read(tmp_path / "made.csv")]
    assert found == [None, 0.05, 0.1, 1, 10, "dense"]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "made.csv").write_text("digest,loss\na,1.0\nb\n")
    with refuses("made.csv, line 3", 1, 2):
        records.read(tmp_path / "made.csv")


@pytest.mark.parametrize(
    "rows",
    [
        [{"digest": "a", "accuracy": 0.9446}],
        [{"digest": "a", "seeds": [1, 23]}, {"digest": "b", "seeds": [4, 56]}],
        [{"digest": "a", "text": 'b, "c"'}],
        [],
    ],
)
def test_a_file_that_was_cut_within_a_line_is_refused(rows, tmp_path):
    """At any byte: 0.94 of 0.9446 is a number too."""
    path = tmp_path / "made.csv"
    records.save(path, rows)
    whole = path.read_bytes()
    assert records.read(path) == rows
    # Where whole lines are missing nothing tells.
    for length in [n for n in range(len(whole)) if not whole[:n].endswith(b"\n")]:
        path.write_bytes(whole[:length])
        with refuses(str(path), "was cut", "version control"):
            records.read(path)


@pytest.mark.parametrize("text", [b'a,b\n1,"2\n', b"a,b\n1,\xff2\n", b'a,b\n1,"2"3\n'])
def test_bytes_that_are_no_csv_are_refused(text, tmp_path):
    (tmp_path / "made.csv").write_bytes(text)
    with refuses(str(tmp_path / "made.csv"), "version control"):
        records.read(tmp_path / "made.csv")


def test_configs_find_their_rows():
    def rows(made, digest=None):
        fields = {**config.to_dict(made), "digest": digest or config.digest(made)}
        return [{**fields, "seed": seed} for seed in made.seeds]

    one, other, absent = Made(), Made(density=0.05), Made(density=0.2)
    older = rows(Made(seeds=(1,)), "older") + rows(Made(density=0.05, seeds=(1, 2)), "older2")
    foreign = rows(Made(density=0.05, seeds=(4,)), "foreign") + rows(Made(method="ai"))
    for row in older:
        del row["experiment"]  # as if the field were new
    found = records.match(rows(one) + older + foreign, [absent, other, one])
    assert list(found) == [absent, other, one]
    assert {config: [row["digest"] for row in rows] for config, rows in found.items()} == {
        absent: [],
        other: ["older2", "older2"],
        one: [config.digest(one)] * 3,
    }
    renamed = dataclasses.replace(other, experiment="another")  # a new field, not at its default
    assert records.match(older, [renamed])[renamed] == []
    part = Made(seeds=(1,))  # its run is its own, and stands in for no other of the grid
    assert records.match(rows(part), [one, part]) == {one: [], part: rows(part)}


# ---------------------------------------------------------------------------- tables

ACCURACY = Value("acc", "accuracy (%)", 100, best="highest")


def table(rows, values=(ACCURACY,), lines=("criterion",), columns="method", **options):
    return Table("made", "Title", "Caption.", rows, values, lines, columns, **options)


def body(made):
    """The cells of the Markdown table: {line: {head: text}}."""
    lines = [line for line in made.markdown().splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads, rule, *rows = split
    assert set("".join(rule)) == set("-:")
    assert all(len(row) == len(heads) for row in split)
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}


def cell(criterion, method, *accuracies):
    kind = {"criterion": criterion, "method": method}
    return [{**kind, "seed": i, "acc": value} for i, value in enumerate(accuracies, 1)] or [kind]


def test_cells_are_means_and_deviations():
    found = body(table(cell("snip", "eoi", 0.9, 0.92, 0.97) + cell("snip", "base", 0.5)))
    # By hand: mean 0.93; squares 0.0009 + 0.0001 + 0.0016 over 2.
    assert found["snip"]["eoi"] == f"**93.00 ± {100 * math.sqrt(0.0013):.2f} (n = 3)**"
    assert found["snip"]["base"] == "50.00 (n = 1)"


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6))
def test_collected_statistics(values):
    rows = [{"seed": i, "x": value} for i, value in enumerate(values)]
    found = collect(rows, "x", lambda row: None)[None]
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    assert found.n == len(values)
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.deviation == pytest.approx(math.sqrt(variance), abs=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.002, 1 / 3])
def test_equal_numbers_are_exact(value):
    """The mean of 0.1 three times is not 0.1 in binary."""
    found = collect([{"seed": seed, "x": value} for seed in (1, 2, 3)], "x", lambda row: None)
    assert found[None] == Cell(3, value, 0.0)


def test_the_best_of_each_group_is_bold():
    rows = cell("snip", "eoi", 0.9) + cell("snip", "base", 0.5) + cell("grasp", "eoi", 0.6)
    rows += cell("grasp", "base", 0.7)
    all_bold = {key: "**" in text for key, text in _flat(body(table(rows))).items()}
    assert all_bold == {
        ("snip", "eoi"): True,
        ("snip", "base"): False,
        ("grasp", "eoi"): False,
        ("grasp", "base"): False,
    }
    grouped = _flat(body(table(rows, group=("criterion",))))
    assert [key for key, text in grouped.items() if "**" in text] == [
        ("snip", "eoi"),
        ("grasp", "base"),
    ]
    lowest = _flat(body(table(rows, (dataclasses.replace(ACCURACY, best="lowest"),))))
    assert [key for key, text in lowest.items() if "**" in text] == [("snip", "base")]
    none = body(table(rows, (dataclasses.replace(ACCURACY, best=None),)))
    assert "**" not in str(none)


def _flat(found):
    return {(line, head): text for line, cells in found.items() for head, text in cells.items()}


def test_ties_as_printed_are_all_bold():
    rows = cell("snip", "eoi", 0.90001) + cell("snip", "base", 0.9) + cell("snip", "ai", 0.8)
    found = body(table(rows))["snip"]
    assert [head for head, text in found.items() if "**" in text] == ["eoi", "base"]


def test_nothing_is_the_best_alone_or_without_a_number():
    rows = cell("snip", "eoi", 0.9) + cell("snip", "base") + cell("grasp", "eoi", math.nan)
    assert "**" not in str(body(table(rows)))
    found = body(table(rows + cell("grasp", "base", 0.1), group=("criterion",)))
    assert found["grasp"] == {"eoi": "nan (n = 1)", "base": "10.00 (n = 1)"}


def test_what_did_not_run_is_empty():
    rows = cell("snip", "eoi", 0.9) + cell("grasp", "base") + cell("snip", "sao")
    found = body(table(rows))
    assert found == {
        "snip": {"eoi": "90.00 (n = 1)", "base": "", "sao": ""},
        "grasp": {"eoi": "", "base": "", "sao": ""},
    }


def test_names_and_orders():
    rows = cell("grasp", "eoi", 0.9) + cell("snip", "dense", 0.8) + cell("new_one", "ai", 0.7)
    made = table(
        rows,
        names={"eoi": "EOI", "snip": "SNIP", "criterion": "rule", "method": "start"},
        order={"method": ("dense", "base"), "criterion": ("snip",)},
    )
    found = body(made)
    assert list(found) == ["SNIP", "grasp", "new one"]
    assert list(found["SNIP"]) == ["dense", "EOI", "ai"]
    assert "| rule |" in made.markdown()
    assert "Columns: start; cells: accuracy (%)." in made.note()


def test_values_may_be_columns():
    rows = [{"model": "mlp7", "size": 129_400, "kept": 12_940.0, "seed": i} for i in (1, 2)]
    values = (Value("size", "weights", fmt=",.0f", exact=True), Value("kept", "kept", fmt=",.0f"))
    found = body(table(rows, values, ("model",), None))
    assert found == {"mlp7": {"weights": "129,400", "kept": "12,940 ± 0 (n = 2)"}}
    rows[0]["size"] = 1
    with refuses("size", "mlp7"):
        table(rows, values, ("model",), None).markdown()
    both = body(table(cell("snip", "eoi", 0.9), (ACCURACY, Value("seed", "seed", fmt=".0f"))))
    assert both == {"snip": {"eoi: accuracy (%)": "90.00 (n = 1)", "eoi: seed": "1 (n = 1)"}}


def test_different_runs_are_not_mixed_silently():
    rows = [
        {"criterion": "snip", "method": "eoi", "seed": 1, "acc": 0.5, "density": d} for d in (1, 2)
    ]
    with refuses("field='acc'", "['density']"):
        table(rows).markdown()


def test_groups_are_lines():
    with refuses("group=('density',)", ("criterion",)):
        table([], group=("density",))


def test_bars_are_escaped():
    assert r"| a\|b |" in table(cell("a|b", "eoi", 1.0)).markdown()


# --------------------------------------------------------------------------- figures


def test_curves_draw_means_and_deviations():
    from matplotlib.figure import Figure as Canvas

    rows = [
        {"x": x, "y": x + seed, "seed": seed, "method": method}
        for method in ("eoi", "base")
        for x in (3, 1, 2)
        for seed in (1, 3)
    ]
    rows += [{"method": "ai"}]
    axes = Canvas().subplots()
    Curves(rows, "x", "y", "method", "x (units)", "y", scale=10, names={"eoi": "EOI"})(axes)
    bars, labels = axes.get_legend_handles_labels()
    assert labels == ["EOI", "base"]
    line = bars[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), [30, 40, 50])
    segments = bars[0].lines[2][0].get_segments()
    np.testing.assert_allclose(segments[0][:, 1], [30 - 10 * 2**0.5, 30 + 10 * 2**0.5])
    assert axes.get_xlabel() == "x (units)"
    styles = {(b.lines[0].get_color(), b.lines[0].get_marker()) for b in bars}
    assert len(styles) == 2


def test_panels_agree_on_colors():
    from matplotlib.figure import Figure as Canvas

    colors = []
    for methods in (("eoi", "base"), ("base",)):
        axes = Canvas().subplots()
        rows = [{"x": 1, "y": 2, "method": method} for method in methods]
        curves = Curves(rows, "x", "y", "method", "x", "y", spread="none", order=("eoi", "base"))
        curves(axes)
        colors.append({line.get_label(): line.get_color() for line in axes.lines})
    assert colors[0]["base"] == colors[1]["base"] != colors[0]["eoi"]


def test_a_figure_is_the_same_twice():
    def draw(axes):
        axes.imshow(np.eye(3))

    figure = Figure("made", "Title", "Caption.", (draw, draw, draw), across=2, size=(1, 1))
    assert figure.png(20) == figure.png(20)


@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_a_legend_stays_inside_its_figure(number):
    def draw(axes):
        for i in range(number):
            axes.plot([0, 1], label=f"a name of some length {i}")

    picture = imread(io.BytesIO(Figure("made", "Title", "Caption.", (draw,)).png()))
    assert np.all(picture[:, [0, -1]] == 1)  # white to both sides
    assert np.any(picture[-40:] != 1)


# ---------------------------------------------------------------------- the command


def test_results_survive_without_runs(place, capsys):
    for made in GRID[:4]:
        leave(made, place / "runs")
    command(place)
    assert "results/made.csv: written" in capsys.readouterr().out
    first = contents(place)
    assert set(first) == {
        "pages/made.md",
        "results/made.csv",
        "results/made.curves.csv",
        "images/made_curves.png",
    }
    logged = records.read(place / "results" / "made.curves.csv")
    assert [len(logged), logged[0]["loss"]] == [4 * 3 * 5 * 2, 2.3]
    page = first["pages/made.md"].decode()
    assert (
        "| 0.1 | 52.00 ± 1.00 (n = 3) | 72.00 ± 1.00 (n = 3) | **92.00 ± 1.00 (n = 3)** |" in page
    )
    assert "| 0.05 | 52.00 ± 1.00 (n = 3) |  |  |" in page
    assert page.startswith("# Made\n\n<!-- table:made -->\n**Accuracy")
    assert page.endswith("\n<!-- /table:made -->\n\nText after.\n")
    command(place)
    assert contents(place) == first
    shutil.rmtree(place / "runs")
    command(place)
    assert contents(place) == first
    assert "written" not in capsys.readouterr().out
    leave(GRID[5], place / "other")  # another machine
    command(place, "--runs", str(place / "other"))
    assert "| 0.05 | 52.00 ± 1.00 (n = 3) |  | **92.00 ± 1.00 (n = 3)** |" in (
        (place / "pages" / "made.md").read_text()
    )


def test_times_are_for_modules_that_ask(place, monkeypatch):
    times = {"step": 10, "seconds": 1.23456789, "seeds": [1, 2]}
    atomic_write_text(leave(GRID[0], place / "runs") / "times.jsonl", json.dumps(times) + "\n")
    path = place / "results" / "made.curves.csv"
    command(place)
    assert "seconds" not in records.read(path)[0]
    monkeypatch.setattr(sweep.find("made"), "TIMED", True, raising=False)
    command(place)
    found = {(row["seed"], row["step"]): row["seconds"] for row in records.read(path)}
    assert {key for key, seconds in found.items() if seconds is not None} == {(1, 10), (2, 10)}
    assert found[1, 10] == 1.23457


def test_newer_results_replace_older_ones(place):
    leave(GRID[0], place / "runs")
    command(place)
    leave(GRID[0], place / "runs", shift=0.1)
    command(place)
    rows = records.read(place / "results" / "made.csv")
    assert [row["test_accuracy"] for row in rows] == [0.61, 0.62, 0.63]
    assert [row["seed"] for row in rows] == [1, 2, 3]
    assert rows[0]["density"] == 0.1
    assert rows[0]["measured_density"] == 0.1001


def test_other_runs_stay_out(place, capsys):
    leave(GRID[0], place / "runs")
    leave(Made(experiment="made_quick", method="eoi"), place / "runs")
    command(place)
    assert {row["experiment"] for row in records.read(place / "results" / "made.csv")} == {"made"}
    stale = Made(density=0.7)
    rows = [{**config.to_dict(stale), "digest": config.digest(stale), "seed": 1}]
    path = place / "results" / "made.csv"
    records.save(path, records.merge(records.read(path), rows))
    capsys.readouterr()
    command(place)
    assert "1 runs belong to no config" in capsys.readouterr().out
    assert len(records.read(path)) == 4
    command(place, "--prune")
    assert len(records.read(path)) == 3


def test_quick_results_go_elsewhere(place):
    leave(GRID[0], place / "runs")
    before = (place / "pages" / "made.md").read_text()
    command(place, "--scale", "quick", "made")
    assert (place / "pages" / "made.md").read_text() == before
    assert not (place / "results").exists()
    assert (place / "runs" / "quick" / "images" / "made_curves.png").exists()


def test_nothing_ran(place, capsys):
    command(place)
    assert set(contents(place)) == {"pages/made.md"}
    assert "made: nothing ran" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mdae"], r"config='mdae'.*'made'"),
        (["--pages", "no/such"], r"pages=.no/such."),
    ],
)
def test_bad_arguments_are_answered(arguments, message, place, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(place, *arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_table_without_a_place_is_told(place, capsys):
    leave(GRID[0], place / "runs")
    (place / "pages" / "made.md").write_text("Nothing here.\n")
    command(place)
    assert "no place for the table made" in capsys.readouterr().out


def test_names_are_unique():
    made = table([])
    with refuses("name='made'"):
        report.unique([made, made])


# ------------------------------------------------------------------------- the pages


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table:a -->\nx\n",
        "x\n<!-- /table:a -->\n",
        "<!-- table:a -->\n<!-- /table:b -->\n",
        "<!-- table:a -->\n<!-- table:a -->\n<!-- /table:a -->\n",
        "inline <!-- table:a -->\n<!-- /table:a -->\n",
    ],
)
def test_unpaired_marks(text):
    with refuses("text", "'a'"):
        report.fill(text, {})


def stale(text, results):
    """The places of a text whose tables are not those of the CSV files."""
    items = [item for name in sweep.names() for item in report.build(name, results)]
    tables = {name: i for name, i in report.unique(items).items() if isinstance(i, Table)}
    places = report.places(text)
    return [
        name
        for name in places
        if name not in tables or report.fill(text, {name: tables[name]}) != text
    ]


def test_an_edited_table_is_found(place):
    for made in GRID:
        leave(made, place / "runs")
    command(place)
    text, results = (place / "pages" / "made.md").read_text(), place / "results"
    assert stale(text, results) == []
    assert stale(text.replace("52.00", "53.00"), results) == ["made"]
    assert stale(text.replace("One epoch", "Ten epochs"), results) == ["made"]
    assert stale(text.replace("# Made", "# Other"), results) == []
    assert stale(text.replace("table:made", "table:gone"), results) == ["gone"]
    csv = results / "made.csv"
    csv.write_text(csv.read_text().replace("0.91", "0.81"))
    assert stale(text, results) == ["made"]


@pytest.mark.slow
def test_the_tables_of_the_pages_are_those_of_the_csv_files():
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md")))
    assert len(report.places(text)) >= 10
    assert stale(text, RESULTS) == []


def test_a_module_without_a_page_gets_one(place, capsys):
    leave(GRID[0], place / "runs")
    (place / "pages" / "made.md").rename(place / "pages" / "other.md")
    (place / "pages" / "other.md").write_text("# Other\n")
    command(place)
    page = place / "pages" / "made.md"
    assert "pages/made.md: written" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith(
        "# Made table: accuracy of methods\n\n"
        "```text\nCommand: python -m experiments sweep made\n```\n\n"
        "<!-- table:made -->\n**Accuracy"
    )
    assert text.endswith("![Accuracy & loss](../images/made_curves.png)\n")
    by_hand = text.replace("# Made table", "# Own title") + "\nOwn words.\n"
    page.write_text(by_hand)
    leave(GRID[1], place / "runs")
    command(place)
    changed = page.read_text()
    assert (changed.startswith("# Own title"), changed.endswith("Own words.\n")) == (True, True)
    assert changed != by_hand


def test_few_points_of_a_logarithmic_axis_are_labelled():
    from matplotlib.figure import Figure as Canvas

    for densities, labels in (((0.05, 0.2, 0.5), ["0.05", "0.2", "0.5"]), (range(1, 9), None)):
        axes = Canvas().subplots()
        rows = [{"x": x, "y": 2, "by": 0} for x in densities]
        Curves(rows, "x", "y", "by", "x", "y", xscale="log")(axes)
        found = [label.get_text() for label in axes.get_xticklabels()]
        assert labels is None or found == labels
        assert (len(axes.get_xticks(minor=True)) > 0) == (labels is None)
