"""Laws of the patterns of planes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eoi_jax as eoi
from experiments import config, data
from experiments.studies import planes
from experiments.training import starts


@pytest.mark.parametrize("size", [2, 3, 16, 21])
def test_planes_are_those_of_the_pattern(size):
    found = set(map(tuple, np.argwhere(np.triu(planes.butterfly(size), 1)).tolist()))
    bits = [2**k for k in range(size.bit_length())]
    assert found == {(i, i ^ b) for i in range(size) for b in bits if i < (i ^ b) < size}
    found = set(map(tuple, np.argwhere(np.triu(planes.banded(size), 1)).tolist()))
    assert found == {(i, j) for i in range(size) for j in range(i + 1, min(i + 9, size))}


@pytest.mark.slow
def test_a_band_stays_near_the_diagonal():
    """After r rotations of a coordinate nothing is farther away than 8 r."""
    distance = {}
    for name in ("banded", "butterfly"):
        key = jax.random.key(0)
        matrix = eoi.orthogonal(key, (128, 128), 4 / 128, planes=planes.LAWS[name])
        i, j = np.nonzero(np.asarray(matrix))
        distance[name] = np.abs(i - j).mean()
    assert distance["banded"] < 16 < distance["butterfly"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["banded", "butterfly"])
def test_networks_have_exact_counts_and_orthogonal_kernels(name):
    guided = config.Spectrum(data="made", depth=4, width=20, density=0.2, planes=name)
    start = starts.make(guided, 1, data.load("made"))
    assert starts.count(start)[0] == round(0.2 * starts.count(start)[1])
    kernels = start.variables["params"]["hidden"]["linear"]["kernel"]
    gram = jnp.einsum("lij,lik->ljk", kernels, kernels)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(20), gram.shape), atol=1e-5)
    assert not np.array_equal(kernels[0], kernels[1])
