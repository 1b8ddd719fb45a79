"""The studies of starts measure what they say."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses
from matplotlib.image import imread
from rich.console import Console

import eoi_jax as eoi
from eoi_jax import mean_field
from experiments import config, models, runs
from experiments.studies import coordinate_check, measure, spectra, universality


@pytest.mark.slow
def test_the_chain_is_the_jacobian_of_its_network(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (5, 6, 6)) / 6**0.5
    biases = jax.random.normal(keys[1], (5, 6))
    x = jax.random.normal(keys[2], (6,))
    found = universality.chain(weights, biases, x, jnp.tanh, (2, 5))

    def network(x, depth):
        for weight, bias in zip(weights[:depth], biases[:depth], strict=True):
            x = weight @ jnp.tanh(x) + bias
        return x

    for depth, (values, moments) in zip((2, 5), found, strict=True):
        jacobian = np.asarray(jax.jacobian(network)(x, depth))
        expected = np.linalg.svd(jacobian, compute_uv=False)
        np.testing.assert_allclose(values, expected, rtol=1e-10, atol=1e-12)
        slopes = [1 - np.tanh(np.asarray(network(x, layer))) ** 2 for layer in range(depth)]
        expected = [[(layer**2).mean(), (layer**4).mean()] for layer in slopes]
        np.testing.assert_allclose(moments, expected, rtol=1e-12)


def test_distances_are_zero_for_the_law_itself_and_known_for_a_shift():
    law = universality.predicted(universality.Case("tanh", 0.1), 4)
    values = law.quantile((np.arange(4000) + 0.5) / 4000)
    gain, _ = mean_field.critical_line("tanh", 0.1)
    second = (law.moments(2)[1] - 1) / 4 + 1  # of the squared slopes, over their squared mean
    moments = np.tile([1 / gain**2, second / gain**4], (4, 1))
    distance, error, freeness_error = universality.compare(values, moments, gain, law)
    assert distance < 1e-12
    assert error < 1e-3
    assert freeness_error < 1e-3
    assert universality.compare(values + 0.25, moments, gain, law)[0] == pytest.approx(0.25)


@pytest.mark.slow
def test_free_slopes_of_any_law_have_the_moments_of_their_product(x64):
    """Diagonals between Haar matrices are free of each other: only their own moments count."""
    width, depth = 300, 6
    keys = jax.random.split(jax.random.key(0), depth)
    diagonals = np.random.default_rng(0).choice([0.2, 1.0, 1.5], (depth, width))
    product = np.eye(width)
    for key, diagonal in zip(keys, diagonals, strict=True):
        haar = jax.nn.initializers.orthogonal(1.3)(key, (width, width), jnp.float64)
        product = np.asarray(haar) @ (diagonal[:, None] * product)
    moments = np.stack([(diagonals**2).mean(1), (diagonals**4).mean(1)], axis=1)
    values = np.linalg.svd(product, compute_uv=False)
    law = universality.predicted(universality.Case("tanh", 0.1), depth)  # not that of these slopes
    _, error, freeness_error = universality.compare(values, moments, 1.3, law)
    assert freeness_error < 0.05
    assert error > 0.5


def test_critical_networks_have_a_mean_square_of_one():
    for case in universality.CASES:
        sigma_w, _ = mean_field.critical_line(*case)
        assert mean_field.chi(case.activation, sigma_w, case.q) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("case", universality.CASES, ids=str)
def test_wide_dense_orthogonal_networks_have_the_predicted_spectrum(case):
    """Bound: 0.1 in Wasserstein-1 distance at width 256 and depth 8, where the mean square is 1.

    The distances of two networks of each case there were 0.041 at most.
    """
    width, depth = 256, 8
    keys = jax.random.split(jax.random.key(3), 3)
    sigma_w, sigma_b = mean_field.critical_line(*case)
    haar = jax.nn.initializers.orthogonal(sigma_w)
    weights = jax.lax.map(lambda key: haar(key, (width, width)), jax.random.split(keys[0], depth))
    biases = sigma_b * jax.random.normal(keys[1], (depth, width))
    x = case.q**0.5 * jax.random.normal(keys[2], (width,))
    phi = models.ACTIVATIONS[case.activation]
    [(values, moments)] = universality.chain(weights, biases, x, phi, (depth,))
    law = universality.predicted(case, depth)
    distance, _, _ = universality.compare(np.asarray(values), np.asarray(moments), sigma_w, law)
    assert distance < (2e-5 if case.activation == "identity" else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["center", "spread"])
def test_convolutions_as_matrices_are_orthogonal_and_see_as_many_units(kind, x64):
    """Four channels on 4 x 4 pixels, at a density of 1/32: two non-zeros a row on average."""
    (matrix,) = universality._weights(
        jax.random.key(0), width=64, depth=1, kind=kind, density=1 / 32
    )
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(64), atol=1e-12)
    assert 64 < (matrix != 0).sum() < 3 * 64  # 128 is expected
    pixels = {
        (row // 4, column // 4) for row, column in np.argwhere(np.abs(np.asarray(matrix)) > 0)
    }
    assert all(one == other for one, other in pixels) == (kind == "center")


def test_widths_without_whole_channels_have_no_convolutions():
    assert universality._exists("spread", 96, 1 / 32)
    assert not universality._exists("spread", 100, 0.05)
    assert universality._exists("blocks", 100, 0.05)


def test_the_coordinate_check_refuses_texts():
    with refuses("data", "data='topics'", "images"):
        coordinate_check.measure(coordinate_check.Config(data="topics"))


@pytest.mark.slow
def test_universality_saves_its_table_and_pictures(tmp_path):
    config = universality.Config(
        densities=(0.25,), depths=(2, 4), widths=(16,), seeds=2, output=str(tmp_path / "u")
    )
    rows = universality.run(config, Console(quiet=True))
    assert len(rows) == 5 * 2 * 4 * 2  # cases, depths, weights, seeds
    for row in rows:
        errors = np.array(row[-3:])
        assert np.isfinite(errors).all()
        assert (errors.max() < 1e-12) == (row.activation == "identity")
    assert len((tmp_path / "u.csv").read_text().splitlines()) == 1 + len(rows)
    for name in ("u.png", "u_convolutions.png", "u_laws.png"):
        assert imread(tmp_path / name).std() > 0


@pytest.mark.slow
def test_spectra_draws_medians_and_eoi_keeps_the_signal(tmp_path):
    config = spectra.Config(layers=50, width=16, output=str(tmp_path / "depth.png"))
    depth = spectra.against_depth(config)
    assert depth["EOI"].shape == (50, 4, 16)
    assert depth["EOI"][-1].mean() > 0.5
    assert depth["masked orthogonal"][-1].max() < 1e-3
    [axes] = spectra.plot(depth, config).axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    for name, values in depth.items():
        medians = np.median(values.reshape(50, -1).clip(1e-12), axis=1)
        np.testing.assert_allclose(drawn[name], medians, rtol=1e-5)


@pytest.mark.slow
def test_base_loses_its_singular_values_as_far_as_known():
    """Linear MLP-7, orthogonal weights under uniform masks: means known from one independent draw.

    One draw is within four standard deviations of the mean over seeds.
    """
    known = {0.05: 2.9e-5, 0.2: 3e-3}
    images = jnp.zeros((1, 28, 28, 1))
    model = models.create("mlp7", activation="identity", kernel_init=nn.initializers.orthogonal())

    @jax.jit
    def values(key):
        params = model.init(key, images)
        found = []
        for density in known:
            densities = eoi.budgets.uniform(params, density, layout=models.layout)
            mask = eoi.masks.random(jax.random.fold_in(key, 1), params, densities)
            network = functools.partial(model.apply, eoi.masked(params, mask).params)
            found.append(eoi.spectrum.singular_values(lambda x, f=network: f(x[None])[0], images))
        return jnp.stack(found)

    drawn = np.stack([values(jax.random.key(seed)).mean(axis=(1, 2)) for seed in range(8)])
    for mean, means in zip(known.values(), drawn.T, strict=True):
        assert abs(means.mean() - mean) < 4 * means.std(ddof=1)
        assert means.std(ddof=1) < 0.4 * means.mean()


@pytest.mark.slow
def test_a_spectrum_that_is_not_finite_is_no_result(tmp_path):
    diverging = config.Spectrum(activation="identity", data="made", depth=3, width=20, scale=1e30)
    with refuses("scale", "1e+30", "seed 1", error=FloatingPointError):
        measure.spectrum(diverging, tmp_path, runs.Runtime(runs=str(tmp_path)))
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_steps_change_a_network_alike_over_densities_with_smupar_only(tmp_path):
    settings = coordinate_check.Config(quick=True, output=str(tmp_path / "check.png"))
    found = coordinate_check.run(settings, Console(quiet=True))
    assert imread(settings.output).std() > 0
    relative = {name: values.changes / values.changes[0] for name, values in found.items()}
    # A sixteenth of the weights: a step moves a unit by as much of what it moves a dense one.
    assert np.abs(relative["SμPar"] - 1).max() < 0.2
    assert relative["rescaled"][-1] < 1.5 / 16
    assert relative["masked"][-1] < relative["rescaled"][-1]
    losses = np.stack([found[name].losses for name in coordinate_check.PARAMETRIZATIONS])
    assert losses.shape == (3, 3, 3)
    np.testing.assert_allclose(losses[0, 0], losses[1, 0], rtol=1e-5)  # dense: all the same
    np.testing.assert_allclose(losses[0, 0], losses[2, 0], rtol=1e-5)
