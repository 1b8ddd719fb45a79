"""The accuracies that pages state are those of the committed results."""

import csv
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).resolve().parent.parent
START, FRONT = "docs/start/which_start.md", "README.md"
PLAIN = {"planes": "independent", "angles": "uniform"}
SPREAD = {"method": "eoi", "taps": "spread", "he_norm": "true", "planes": "independent"}
RESNET = {"density": "0.1", "epochs": "1.0"}
STATED = [
    ("best_rates_mlp1000", {"method": "dense"}, "94.6", (START, FRONT)),
    ("best_rates_mlp1000", {"method": "eoi", **PLAIN}, "93.2", (START, FRONT)),
    ("best_rates_mlp1000", {"planes": "matching", "angles": "uniform"}, "92.8", (START,)),
    ("best_rates_mlp1000", {"method": "sao"}, "94.7", (START, FRONT)),
    ("best_rates_mlp1000", {"method": "ai"}, "91.0", (START, FRONT)),
    ("best_rates_mlp1000", {"method": "rescaled", "density_power": "0.0"}, "11.35", (START, FRONT)),
    ("best_rates_mlp1000", {"density_power": "1.0"}, "11.7", (START,)),
    ("table1_mlp1000", {"method": "sao"}, "92.0", (START,)),
    ("table1_mlp1000", {"method": "ai", "epochs": "2.0"}, "89.3", (START,)),
    ("best_rates_resnet20", {**SPREAD, **RESNET}, "56.4 ± 1.9", (START, FRONT)),
    ("best_rates_resnet20", {"method": "base", **RESNET}, "55.8 ± 2.1", (START, FRONT)),
    (
        "best_rates_resnet20",
        {"planes": "matching", "he_norm": "true", **RESNET},
        "56.35 ± 1.1",
        ("docs/results/best_rates_resnet20.md",),
    ),
    (
        "best_rates_resnet20",
        {"planes": "matching", "he_norm": "false", **RESNET},
        "51.8 ± 0.7",
        ("docs/results/best_rates_resnet20.md",),
    ),
    ("best_rates_resnet20", {"method": "dense", "epochs": "1.0"}, "57.1 ± 3.3", (START,)),
    ("best_rates_resnet20", {"method": "rescaled", **RESNET}, "49.1 ± 1.6", (START,)),
    ("best_rates_resnet20", {"method": "ai", **RESNET}, "51.9 ± 1.9", (START,)),
    (
        "best_rates_resnet20",
        {"taps": "spread", "he_norm": "false", "planes": "independent", **RESNET},
        "51.5 ± 1.1",
        (START,),
    ),
    (
        "best_rates_resnet20",
        {"method": "eoi", "taps": "center", "he_norm": "false", **RESNET},
        "45.4 ± 5.1",
        (START, FRONT),
    ),
]


@pytest.mark.parametrize(("name", "where", "stated", "pages"), STATED)
def test_accuracies_are_those_of_the_results(name, where, stated, pages):
    with (ROOT / "experiments" / "results" / f"{name}.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if where.items() <= row.items()]
    values = [100 * float(row["test_accuracy"]) for row in rows]
    assert len(values) == 3
    digits = len(stated.split()[0].partition(".")[2])
    found = f"{mean(values):.{digits}f}" + f" ± {stdev(values):.1f}" * ("±" in stated)
    assert found == stated
    for page in pages:
        assert stated in (ROOT / page).read_text()
