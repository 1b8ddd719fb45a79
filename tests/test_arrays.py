"""Arrays of NumPy in the byte order of another machine have the results of their values."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eoi_jax as eoi
from eoi_jax._internal.arrays import native

RNG = np.random.default_rng(0)
KERNEL = np.float32(RNG.normal(size=(6, 6)) * (RNG.random((6, 6)) < 0.5))
PARAMS = {"a": {"kernel": KERNEL, "bias": np.ones(6, np.float32)}}
MASK = {"a": {"kernel": KERNEL != 0, "bias": np.array(True)}}
BATCH = np.float32(RNG.normal(size=(4, 6)))
KEY = jax.random.key(0)


def apply(params, x):
    return jnp.maximum(x @ params["a"]["kernel"], 0)


def loss(params, x):
    return jnp.sum(apply(params, x) ** 2)


def turn(matrix):
    return eoi.rotation.rotate(matrix, eoi.givens.sample(KEY, 6, 4))


FUNCTIONS = {
    "apply": (lambda params: eoi.masks.apply(MASK, params), PARAMS),
    "support": (eoi.masks.support, PARAMS),
    "top_k": (lambda scores: eoi.masks.top_k(scores, 0.5), {"k": np.abs(KERNEL)}),
    "magnitude": (eoi.criteria.magnitude, PARAMS),
    "snip": (lambda params, x: eoi.criteria.snip(loss, params, x), (PARAMS, BATCH)),
    "synflow": (lambda params, x: eoi.criteria.synflow(apply, params, x), (PARAMS, BATCH)),
    "prune": (lambda params: eoi.criteria.prune(eoi.criteria.magnitude, params, 0.5), PARAMS),
    "masked": (lambda params: eoi.masked(params, MASK), PARAMS),
    "approximate_isometry": (lambda params: eoi.approximate_isometry(params, MASK), PARAMS),
    "exact_orthogonal": (lambda params: eoi.exact_orthogonal(KEY, params, 0.8), PARAMS),
    "kernel_singular_values": (eoi.spectrum.kernel_singular_values, PARAMS),
    "orthogonality_error": (eoi.spectrum.orthogonality_error, KERNEL),
    "singular_values": (lambda x: eoi.spectrum.singular_values(jnp.tanh, x), BATCH),
    "rotate": (turn, KERNEL),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FUNCTIONS)
def test_the_other_byte_order_has_the_same_results(what):
    function, arguments = FUNCTIONS[what]
    swapped = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype.newbyteorder("S")), arguments)
    assert not any(leaf.dtype.isnative for leaf in jax.tree.leaves(swapped))
    found, expected = (
        function(*given) if isinstance(given, tuple) else function(given)
        for given in (swapped, arguments)
    )
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


def test_all_else_is_left_as_it_is():
    for array in (KERNEL, jnp.ones(2), np.zeros(2, jnp.bfloat16), np.array([True]), 1.0, None):
        assert native(array) is array
    for dtype in (">f2", ">f4", ">f8", ">i4", ">u8", ">c16"):
        array = np.arange(3).astype(dtype)
        assert native(array).dtype.isnative
        np.testing.assert_array_equal(native(array), array)
