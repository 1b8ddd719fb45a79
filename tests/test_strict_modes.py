"""Users may forbid implicit promotion of dtypes and ranks: the library runs there all the same."""

import jax
import jax.numpy as jnp
import optax
import pytest

import eoi_jax as eoi

KEY = jax.random.key(0)
KERNEL = {"kernel": jnp.eye(6, 4), "bias": jnp.zeros(4)}


def step_under_a_mask():
    tx = eoi.static_sparse(optax.sgd(1e-3, momentum=0.9), eoi.masks.support(KERNEL))
    return tx.update(KERNEL, tx.init(KERNEL), KERNEL)


def products_of_blocks(dtype=jnp.float32):
    w = eoi.blocks.orthogonal(KEY, (6, 8), 0.5, block_size=2, dtype=dtype)
    y, pull = jax.vjp(lambda x, w: x @ w, jnp.ones((3, 6), dtype), w)
    return pull(y), w.T.to_dense(), eoi.blocks.from_dense(w.to_dense(), 2)


def steps_of_blocks():
    w = eoi.blocks.growable(eoi.blocks.orthogonal(KEY, (8, 8), 0.5, block_size=2))
    norms = eoi.blocks.gradient_norms(jnp.ones((3, 8)), jnp.ones((3, 8)), w.block_shape)
    return eoi.blocks.rigl_step(eoi.blocks.set_step(KEY, w, 0.5).matrix, norms, 0.5)


CALLS = {
    "orthogonal": lambda: eoi.orthogonal(KEY, (10, 20), 0.2),
    "traced density": lambda: jax.jit(lambda d: eoi.orthogonal(KEY, (10, 20), d))(0.2),
    "bfloat16": lambda: eoi.orthogonal(KEY, (10, 20), 0.2, scale=2.0, dtype=jnp.bfloat16),
    "options": lambda: eoi.orthogonal(KEY, (10, 20), 0.2, permute=True, angles=0.3),
    "conv": lambda: eoi.conv(0.2, feature_group_count=2)(KEY, (3, 3, 8, 8), jnp.float32),
    "support": lambda: eoi.givens.support(eoi.givens.sample(KEY, 10, 5), (10, 4)),
    "rotate": lambda: eoi.rotation.rotate(jnp.ones((3, 10)), eoi.givens.sample(KEY, 10, 5)),
    "fill": lambda: eoi.masks.fill(KEY, eoi.masks.support(KERNEL), 0.5),
    "static_sparse": step_under_a_mask,
    "blocks": products_of_blocks,
    "blocks of bfloat16": lambda: products_of_blocks(jnp.bfloat16),
    "steps of blocks": steps_of_blocks,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_no_implicit_promotion(name):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        CALLS[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["orthogonal", "options", "conv", "static_sparse", "blocks"])
def test_no_nan_on_the_way(name):
    with jax.debug_nans(True):
        CALLS[name]()
