"""Laws of dynamic sparse training.

The table of optimizers is that of the static ones. Each is compiled once, as a run of RigL of
``STEPS`` steps with two mask updates; the laws read that run.
"""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from helpers import refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optim import (
    OPTIMIZERS,
    as_jax,
    at,
    copies,
    example_mask,
    example_params,
    get,
    make_step,
    stack,
)

from eoi_jax import dynamic, initializers, masks, optim, typing

EVERY = 3
STEPS = 7  # the mask is updated at 3 and 6
UPDATES = [step for step in range(1, STEPS) if step % EVERY == 0]
TRAINING = [step for step in range(STEPS) if step not in UPDATES]
FRACTION = 0.35
KEY = jax.random.key(1)

# One kernel is sparse; a stack of two and all else stay dense.
KERNEL = ("dense", "kernel")
MASK = example_mask(0)
MASK["layers"]["kernel"] = jnp.array(True)
START = masks.apply(MASK, as_jax(example_params()))
# Gradients of one direction with noise: of pure noise, Rprop would refuse every other step.
GRADS = stack(
    [
        jax.tree.map(lambda g, noise: g + noise / 2, as_jax(example_params(9)), as_jax(example))
        for example in map(example_params, range(20, 20 + STEPS))
    ]
)


def oracle(mask, weights, grads, fraction, regrow_dropped=True):
    """One mask update of one kernel by sorting: the weights that stay, and the next mask."""
    mask, weights, grads = (np.asarray(array) for array in (mask, weights, grads))
    shape = mask.shape
    mask, weights, grads = mask.ravel(), weights.ravel(), grads.ravel()
    active = np.flatnonzero(mask)
    wanted = np.floor(np.float32(fraction) * np.float32(len(active)))
    number = min(int(wanted), mask.size - len(active))
    kept = mask.copy()
    kept[sorted(active, key=lambda i: (abs(float(weights[i])), i))[:number]] = False
    size = np.abs(grads.astype(np.float64))
    size[np.isnan(size)] = -1.0
    candidates = np.flatnonzero(~(kept if regrow_dropped else mask))
    new = kept.copy()
    new[sorted(candidates, key=lambda i: (-size[i], i))[:number]] = True
    return kept.reshape(shape), new.reshape(shape)


def scan(tx, params, grads):
    """Run all steps; the weights and states before each, and after the last."""
    start = (params, tx.init(params))

    def body(carry, grads):
        carry = make_step(tx)(*carry, grads)
        return carry, carry

    after = jax.lax.scan(body, start, grads)[1]
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, after)


@functools.cache
def compiled(name):
    tx = dynamic.rigl(OPTIMIZERS[name].make(), MASK, update_every=EVERY, drop_fraction=FRACTION)
    return jax.jit(functools.partial(scan, tx))


@functools.cache
def history(name):
    return jax.device_get(compiled(name)(START, GRADS))


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    return request.param


@pytest.mark.slow
def test_masked_weights_are_zero_and_counts_are_constant(name):
    params, states = history(name)
    assert states.step.tolist() == list(range(STEPS + 1))
    mask = get(states.mask, KERNEL)
    np.testing.assert_array_equal(mask[0], get(MASK, KERNEL))
    np.testing.assert_array_equal(get(params, KERNEL)[~mask], 0.0)
    assert set(mask.sum(axis=(1, 2)).tolist()) == {int(get(MASK, KERNEL).sum())}
    changes = [step for step in range(STEPS) if (mask[step] != mask[step + 1]).any()]
    # At the second, all that is dropped may grow again.
    assert changes in (UPDATES, UPDATES[:1])


def test_a_mask_update_drops_grows_and_leaves_all_else(name):
    new_slots = {np.float32(0.0), np.float32(OPTIMIZERS[name].floor)}
    params, states = history(name)
    chex.assert_tree_all_finite(params)
    for step in UPDATES:
        before, after = at(params, step), at(params, step + 1)
        mask, grads = at(states.mask, step), at(GRADS, step)
        kept, new = oracle(*(get(tree, KERNEL) for tree in (mask, before, grads)), FRACTION)
        assert kept.sum() == get(mask, KERNEL).sum() - 4
        np.testing.assert_array_equal(get(states.mask, KERNEL)[step + 1], new)
        expected = {
            **before,
            "dense": dict(before["dense"], kernel=before["dense"]["kernel"] * kept),
        }
        chex.assert_trees_all_equal(after, expected)

        found = {path for path, keys in copies(states.inner_state) if keys == KERNEL}
        were_used = not OPTIMIZERS[name].copies
        for path, value in jax.tree_util.tree_leaves_with_path(states.inner_state):
            stay = np.ones(np.shape(value)[1:], bool)
            if path in found:
                stay &= kept  # L-BFGS keeps several copies along a further axis
                assert set(np.unique(value[step + 1][~stay])) <= new_slots
                were_used |= not set(np.unique(value[step][~stay])) <= new_slots
            np.testing.assert_array_equal(value[step + 1][stay], value[step][stay])
        assert were_used


SOME = ["adamw", "muon", "schedule_free_adamw", "adafactor", "multi_steps"]


@pytest.mark.parametrize("name", SOME)
def test_between_mask_updates_it_is_the_static_optimizer(name):
    tx = optim.static_sparse(OPTIMIZERS[name].make(), MASK)
    params, states = history(name)

    @jax.jit
    def run(params, mask, inner_state, grads):
        def step(inputs):
            params, mask, inner_state, grads = inputs
            state = optim.StaticSparseState(mask, inner_state)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state.inner_state

        return jax.lax.map(step, (params, mask, inner_state, grads))

    before = jax.tree.map(lambda leaf: leaf[:-1], (params, states.mask, states.inner_state))
    after = jax.tree.map(lambda leaf: leaf[1:], (params, states.inner_state))
    static = jax.device_get(run(*before, GRADS))
    for step in TRAINING:  # two programs: a sum may be fused, and rounded, otherwise
        chex.assert_trees_all_close(at(after, step), at(static, step), rtol=1e-6, atol=1e-7)


def test_gradients_off_the_mask_have_no_influence_between_mask_updates(name):
    params, states = history(name)
    seen = get(states.mask, KERNEL)[:-1] | np.isin(np.arange(STEPS), UPDATES)[:, None, None]
    assert not seen.all()
    grads = {
        **GRADS,
        "dense": dict(GRADS["dense"], kernel=jnp.where(seen, get(GRADS, KERNEL), jnp.nan)),
    }
    chex.assert_trees_all_equal(jax.device_get(compiled(name)(START, grads)), (params, states))


def test_grown_weights_start_from_zero_and_train(name):
    params, states = history(name)
    mask, weights = get(states.mask, KERNEL), get(params, KERNEL)
    first, second = UPDATES
    grown = mask[first + 1] & ~mask[first]
    assert grown.any()
    np.testing.assert_array_equal(weights[first + 1][grown], 0.0)
    # Up to the next mask update, for an optimizer that accumulates takes two steps for one.
    assert np.all(weights[second][grown] != 0)


def test_the_mask_reads_back_once(name):
    _, states = history(name)
    chex.assert_trees_all_equal(optax.tree.get(states, "mask"), states.mask)


def make(name, method, mask=MASK, key=KEY, **kwargs):
    options = {"update_every": EVERY, "drop_fraction": FRACTION, **kwargs}
    inner = OPTIMIZERS[name].make()
    if method == "rigl":
        return dynamic.rigl(inner, mask, **options)
    return dynamic.sparse_evolutionary_training(inner, mask, key=key, **options)


@functools.cache
def loop(name, method):
    """A compiled step, and the states before each step and after the last of a run."""
    step = jax.jit(make_step(make(name, method)))
    carries = [(START, make(name, method).init(START))]
    for index in range(STEPS):
        carries.append(step(*carries[-1], at(GRADS, index)))
    return step, carries


def test_a_loop_is_the_scan():
    for index, carry in enumerate(loop("adamw", "rigl")[1]):
        expected = at(history("adamw"), index)
        chex.assert_trees_all_equal(carry[1].mask, expected[1].mask)
        chex.assert_trees_all_close(jax.device_get(carry), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_step_serves_all_steps_and_eager_is_jit():
    _, carries = loop("adamw", "set")
    chex.clear_trace_counter()
    eager = make_step(make("adamw", "set"))
    traced = jax.jit(chex.assert_max_traces(make_step(make("adamw", "set")), n=1))
    for index in (EVERY - 1, EVERY):
        for actual in (
            traced(*carries[index], at(GRADS, index)),
            eager(*carries[index], at(GRADS, index)),
        ):
            chex.assert_trees_all_equal(actual[1].mask, carries[index + 1][1].mask)
            chex.assert_trees_all_close(actual, carries[index + 1], rtol=1e-5, atol=1e-6)


def by_bytes(state):
    template = jax.tree.map(np.zeros_like, state)
    return serialization.from_bytes(template, serialization.to_bytes(state))


def by_arrays(state):
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, [np.array(np.asarray(leaf)) for leaf in leaves])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [("adamw", "rigl"), ("adamw", "set"), ("muon", "set"), ("schedule_free_adamw", "set")],
)
def test_a_restored_state_goes_on_to_the_last_bit(name, method):
    step, carries = loop(name, method)
    for restore in (by_bytes, by_arrays):
        for start in (EVERY, EVERY + 1, EVERY + 2):
            params, state = carries[start]
            carry = (params, restore(state))
            assert isinstance(carry[1], dynamic.DynamicSparseState)
            for index in range(start, STEPS):
                carry = step(*carry, at(GRADS, index))
            chex.assert_trees_all_equal(carry, carries[-1])


@pytest.mark.slow
def test_vmap_over_seeds_is_the_loop():
    params = stack([masks.apply(MASK, as_jax(example_params(seed))) for seed in range(2)])
    keys = jax.random.split(jax.random.key(7), 2)

    def run(params, key):
        return scan(make("adamw", "set", key=key), params, GRADS)

    one, both = jax.jit(run), jax.jit(jax.vmap(run))(params, keys)
    results = [one(at(params, seed), keys[seed]) for seed in range(2)]
    for seed in range(2):
        chex.assert_trees_all_equal(at(both[1].mask, seed), results[seed][1].mask)
        chex.assert_trees_all_close(at(both, seed), results[seed], rtol=1e-5, atol=1e-6)
    last = at(results[0][1].mask, -1), at(results[1][1].mask, -1)
    assert masks.overlap(*last) < 1


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_state_may_be_donated_and_what_the_user_gave_lives_on(method):
    key = jax.random.key(3)
    tx = make("schedule_free_sgd", method, key=key, update_every=2)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, START), tx.init(START)
    for index in range(3):
        params, state = step(params, state, at(GRADS, index))
    jax.random.bits(key)
    chex.assert_trees_all_equal(tx.init(START).mask, MASK)


# One kernel, one mask update


@functools.cache
def one_update(regrow_dropped):
    @jax.jit
    def run(weights, mask, grads, fraction):
        tx = dynamic.rigl(
            optax.sgd(0.1, momentum=0.9),
            mask,
            update_every=1,
            drop_fraction=fraction,
            regrow_dropped=regrow_dropped,
        )
        state = tx.init(weights)._replace(step=jnp.int32(1))
        weights, state = make_step(tx)(weights, state, grads)
        return weights, state.mask

    return run


@pytest.mark.slow
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(6, 5), (3, 1, 2, 4)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    regrow_dropped=st.booleans(),
    density=st.sampled_from([0.0, 0.1, 0.4, 0.7, 1.0]),
    fraction=st.floats(0.0, 1.0, width=32),
    few_values=st.booleans(),
)
def test_the_smallest_weights_drop_and_the_largest_gradients_grow(
    seed, shape, dtype, regrow_dropped, density, fraction, few_values
):
    """Ties, zeros, NaN and infinite gradients; weights that are dirty off the mask."""
    generator = np.random.default_rng(seed)
    mask = generator.random(shape) < density
    if few_values:
        weights = generator.choice([0.0, -0.5, 0.5, 2.0], shape)
        grads = generator.choice([0.0, -0.0, 1.0, -1.0, np.nan, np.inf], shape)
    else:
        weights, grads = generator.normal(size=(2, *shape))
    weights, grads = jnp.asarray(weights, dtype), jnp.asarray(grads, "float32")
    actual, new = one_update(regrow_dropped)(weights, jnp.asarray(mask), grads, fraction)
    kept, expected = oracle(mask, weights, grads, fraction, regrow_dropped)
    np.testing.assert_array_equal(new, expected)
    assert actual.dtype == weights.dtype
    np.testing.assert_array_equal(actual, np.where(kept, weights, 0))


def test_a_nan_weight_drops_first():
    weights = jnp.ones((6, 5)).at[5, 4].set(jnp.nan).at[0, 0].set(jnp.inf).at[0, 1].set(0.0)
    mask = jnp.ones((6, 5), bool).at[1:5].set(False)
    _, new = one_update(False)(weights, mask, jnp.zeros((6, 5)), 0.2)
    assert np.flatnonzero(mask & ~new).tolist() == [1, 29]


def test_wide_weights(x64):
    generator = np.random.default_rng(0)
    weights, grads = generator.normal(size=(2, 6, 5))
    # They differ by less than float32 can tell.
    weights, mask = 1.0 + 1e-12 * weights, generator.random((6, 5)) < 0.5
    actual, new = one_update(True)(weights, mask, jnp.asarray(grads), 0.5)
    kept, expected = oracle(mask, weights, grads, 0.5)
    np.testing.assert_array_equal(new, expected)
    np.testing.assert_array_equal(actual, np.where(kept, weights, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("regrow_dropped", [True, False])
def test_set_grows_uniformly(regrow_dropped):
    """Single weights and pairs: within 5 standard errors over 4000 keys."""
    size, active, number, draws = 40, 16, 4, 4000
    weights = jnp.arange(1.0, size + 1).reshape(5, 8)
    mask = (jnp.arange(size) < active).reshape(5, 8)

    @jax.jit
    @jax.vmap
    def run(key):
        tx = dynamic.sparse_evolutionary_training(
            optax.sgd(0.1),
            mask,
            key=key,
            update_every=1,
            drop_fraction=number / active,
            regrow_dropped=regrow_dropped,
        )
        state = tx.init(weights)._replace(step=jnp.int32(1))
        return tx.update(weights, state, weights)[1].mask

    drawn = np.asarray(run(jax.random.split(jax.random.key(0), draws))).reshape(draws, size)
    dropped, others = np.arange(number), np.arange(active, size)
    candidates = np.r_[dropped, others] if regrow_dropped else others
    assert drawn[:, number:active].all()
    grown = drawn[:, candidates].astype(np.float64)
    np.testing.assert_array_equal(grown.sum(axis=1), number)
    count = len(candidates)
    together = grown.T @ grown / draws
    for observed, chance in (
        (np.diag(together), number / count),
        (together[np.triu_indices(count, 1)], number * (number - 1) / (count * (count - 1))),
    ):
        assert np.all(np.abs(observed - chance) < 5 * np.sqrt(chance * (1 - chance) / draws))


# Counts, schedules, layers

LAYERS = np.random.default_rng(8)
STACK = jnp.asarray(LAYERS.normal(size=(2, 2, 6, 5)), jnp.float32)
STACK_MASK = jnp.asarray(LAYERS.random((2, 2, 6, 5)) < LAYERS.random((2, 2, 1, 1)))
STACK_GRADS = jnp.asarray(LAYERS.normal(size=(2, 2, 6, 5)), jnp.float32)
TREE = {
    "none": {"kernel": jnp.zeros((0, 3))},
    "some": {"bias": jnp.ones(3), "kernel": jnp.linspace(-1.0, 1.0, 48).reshape(2, 4, 6)},
}


@functools.cache
def many_updates(method):
    @jax.jit
    def run(key, mask, fraction):
        tx = make("nesterov", method, mask, key, update_every=2, drop_fraction=fraction)
        keys = jax.random.split(key, 20)
        grads = jax.vmap(lambda key: optax.tree.random_like(key, TREE))(keys)
        return scan(tx, TREE, grads)[1].mask

    return run


@pytest.mark.slow
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    density=st.floats(0.0, 1.0),
    fraction=st.floats(0.0, 1.0, width=32),
    method=st.sampled_from(["rigl", "set"]),
)
def test_no_count_ever_changes(seed, density, fraction, method):
    draw = np.random.default_rng(seed).random((2, 4, 6)) < density
    mask = {
        "none": {"kernel": jnp.zeros((0, 3), bool)},
        "some": {"bias": jnp.array(True), "kernel": jnp.asarray(draw)},
    }
    masks_of_step = many_updates(method)(jax.random.key(seed), mask, fraction)
    for leaf, start in zip(*map(jax.tree.leaves, (masks_of_step, mask)), strict=True):
        axes = tuple(range(1, leaf.ndim))
        assert set(np.asarray(leaf).sum(axis=axes).tolist()) == {int(start.sum())}
    exchanged = np.floor(np.float32(fraction) * np.float32(draw.sum()))
    if method == "set" and exchanged == 0:
        assert (np.asarray(masks_of_step["some"]["kernel"]) == draw).all()


def still(method, num_steps=8, **kwargs):
    """The masks of one kernel before each call and after the last, without training."""
    weights = jnp.linspace(1.0, 2.0, 100).reshape(10, 10)
    mask = jnp.arange(100).reshape(10, 10) % 2 == 0
    tx = make("sgd", method, mask, regrow_dropped=False, **kwargs)
    carry = weights * mask, tx.init(weights)
    found = [mask]
    for _ in range(num_steps):
        carry = make_step(tx)(*carry, jnp.zeros_like(weights))
        found.append(carry[1].mask)
    return np.asarray(found).reshape(-1, 100)


def moved(mask_of_step):
    return (mask_of_step[:-1] & ~mask_of_step[1:]).sum(axis=1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_when_and_how_many(method):
    for stop_step, expected in (
        (None, [0, 0, 25, 0, 25, 0, 25, 0]),
        (7, [0, 0, 25, 0, 25, 0, 25, 0]),
        (6, [0, 0, 25, 0, 25, 0, 0, 0]),
        (2, [0] * 8),
        (0, [0] * 8),
    ):
        found = still(method, update_every=2, drop_fraction=0.5, stop_step=stop_step)
        assert moved(found) == expected
    assert moved(still(method, 3, update_every=1, drop_fraction=0.1)) == [0, 5, 5]
    assert moved(still(method, 3, update_every=2, drop_fraction=0.0)) == [0, 0, 0]


def test_a_schedule_gets_the_step():
    schedule = optax.cosine_decay_schedule(0.3, 8)
    expected = [0, *(int(np.floor(np.float32(schedule(step)) * 50)) for step in range(1, 8))]
    assert moved(still("rigl", update_every=1, drop_fraction=schedule)) == expected
    assert len(set(expected)) > 5


@pytest.mark.slow
def test_the_value_of_a_schedule_is_limited_by_what_there_is():
    active = int(STACK_MASK.sum())
    for fraction, number in ((2.0, min(active, STACK.size - active)), (-1.0, 0)):
        tx = make(
            "sgd",
            "rigl",
            STACK_MASK,
            drop_fraction=lambda step, fraction=fraction: jnp.float32(fraction),
            regrow_dropped=False,
        )
        state = tx.init(STACK)._replace(step=jnp.int32(EVERY))
        _, state = jax.jit(tx.update)(STACK_GRADS, state, STACK)
        assert int(state.mask.sum()) == active
        assert int((STACK_MASK & ~state.mask).sum()) == number


@pytest.mark.slow
def test_another_key_or_step_draws_other_weights():
    def run(key):
        return still("set", 2, update_every=1, drop_fraction=0.2, key=key)

    first = run(jax.random.key(0))
    np.testing.assert_array_equal(run(jax.random.key(0)), first)
    np.testing.assert_array_equal(run(jax.random.PRNGKey(0)), first)
    for other in (jax.random.key(1), jax.random.key(0, impl="rbg")):
        assert (run(other)[2] != first[2]).any()
    assert moved(run(jax.random.key(0, impl="rbg"))) == moved(first)
    # The same state but for the step, and two layers of equal masks.
    tx = make("sgd", "set", jnp.eye(20, dtype=bool), update_every=1)
    state = tx.init(jnp.eye(20))
    drawn = [
        tx.update(jnp.eye(20), state._replace(step=jnp.int32(step)), jnp.eye(20))[1].mask
        for step in (1, 2)
    ]
    assert (drawn[0] != drawn[1]).any()


def exchange(tx, params, grads):
    state = tx.init(params)
    params, state = make_step(tx)(params, state._replace(step=jnp.int32(EVERY)), grads)
    return params, state.mask


@pytest.mark.slow
def test_the_layers_of_a_stack_are_kernels_of_their_own():
    def layout(path, leaf):
        assert leaf.shape == STACK.shape
        return typing.Layout(batch_axes=2)

    def one(stacked):
        return {(i, j): stacked[i, j] for i in range(2) for j in range(2)}

    params, mask = exchange(make("sgd", "rigl", STACK_MASK, layout=layout), STACK, STACK_GRADS)
    parts = exchange(make("sgd", "rigl", one(STACK_MASK)), one(STACK), one(STACK_GRADS))
    chex.assert_trees_all_equal((one(params), one(mask)), parts)
    _, whole = exchange(make("sgd", "rigl", STACK_MASK), STACK, STACK_GRADS)
    assert (whole != mask).any()
    # SET drops the same and keeps each layer's count.
    params, mask = exchange(make("sgd", "set", STACK_MASK, layout=layout), STACK, STACK_GRADS)
    chex.assert_trees_all_equal(one(params), parts[0])
    np.testing.assert_array_equal(mask.sum(axis=(2, 3)), STACK_MASK.sum(axis=(2, 3)))


@pytest.mark.slow
def test_kernels_and_layers_of_equal_masks_draw_apart():
    params = {name: jnp.broadcast_to(jnp.eye(20), (2, 20, 20)) for name in ("a", "b")}
    mask = jax.tree.map(lambda leaf: leaf != 0, params)
    tx = make("sgd", "set", mask, layout=lambda path, leaf: typing.Layout(batch_axes=1))
    _, mask = exchange(tx, params, params)
    drawn = {np.asarray(layer).tobytes() for leaf in mask.values() for layer in leaf}
    assert len(drawn) == 4


# Dtypes, inner optimizers, programs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float16)]
)
def test_narrow_weights_stay_exact(dtype, grad_dtype):
    """The momentum of narrow weights and wide gradients gets wider at the first step."""
    tx = make("nesterov", "rigl", update_every=2)
    params, grads = as_jax(START, dtype), as_jax(GRADS, grad_dtype)
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    for index in range(4):
        old, old_mask = params, state.mask
        params, state = step(params, state, at(grads, index))
        chex.assert_trees_all_equal_dtypes(params, old)
        chex.assert_trees_all_equal(masks.apply(state.mask, params), params)
        if index == 2:
            leaves = (get(tree, KERNEL) for tree in (old_mask, old, at(grads, index)))
            kept, new = oracle(*leaves, FRACTION)
            np.testing.assert_array_equal(get(state.mask, KERNEL), new)
            np.testing.assert_array_equal(get(params, KERNEL), np.where(kept, get(old, KERNEL), 0))


@pytest.mark.slow
def test_weights_that_are_dirty_off_the_mask_become_zero():
    dirty = as_jax(example_params())
    actual = exchange(make("adamw", "rigl"), dirty, at(GRADS, 0))
    expected = exchange(make("adamw", "rigl"), START, at(GRADS, 0))
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.slow
def test_extra_arguments_reach_the_inner_optimizer():
    def loss(params):
        return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))

    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=4)
    for inner in (optax.chain(optax.sgd(1.0), search), optax.MultiSteps(optax.polyak_sgd(), 1)):
        tx = dynamic.rigl(inner, MASK, update_every=2, drop_fraction=FRACTION)

        @jax.jit
        def step(params, state, tx=tx):
            value, grad = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
            return optax.apply_updates(params, updates), state

        params, state = START, tx.init(START)
        for _ in range(4):
            params, state = step(params, state)
        assert loss(params) < loss(START)
        chex.assert_trees_all_equal(masks.apply(state.mask, params), params)


def primitives(jaxpr, into_conditions):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name == "cond" and not into_conditions:
            continue
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, into_conditions)


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_selection_stands_under_a_condition_and_sorts_nothing(method):
    tx = make("adamw", method)
    program = jax.make_jaxpr(tx.update)(START, tx.init(START), START).jaxpr
    always, ever = (set(primitives(program, into)) for into in (False, True))
    assert {"while", "scan"} & (ever - always)
    assert not {"while", "scan", "random_bits", "threefry2x32", "cumsum"} & always
    assert "sort" not in ever


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_no_implicit_promotion_and_no_nan_on_the_way(method):
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
    ):
        exchange(make("decayed", method, STACK_MASK), STACK, STACK_GRADS)


@pytest.mark.slow
def test_nnx():
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    mask = masks.random(jax.random.key(0), nnx.state(model, nnx.Param), 0.4)
    optimizer = nnx.Optimizer(model, make("muon", "set", mask, update_every=2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(
            model, nnx.grad(lambda model: jnp.sum((model(jnp.eye(6)) - 1) ** 2))(model)
        )

    for _ in range(4):
        step(model, optimizer)
    now = optax.tree.get(optimizer.opt_state, "mask")["kernel"][...]
    before = mask["kernel"][...]
    assert (now != before).any()
    assert now.sum() == before.sum()
    np.testing.assert_array_equal(np.asarray(model.kernel[...])[~now], 0.0)


@pytest.mark.slow
def test_exact_orthogonal_kernels_train():
    """EOI is the start: the loss falls, the masks move, the densities stay."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (16, 16):
                x = nn.tanh(nn.Dense(width, kernel_init=initializers.dense(0.3))(x))
            return nn.Dense(2)(x)

    inputs = jax.random.normal(jax.random.key(0), (64, 8))
    targets = jnp.stack([inputs[:, 0] * inputs[:, 1], jnp.sin(inputs[:, 2])], axis=1)
    net = Net()
    params = jax.jit(net.init)(jax.random.key(1), inputs)

    def loss(params):
        return jnp.mean((net.apply(params, inputs) - targets) ** 2)

    mask = masks.support(params)
    tx = make("adam", "rigl", mask, update_every=10, stop_step=75)

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            return make_step(tx)(params, state, grads), value

        return jax.lax.scan(body, (params, tx.init(params)), length=100)

    (params, state), losses = run(params)
    assert losses[-1] < losses[0] / 2
    now = optax.tree.get(state, "mask")
    chex.assert_trees_all_equal(masks.densities(now), masks.densities(mask))
    assert masks.overlap(now, mask) < 0.9
    chex.assert_trees_all_equal(masks.apply(now, params), params)


# Errors


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("update_every", value) for value in (0, 2.5, 2**31)],
        *[("drop_fraction", value) for value in (1.0, -0.1, np.nan, "0.3")],
        *[("stop_step", value) for value in (-1, 1.5, 0.0)],
    ],
)
def test_arguments_out_of_range_are_refused_where_they_are_given(method, name, value):
    with refuses(f"{name}={value!r}"):
        make("sgd", method, **{name: value})


@pytest.mark.parametrize(
    ("key", "named"),
    [
        (0, "key=0"),
        (None, "key=None"),
        (jax.random.split(KEY, 3), "(3,)"),
        (jnp.zeros((3, 2), jnp.uint32), "(3, 2)"),
    ],
)
def test_what_is_not_one_key_is_refused(key, named):
    with refuses("key", named):
        make("sgd", "set", key=key)


def test_a_layout_is_asked_of_sparse_leaves_alone():
    params = {"kernel": jnp.ones((2, 4, 4)), "steps": jnp.ones(())}
    mask = {"kernel": jnp.ones((2, 4, 4), bool), "steps": jnp.array(True)}
    tx = dynamic.rigl(optax.sgd(0.1), mask, layout=lambda path, leaf: typing.Layout(batch_axes=1))
    assert tx.init(params).mask["kernel"].all()


def test_what_does_not_fit_the_parameters_is_refused_at_init():
    with refuses("mask", "params"):
        make("sgd", "rigl").init({"kernel": jnp.ones((2, 2))})
    tx = make("sgd", "rigl", layout=lambda path, leaf: typing.Layout(batch_axes=3))
    with refuses("layout(dense/kernel).batch_axes=3"):
        tx.init(START)


@pytest.mark.parametrize("step", [0, EVERY])
def test_update_without_params_is_refused(step):
    for update in (make("sgd", "set").update, jax.jit(make("sgd", "set").update)):
        state = make("sgd", "set").init(START)._replace(step=jnp.int32(step))
        with refuses("params=None", "tx.update(grads, state, params)"):
            update(at(GRADS, 0), state)


def test_a_schedule_out_of_range_is_refused_where_it_is_known():
    tx = make("sgd", "rigl", drop_fraction=optax.constant_schedule(1.5))
    state = tx.init(START)
    with refuses("drop_fraction=1.5"):
        jax.jit(tx.update)(at(GRADS, 0), state, START)


@pytest.mark.parametrize("density", [0.25, 0.75])
def test_a_schedule_drops_no_more_than_there_is_to_drop_and_to_grow(density):
    size = 16
    kept = jnp.arange(size).reshape(4, 4) < density * size
    params = {"kernel": jnp.where(kept, 1.0 + jnp.arange(16.0).reshape(4, 4), 0.0)}
    grads = {"kernel": jnp.arange(16.0).reshape(4, 4) + 1.0}
    tx = dynamic.rigl(
        optax.sgd(0.0),
        masks.support,
        update_every=1,
        drop_fraction=lambda step: jnp.float32(5.0),
        regrow_dropped=False,
    )
    state = tx.init(params)._replace(step=jnp.int32(1))
    _, state = jax.jit(tx.update)(grads, state, params)
    mask = np.asarray(state.mask["kernel"])
    # As many as are masked move, and no more than are unmasked.
    moved = min(int(kept.sum()), int((~kept).sum()))
    assert mask.sum() == kept.sum()
    assert (mask & ~np.asarray(kept)).sum() == moved
