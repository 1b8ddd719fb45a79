"""Block-sparse layers train as masked dense ones do, and store only their blocks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import gram_error, refuses

import eoi_jax as eoi
from eoi_jax.blocks import BlockSparse
from eoi_jax.linen import BlockSparseDense
from eoi_jax.nnx import BlockSparseLinear

KEY = jax.random.key(3)
X = jax.random.normal(KEY, (5, 12))
Y = jnp.cos(jnp.arange(5 * 16.0)).reshape(5, 16)
BLOCKS = {"density": 0.5, "block_size": 2}


class Net(nn.Module):
    layer: type = nn.Dense
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        options = dict(self.options)
        x = nn.tanh(self.layer(12, name="first", **options)(x))
        return self.layer(16, name="last", **options)(x)


SPARSE = Net(BlockSparseDense, tuple(BLOCKS.items()))
NAMES = ("first", "last")


def dense_kernels(params, pattern):
    """Kernels and biases of nn.Dense, and masks of the kernels."""
    found, mask = {}, {}
    for name in NAMES:
        matrix = BlockSparse(params[name]["kernel"], **pattern[name])
        found[name] = {"kernel": matrix.to_dense(), "bias": params[name]["bias"]}
        mask[name] = {"kernel": matrix.mask(), "bias": jnp.array(True)}
    return found, mask


def step_of(tx, loss):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.slow
def test_training_is_that_of_masked_dense_layers_step_by_step():
    variables = SPARSE.init(KEY, X)
    pattern, params = variables["pattern"], variables["params"]
    dense, mask = dense_kernels(params, pattern)
    adamw = optax.adamw(1e-2, weight_decay=0.1)
    masked = eoi.static_sparse(adamw, mask)

    def loss(params):
        return ((SPARSE.apply({"params": params, "pattern": pattern}, X) - Y) ** 2).mean()

    step = step_of(adamw, loss)
    dense_step = step_of(masked, lambda p: ((Net().apply({"params": p}, X) - Y) ** 2).mean())
    state, dense_state = adamw.init(params), masked.init(dense)
    start = dense
    for _ in range(5):
        params, state = step(params, state)
        dense, dense_state = dense_step(dense, dense_state)
        found, _ = dense_kernels(params, pattern)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, dense)
    assert np.abs(start["last"]["kernel"] - dense["last"]["kernel"]).max() > 1e-2


@pytest.mark.slow
def test_only_blocks_are_stored_and_they_start_orthogonal():
    variables = SPARSE.init(KEY, X)
    dense, _ = dense_kernels(variables["params"], variables["pattern"])
    for name in NAMES:
        assert gram_error(dense[name]["kernel"]) < 2e-6
    even = BlockSparseDense(24, **BLOCKS).init(KEY, X)["params"]  # 3 blocks in each row of 6
    assert (even["kernel"].size, even["bias"].size) == (12 * 24 // 2, 24)
    state = optax.adam(1e-3).init(even)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 1 + 2 * (12 * 24 // 2 + 24)
    shapes = jax.eval_shape(SPARSE.init, KEY, X)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)


@pytest.mark.slow
def test_nnx_trains_with_its_own_optimizer_as_the_masked_dense_matrix_does():
    layer = BlockSparseLinear(12, 16, **BLOCKS, rngs=nnx.Rngs(0))
    matrix = layer.matrix()
    dense, mask = matrix.to_dense(), matrix.mask()
    assert gram_error(dense) < 2e-6
    optimizer = nnx.Optimizer(layer, optax.adamw(1e-2), wrt=nnx.Param)
    tx = eoi.static_sparse(optax.adamw(1e-2), {"kernel": mask, "bias": jnp.array(True)})
    params = {"kernel": dense, "bias": jnp.zeros(16)}
    step = step_of(tx, lambda p: ((X @ p["kernel"] + p["bias"] - Y) ** 2).mean())
    state = tx.init(params)
    graded = nnx.jit(nnx.grad(lambda layer: ((layer(X) - Y) ** 2).mean()))
    for _ in range(3):
        optimizer.update(layer, graded(layer))
        params, state = step(params, state)
        np.testing.assert_allclose(layer.matrix().to_dense(), params["kernel"], atol=1e-5)
        np.testing.assert_allclose(layer.bias[...], params["bias"], atol=1e-5)


def make(kind, **options):
    """A layer of 12 to 16 as a function, and its parameters."""
    if kind == "nnx":
        layer = BlockSparseLinear(12, 16, **BLOCKS, **options, rngs=nnx.Rngs(0))
        return layer, nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    layer = BlockSparseDense(16, **BLOCKS, **options)
    variables = layer.init(KEY, X)
    return lambda x: layer.apply(variables, x), variables["params"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_options_are_those_of_a_dense_layer(kind):
    apply, params = make(kind, use_bias=False, param_dtype=jnp.bfloat16, scale=2.0)
    assert set(params) == {"kernel"}
    assert params["kernel"].dtype == jnp.bfloat16
    assert apply(X).dtype == jnp.float32
    np.testing.assert_allclose(
        jnp.linalg.norm(apply(X), axis=1), 2 * jnp.linalg.norm(X, axis=1), rtol=1e-2
    )
    apply, params = make(kind, dtype=jnp.bfloat16, bias_init=nn.initializers.ones)
    assert params["kernel"].dtype == jnp.float32
    assert apply(X).dtype == jnp.bfloat16
    assert (apply(jnp.zeros((2, 3, 12), int)) == 1).all()
    with refuses("x.shape=(5, 13)"):
        apply(jnp.ones((5, 13)))
    with refuses("implementation='cuda'"):
        make(kind, implementation="cuda")[0](X)


@pytest.mark.slow
def test_linen_wants_the_pattern():
    variables = SPARSE.init(KEY, X)
    with refuses("variables['pattern']", "first"):
        SPARSE.apply({"params": variables["params"]}, X)
