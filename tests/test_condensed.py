"""The condensed form: equal to the dense matrix in storage, products and derivatives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

import eoi_jax as eoi
from eoi_jax import condensed

KEY = jax.random.key(29)
EYE = jnp.eye(4)


def matrix(seed=0, shape=(6, 5)):
    """A third of the entries, an output without any, and an input that nobody sees."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=shape) * (rng.random(shape) < 1 / 3)
    dense[:, 1] = dense[2] = 0
    return jnp.asarray(dense, jnp.float32)


@pytest.mark.slow
@given(seed=st.integers(0, 15))
def test_ways_to_dense_and_back_lose_nothing(seed):
    dense = matrix(seed)
    w = condensed.from_dense(dense)
    assert w.values.shape == w.rows.shape == (5, (dense != 0).sum(0).max())
    np.testing.assert_array_equal(w.to_dense(), dense)
    np.testing.assert_array_equal(w.mask(), dense != 0)
    assert w.density == pytest.approx(float((dense != 0).mean()))
    assert (np.diff(w.rows, axis=1)[w.rows[:, 1:] < 6] > 0).all()
    assert (w.values[w.rows == 6] == 0).all()


@pytest.mark.slow
def test_stacks():
    w = condensed.from_dense(matrix())
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), w)
    stack = dataclasses.replace(stack, rows=jnp.stack([w.rows, w.rows]))
    assert stack.shape == (2, 6, 5)
    np.testing.assert_array_equal(stack.to_dense(), [matrix(), 2 * matrix()])
    assert float(jax.jit(lambda w: w.density)(stack)) == pytest.approx(w.density)
    x = jax.random.normal(KEY, (3, 6))
    found = jax.vmap(condensed.matmul, (None, 0))(x, stack)
    np.testing.assert_allclose(found, jnp.stack([x @ matrix(), 2 * x @ matrix()]), atol=1e-6)


def test_a_mask_keeps_zeros_and_a_matrix_of_zeros_has_products():
    mask = np.tril(np.ones((4, 4), bool))
    w = condensed.from_dense(0 * EYE, mask)
    assert w.values.shape == (4, 4)
    np.testing.assert_array_equal(w.mask(), mask)
    empty = condensed.from_dense(0 * EYE)
    assert empty.density == 0
    np.testing.assert_array_equal(EYE @ empty, 0 * EYE)


@pytest.mark.slow
def test_a_matching_draw_is_stored_without_loss():
    dense = eoi.orthogonal(KEY, (16, 16), 1 / 4, planes=eoi.planes.matching)
    np.testing.assert_array_equal(condensed.from_dense(dense).to_dense(), dense)


@pytest.mark.slow
def test_products_and_gradients_are_those_of_the_dense_matrix():
    dense = matrix(1)
    w, x = condensed.from_dense(dense), jax.random.normal(KEY, (2, 3, 6))

    @jax.jit
    def products(x, values):
        y, pull = jax.vjp(lambda x, v: x @ dataclasses.replace(w, values=v), x, values)
        return y, *pull(jnp.cos(y))

    y, dx, dw = products(x, w.values)
    exact = np.asarray(dense, np.float64)
    expected = np.asarray(x, np.float64) @ exact
    np.testing.assert_allclose(y, expected, atol=1e-5)
    dy = np.cos(expected)
    np.testing.assert_allclose(dx, dy @ exact.T, atol=1e-5)
    grad = np.asarray(x, np.float64).reshape(-1, 6).T @ dy.reshape(-1, 5)
    found = dataclasses.replace(w, values=dw).to_dense()
    np.testing.assert_allclose(found, grad * (exact != 0), atol=1e-5)
    # What is no entry has no gradient: plain optimizers leave the padding zero.
    assert (dw[w.rows == 6] == 0).all()
    np.testing.assert_allclose(np.asarray(x) @ w, expected, atol=1e-5)
    np.testing.assert_allclose(x[0, 0] @ w, expected[0, 0], atol=1e-5)
    assert (x[:, :0] @ w).shape == (2, 0, 5)


@pytest.mark.slow
def test_derivatives_of_both_modes_and_orders():
    w, x = condensed.from_dense(matrix(1)), jax.random.normal(KEY, (2, 6))

    def product(x, values):
        return jnp.tanh(x @ dataclasses.replace(w, values=values))

    check_grads(product, (x, w.values), order=2, atol=1e-2, rtol=1e-2)


def test_no_array_of_weights_by_examples_is_formed():
    """It would have 16 MiB, the output and the inputs have a quarter of one each."""
    w = condensed.from_dense(jnp.ones((64, 64)))
    x = jnp.ones((1024, 64))

    def loss(x, values):
        return ((x @ dataclasses.replace(w, values=values)) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w.values).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 64 * 1024 * 4 / 4


def test_narrow_products_are_summed_in_float32():
    """In bfloat16 a sum of ones stays at 256."""
    w = condensed.from_dense(jnp.ones((512, 2), jnp.bfloat16))
    y = jnp.ones((3, 512), jnp.bfloat16) @ w
    assert y.dtype == jnp.bfloat16
    assert (y == 512).all()
    assert (jnp.ones((3, 512)) @ w).dtype == jnp.float32


def test_what_makes_no_sense_is_refused():
    w = condensed.from_dense(EYE)
    stack = jax.tree.map(lambda leaf: leaf[None], w)
    for bad, named in (
        (lambda: condensed.from_dense(jnp.ones((2, 4, 4))), "matrix.shape=(2, 4, 4)"),
        (lambda: condensed.from_dense(jnp.ones((0, 4))), "matrix.shape=(0, 4)"),
        (lambda: condensed.from_dense(jnp.eye(4, dtype=int)), "matrix.dtype='int32'"),
        (lambda: condensed.from_dense(EYE, EYE[:2] > 0), "mask.shape=(2, 4)"),
        (lambda: condensed.from_dense(EYE, EYE.at[2, 2].set(0) > 0), "at (2, 2)"),
        (lambda: jax.jit(condensed.from_dense)(EYE), "matrix or mask is traced"),
        (lambda: condensed.matmul(jnp.ones((2, 3)), w), "x.shape=(2, 3)"),
        (lambda: condensed.matmul(jnp.ones(()), w), "x.shape=()"),
        (lambda: condensed.matmul(jnp.ones((2, 4), int), w), "x.dtype='int32'"),
        (lambda: condensed.matmul("x", w), "x=str"),
        (lambda: condensed.matmul(EYE, stack), "w=(1, 4, 4)"),
        (lambda: condensed.matmul(EYE, EYE), "w='ArrayImpl'"),
    ):
        with refuses(named):
            bad()
