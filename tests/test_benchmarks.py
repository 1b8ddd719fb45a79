"""The benchmarks measure what they say."""

import io

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

import eoi_jax as eoi
from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import initialization, methods, timing, training
from experiments.training import loops

WEIGHTS = 129_400  # of MLP-7


@pytest.fixture(scope="module")
def starts():
    return methods.network_starts("mlp7", 0.1, ai_steps=3)


SPARSE = ("ERK, random mask", "magnitude", "SNIP", "GraSP", "SynFlow", "ERK, EOI", "ERK, AI")


@pytest.mark.parametrize("method", SPARSE)
def test_every_method_leaves_a_tenth_of_the_weights(starts, method):
    [start] = [start for name, start in starts.items() if name.startswith(method)]
    params, mask = start()
    assert round(eoi.masks.density(mask) * WEIGHTS) == WEIGHTS // 10
    chex.assert_trees_all_equal(params, eoi.masks.apply(mask, params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_dense_start_is_orthogonal_and_sao_has_ten_connections(starts):
    dense = starts["dense orthogonal (QR)"]()
    assert eoi.spectrum.orthogonality_error(dense["first"]["kernel"]) < 1e-5
    hidden = starts["SAO"]().mask["hidden"]["linear"]["kernel"]
    assert (hidden.sum(1) == 10).all()


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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["init", "--repeats", "0"], "error: repeats=0"),
        (["methods", "--output", "nowhere/a.png"], "error: output='nowhere/a.png'"),
    ],
)
def test_bad_settings_are_named_before_any_measuring(arguments, named):
    with pytest.raises(SystemExit, match=named):
        benchmarks.main(arguments)


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
