"""The benchmarks measure what they say."""

import csv
import dataclasses
import io
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import eoi_jax as eoi
from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import initialization, methods, rl, sparse_layers, timing, training
from experiments.training import loops

WEIGHTS = 129_400  # of MLP-7


@pytest.fixture(scope="module")
def starts():
    return methods.network_starts("mlp7", 0.1, ai_steps=3)


SPARSE = ("ERK, random mask", "magnitude", "SNIP", "GraSP", "SynFlow", "ERK, EOI", "ERK, AI")


@pytest.mark.slow
@pytest.mark.parametrize("method", SPARSE)
def test_every_method_leaves_a_tenth_of_the_weights(starts, method):
    [start] = [start for name, start in starts.items() if name.startswith(method)]
    params, mask = start()
    assert round(eoi.masks.density(mask) * WEIGHTS) == WEIGHTS // 10
    chex.assert_trees_all_equal(params, eoi.masks.apply(mask, params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_a_dense_start_is_orthogonal_and_sao_has_ten_connections(starts):
    dense = starts["dense orthogonal (QR)"]()
    assert eoi.spectrum.orthogonality_error(dense["first"]["kernel"]) < 1e-5
    hidden = starts["SAO"]().mask["hidden"]["linear"]["kernel"]
    assert (hidden.sum(1) == 10).all()


@pytest.mark.slow
def test_what_a_method_cannot_do_has_no_time(monkeypatch):
    def refuse():
        raise ValueError("density=0.1 does not suit it.")

    found = {"possible": lambda: np.ones(1), "impossible": refuse}
    monkeypatch.setattr(methods, "network_starts", lambda *_: found)
    console = Console(width=120, file=io.StringIO())
    methods.bench_methods(methods.Methods(quick=True, matrices=False), console)
    text = console.file.getvalue()
    [row] = [line for line in text.splitlines() if line.split()[:1] == ["impossible"]]
    assert row.split()[1:] == ["–", "/", "–"]
    assert "density=0.1 does not suit it." in text


def test_functions_take_turns_and_the_first_does_not_count(monkeypatch):
    clock, calls = [0.0], []

    def spend(name, durations):
        durations = iter(durations)

        def run():
            calls.append(name)
            clock[0] += next(durations)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    # The first run compiles; the median of the others is told.
    functions = {"a": spend("a", [90, 5, 1, 2]), "b": spend("b", [70, 3, 4, 40])}
    assert timing.medians(functions, repeats=3) == {"a": 2, "b": 4}
    assert calls == ["a", "b"] * 4
    # What has taken 90 seconds is run only once more.
    calls.clear()
    functions = {"a": spend("a", [90, 5]), "b": spend("b", [70, 3, 4, 40])}
    assert timing.medians(functions, repeats=3, most_seconds=90) == {"a": 5, "b": 4}
    assert calls == ["a", "b", "a", "b", "b", "b"]
    # Of two runs in a turn the second counts.
    calls.clear()
    functions = {"a": spend("a", [90, 50, 1, 60, 2]), "b": spend("b", [70, 40, 3, 30, 4])}
    assert timing.medians(functions, repeats=2, twice=True) == {"a": 1.5, "b": 3.5}
    assert calls == ["a", "b", "a", "a", "b", "b", "a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["init", "--repeats", "0"], "error: repeats=0"),
        (["methods", "--output", "nowhere/a.png"], "error: output='nowhere/a.png'"),
        (["sparse_layers", "--blocks", "128", "0"], "error: blocks=0"),
        (["sparse_layers", "--densities", "1.5"], "error: densities=1.5"),
        (["sparse_layers", "--densities", "0.3"], "error: densities=0.3"),
        (["sparse_layers", "--memory", "0"], "error: memory=0"),
        (["sparse_layers", "--quick", "--full"], "error: quick=True"),
        (["rl", "--widths", "20"], "error: widths=20"),
        (["rl", "--num-seeds", "0"], "error: num_seeds=0"),
    ],
)
def test_bad_settings_are_named_before_any_measuring(arguments, named):
    with pytest.raises(SystemExit, match=named):
        benchmarks.main(arguments)


def test_environment_steps_are_counted_over_all_seeds(monkeypatch):
    """Of two seeds with 3 x 128 steps each: what a second of the dense program comes to."""
    seconds = {"dense": 1.0, "masked": 2.0, "blocks": 0.5}
    monkeypatch.setattr(rl, "_update", lambda config: config.method)
    monkeypatch.setattr(
        rl, "medians", lambda functions, *_, **__: {k: seconds[k] for k in functions}
    )
    console = Console(width=200, record=True, file=io.StringIO())
    rl.bench_rl(rl.Rl(widths=(32,), num_seeds=2, num_envs=3), console)
    [row] = [line.split() for line in console.export_text().splitlines() if "768" in line]
    assert row == ["32", "768", "384", "1,536", "0.50", "2.00"]
    found = rl.configs(rl.Rl(), 64)
    starts = ("method", "density", "planes", "block_size")
    same = [
        dataclasses.replace(each, **{f: getattr(found["dense"], f) for f in starts})
        for each in found.values()
    ]
    assert len(set(same)) == 1
    assert [each.method for each in found.values()] == ["dense", "eoi", "blocks"]


def curves(axes):
    """What is drawn, by its name in the legend."""
    return {line.get_label(): line.get_ydata() for line in axes.get_lines()}


def test_the_plot_of_init_shows_the_medians():
    seconds = {
        size: {"normal": 1e-3 * size, "haar": 4e-3 * size, "0.1": 5e-4 * size, "0.5": 6e-4 * size}
        for size in (128, 256)
    }
    left, right = initialization.plot(seconds, (0.1, 0.5)).axes
    np.testing.assert_allclose(curves(left)["jax.random.normal"], [128, 256])
    np.testing.assert_allclose(curves(left)["eoi.orthogonal, density 0.1"], [64, 128])
    np.testing.assert_allclose(curves(right)["eoi.orthogonal"], [128, 153.6])
    np.testing.assert_allclose(curves(right)["jax.nn.initializers.orthogonal"], 1024)


def test_the_plot_of_methods_shows_the_medians():
    rows = {
        (size, density): {"EOI": size * density, "QR": 2e-3, "SAO": float("nan"), "AI": 1e-3}
        for size in (128, 256)
        for density in (0.0625, 0.125, 0.25)
    }
    left, right = map(curves, methods.plot(rows).axes)
    np.testing.assert_allclose(left["EOI"], [16, 32])
    np.testing.assert_allclose(right["EOI"], [16, 32, 64])
    for axes in (left, right):
        np.testing.assert_allclose(axes["AI, 10,000 times one measured step"], 10)


@pytest.mark.slow
def test_a_training_step_is_the_same_under_the_options_for_cpus():
    """The smallest network has all kinds of layers; rounding differs, since fusions do."""
    if jax.default_backend() != "cpu":
        pytest.skip("The options are for CPUs.")
    step, arguments = training.step_of(training.Training(depth=8))
    lowered = jax.jit(step).lower(*arguments)
    (ours, sums), (theirs, expected) = (
        lowered.compile(compiler_options=options)(*arguments)
        for options in (loops.CPU_OPTIONS, None)
    )
    chex.assert_trees_all_close(sums, expected, rtol=1e-5)
    chex.assert_trees_all_close(ours.params, theirs.params, rtol=1e-3, atol=1e-5)
    kernel = arguments[0].params["first"]["kernel"]
    assert np.abs(ours.params["first"]["kernel"] - kernel).max() > 1e-3  # it has trained


# A layer of 32 by 32 with a quarter of the weights; of blocks of 5 there are none.
LAYERS = {"n": 32, "density": 1 / 4, "blocks": (8, 5)}


@pytest.mark.slow
def test_every_sparse_layer_has_its_density_and_the_product_of_its_matrix():
    networks = sparse_layers._networks(**LAYERS)
    assert list(networks) == ["dense", "masked", "BCOO", "condensed", "block 8"]
    x = jax.random.normal(jax.random.key(0), (3, 32))
    for name, network in networks.items():
        layer = network[0]
        matrix = layer.multiply(jnp.eye(32), layer.weights, layer.pattern)
        assert (np.count_nonzero(matrix, axis=0) == (32 if name == "dense" else 8)).all(), name
        found = layer.multiply(x, layer.weights, layer.pattern)
        np.testing.assert_allclose(found, x @ matrix, atol=1e-5)
        assert [each.weights.shape for each in network] == [layer.weights.shape] * 3
        work = layer.work(10)["forward"]
        counted = 1024 if name in ("dense", "masked") else 256
        assert work.flops == 2 * 10 * counted
    assert networks["dense"][0].work(10)["forward"].bytes == 4 * (2 * 10 * 32 + 32 * 32)


@pytest.mark.slow
def test_sparse_layers_prints_saves_and_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_layers, "_SQUARE", 8)
    monkeypatch.setattr(sparse_layers, "_COPIES", {"memory": (8, 1), "cache": (8, 1)})
    options = sparse_layers.SparseLayers(
        batches=(4,), sizes=(32,), blocks=(8,), densities=(1 / 4,), repeats=1
    )
    options = dataclasses.replace(options, output=str(tmp_path / "a.png"))
    console = Console(width=120, file=io.StringIO())
    sparse_layers.bench_sparse_layers(options, console)
    text = console.file.getvalue()
    for title in ("AdamW step of 3 layers, batch 4", "Why blocks fall short", "begin to win"):
        assert title in text
    assert "…" not in text  # no column is cut
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with (tmp_path / "a.csv").open() as file:
        rows = {(row["program"], row["layer"]): row for row in csv.DictReader(file)}
    layers = ("dense", "masked", "BCOO", "condensed", "block 8")
    assert set(rows) == {(p, name) for p in sparse_layers.PROGRAMS for name in layers}
    for (program, name), row in rows.items():
        numbers = {k: float(v) for k, v in row.items() if k not in ("program", "layer")}
        assert numbers["ms"] > 0
        assert numbers["peak_bytes"] > numbers["parameter_bytes"]
        assert numbers["limit"] == (1 if name in ("dense", "masked") else 4)
        dense = float(rows[program, "dense"]["ms"])
        assert numbers["ratio"] == pytest.approx(dense / numbers["ms"], rel=1e-4)
        if name == "dense":
            products = {"forward": 1, "forward + backward": 3, "AdamW step": 8}[program]
            updates = 15 * 3 * 1024 if program == "AdamW step" else 0
            assert numbers["flops"] == products * 2 * 4 * 1024 + updates
    # Three layers of 256 weights and two moments of each, and indices beside.
    step = rows["AdamW step", "block 8"]
    indices = sum(leaf.size for leaf in jax.tree.leaves(blocks_of(32)))
    assert int(step["parameter_bytes"]) == 3 * 4 * (256 + indices)
    assert int(step["optimizer_bytes"]) == 4 * (2 * 3 * 256 + 1)


def blocks_of(n):
    """The indices of a layer of blocks."""
    return sparse_layers._networks(**(LAYERS | {"n": n}))["block 8"][0].pattern


@pytest.mark.slow
def test_products_alone_are_those_of_the_layer():
    layer = sparse_layers._networks(**LAYERS)["block 8"][0]
    alone = sparse_layers._products_alone(layer.weights, 3)
    rows, _ = layer.pattern
    outputs, per, high, wide = layer.weights.shape
    assert rows.shape == (outputs, per)
    ones = jnp.ones((3, 32))
    y, pull = jax.vjp(lambda x, w: layer.multiply(x, w, layer.pattern), ones, layer.weights)
    forward = alone["forward"]().swapaxes(0, 1).reshape(3, 32)
    np.testing.assert_allclose(forward, y, atol=1e-5)
    assert alone["input gradient"]().shape == (outputs, 3, per * high)
    _, dw = pull(ones)
    np.testing.assert_allclose(alone["weight gradient"]().reshape(dw.shape), dw, atol=1e-5)
    assert wide * outputs == 32


@pytest.mark.slow
def test_programs_that_need_too_much_memory_are_not_run():
    networks = {"dense": sparse_layers._networks(**LAYERS)["dense"]}
    grid = sparse_layers.SparseLayers(memory=1e-9)
    case = sparse_layers.Case(4, 32, 1 / 4, "forward")
    rates = (sparse_layers.Work(1, 1), sparse_layers.Work(1, 2))
    [cell] = sparse_layers._measure(grid, case, networks, rates)
    assert math.isnan(cell.ms)
    assert math.isnan(cell.ratio)
    assert cell.peak_bytes >= 4 * (2 * 4 * 32 + 32 * 32)


def test_a_bound_is_the_slower_of_products_and_memory():
    rates = sparse_layers.Work(10, 5)  # FLOPs and bytes a second
    computes, waits = sparse_layers.Work(100, 5), sparse_layers.Work(10, 10)
    assert (computes.seconds(rates), waits.seconds(rates)) == (10, 2)
    assert sparse_layers._bound([computes, waits], [waits, waits], rates) == 3


def test_a_state_is_overwritten_and_goes_on():
    call = sparse_layers._repeatable(lambda state, x: (state + x,), (1, 10), 1)
    assert [call(), call()] == [(11,), (21,)]


def cell_of(n, density, ratio, layer="block 8", program="forward", batch=4):
    fields = dict.fromkeys(sparse_layers.Cell._fields, 0)
    given = {"n": n, "density": density, "ratio": ratio, "layer": layer}
    return sparse_layers.Cell(**fields | given | {"program": program, "batch": batch})


def test_blocks_begin_to_win_at_the_smallest_size_and_the_largest_density():
    small, dense = cell_of(64, 1 / 8, 1.5), cell_of(256, 1 / 2, 1.1)
    others = [
        cell_of(32, 1 / 8, 0.9),
        cell_of(64, 1 / 8, 1.2),
        cell_of(256, 1 / 2, math.nan),
        cell_of(16, 1, 3, layer="masked"),
        cell_of(32, 1 / 8, 0.5, program="AdamW step"),
    ]
    found = sparse_layers.break_even([*others, small, dense])
    assert found == {("forward", 4): (small, dense), ("AdamW step", 4): None}


def test_the_plot_of_sparse_layers_shows_the_ratios():
    cells = [cell_of(64, 1 / 4, 2.0), cell_of(64, 1 / 8, 5.0), cell_of(32, 1 / 4, 1, "dense")]
    first, second, _ = sparse_layers.plot(cells).axes
    found = curves(first)
    np.testing.assert_allclose(found["block 8, n = 64"], [5, 2])
    assert not any(label.startswith("dense") for label in found)
    assert "block 8, n = 64" not in curves(second)
