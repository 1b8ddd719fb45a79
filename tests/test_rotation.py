import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eoi_jax import givens, rotation
from eoi_jax._internal import waves

KEY = jax.random.key(11)


def float64_product(rotations, size):
    """The product of the sequence in float64 NumPy, as 2 x 2 blocks put into identities."""
    product = np.eye(size)
    for i, j, theta in zip(*(np.asarray(x).tolist() for x in rotations), strict=True):
        one = np.eye(size)
        one[i, i] = one[j, j] = np.cos(theta)
        one[i, j], one[j, i] = np.sin(theta), -np.sin(theta)
        product = one @ product
    return product


@pytest.mark.slow
@given(st.integers(0, 2**31 - 1), st.sampled_from([(2, 1), (9, 40), (33, 70)]))
def test_waves_give_the_sequential_product(seed, sizes):
    size, length = sizes
    rotations = givens.sample(jax.random.key(seed), size, length)
    oracle = float64_product(rotations, size)
    np.testing.assert_allclose(rotation.as_matrix(rotations, size), oracle, atol=2e-6)
    np.testing.assert_allclose(rotation.rotate(jnp.eye(size), rotations, axis=0), oracle, atol=2e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_rotate_multiplies_the_vectors_along_the_axis(axis):
    x = jax.random.normal(KEY, (6, 8, 10))
    size = x.shape[axis]
    rotations = givens.sample(KEY, size, 25)
    oracle = np.moveaxis(
        np.tensordot(float64_product(rotations, size), np.asarray(x), (1, axis)), 0, axis
    )
    turned = rotation.rotate(x, rotations, axis=axis)
    np.testing.assert_allclose(turned, oracle, atol=1e-5)
    chex.assert_equal_shape([turned, x])


@pytest.mark.slow
def test_rotating_preserves_norms_and_composes():
    x = jax.random.normal(KEY, (5, 30))
    rotations = givens.sample(KEY, 30, 200)
    first = jax.tree.map(lambda leaf: leaf[:77], rotations)
    second = jax.tree.map(lambda leaf: leaf[77:], rotations)
    turned = rotation.rotate(x, rotations)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=1), jnp.linalg.norm(x, axis=1), rtol=1e-5
    )
    twice = rotation.rotate(rotation.rotate(x, first), second)
    np.testing.assert_allclose(turned, twice, atol=1e-5)


def test_no_rotation_is_the_identity():
    x = jax.random.normal(KEY, (4, 6))
    np.testing.assert_array_equal(rotation.rotate(x, givens.sample(KEY, 6, 0)), x)


@pytest.mark.slow
def test_jit_and_vmap_agree_with_the_loop():
    keys = jax.random.split(KEY, 3)
    x = jax.random.normal(KEY, (3, 4, 12))

    def turn(key, x):
        return rotation.rotate(x, givens.sample(key, 12, 40))

    looped = jnp.stack([turn(k, a) for k, a in zip(keys, x, strict=True)])
    np.testing.assert_allclose(jax.vmap(turn)(keys, x), looped, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(turn))(keys, x), looped, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_cast_last(dtype):
    x = jax.random.normal(KEY, (4, 20), dtype)
    rotations = givens.sample(KEY, 20, 100)
    wide = rotation.rotate(x.astype(jnp.float32), rotations)
    turned = rotation.rotate(x, rotations)
    chex.assert_type(turned, dtype)
    np.testing.assert_array_equal(turned, wide.astype(dtype))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_float64_is_float64_throughout():
    rotations = givens.sample(KEY, 30, 300, dtype=jnp.float64)
    turned = rotation.rotate(jnp.eye(30, dtype=jnp.float64), rotations, axis=0)
    np.testing.assert_allclose(turned, float64_product(rotations, 30), atol=1e-13)


@pytest.mark.slow
def test_gained_counts_follow_the_floats():
    # The same plane turned forth and back: (0, 1) by θ, then (1, 0) by θ, is the identity.
    forth_and_back = givens.from_pairs(KEY, [(0, 1), (1, 0), (1, 2)], angles=0.7)
    rows, gained = waves.rotate_and_count(
        jnp.eye(3), forth_and_back, givens.waves(forth_and_back, 3)
    )
    assert gained.tolist() == [2, -2, 2]
    np.testing.assert_allclose(rows, float64_product(forth_and_back, 3), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rotation.rotate(jnp.eye(4), givens.sample(KEY, 9, 50)),
            r"rotations\[\d+\] has the plane \(\d, \d\), outside .* in \[0, 4\)",
        ),
        (
            lambda: rotation.rotate(jnp.eye(4, dtype=int), givens.sample(KEY, 4, 5)),
            r"matrix.dtype='int32'",
        ),
        (
            lambda: rotation.rotate(jnp.eye(4), givens.sample(KEY, 4, 5), axis=2),
            r"axis=2",
        ),
        (
            lambda: rotation.rotate(jnp.ones((3, 1)), givens.sample(KEY, 4, 5)),
            r"matrix.shape\[1\]=1",
        ),
        (
            lambda: rotation.as_matrix(givens.sample(KEY, 9, 50), 4),
            r"rotations\[\d+\] has the plane \(\d, \d\), outside .* in \[0, 4\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
