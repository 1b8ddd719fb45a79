"""Parameters whose axes are named (Flax's SPMD): a mask has those of its kernel, or none."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec

import eoi_jax as eoi

X = jnp.ones((4, 8))
LINEN = {"partitioned": nn.with_partitioning, "logically": nn.with_logical_partitioning}
OPTIMIZERS = {
    "mask_updates": lambda mask: optax.chain(optax.sgd(0.1), eoi.mask_updates(mask)),
    "static_sparse": lambda mask: eoi.static_sparse(optax.adam(0.1), mask),
    "rigl": lambda mask: eoi.rigl(optax.adam(0.1), mask, update_every=2),
    "set": lambda mask: eoi.sparse_evolutionary_training(
        optax.adam(0.1), mask, key=jax.random.key(0), update_every=2
    ),
}


class Net(nn.Module):
    """A kernel, a bias and a scale whose axes are named."""

    annotate: object

    @nn.compact
    def __call__(self, x):
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        x = nn.Dense(
            16,
            kernel_init=self.annotate(eoi.dense(density=0.3), (None, "model")),
            bias_init=self.annotate(zeros, ("model",)),
        )(x)
        x = nn.LayerNorm(scale_init=self.annotate(ones, ("model",)))(x)
        return nn.Dense(3)(x)


def mesh_of(kind):
    return jax.make_mesh((1,), ("model",), axis_types=(kind,))


def scalars(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if np.ndim(leaf) == 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("annotation", LINEN)
def test_the_workflow_of_linen(annotation, optimizer, kind):
    """eval_shape, get_sharding, jit with out_shardings; then train."""
    net = Net(LINEN[annotation])
    tx = OPTIMIZERS[optimizer](eoi.masks.support)

    def make(key):
        params = net.init(key, X)["params"]
        return TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    mesh = mesh_of(kind)
    shardings = nn.get_sharding(jax.eval_shape(make, jax.random.key(0)), mesh)
    state = jax.jit(make, out_shardings=shardings)(jax.random.key(0))
    mask = optax.tree.get(state.opt_state, "mask")
    specs = nn.get_partition_spec(mask)
    assert specs["Dense_0"]["kernel"] == PartitionSpec(None, "model")
    for path in (("Dense_0", "bias"), ("LayerNorm_0", "scale"), ("Dense_1", "bias")):
        assert specs[path[0]][path[1]] == PartitionSpec()
    # The mask is that of the parameters, boxes or not.
    before = eoi.masks.density(mask)
    assert before == eoi.masks.density(eoi.masks.support(state.params))
    if kind == AxisType.Auto:
        grads = jax.tree.map(jnp.ones_like, state.params)
        state = jax.jit(lambda state: state.apply_gradients(grads=grads))(state)
        jax.tree.map(
            np.testing.assert_array_equal,
            state.params,
            eoi.masks.apply(optax.tree.get(state.opt_state, "mask"), state.params),
        )


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_workflow_of_nnx(optimizer):
    def annotated(init, *names):
        return nnx.with_partitioning(init, names)

    zeros = nnx.initializers.zeros_init()
    # Flax places an annotated parameter at once where a mesh is entered.
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        model = nnx.Linear(
            8,
            16,
            kernel_init=annotated(eoi.dense(density=0.3), None, "model"),
            bias_init=annotated(zeros, "model"),
            rngs=nnx.Rngs(0),
        )
        params = nnx.state(model, nnx.Param)
        tx = OPTIMIZERS[optimizer](eoi.masks.support)
        state = jax.jit(tx.init)(params)
        mask = optax.tree.get(state, "mask")
        [dense] = scalars(mask)
        assert bool(dense)
        specs = nnx.get_partition_spec(mask)
        assert jax.tree.leaves(specs["bias"], is_leaf=lambda s: isinstance(s, PartitionSpec)) == [
            PartitionSpec()
        ]
        nnx.get_named_sharding(mask, mesh_of(AxisType.Auto))
        updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def params_of(annotation):
    return Net(LINEN[annotation]).init(jax.random.key(0), X)["params"]


MASKS = {
    "support": lambda params: eoi.masks.support(params),
    "random": lambda params: eoi.masks.random(jax.random.key(0), params, 0.5),
    "top_k": lambda params: eoi.masks.top_k(eoi.criteria.magnitude(params), 0.5),
    "top_k of layers": lambda params: eoi.masks.top_k(
        eoi.criteria.magnitude(params), 0.5, scope="layer"
    ),
    "exact_orthogonal": lambda params: eoi.exact_orthogonal(jax.random.key(0), params, 0.5).mask,
    "sparsity_aware": lambda params: (
        eoi.sparsity_aware_orthogonal(jax.random.key(0), params, 0.5).mask
    ),
    "shuffle": lambda params: eoi.masks.shuffle(jax.random.key(1), eoi.masks.support(params)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_goes_back_into_every_function(name):
    params = params_of("partitioned")
    mask = MASKS[name](params)
    shardings = nn.get_sharding(jax.eval_shape(lambda: mask), mesh_of(AxisType.Auto))
    jax.jit(lambda: mask, out_shardings=shardings)()
    assert len(jax.tree.leaves(mask)) == len(jax.tree.leaves(params))
    start = eoi.masked(params, mask)
    assert jax.tree.structure(start.params) == jax.tree.structure(params)
    assert eoi.masks.overlap(mask, start.mask) == 1.0
    densities = eoi.masks.densities(mask)
    filled = eoi.masks.random(jax.random.key(2), params, densities)
    assert eoi.masks.density(filled) == eoi.masks.density(mask)
    # Masks made by other means keep the boxes, and fit as well.
    boxed = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(mask))
    assert eoi.masks.overlap(boxed, mask) == 1.0
    jax.tree.map(np.testing.assert_array_equal, eoi.masks.apply(boxed, params), start.params)


@pytest.mark.slow
def test_a_tree_that_differs_by_more_than_boxes_is_refused():
    params = params_of("partitioned")
    mask = eoi.masks.support(params)
    del mask["Dense_1"]["bias"]
    with pytest.raises(ValueError, match="Dense_1/bias"):
        eoi.masks.apply(mask, params)
