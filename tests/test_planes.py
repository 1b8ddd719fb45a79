"""Laws of rotations in planes of a pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses

from experiments import config, data, models
from experiments.studies import planes
from experiments.training import starts


@pytest.mark.parametrize("size", [2, 3, 16, 21])
def test_planes_are_those_of_the_pattern(size):
    found = {tuple(pair) for pair in planes.planes("butterfly", size).tolist()}
    bits = [2**k for k in range(size.bit_length())]
    assert found == {(i, i ^ b) for i in range(size) for b in bits if i < (i ^ b) < size}
    found = {tuple(pair) for pair in planes.planes("banded", size).tolist()}
    assert found == {(i, j) for i in range(size) for j in range(i + 1, min(i + 9, size))}


@pytest.mark.parametrize(("shape", "count"), [((40, 24), 300), ((128, 10), 1107)])
@pytest.mark.parametrize("pattern", planes.PATTERNS)
def test_matrices_are_orthogonal_within_their_count_and_pattern(pattern, shape, count):
    matrix = np.asarray(planes.orthogonal(jax.random.key(0), shape, count, pattern=pattern))
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(shape[1]), atol=1e-5)
    nonzeros = np.count_nonzero(matrix)
    # The next rotation adds one to a vector at most.
    assert count - 2 * shape[1] < nonzeros <= count
    other = planes.orthogonal(jax.random.key(1), shape, count, pattern=pattern)
    assert not np.array_equal(matrix, other)


def test_a_band_stays_near_the_diagonal():
    """After r rotations of a coordinate nothing is farther away than 8 r."""
    size = 128
    matrix = planes.orthogonal(jax.random.key(0), (size, size), 4 * size, pattern="banded")
    i, j = np.nonzero(np.asarray(matrix))
    free = planes.orthogonal(jax.random.key(0), (size, size), 4 * size, pattern="butterfly")
    k, m = np.nonzero(np.asarray(free))
    assert np.abs(i - j).mean() < 16 < np.abs(k - m).mean()


def test_networks_have_exact_counts_and_orthogonal_kernels():
    guided = config.Spectrum(data="made", depth=4, width=20, density=0.2, planes="banded")
    start = starts.make(guided, 1, data.load("made"))
    assert starts.count(start)[0] == round(0.2 * starts.count(start)[1])
    kernels = start.variables["params"]["hidden"]["linear"]["kernel"]
    gram = jnp.einsum("lij,lik->ljk", kernels, kernels)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(20), gram.shape), atol=1e-5)
    assert not np.array_equal(kernels[0], kernels[1])


def test_what_has_no_pattern_is_refused():
    with refuses("pattern", "pattern='circle'", "butterfly"):
        planes.planes("circle", 4)
    params = {"kernel": jnp.zeros((3, 3, 8, 8))}
    with refuses("params['kernel']", (3, 3, 8, 8)):
        planes.start(
            jax.random.key(0), params, {"kernel": 0.5}, pattern="banded", layout=models.layout
        )
    for ignored in ({"angles": "80"}, {"method": "eis"}):
        with refuses("planes", "planes='banded'", "independent"):
            config.Spectrum(planes="banded", **ignored)
