"""What is measured without training, each as a run leaves it."""

import json

import pytest

from experiments import config, runs
from experiments.studies import measure


def measured(function, settings, folder):
    function(settings, folder, runs.Runtime(runs=str(folder)))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_a_linear_network_from_eoi_has_singular_values_of_one(tmp_path):
    linear = config.Spectrum(activation="identity", data="made", depth=3, width=20)
    [row] = measured(measure.spectrum, linear, tmp_path)
    assert row["spectrum_min"] == pytest.approx(1, abs=1e-5)
    assert row["spectrum_max"] == pytest.approx(1, abs=1e-5)


def test_parameters_are_counted(tmp_path):
    """784 x 100, five layers of 100 x 100, 100 x 10; biases of 610 units."""
    size = 784 * 100 + 5 * 100 * 100 + 100 * 10
    counts = {"parameters": size + 610, "size": size, "kept": size // 10}
    counts["all_kept"] = counts["kept"] + 610
    assert measured(measure.counts, config.Counts(model="mlp7"), tmp_path) == [counts]


@pytest.mark.slow
def test_times_are_those_of_every_method(tmp_path):
    times = config.Times(size=16, densities=(0.25,), repeats=1)
    rows = measured(measure.times, times, tmp_path)
    assert {row["method"] for row in rows} == {"EOI", "SAO", "AI", "QR"}
    assert {row["density"] for row in rows} == {0.25}


@pytest.mark.slow
def test_a_kernel_is_drawn_at_its_center_and_unmasked_everywhere(tmp_path):
    rows = measured(measure.kernel, config.Kernel(channels=16), tmp_path)
    assert [row["tap"] for row in rows if row["nonzeros"]] == [[1, 1]]
    assert sum(row["unmasked"] for row in rows) == round(0.1 * 9 * 16 * 16)
    assert all(row["unmasked"] > row["nonzeros"] for row in rows)
