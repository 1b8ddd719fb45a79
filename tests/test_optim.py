"""Laws of the sparse optimizers, over one table of optimizers.

Each optimizer is compiled once, as a whole run of ``STEPS`` steps that starts from weights which
are dirty off the mask, and in which another mask is swapped in halfway. The laws read that run.
"""

import functools
import itertools
from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.core import freeze
from flax.training.train_state import TrainState
from helpers import refuses

from eoi_jax import dynamic, masks, networks, optim
from eoi_jax.typing import Layout

STEPS = 6
SWAP = 3  # the second mask rules from this step on


class Row(NamedTuple):
    """One optimizer, and which laws beyond the common ones it obeys."""

    make: object
    # It treats each kept weight, or all kept weights of a leaf, as if there were no others.
    ignores_zeros: bool = True
    # The off-mask value that its accumulators start from.
    floor: float = 0.0
    # How many arrays of a kernel's shape its state has for each kernel, or more.
    copies: int = 1


def schedule(step):
    return 0.1 / (1 + step)


OPTIMIZERS = {
    "sgd": Row(lambda: optax.sgd(0.1), copies=0),
    "nesterov": Row(lambda: optax.sgd(schedule, 0.9, nesterov=True)),
    "adam": Row(lambda: optax.adam(0.1), copies=2),
    "adamw": Row(lambda: optax.adamw(0.1, weight_decay=0.1), copies=2),
    "nadamw": Row(lambda: optax.nadamw(0.1), copies=2),
    "radam": Row(lambda: optax.radam(0.1), copies=2),
    "adabelief": Row(lambda: optax.adabelief(0.1), copies=2),
    "lion": Row(lambda: optax.lion(0.1, weight_decay=0.1)),
    "rmsprop": Row(lambda: optax.rmsprop(0.1, momentum=0.9, centered=True), copies=3),
    "adagrad": Row(lambda: optax.adagrad(0.1), floor=0.1),
    "yogi": Row(lambda: optax.yogi(0.1), floor=1e-6, copies=2),
    "rprop": Row(lambda: optax.rprop(0.1), floor=0.1, copies=2),
    "novograd": Row(lambda: optax.novograd(0.1)),
    "lamb": Row(lambda: optax.lamb(0.1, weight_decay=0.1), copies=2),
    "lars": Row(lambda: optax.lars(0.1, weight_decay=0.1)),
    "sm3": Row(lambda: optax.sm3(0.1), ignores_zeros=False),
    "adafactor": Row(
        lambda: optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9),
        ignores_zeros=False,
    ),
    "muon": Row(lambda: optax.contrib.muon(0.1, weight_decay=0.1), ignores_zeros=False),
    "prodigy": Row(lambda: optax.contrib.prodigy(0.1, estim_lr0=0.1), copies=4),
    "schedule_free_sgd": Row(lambda: optax.contrib.schedule_free_sgd(0.1, weight_decay=0.1)),
    "schedule_free_adamw": Row(lambda: optax.contrib.schedule_free_adamw(0.1), copies=2),
    "lbfgs": Row(lambda: optax.lbfgs(0.1, linesearch=None), copies=2),
    "inject_hyperparams": Row(
        lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=schedule), copies=2
    ),
    "multi_steps": Row(lambda: optax.MultiSteps(optax.adam(0.1), 2), copies=3),
    "apply_if_finite": Row(lambda: optax.apply_if_finite(optax.adam(0.1), 2), copies=2),
    "clipped": Row(lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)), copies=2),
    "decayed": Row(lambda: optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1, 0.9))),
    "averaged": Row(lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9))),
    "centralized": Row(
        lambda: optax.chain(optax.centralize(), optax.adam(0.1)), ignores_zeros=False, copies=2
    ),
    "partitioned": Row(
        lambda: optax.partition(
            {"a": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)},
            {"dense": "a", "layers": "b", "norm": "a"},
        ),
    ),
}


def example_params(seed=0):
    """A kernel, a stack of kernels as a scan over layers makes it, and leaves that stay dense."""
    rng = np.random.default_rng(seed)
    return {
        "dense": {"bias": rng.normal(size=5), "kernel": rng.normal(size=(7, 5))},
        "layers": {"bias": rng.normal(size=(2, 5)), "kernel": rng.normal(size=(2, 5, 5))},
        "norm": {"scale": rng.normal(size=5)},
    }


def as_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def example_mask(seed):
    rng = np.random.default_rng(seed)
    dense = jnp.array(True)
    return {
        "dense": {"bias": dense, "kernel": jnp.asarray(rng.random((7, 5)) < 0.4)},
        "layers": {"bias": dense, "kernel": jnp.asarray(rng.random((2, 5, 5)) < 0.4)},
        "norm": {"scale": dense},
    }


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


PARAMS = as_jax(example_params())
# Gradients of one direction with noise: of pure noise, Rprop would refuse every other step.
GRADS = stack(
    [
        jax.tree.map(lambda g, noise: g + noise / 2, as_jax(example_params(9)), as_jax(example))
        for example in map(example_params, range(10, 10 + STEPS))
    ]
)
MASK = example_mask(0)
OTHER_MASK = example_mask(1)
ONE_MASK = stack([MASK] * STEPS)
TWO_MASKS = stack([MASK] * SWAP + [OTHER_MASK] * (STEPS - SWAP))
KERNELS = [("dense", "kernel"), ("layers", "kernel")]


def get(tree, path):
    return tree[path[0]][path[1]]


def off_mask(mask, tree, value):
    """Write ``value`` over every masked entry."""
    return jax.tree.map(lambda m, x: jnp.where(m, x, value) if m.ndim > 1 else x, mask, tree)


def copies(tree):
    """Find the leaves of a state that belong to a kernel: by the end of their path, by shape."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = tuple(getattr(entry, "key", None) for entry in path[-2:])
        if keys in KERNELS and np.shape(leaf)[-get(PARAMS, keys).ndim :] == get(PARAMS, keys).shape:
            found.append((path, keys))
    return found


def poison(state, mask, value):
    """Write ``value`` over the masked entries of everything in a state that belongs to a kernel."""
    paths = dict(copies(state))

    def write(path, leaf):
        if path not in paths:
            return leaf
        return jnp.where(get(mask, paths[path]), leaf, jnp.asarray(value, leaf.dtype))

    return jax.tree_util.tree_map_with_path(write, state)


def make_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def compiled(name):
    """Compile the run: all weights and states after each step, from weights dirty off the mask."""

    @jax.jit
    def run(params, grads, mask_of_step, dirt):
        tx = optim.static_sparse(OPTIMIZERS[name].make(), at(mask_of_step, 0))
        step = make_step(tx)

        def body(carry, inputs):
            grads, mask = inputs
            params, state = carry
            state = state._replace(mask=mask, inner_state=poison(state.inner_state, mask, dirt))
            carry = step(params, state, grads)
            return carry, carry

        return jax.lax.scan(body, (params, tx.init(params)), (grads, mask_of_step))[1]

    return run


@functools.cache
def history(name):
    return jax.device_get(compiled(name)(PARAMS, GRADS, TWO_MASKS, 0.0))


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    return request.param


@pytest.mark.slow
def test_masked_weights_are_zero_after_every_step(name):
    params, _ = history(name)
    for path in KERNELS:
        masked = ~np.asarray(get(TWO_MASKS, path))
        assert masked.any(axis=tuple(range(1, masked.ndim))).all()
        np.testing.assert_array_equal(np.asarray(get(params, path))[masked], 0.0)
        # They were not zero before.
        assert np.all(np.asarray(get(PARAMS, path))[masked[0]] != 0)


def test_all_other_weights_train(name):
    params, _ = history(name)
    chex.assert_tree_all_finite(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = tuple(entry.key for entry in path)
        kept = np.broadcast_to(get(MASK, keys) & get(OTHER_MASK, keys), leaf.shape[1:])
        # Signs of random gradients may cancel by the last step, so a change at any step counts.
        assert np.all((leaf != np.asarray(get(PARAMS, keys))).any(axis=0)[kept]), keys


def test_masked_slots_of_the_state_are_those_of_a_new_weight(name):
    row = OPTIMIZERS[name]
    _, states = history(name)
    found = copies(states.inner_state)
    # In a partition the kernels may differ.
    per_leaf = [sum(keys == path for _, keys in found) for path in KERNELS]
    assert min(per_leaf) >= row.copies
    values = dict(jax.tree_util.tree_leaves_with_path(states.inner_state))
    for path, keys in found:
        value = np.asarray(values[path])
        kept = np.asarray(get(TWO_MASKS, keys))
        # L-BFGS keeps several copies along a further axis.
        kept = np.broadcast_to(
            kept.reshape((STEPS,) + (1,) * (value.ndim - kept.ndim) + kept.shape[1:]), value.shape
        )
        assert set(np.unique(value[~kept])) <= {np.float32(0.0), np.float32(row.floor)}, path
        assert np.any(value[kept] != 0), path


def test_what_stands_off_the_mask_has_no_influence(name):
    """Other weights, gradients and moments off the mask: the same run, to the last bit."""
    expected_params, expected_states = history(name)
    grads = off_mask(TWO_MASKS, GRADS, jnp.nan)
    params = off_mask(MASK, PARAMS, 1e4)
    actual_params, actual_states = compiled(name)(params, grads, TWO_MASKS, jnp.nan)
    chex.assert_trees_all_equal(actual_params, expected_params)
    chex.assert_trees_all_equal(actual_states, expected_states)


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.ignores_zeros])
def test_the_kept_weights_train_as_if_there_were_no_others(name):
    """Oracle: the bare optimizer on vectors that hold the kept weights and nothing else."""

    def kept(tree):
        flat = jax.tree.map(lambda m, x: np.asarray(x)[np.asarray(m)] if m.ndim else x, MASK, tree)
        return as_jax(flat)

    tx = OPTIMIZERS[name].make()
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()

    @jax.jit
    def run(params, grads):
        step = make_step(tx)

        def body(carry, grads):
            return step(*carry, grads), None

        return jax.lax.scan(body, (params, tx.init(params)), grads)[0][0]

    grads = stack([kept(at(GRADS, step)) for step in range(STEPS)])
    expected = run(kept(PARAMS), grads)
    actual, _ = compiled(name)(PARAMS, GRADS, ONE_MASK, 0.0)
    # Sums over leaves run in another order; a sign flips for no smaller difference than this.
    chex.assert_trees_all_close(kept(at(actual, -1)), expected, rtol=2e-4, atol=2e-5)


def test_the_mask_reads_back_and_survives_serialization(name):
    params, states = history(name)
    params, state = at(params, -1), at(states, -1)
    chex.assert_trees_all_equal(optax.tree.get(state, "mask"), OTHER_MASK)

    template = jax.tree.map(np.zeros_like, state)
    for restored in (
        serialization.from_bytes(template, serialization.to_bytes(state)),
        serialization.from_state_dict(template, serialization.to_state_dict(state)),
    ):
        assert isinstance(restored, optim.StaticSparseState)
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, restored), state)


FEW = ["adamw", "muon", "schedule_free_adamw"]


@pytest.mark.parametrize("name", FEW)
def test_one_trace_serves_all_masks_and_a_loop_is_the_scan(name):
    chex.clear_trace_counter()  # it counts by name
    tx = optim.static_sparse(OPTIMIZERS[name].make(), MASK)
    step = jax.jit(chex.assert_max_traces(make_step(tx), n=1))
    params, state = PARAMS, tx.init(PARAMS)
    for index in range(STEPS):
        if index == SWAP:
            state = optax.tree.set(state, mask=OTHER_MASK)
        if index == SWAP + 1:
            state = serialization.from_bytes(state, serialization.to_bytes(state))
        params, state = step(params, state, at(GRADS, index))
    expected_params, expected_states = history(name)
    chex.assert_trees_all_close(params, at(expected_params, -1), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state, at(expected_states, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_eager_is_jit(name):
    tx = optim.static_sparse(OPTIMIZERS[name].make(), MASK)
    step = make_step(tx)
    state = tx.init(PARAMS)
    eager = step(PARAMS, state, at(GRADS, 0))
    chex.assert_trees_all_close(
        jax.jit(step)(PARAMS, state, at(GRADS, 0)), eager, rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_vmap_over_runs_is_the_loop(name):
    params = stack([as_jax(example_params(seed)) for seed in range(2)])
    grads = at(GRADS, 0)

    def run(params, mask):
        tx = optim.static_sparse(OPTIMIZERS[name].make(), mask)
        return make_step(tx)(params, tx.init(params), grads)

    run_one = jax.jit(run)
    both = stack([MASK, OTHER_MASK])
    for mask, axis, pick in ((both, 0, at), (MASK, None, lambda mask, index: mask)):
        batched = jax.jit(jax.vmap(run, in_axes=(0, axis)))(params, mask)
        for index in range(2):
            chex.assert_trees_all_close(
                at(batched, index),
                run_one(at(params, index), pick(mask, index)),
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", [None, jnp.float32])
def test_schedule_free_evaluates_at_zero(state_dtype):
    inner = optax.contrib.schedule_free_sgd(0.1, state_dtype=state_dtype)
    tx = optim.static_sparse(inner, MASK)
    params, state = PARAMS, tx.init(PARAMS)
    chex.assert_trees_all_equal(state.inner_state.z, masks.apply(MASK, PARAMS))
    for index in range(3):
        params, state = make_step(tx)(params, state, at(GRADS, index))
        average = optax.contrib.schedule_free_eval_params(state.inner_state, params)
        for path in KERNELS:
            masked = ~get(MASK, path)
            np.testing.assert_array_equal(np.asarray(get(average, path))[masked], 0.0)
            assert np.all(np.asarray(get(average, path))[~masked] != 0)


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_is_exact_in_every_pair_of_dtypes(dtype, grad_dtype):
    params, grads = as_jax(PARAMS, dtype), as_jax(at(GRADS, 0), grad_dtype)
    tx = optim.static_sparse(optax.sgd(0.1), MASK)
    updates, _ = tx.update(grads, tx.init(params), params)
    bare, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(params), params)
    for mask, update, bare_update, param in zip(
        *map(jax.tree.leaves, (MASK, updates, bare, params)), strict=True
    ):
        wider = jnp.promote_types(bare_update.dtype, param.dtype)
        assert update.dtype == (wider if mask.ndim else bare_update.dtype)
        kept = np.broadcast_to(mask, update.shape)
        np.testing.assert_array_equal(np.asarray(update)[kept], np.asarray(bare_update)[kept])
    new = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal_dtypes(new, params)
    for path in KERNELS:
        np.testing.assert_array_equal(np.asarray(get(new, path))[~get(MASK, path)], 0.0)


def test_a_step_that_the_inner_optimizer_refuses_still_zeroes():
    tx = optim.static_sparse(optax.apply_if_finite(optax.adam(0.1), 3), MASK)
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), PARAMS)
    params, state = make_step(tx)(PARAMS, state, grads)
    chex.assert_trees_all_equal(params, masks.apply(MASK, PARAMS))
    assert int(state.inner_state.total_notfinite) == 1
    # Off the mask it is none of the optimizer's business.
    grads = off_mask(MASK, at(GRADS, 0), jnp.nan)
    _, state = make_step(tx)(params, state, grads)
    assert bool(state.inner_state.last_finite)


@pytest.mark.slow
def test_extra_arguments_reach_the_inner_optimizer():
    """A line search gets its value function, Polyak's step its value."""

    def loss(params):
        return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))

    for inner in (optax.polyak_sgd(), optax.lbfgs(), optax.MultiSteps(optax.polyak_sgd(), 1)):
        tx = optim.static_sparse(inner, MASK)

        @jax.jit
        def step(params, state, tx=tx):
            value, grad = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
            return optax.apply_updates(params, updates), state

        params = masks.apply(MASK, PARAMS)
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
        assert loss(params) < loss(masks.apply(MASK, PARAMS))
        chex.assert_trees_all_equal(masks.apply(MASK, params), params)


def test_inner_optimizers_without_extra_arguments_do_not_see_them():
    tx = optim.static_sparse(optax.scale_by_adam(), MASK)
    tx.update(at(GRADS, 0), tx.init(PARAMS), PARAMS, value=1.0)


def test_an_update_that_is_not_a_number_stays_off_the_weights():
    """Without an epsilon Adam divides 0 by 0 for every masked weight."""
    inner = optax.adam(0.1, eps=0.0)
    tx = optim.static_sparse(inner, MASK)
    bare, _ = inner.update(masks.apply(MASK, at(GRADS, 0)), inner.init(PARAMS), PARAMS)
    assert all(np.isnan(get(bare, path)).any() for path in KERNELS)
    params, _ = make_step(tx)(PARAMS, tx.init(PARAMS), at(GRADS, 0))
    chex.assert_tree_all_finite(params)
    chex.assert_trees_all_equal(masks.apply(MASK, params), params)


def test_a_new_weight_starts_as_a_fresh_one():
    """A weight that a swapped mask lets in has the moments of the first step."""
    tx = optim.static_sparse(optax.adagrad(0.1), MASK)
    step = jax.jit(make_step(tx))
    state = tx.init(PARAMS)
    params, state = step(PARAMS, state, at(GRADS, 0))
    params, state = step(params, state._replace(mask=OTHER_MASK), at(GRADS, 1))
    new = np.asarray(get(OTHER_MASK, KERNELS[0]) & ~get(MASK, KERNELS[0]))
    assert new.any()
    first, _ = optax.adagrad(0.1).update(at(GRADS, 1), optax.adagrad(0.1).init(PARAMS), PARAMS)
    np.testing.assert_allclose(
        np.asarray(get(params, KERNELS[0]))[new], np.asarray(get(first, KERNELS[0]))[new], rtol=1e-6
    )


def test_a_state_may_be_donated_and_the_mask_lives_on():
    tx = optim.static_sparse(optax.contrib.schedule_free_sgd(0.1), MASK)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    params, state = step(params, tx.init(params), at(GRADS, 0))
    step(params, state, at(GRADS, 1))
    chex.assert_trees_all_equal(optax.tree.get(tx.init(PARAMS), "mask"), MASK)


def test_a_single_array_is_a_tree():
    """Every leaf of the state sits where a lone array does, so only its shape tells a copy."""
    weights = get(PARAMS, KERNELS[0])
    mask = get(MASK, KERNELS[0])
    for inner in (optax.adam(0.1), optax.contrib.muon(0.1)):
        tx = optim.static_sparse(inner, mask)
        params, state = jax.jit(make_step(tx))(weights, tx.init(weights), get(GRADS, KERNELS[0])[0])
        np.testing.assert_array_equal(params != 0, mask)
        assert int(optax.tree.get_all_with_path(state, "count")[0][1]) == 1


def test_masks_of_other_array_types_and_frozen_dicts():
    mask = jax.tree.map(lambda m: np.asarray(m) if m.ndim else True, MASK)
    tx = optim.static_sparse(optax.sgd(0.1), freeze(mask))
    params, state = make_step(tx)(freeze(PARAMS), tx.init(freeze(PARAMS)), freeze(at(GRADS, 0)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state.mask))
    chex.assert_trees_all_equal(masks.apply(freeze(MASK), params), params)


X = jnp.asarray(np.random.default_rng(5).normal(size=(8, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(6).normal(size=(8, 4)), jnp.float32)


def squared_error(prediction):
    return jnp.mean((prediction - Y) ** 2)


def draw_mask(params):
    """Mask most weights of each kernel at random, also where they are not zero."""
    empty = jax.tree.map(lambda m: m & False if m.ndim else m, masks.support(params))
    return masks.fill(jax.random.key(3), empty, 0.4)


def check_trained(mask, before, after):
    for leaf_mask, old, new in zip(*map(jax.tree.leaves, (mask, before, after)), strict=True):
        kept = np.broadcast_to(leaf_mask, new.shape)
        np.testing.assert_array_equal(np.asarray(new)[~kept], 0.0)
        # A gradient may vanish where a ReLU is off, so some of them are enough.
        assert np.any(np.asarray(new)[kept] != np.asarray(old)[kept])


# Muon stands for all: it keeps Adam inside, each with a part of the tree.
MUON = optax.contrib.muon(0.1)


@pytest.mark.slow
def test_linen_train_state():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(4)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.Dense(4)(x))
            layers = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=2)
            return layers(name="layers")(x, None)[0]

    net = Net()
    params = jax.jit(net.init)(jax.random.key(0), X)["params"]
    mask = draw_mask(params)
    tx = optim.static_sparse(MUON, mask)
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        grads = jax.grad(lambda p: squared_error(net.apply({"params": p}, X)))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(2):
        state = step(state)
    check_trained(mask, params, state.params)
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    chex.assert_trees_all_equal(
        jax.tree.map(jnp.asarray, optax.tree.get(restored.opt_state, "mask")), mask
    )


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(4, 4, rngs=rngs)])

    def __call__(self, x):
        return self.rest[0](nnx.tanh(self.norm(self.first(x))))


@pytest.mark.slow
def test_nnx_optimizer():
    model = NnxNet(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    mask = draw_mask(nnx.state(model, nnx.Param))
    assert isinstance(mask, nnx.State)
    optimizer = nnx.Optimizer(model, optim.static_sparse(MUON, mask), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: squared_error(model(X)))(model)
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer)
    check_trained(mask, before, nnx.state(model, nnx.Param))
    read = optax.tree.get(optimizer.opt_state, "mask")
    chex.assert_trees_all_equal(jax.tree.leaves(read), jax.tree.leaves(mask))
    # The momentum sits off the mask at zero, whatever Muon did with it.
    momentum = [np.asarray(leaf) for leaf in jax.tree.leaves(optimizer.opt_state.inner_state)]
    kernel = np.asarray(mask["first"]["kernel"][...])
    shaped = [leaf for leaf in momentum if leaf.shape == kernel.shape]
    assert shaped
    for leaf in shaped:
        np.testing.assert_array_equal(leaf[~kernel], 0.0)


def test_nnx_state_without_its_optimizer():
    graph, params = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param)
    mask = draw_mask(params)
    tx = optim.static_sparse(MUON, mask)
    grads = jax.jit(jax.grad(lambda p: squared_error(nnx.merge(graph, p)(X))))(params)
    new, state = jax.jit(make_step(tx))(params, tx.init(params), grads)
    assert isinstance(new, nnx.State)
    check_trained(mask, params, new)
    chex.assert_trees_all_equal(optax.tree.get(state, "mask"), mask)


@pytest.mark.slow
def test_equinox():
    model = eqx.nn.MLP(3, 4, 4, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    mask = draw_mask(params)
    tx = optim.static_sparse(MUON, mask)

    @eqx.filter_jit
    def step(params, state):
        def loss(params):
            return squared_error(jax.vmap(eqx.combine(params, static))(X))

        return make_step(tx)(params, state, eqx.filter_grad(loss)(params))

    new, _ = step(params, tx.init(params))
    assert isinstance(new, eqx.nn.MLP)
    check_trained(mask, params, new)


@pytest.mark.slow
def test_haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 4], activation=jnp.tanh)(x)))
    params = net.init(jax.random.key(0), X)
    mask = draw_mask(params)
    tx = optim.static_sparse(MUON, mask)
    grads = jax.grad(lambda p: squared_error(net.apply(p, X)))(params)
    new, _ = jax.jit(make_step(tx))(params, tx.init(params), grads)
    check_trained(mask, params, new)


def test_mask_updates_zeroes_updates_and_nothing_else():
    updates = off_mask(MASK, at(GRADS, 0), jnp.nan)
    tx = optim.mask_updates(MASK)
    state = tx.init(PARAMS)
    assert isinstance(state, optim.MaskUpdatesState)
    masked, _ = tx.update(updates, state)
    chex.assert_trees_all_equal(masked, masks.apply(MASK, at(GRADS, 0)))
    half = as_jax(updates, jnp.bfloat16)
    chex.assert_trees_all_equal_dtypes(tx.update(half, state)[0], half)


def test_mask_updates_keeps_its_mask_in_the_state():
    chex.clear_trace_counter()
    tx = optax.chain(optax.sgd(0.1), optim.mask_updates(MASK))
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal(optax.tree.get(state, "mask"), MASK)
    for mask in (MASK, OTHER_MASK):
        state = optax.tree.set(state, mask=mask)
        updates, state = update(at(GRADS, 0), state)
        for path in KERNELS:
            np.testing.assert_array_equal(get(updates, path) != 0, get(mask, path))
    restored = serialization.from_bytes(tx.init(PARAMS), serialization.to_bytes(state))
    chex.assert_trees_all_equal(jax.tree.map(jnp.asarray, restored), state)


@pytest.mark.parametrize(
    "make", [optim.mask_updates, lambda mask: optim.static_sparse(optax.sgd(0.1), mask)]
)
@pytest.mark.parametrize(
    ("mask", "named"),
    [
        ({"w": jnp.ones((2, 2), bool)}, ["mask[w]", "params"]),
        ({"kernel": jnp.ones((2, 3), bool)}, ["mask[kernel]", "(2, 3)"]),
        ({"kernel": jnp.ones((2, 2))}, ["mask[kernel]", "float32"]),
        ({"kernel": False}, ["mask[kernel]=False"]),
        ({"kernel": None}, ["mask[kernel]", "None"]),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_at_init(make, mask, named):
    with refuses(*named):
        make(mask).init({"kernel": jnp.ones((2, 2))})


def test_update_without_params_is_refused():
    tx = optim.static_sparse(optax.sgd(0.1), MASK)
    with refuses("params=None", "tx.update(grads, state, params)"):
        tx.update(at(GRADS, 0), tx.init(PARAMS))


@pytest.mark.parametrize("make", [optim.static_sparse, dynamic.rigl], ids=["static_sparse", "rigl"])
def test_optax_maps_over_the_copies_of_the_parameters(make):
    params = {"kernel": jnp.array([[0.0, 2.0], [1.0, 0.0]]), "bias": jnp.ones(2)}
    tx = make(optax.adam(0.1), masks.support(params))
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
    for name in ("mu", "nu"):
        moment = optax.tree.get(state, name)
        twice = jax.tree.map(lambda leaf: 2 * leaf, moment)
        chex.assert_trees_all_equal(optax.tree.get(doubled, name), twice)
    for name in ("mask", "count"):
        chex.assert_trees_all_equal(optax.tree.get(doubled, name), optax.tree.get(state, name))


def test_swapped_arguments_are_named():
    with refuses("inner='ndarray'"):
        optim.static_sparse(np.ones((2, 2), bool), optax.adam(1e-3))


# --- masks as functions of the parameters -------------------------------------------------------

WITH_FUNCTIONS = {
    "mask_updates": lambda mask: optax.chain(optax.sgd(0.1, 0.9), optim.mask_updates(mask)),
    "static_sparse": lambda mask: optim.static_sparse(optax.adamw(0.1), mask),
    "rigl": lambda mask: dynamic.rigl(optax.adam(0.1), mask, update_every=2),
    "set": lambda mask: dynamic.sparse_evolutionary_training(
        optax.adam(0.1), mask, key=jax.random.key(0), update_every=2
    ),
}


def three_steps(tx, params):
    state, step = tx.init(params), jax.jit(make_step(tx))
    for index in range(3):
        params, state = step(params, state, at(GRADS, index))
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_FUNCTIONS)
def test_a_function_of_the_parameters_is_the_mask_that_it_makes(name):
    make, params = WITH_FUNCTIONS[name], masks.apply(MASK, PARAMS)
    calls = []

    def support(given):
        calls.append(given)
        return masks.support(given)

    expected = three_steps(make(masks.support(params)), params)
    chex.assert_trees_all_equal(three_steps(make(support), params), expected)
    assert len(calls) == 1  # the mask is in the state from then on
    traced = jax.jit(make(masks.support).init)(params)
    chex.assert_trees_all_equal(optax.tree.get(traced, "mask"), masks.support(params))


def test_a_function_makes_masks_where_the_optimizer_comes_first():
    params = masks.apply(MASK, PARAMS)
    mask = masks.support(params)

    def sparse_adam(learning_rate):
        return optim.static_sparse(optax.adam(learning_rate), masks.support)

    injected = optax.inject_hyperparams(sparse_adam)(learning_rate=0.1)
    trained = TrainState.create(apply_fn=None, params=params, tx=injected)
    trained = trained.apply_gradients(grads=at(GRADS, 0))
    chex.assert_trees_all_equal(optax.tree.get(trained.opt_state, "mask"), mask)
    chex.assert_trees_all_equal(masks.apply(mask, trained.params), trained.params)

    key = jax.random.key(3)
    random = optim.static_sparse(optax.sgd(0.1), lambda given: masks.random(key, given, 0.25))
    params, state = three_steps(random, PARAMS)
    assert masks.density(state.mask) == pytest.approx(0.25, abs=0.01)
    chex.assert_trees_all_equal(masks.apply(state.mask, params), params)


@pytest.mark.slow
def test_a_module_with_a_call_is_a_mask_and_no_function():
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    params = jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) < 0.2, 0.0, leaf), params)
    mask = masks.support(params, where=lambda path, leaf: leaf.ndim == 2)
    assert callable(mask)
    state = optim.static_sparse(optax.adam(0.1), mask).init(params)
    chex.assert_trees_all_equal(jax.tree.leaves(state.mask), jax.tree.leaves(mask))


def test_map_params_maps_what_a_function_has_made_too():
    tx = optim.static_sparse(optax.adam(0.1), masks.support)
    state = tx.init(PARAMS)
    negated = optax.tree.map_params(tx, lambda leaf: ~leaf if leaf.dtype == bool else -leaf, state)
    chex.assert_trees_all_equal(negated.mask, jax.tree.map(jnp.logical_not, state.mask))


@pytest.mark.parametrize("name", WITH_FUNCTIONS)
def test_a_function_that_makes_no_mask_is_refused(name):
    tx = WITH_FUNCTIONS[name](lambda params: {"dense": params["dense"]})
    with refuses("mask[layers]"):
        tx.init(PARAMS)
    tx = WITH_FUNCTIONS[name](lambda params: params)
    with refuses("mask[dense/bias]", "float32"):
        tx.init(PARAMS)


@pytest.mark.parametrize("name", WITH_FUNCTIONS)
def test_numbers_of_python_are_parameters(name):
    params = {"dense": {"kernel": jnp.eye(4), "temperature": 0.5}, "scale": np.float32(2.0)}
    grads = {"dense": {"kernel": jnp.ones((4, 4)), "temperature": 1.0}, "scale": np.float32(1.0)}
    tx = WITH_FUNCTIONS[name](masks.support)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert float(params["dense"]["temperature"]) < 0.5
    assert int(optax.tree.get(state, "mask")["dense"]["kernel"].sum()) == 4


# --- learning rates for sparse kernels ------------------------------------------------------------


def test_updates_are_scaled_by_a_power_of_the_density_of_each_layer():
    mask = masks.random(jax.random.key(0), PARAMS, {**SCALED, "norm": {"scale": 1.0}})
    by_layer = optim.scale_by_density(mask, 0.5, layout=stacked)
    whole = optim.scale_by_density(mask, 0.5)
    grads = at(GRADS, 0)
    scaled, _ = by_layer.update(grads, by_layer.init(PARAMS))
    stack, _ = whole.update(grads, whole.init(PARAMS))
    density = masks.densities(mask, layout=stacked)
    kernel, layers = grads["dense"]["kernel"], grads["layers"]["kernel"]
    np.testing.assert_allclose(
        scaled["dense"]["kernel"], kernel * density["dense"]["kernel"] ** -0.5, rtol=1e-6
    )
    factors = density["layers"]["kernel"].reshape(2, 1, 1) ** -0.5
    np.testing.assert_allclose(scaled["layers"]["kernel"], layers * factors, rtol=1e-6)
    mean = density["layers"]["kernel"].mean() ** -0.5
    np.testing.assert_allclose(stack["layers"]["kernel"], layers * mean, rtol=1e-6)
    for name in ("dense", "layers"):
        chex.assert_trees_all_equal(scaled[name]["bias"], grads[name]["bias"])


SCALED = {
    "dense": {"bias": 1.0, "kernel": 0.4},
    "layers": {"bias": 1.0, "kernel": np.array([0.2, 0.6])},
}


def stacked(path, leaf):
    return Layout(batch_axes=int(path[0].key == "layers"))


def test_masks_hold_under_scaled_updates():
    params = masks.apply(MASK, PARAMS)
    inner = optax.chain(optax.adamw(0.1), optim.scale_by_density(masks.support))
    params, state = three_steps(optim.static_sparse(inner, masks.support), params)
    chex.assert_trees_all_equal(masks.apply(MASK, params), params)
    chex.assert_trees_all_equal(optax.tree.get(state, "mask"), masks.support(params))


def test_gradients_of_integers_are_not_scaled():
    tx = optim.scale_by_density({"kernel": jnp.eye(4, dtype=bool), "steps": jnp.array(True)})
    nothing = np.zeros((), jax.dtypes.float0)
    state = tx.init({"kernel": jnp.ones((4, 4)), "steps": jnp.array(1)})
    updates, _ = tx.update({"kernel": jnp.ones((4, 4)), "steps": nothing}, state)
    assert updates["steps"] is nothing
    assert (updates["kernel"] == 4).all()


@pytest.mark.parametrize("power", [np.nan, np.inf, "1"])
def test_a_power_that_is_no_number_is_refused(power):
    with refuses("power", power):
        optim.scale_by_density(MASK, power)


@pytest.mark.slow
def test_one_learning_rate_suits_all_densities():
    """Coordinate check: how far five steps of Adam move the outputs of a wide ReLU network.

    Rescaled weights and scaled updates (SμPar) move them as far at every density; masked weights
    with updates as they are move them less and less.
    """
    width, names = 256, ("first", "second", "third", "out")
    sizes = dict(zip(names, itertools.pairwise((64, width, width, width, 8)), strict=True))
    x = jax.random.normal(jax.random.key(5), (128, 64))
    target = jnp.sin(2 * x[:, :8])

    def outputs(params):
        hidden = x
        for name in names[:-1]:
            hidden = jax.nn.relu(hidden @ params[name]["kernel"])
        return hidden @ params["out"]["kernel"]

    def middle(path, leaf):
        return path[0].key in ("second", "third")

    def support(params):
        return masks.support(params, where=middle)

    def distance(make_start, power):
        inner = optax.chain(optax.adam(1e-3), optim.scale_by_density(support, power))
        tx = optim.static_sparse(inner, support)

        @jax.jit
        def train(params, state):
            def step(carry, _):
                params, state = carry
                grads = jax.grad(lambda p: jnp.mean((outputs(p) - target) ** 2))(params)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            (trained, _), _ = jax.lax.scan(step, (params, state), None, length=5)
            return jnp.sqrt(jnp.mean((outputs(trained) - outputs(params)) ** 2))

        found = []
        for density in (1.0, 0.25, 0.0625):
            of_seeds = []
            for key in jax.random.split(jax.random.key(0), 3):
                keys = dict(zip(names, jax.random.split(key, 4), strict=True))
                params = {
                    name: {"kernel": (2 / size[0]) ** 0.5 * jax.random.normal(keys[name], size)}
                    for name, size in sizes.items()
                }
                mask = masks.random(key, params, density, where=middle)
                params = make_start(params, mask).params
                of_seeds.append(float(train(params, tx.init(params))))
            found.append(np.mean(of_seeds))
        return np.array(found) / found[0]

    np.testing.assert_allclose(distance(networks.rescaled, 1.0), 1, atol=0.25)
    assert (distance(networks.masked, 0.0)[1:] < (0.4, 0.1)).all()
