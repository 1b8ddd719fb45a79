"""SET and RigL on blocks: what drops, what grows, and what stays as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import compilations, refuses
from hypothesis import given
from hypothesis import strategies as st

import eoi_jax as eoi
from eoi_jax import blocks
from eoi_jax.nnx import BlockSparseLinear

KEY = jax.random.key(11)
RAGGED = np.array([[1, 0, 1, 1], [1, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]], bool)


def ragged():
    """Rows of 2, 0, 2 and 5 blocks, of which the last sees all blocks of inputs."""
    mask = np.kron(RAGGED, np.ones((2, 3), bool))
    matrix = jnp.where(mask, jax.random.normal(KEY, mask.shape), 0)
    return blocks.from_dense(matrix, (2, 3))


def draw(shape, density):
    return blocks.orthogonal(KEY, shape, density, block_size=2)


MATRICES = {
    "square": draw((32, 32), 1 / 4),
    "tall": draw((24, 12), 1 / 2),
    "between": draw((20, 20), 0.25),  # rows of 2 and of 3 blocks
    "nearly full": blocks.from_dense(jnp.ones((8, 8)).at[:2, :2].set(0), 2),
    "full": blocks.all_blocks(draw((8, 8), 1 / 2)),
    "ragged": ragged(),
}
MATRICES = {name: blocks.growable(w) for name, w in MATRICES.items()}


def pattern(w):
    """The stored blocks, (R, P), each found once."""
    outputs, inputs = w.rows.shape[0], w.slots.shape[0]
    found = np.zeros((outputs, inputs + 1), int)
    np.add.at(found, (np.arange(outputs)[:, None], np.asarray(w.rows)), 1)
    assert found[:, :-1].max(initial=0) <= 1, "a block is twice in a row"
    return found[:, :-1] == 1


def norms(w):
    """Frobenius norms of all blocks, (R, P), those of missing blocks 0."""
    high, wide = w.block_shape
    dense = np.asarray(w.to_dense(), np.float64)
    shaped = dense.reshape(-1, high, dense.shape[1] // wide, wide)
    return np.sqrt((shaped**2).sum((1, 3))).T


def oracle(w, scores, fraction):
    """The patterns of what stays and of the result: one pair after the other."""
    before, sizes, width = pattern(w), norms(w), w.slots.shape[1]
    outputs, inputs = before.shape
    stay, number = before.copy(), before.sum(1)
    count = np.floor(np.float32(fraction) * number.astype(np.float32)).astype(int)
    count = np.minimum(count, inputs - number)
    for row in range(outputs):
        columns = [p for p in np.asarray(w.rows)[row] if p < inputs]  # equal norms: as stored
        for column in sorted(columns, key=lambda p: sizes[row, p])[: count[row]]:
            stay[row, column] = False
    after = stay.copy()
    pairs = [(r, p) for r in range(outputs) for p in range(inputs) if not stay[r, p]]
    for row, column in sorted(pairs, key=lambda rp: (before[rp], -scores[rp])):
        if after[row].sum() < number[row] and after[:, column].sum() < width:
            after[row, column] = True
    assert (after.sum(1) == number).all()
    return stay, after


def check_laws(w, step):
    """What holds whatever grows."""
    new, kept = step
    before, after = pattern(w), pattern(new)
    assert new.shape == w.shape
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, w)
    assert new.dtype == w.dtype
    np.testing.assert_array_equal(before.sum(1), after.sum(1))
    stayed = np.asarray(kept).all((2, 3))
    assert (np.asarray(kept).any((2, 3)) == stayed).all()
    np.testing.assert_array_equal(np.asarray(new.rows)[stayed], np.asarray(w.rows)[stayed])
    np.testing.assert_array_equal(np.asarray(new.values)[stayed], np.asarray(w.values)[stayed])
    assert (np.asarray(new.values)[~stayed] == 0).all()
    # The inverse is exact: as many places as blocks, each the place of a block of that column.
    found = {(slot, p) for p, row in enumerate(np.asarray(new.slots)) for slot in row.tolist()}
    found = {(slot, p) for slot, p in found if slot < new.rows.size}
    flat = np.asarray(new.rows).ravel()
    assert found == {(place, p) for place, p in enumerate(flat.tolist()) if p < len(new.slots)}
    return before, after, stayed


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRICES)
@given(seed=st.integers(0, 2**32 - 1), fraction=st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.99]))
def test_rigl_drops_the_smallest_blocks_and_grows_those_of_the_largest_gradients(
    name, seed, fraction
):
    w = MATRICES[name]
    of_values, of_scores = jax.random.split(jax.random.key(seed))
    present = (w.rows < len(w.slots))[..., None, None]
    values = jnp.where(present, jax.random.normal(of_values, w.values.shape), 0)
    w = dataclasses.replace(w, values=values)
    scores = jax.random.uniform(of_scores, (len(w.rows), len(w.slots)))
    step = blocks.rigl_step(w, scores, fraction)
    before, after, _ = check_laws(w, step)
    stay, expected = oracle(w, np.asarray(scores), fraction)
    np.testing.assert_array_equal(after, expected)
    # The function loses the dropped blocks alone.
    high, wide = w.block_shape
    entries = np.kron(stay.T, np.ones((high, wide)))
    np.testing.assert_array_equal(step.matrix.to_dense(), w.to_dense() * entries)
    # What a row drops is not above what it keeps.
    sizes = norms(w)
    for row in range(len(stay)):
        gone, left = sizes[row][before[row] & ~stay[row]], sizes[row][stay[row]]
        assert gone.max(initial=0) <= left.min(initial=np.inf)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["square", "between", "ragged"])
def test_set_grows_every_place_in_turn_and_the_laws_hold_for_ever(name):
    w, seen = MATRICES[name], pattern(MATRICES[name])
    for index in range(60):
        random = jax.random.normal(jax.random.fold_in(KEY, index), w.values.shape)
        present = (w.rows < len(w.slots))[..., None, None]
        w = dataclasses.replace(w, values=jnp.where(present, random, 0))
        step = blocks.set_step(jax.random.key(index), w, 0.5)
        before, after, stayed = check_laws(w, step)
        # Half of each row's blocks are new, where there is another place for each.
        moved = np.minimum(before.sum(1) // 2, before.shape[1] - before.sum(1))
        np.testing.assert_array_equal((~stayed).sum(1), moved)
        w, seen = step.matrix, seen | after
    assert (seen.all(1) | (before.sum(1) < 2)).all()


def test_set_draws_by_its_key():
    w = MATRICES["square"]
    one, same, other = (blocks.set_step(jax.random.key(k), w, 0.5).matrix for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (pattern(one) != pattern(other)).any()


@pytest.mark.slow
def test_set_grows_every_free_block_as_often():
    """With room everywhere, each of the places that a row lacks is as likely as the others."""
    ring = jnp.eye(4) + jnp.roll(jnp.eye(4), 1, 0)
    w = blocks.from_dense(jnp.kron(ring, jnp.ones((2, 2))), 2)
    w = dataclasses.replace(w, slots=jnp.pad(w.slots, ((0, 0), (0, 2)), constant_values=8))
    before, draws = pattern(w), 2000
    steps = jax.vmap(lambda key: blocks.set_step(key, w, 0.5).matrix.rows)
    rows = np.asarray(steps(jax.random.split(KEY, draws)))
    grown = (rows[..., None] == np.arange(4)).any(2).mean(0)[~before]
    np.testing.assert_allclose(grown, 0.5, atol=5 * 0.5 / np.sqrt(draws))


@pytest.mark.slow
def test_equal_norms_go_in_order_and_nan_drops_first_and_grows_last():
    mask = np.kron([[1], [1], [1], [0], [0], [0]], np.ones((2, 2)))
    w = blocks.growable(blocks.from_dense(jnp.asarray(mask), 2))
    scores = jnp.zeros((1, 6)).at[0, 3].set(jnp.nan)
    new = blocks.rigl_step(w, scores, 0.7).matrix
    assert new.rows.tolist() == [[4, 5, 2]]
    w = dataclasses.replace(w, values=w.values.at[0, 2, 0, 0].set(jnp.nan))
    new = blocks.rigl_step(w, scores.at[0, 5].set(1e-30), 0.4).matrix
    assert new.rows.tolist() == [[0, 1, 5]]


@pytest.mark.slow
def test_patterns_and_fractions_do_not_compile_anew():
    w, key = MATRICES["square"], jax.random.key(0)
    program = jax.jit(blocks.set_step)
    scores = jnp.ones((len(w.rows), len(w.slots)))
    w = program(key, w, jnp.float32(0.5)).matrix
    for fraction in (0.2, 0.3):
        blocks.rigl_step(w, scores, fraction)
    with compilations() as compiled:
        for fraction in (0.7, 0.3):
            w = program(key, w, jnp.float32(fraction)).matrix
            w = blocks.rigl_step(w, scores, fraction).matrix
    assert compiled == []


@pytest.mark.slow
def test_stacks_step_as_their_matrices_do():
    keys = jax.random.split(KEY, 3)
    stack = jax.vmap(lambda key: blocks.orthogonal(key, (12, 12), 1 / 2, block_size=2))(keys)
    wide = blocks.growable(stack)
    full = blocks.all_blocks(stack)
    np.testing.assert_array_equal(full.to_dense(), stack.to_dense())
    np.testing.assert_array_equal(wide.to_dense(), stack.to_dense())
    found = jax.vmap(lambda key, w: blocks.set_step(key, w, 0.5))(keys, wide)
    for index in range(3):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], wide)
        expected = blocks.set_step(keys[index], one, 0.5)
        jax.tree.map(lambda a, b, i=index: np.testing.assert_array_equal(a[i], b), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["square", "ragged"])
def test_all_blocks_and_growable_are_the_same_matrix(name):
    w = MATRICES[name]
    full = blocks.all_blocks(w)
    assert full.density == 1
    assert pattern(full).all()
    x = jax.random.normal(KEY, (3, w.shape[0]))
    for other in (full, full.T.T, blocks.growable(full)):
        np.testing.assert_array_equal(other.to_dense(), w.to_dense())
    pull = jax.vjp(lambda x: x @ w, x)[1]
    dy = jax.random.normal(KEY, (3, w.shape[1]))
    np.testing.assert_allclose(pull(dy)[0], dy @ w.to_dense().T, atol=1e-5)
    assert blocks.growable(w) is w


@pytest.mark.slow
@pytest.mark.parametrize("name", ["square", "ragged", "tall"])
def test_gradient_norms_are_those_of_the_dense_gradient(name):
    w = MATRICES[name]
    full = blocks.all_blocks(w)
    x = jax.random.normal(KEY, (3, 2, w.shape[0]))

    def loss(y):
        return jnp.sin(y).sum()

    dy = jax.grad(loss)(x @ w)
    found = jax.jit(functools.partial(blocks.gradient_norms, block_shape=w.block_shape))(x, dy)
    flat = [np.asarray(a, np.float64).reshape(6, -1) for a in (x, dy)]
    dense = (flat[0].T @ flat[1]).reshape(len(w.slots), w.block_shape[0], len(w.rows), -1)
    expected = np.sqrt((dense**2).sum((1, 3))).T
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    grads = jax.grad(lambda values: loss(x @ dataclasses.replace(full, values=values)))(full.values)
    np.testing.assert_allclose(jnp.linalg.norm(grads, axis=(-2, -1)), expected, rtol=1e-5)
    narrow = blocks.gradient_norms(*(a.astype(jnp.bfloat16) for a in (x, dy)), w.block_shape)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [optax.adam(1e-2), optax.sgd(0.1, momentum=0.9)])
def test_an_optimizer_forgets_blocks_that_moved(inner):
    w = MATRICES["square"]
    x = jax.random.normal(KEY, (5, w.shape[0]))
    params = {"kernel": w.values, "bias": jnp.zeros(w.shape[1])}

    def loss(params, w):
        y = x @ dataclasses.replace(w, values=params["kernel"]) + params["bias"]
        return (y**2).mean()

    state = inner.init(params)
    for _ in range(2):
        updates, state = inner.update(jax.grad(loss)(params, w), state, params)
        params = optax.apply_updates(params, updates)
    w, kept = blocks.set_step(KEY, dataclasses.replace(w, values=params["kernel"]), 0.5)
    mask = {"kernel": kept, "bias": jnp.array(True)}
    new = eoi.dynamic.reset_state(inner, mask, params | {"kernel": w.values}, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        is_kernel = before.shape == kept.shape
        expected = np.where(kept, before, 0) if is_kernel else before
        np.testing.assert_array_equal(after, expected)
    assert sum(leaf.shape == kept.shape for leaf in jax.tree.leaves(new)) >= 1
    assert float(np.asarray(kept).mean()) == 0.5


@pytest.mark.slow
def test_a_layer_of_nnx_moves_its_blocks_and_its_optimizer_forgets_them():
    layer = BlockSparseLinear(32, 32, density=1 / 4, block_size=2, rngs=nnx.Rngs(0))
    layer.set_matrix(blocks.growable(layer.matrix()))
    tx = optax.adam(1e-2)
    optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
    x = jax.random.normal(KEY, (5, 32))

    @nnx.jit
    def train(layer, optimizer):
        optimizer.update(layer, nnx.grad(lambda layer: (layer(x) ** 2).mean())(layer))

    train(layer, optimizer)
    before = layer.matrix()
    step = blocks.set_step(KEY, before, 0.5)
    layer.set_matrix(step.matrix)
    assert (pattern(layer.matrix()) != pattern(before)).any()
    product = x @ step.matrix.to_dense()
    np.testing.assert_allclose(layer(x), product + layer.bias[...], atol=1e-5)

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    def arrays(tree):
        return jax.tree.map(lambda variable: variable[...], tree, is_leaf=is_variable)

    params, state = arrays(nnx.state(layer, nnx.Param)), arrays(optimizer.opt_state)
    mask = nnx.State({"kernel": step.kept, "bias": jnp.array(True)})
    new = eoi.dynamic.reset_state(tx, mask, params, state)
    expected = np.where(step.kept, state[0].mu["kernel"], 0)
    assert (expected != 0).any()
    np.testing.assert_array_equal(new[0].mu["kernel"], expected)
    np.testing.assert_array_equal(new[0].mu["bias"], state[0].mu["bias"])
    with refuses("matrix.shape=(20, 20)", "(32, 32)"):
        layer.set_matrix(MATRICES["between"])


def test_a_mask_that_does_not_fit_is_refused():
    tx, params = optax.adam(1e-2), {"kernel": jnp.ones((2, 3))}
    state = tx.init(params)
    for mask, named in (
        ({"kernel": jnp.ones((3, 2), bool)}, "mask[kernel]"),
        ({"kernel": jnp.ones((2, 3))}, "mask[kernel]"),
        ({"w": jnp.array(True)}, "mask[w]"),
    ):
        with refuses(named):
            eoi.dynamic.reset_state(tx, mask, params, state)


def test_steps_that_cannot_be_are_refused():
    tight = draw((32, 32), 1 / 4)
    w, scores = blocks.growable(tight), jnp.ones((8, 16))
    stack = jax.tree.map(lambda leaf: leaf[None], w)
    for bad, named in (
        (lambda: blocks.rigl_step(tight, scores), ("w.slots.shape=(16, 2)", "growable")),
        (lambda: blocks.set_step(KEY, tight), ("w.slots.shape=(16, 2)", "growable")),
        (lambda: blocks.set_step(KEY, stack), ("w=(1, 32, 32)", "jax.vmap")),
        (lambda: blocks.set_step(KEY, w.to_dense()), ("w=",)),
        (lambda: blocks.all_blocks(w.to_dense()), ("w=",)),
        (lambda: blocks.growable(w.to_dense()), ("w=",)),
        (lambda: blocks.set_step(jax.random.split(KEY), w), ("key=",)),
        (lambda: blocks.set_step(KEY, w, 1.0), ("drop_fraction=1.0", "[0, 1)")),
        (lambda: blocks.rigl_step(w, scores, -0.1), ("drop_fraction=-0.1", "[0, 1)")),
        (lambda: blocks.rigl_step(w, scores.T), ("gradient_norms.shape=(16, 8)", "(8, 16)")),
        (lambda: blocks.rigl_step(w, scores > 0), ("gradient_norms.dtype='bool'",)),
        (lambda: blocks.gradient_norms(scores, scores[1:], (2, 2)), ("dy.shape=(7, 16)",)),
        (lambda: blocks.gradient_norms(scores, scores, (2, 3)), ("block_size=3",)),
        (lambda: blocks.gradient_norms(scores, scores, (2, 2, 2)), ("block_size=(2, 2, 2)",)),
        (lambda: blocks.gradient_norms(scores > 0, scores, (2, 2)), ("x.dtype='bool'",)),
        (lambda: blocks.gradient_norms(jnp.ones(()), scores, (2, 2)), ("x.shape=()",)),
    ):
        with refuses(*named):
            bad()
