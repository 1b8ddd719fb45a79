"""Training at the best of several learning rates: what is tried, what is taken, what is kept."""

import dataclasses
import json
import math

import numpy as np
import pytest
from helpers import refuses

from experiments import runs
from experiments.config import Train, digest
from experiments.tools import show
from experiments.training import metrics, rates, steps, train

TWO = Train(
    experiment="rates",
    data="made",
    depth=2,
    width=8,
    density=0.5,
    method="base",
    epochs=0.5,
    seeds=(3, 5),
    learning_rates=(0.001, 0.3, 1e25),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs.execute(TWO, runs.Runtime(runs=str(folder), progress=False))
    return folder


def single(seed, rate):
    return dataclasses.replace(TWO, seeds=(seed,), learning_rates=(), learning_rate=rate)


@pytest.mark.slow
def test_the_first_seed_tries_all_and_the_others_take_the_best(root):
    tried = [single(3, rate) for rate in TWO.learning_rates]
    assert [runs.is_done(runs.folder_of(config, root)) for config in tried] == [True, True, False]
    found = json.loads((runs.folder_of(TWO, root) / "results.json").read_bytes())
    accuracy = {
        rate: rates.validation_accuracy(runs.folder_of(config, root))
        for rate, config in list(zip(TWO.learning_rates, tried, strict=True))[:2]
    }
    assert accuracy[0.3] > accuracy[0.001]
    assert not runs.folder_of(single(5, 0.001), root).exists()
    for row, seed in zip(found, TWO.seeds, strict=True):
        [alone] = json.loads(
            (runs.folder_of(single(seed, 0.3), root) / "results.json").read_bytes()
        )
        extra = {"learning_rate": 0.3, "tried": row["tried"]}
        assert row == alone | extra
        assert row["tried"] == {"0.001": accuracy[0.001], "0.3": accuracy[0.3], "1e+25": None}


def test_curves_are_those_of_the_rate_chosen(root):
    lines = metrics.read(runs.folder_of(TWO, root) / "metrics.jsonl")
    apart = [
        metrics.read(runs.folder_of(single(seed, 0.3), root) / "metrics.jsonl")
        for seed in TWO.seeds
    ]
    assert lines == [*apart[0], *apart[1]]
    curves = [row for row in runs.load_curves(root) if row["digest"] == digest(TWO)]
    times = {(row["seed"], row["step"]): row["seconds"] for row in curves}
    assert len(times) == len({(line["seed"], line["step"]) for line in lines})
    assert all(seconds > 0 for seconds in times.values())


def test_results_name_the_rate_apart_from_the_field(root):
    rows = [row for row in runs.load_rows(root) if row["digest"] == digest(TWO)]
    assert [row["measured_learning_rate"] for row in rows] == [0.3, 0.3]
    assert {tuple(row["learning_rates"]) for row in rows} == {TWO.learning_rates}


def test_runs_that_are_complete_are_not_repeated(root, monkeypatch):
    folder = runs.folder_of(TWO, root)
    before = (folder / "results.json").read_bytes()
    (folder / "done").unlink()
    advanced = []
    monkeypatch.setattr(train, "_begin", lambda config, *_: advanced.append(config))
    # The rate whose loss is not finite has no result and is tried again.
    monkeypatch.setattr(rates, "execute", _refusing(single(3, 1e25)))
    runs.execute(TWO, runs.Runtime(runs=str(root), progress=False))
    assert not advanced
    assert (folder / "results.json").read_bytes() == before


def _refusing(config):
    def execute(other, runtime):
        if other == config:
            raise FloatingPointError("not finite")
        return runs.execute(other, runtime)

    return execute


def test_without_a_rate_that_trains_there_is_no_result(tmp_path):
    config = dataclasses.replace(TWO, learning_rates=(1e25, 2e25))
    with pytest.raises(FloatingPointError, match=r"learning_rates=\(1e\+25, 2e\+25\) .*seed 3"):
        train.run(config, tmp_path, runs.Runtime(runs=str(tmp_path), progress=False))


def test_the_folder_of_several_rates_names_those_of_checkpoints(root):
    folder = runs.folder_of(TWO, root)
    with refuses("folder", folder, "single rates", folder.parent):
        show.read(folder)


def test_the_loss_of_training_is_the_mean_over_the_last_tenth_of_the_steps(tmp_path):
    lines = [
        {"step": step, "epoch": 0.0, "seed": 3, "split": split, "loss": loss, "accuracy": loss / 8}
        for step, split, loss in [
            *((18, "train", 9.0), (20, "train", 2.0), (21, "train", 5.0)),
            *((21, "validation", 4.0), (21, "test", 3.0)),
        ]
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [row] = train._results(tmp_path, [{"seed": 3}], 21)
    assert (row["train_loss"], row["train_accuracy"]) == (3.0, 3.0 / 8)  # of three steps
    assert (row["validation_loss"], row["test_loss"], row["steps"]) == (4.0, 3.0, 21)


def test_the_last_quarter_counts(tmp_path):
    config = single(3, 0.1)
    lines = [
        {"step": step, "epoch": 0.0, "seed": 3, "split": split, "loss": 1.0, "accuracy": accuracy}
        for step, split, accuracy in [
            *((10, "validation", 0.9), (74, "validation", 0.8), (75, "validation", 0.4)),
            *((100, "train", 0.7), (100, "validation", 0.6), (100, "test", 0.1)),
        ]
    ]
    folder = runs.folder_of(config, tmp_path)
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    assert rates.validation_accuracy(folder) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("accuracies", "rate"),
    [
        ({0.1: 0.5, 0.2: 0.7, 0.3: 0.6}, 0.2),
        ({0.3: 0.7, 0.2: 0.7, 0.1: math.nan}, 0.2),
        ({0.3: math.nan, 0.2: 0.0}, 0.2),
    ],
)
def test_the_highest_accuracy_wins_and_ties_go_to_the_lowest_rate(accuracies, rate):
    assert rates.best(accuracies) == rate


def test_one_config_whatever_rate_stood_there():
    assert dataclasses.replace(TWO, learning_rate=7.0) == TWO
    assert TWO.learning_rate == 0.001


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"learning_rates": (0.1,)}, "two or more"),
        ({"learning_rates": (0.1, 0.1)}, "two or more"),
        ({"learning_rates": (0.1, -0.1)}, "two or more"),
        ({"learning_rates": (0.1, math.inf)}, "two or more"),
        ({"density_power": math.nan}, "finite"),
        ({"taps": "spread"}, "'center'"),
        ({"planes": "matching"}, "'independent'"),
        ({"he_norm": True}, "False"),
    ],
)
def test_fields_out_of_range(change, allowed):
    name = next(name for name in change if name != "method")
    with refuses(name, f"{name}={change[name]!r}", allowed):
        dataclasses.replace(TWO, **change)


def test_no_file_is_saved_of_several_rates(tmp_path, capsys):
    arguments = ["--data", "made", "--learning-rates", "0.1", "0.2", "--save", "net.safetensors"]
    with pytest.raises(SystemExit, match=r"save='net.safetensors' .*learning_rates=\(0.1, 0.2\)"):
        train.main([*arguments, "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_updates_are_divided_by_the_density():
    """SGD without momentum or decay: an update is the rate over the density times the gradient."""
    mask = {"layer": {"kernel": np.arange(20).reshape(4, 5) < 5, "bias": np.array(True)}}
    grads = {"layer": {"kernel": np.ones((4, 5), "f"), "bias": np.ones(5, "f")}}
    params = {"layer": {"kernel": mask["layer"]["kernel"].astype("f"), "bias": np.ones(5, "f")}}
    for power, factor in ((0.0, 1.0), (1.0, 4.0), (0.5, 2.0)):
        optimizer_of = steps.sparse_optimizer(
            10, momentum=0.0, weight_decay=0.0, density_power=power
        )
        tx = optimizer_of(None, mask, 0.1)
        updates, _ = tx.update(grads, tx.init(params), params)
        expected = np.where(mask["layer"]["kernel"], -0.1 * factor, 0)
        np.testing.assert_allclose(updates["layer"]["kernel"], expected, rtol=1e-6)
        np.testing.assert_allclose(updates["layer"]["bias"], -0.1, rtol=1e-6)
