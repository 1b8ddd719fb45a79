"""The experiments on spectra measure what they say."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import eoi_jax as eoi
from eoi_jax import mean_field
from experiments import models, spectra, universality

PNG = b"\x89PNG\r\n\x1a\n"


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

    for depth, values in zip((2, 5), found, strict=True):
        jacobian = np.asarray(jax.jacobian(network)(x, depth))
        expected = np.linalg.svd(jacobian, compute_uv=False)
        np.testing.assert_allclose(values, expected, rtol=1e-10, atol=1e-12)


def test_distances_are_zero_for_the_law_itself_and_known_for_a_shift():
    law = universality.predicted("tanh", 4)
    values = law.quantile((np.arange(4000) + 0.5) / 4000)
    distance, error = universality.compare(values, law)
    assert distance < 1e-12
    assert error < 1e-3
    assert universality.compare(values + 0.25, law)[0] == pytest.approx(0.25)


def test_critical_networks_have_a_mean_square_of_one():
    for activation, q in universality.VARIANCES.items():
        sigma_w, _ = mean_field.critical_line(activation, q)
        assert mean_field.chi(activation, sigma_w, q) == pytest.approx(1.0)


def test_universality_saves_its_table_and_pictures(tmp_path):
    config = universality.Config(
        densities=(0.25,), depths=(2, 4), widths=(16,), seeds=2, output=str(tmp_path / "u")
    )
    rows = universality.run(config, Console(quiet=True))
    assert len(rows) == 3 * 2 * 2 * 2  # activations, depths, weights, seeds
    assert all(np.isfinite(row.wasserstein) and row.wasserstein > 0 for row in rows)
    assert len((tmp_path / "u.csv").read_text().splitlines()) == 1 + len(rows)
    for name in ("u.png", "u_laws.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_spectra_saves_its_pictures_and_eoi_is_an_isometry(tmp_path):
    config = spectra.Config(
        layers=50,
        width=16,
        densities=(0.2, 0.5),
        samples=2,
        output=str(tmp_path / "s"),
        quick=False,
    )
    depth = spectra.against_depth(config)
    assert depth["EOI"].shape == (50, 4, 16)
    assert depth["EOI"][-1].mean() > 0.5
    assert depth["masked orthogonal"][-1].max() < 1e-3
    quick = dataclasses.replace(config, quick=True)
    images = jax.random.normal(jax.random.key(0), (2, 28, 28, 1))
    found = spectra.against_density(quick, images)
    np.testing.assert_allclose(found["identity", "EOI", 0.2], 1.0, atol=2e-5)
    base = found["identity", "masked orthogonal", 0.2]
    assert base.max() < 0.1
    spectra.plot_depth(depth, config, tmp_path / "depth.png")
    spectra.plot_density(found, config, "noise", tmp_path / "density.png")
    for name in ("depth.png", "density.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert spectra.table_of(found, config, "noise").row_count == 4


@pytest.mark.parametrize(("density", "mean"), [(0.05, 2.9e-5), (0.2, 3e-3)])
def test_base_loses_its_singular_values_as_far_as_known(density, mean):
    """Linear MLP-7, orthogonal weights under uniform masks: means known from one independent draw.

    One draw is within four standard deviations of the mean over seeds.
    """
    images = jnp.zeros((1, 28, 28, 1))
    model = models.create("mlp7", activation="identity", kernel_init=nn.initializers.orthogonal())

    @jax.jit
    def values(key):
        params = model.init(key, images)
        densities = eoi.budgets.uniform(params, density, layout=models.layout)
        mask = eoi.masks.random(jax.random.fold_in(key, 1), params, densities)
        start = eoi.masked(params, mask).params
        return eoi.spectrum.singular_values(lambda x: model.apply(start, x[None])[0], images)

    means = np.array([values(jax.random.key(seed)).mean() for seed in range(10)])
    assert abs(means.mean() - mean) < 4 * means.std(ddof=1)
    assert means.std(ddof=1) < 0.4 * means.mean()
