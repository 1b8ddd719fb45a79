"""Every figure and table: what its module says, that its small version runs, and its report."""

import inspect
import json
import re

import pytest

from experiments import models, runs
from experiments.config import Train, digest, to_dict
from experiments.reporting import report
from experiments.reporting.figures import Figure
from experiments.reporting.tables import Table
from experiments.runs import sweep

NAMES = sweep.names()
each = pytest.mark.parametrize("name", NAMES)


@each
def test_it_states_command_hardware_time_and_expectation(name):
    doc = inspect.getdoc(sweep.find(name))
    assert f"python -m experiments sweep {name}" in doc
    for word in ("Command:", "Hardware:", "Time:", "Expected:"):
        assert word in doc


@pytest.mark.slow
@each
def test_its_grids_hold_configs_of_one_experiment(name):
    module = sweep.find(name)
    for scale in ("paper", "small", "quick"):
        grid = sweep.grid_of(module, scale)
        assert {entry.experiment for entry in grid} <= {name}
        assert {type(entry).__name__ for entry in grid} <= set(runs.RUNNERS)
        assert len({digest(entry) for entry in grid}) == len(grid)
        assert all(getattr(entry, "model", "mlp7") in models.NAMES for entry in grid)
    assert sweep.grid_of(module, "paper")
    assert module.get_config().experiment == name


@each
def test_methods_of_one_table_share_their_learning_rates(name):
    for scale in ("paper", "small"):
        rates = {}
        for train in sweep.grid_of(sweep.find(name), scale):
            # Where each start has its own, it is chosen from several.
            if isinstance(train, Train) and not train.learning_rates:
                row = (train.model, train.epochs, train.density, train.seeds, train.criterion)
                rates.setdefault(row, {}).setdefault(train.method, set()).add(train.learning_rate)
        for by_method in rates.values():
            assert len(set(map(frozenset, by_method.values()))) == 1


@pytest.mark.slow
@each
def test_it_reports_empty_cells_before_anything_ran(name, tmp_path):
    """A table that has not run at all is not written: its file is missing. One run is enough."""
    items = report.build(name, tmp_path)
    assert items
    for item in items:
        assert isinstance(item, Table | Figure)
        assert item.caption
        if isinstance(item, Table):
            assert not re.search(r"\d ± \d", item.markdown())
        else:
            assert item.panels


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("name", sorted({*NAMES} - {"appendix_a", "appendix_b", "appendix_f"}))
def test_it_tells_all_its_configs_apart(name, scale):
    """Each config has another made result, whatever its seeds: none is averaged with another."""
    module = sweep.find(name)
    fields = ("test_accuracy", "test_loss", "train_loss", "return", "kept", "spectrum_mean")
    rows, curves, numbers = [], [], {}
    for entry in sweep.grid_of(module, scale):
        config = {**to_dict(entry), "digest": digest(entry)}
        without = {key: config[key] for key in config if key not in ("digest", "seed", "seeds")}
        number = numbers.setdefault(json.dumps(without), len(numbers))
        rates = config.get("learning_rates")
        for seed in config.get("seeds") or [config.get("seed", 1)]:
            made = dict.fromkeys(fields, float(number))
            made |= {"measured_learning_rate": rates[number % len(rates)]} if rates else {}
            rows.append({**config, "seed": seed, **made})
            line = {"seed": seed, "step": 10, "epoch": 1.0, "split": "train", "loss": 1.0}
            measured = dict.fromkeys(("return", "dormant_actor", "smallest", "largest"), 1.0)
            curves.append({**config, **line, "accuracy": 1.0, "seconds": 1.0, **measured})
    items = module.report(rows, curves) if report._logs(module) else module.report(rows)
    [table, *_] = [item for item in items if isinstance(item, Table)]
    cells = [cell for _, line in table.body() for _, cell, _ in line if cell is not None]
    assert cells
    assert not any(cell.deviation > 0 for cell in cells)


def test_wall_times_are_read_off_the_curves():
    """Of two made runs, a step a second and half of one; only the first reaches the target."""
    module = sweep.find("sparse_wall_time")
    assert 0.95 < module.TARGET < 0.98
    rows, curves = [], []
    for train, pace, top in zip(module.small()[:2], (1.0, 0.5), (0.98, 0.95), strict=True):
        fields = {**to_dict(train), "digest": digest(train)}
        rows.append({**fields, "seed": 1, "test_accuracy": top})
        for step in (30, 60, 90):
            line = {"seed": 1, "step": step, "epoch": step / 60, "seconds": pace * step}
            accuracy = min(top, 0.6 + step / 150)  # 0.8 at step 30, the top at step 60
            for split in ("train", "validation"):
                curves.append({**fields, **line, "split": split, "accuracy": accuracy})
    table, figure = module.report(rows, curves)
    cells = {line[1]: [text for text, *_ in found] for line, found in table.body()}
    assert cells["blocks of 128"][2:] == ["60.0 (n = 1)", "60.0 (n = 1)"]
    assert cells["dense"][2:] == ["30.0 (n = 1)", ""]
    [panel] = figure.panels
    drawn = [(row["variant"], row["seconds"]) for row in panel.rows]
    assert drawn == [
        *(("blocks of 128", seconds) for seconds in (30.0, 60.0, 90.0)),
        *(("dense", seconds) for seconds in (15.0, 30.0, 45.0)),
    ]


@pytest.mark.slow
@each
def test_its_quick_version_runs_and_reports(name, tmp_path, monkeypatch):
    if name.startswith("rl_"):
        pytest.importorskip("gymnax", reason="needs the extra rl: pip install -e '.[rl]'")
    grid = sweep.grid_of(sweep.find(name), "quick")
    if not grid:
        pytest.skip("the network has no small version; its shapes are tested instead")
    runtime = runs.Runtime(runs=str(tmp_path), progress=False)
    for entry in grid:
        folder = runs.execute(entry, runtime)
        assert json.loads((folder / "results.json").read_text())
    report.main(["--scale", "quick", "--runs", str(tmp_path), name])
    assert (tmp_path / "quick" / "results" / f"{name}.csv").exists()
    items = report.build(name, tmp_path / "quick" / "results", scale="quick")
    for item in items:
        if isinstance(item, Table):
            assert item.cells()
        else:
            assert (tmp_path / "quick" / "images" / f"{item.name}.png").stat().st_size
