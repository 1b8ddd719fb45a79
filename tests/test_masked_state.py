"""Which arrays of an optimizer's state are copies of the weights, and what its functions see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eoi_jax as eoi

SHAPES = [(7, 5), (5, 7), (6, 6)]
STEPS = 4


def example(shape, density=0.4, seed=0):
    rng = np.random.default_rng(seed)
    params = {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32), "bias": jnp.ones(3)}
    kept = rng.random(shape) < density
    kept.flat[:2] = True, False
    mask = {"kernel": jnp.asarray(kept), "bias": jnp.array(True)}
    grads = [
        {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32), "bias": jnp.ones(3)}
        for _ in range(STEPS)
    ]
    return params, mask, grads


def kronecker_factors():
    """Shampoo in short: gradients between the inverse roots of two factors of each kernel."""

    def root(factor):
        values, vectors = jnp.linalg.eigh(factor + 1e-3 * jnp.eye(len(factor)))
        return (vectors * values**-0.25) @ vectors.T

    def init(params):
        left = jax.tree.map(lambda p: jnp.eye(len(p)) if p.ndim == 2 else p, params)
        right = jax.tree.map(lambda p: jnp.eye(p.shape[-1]) if p.ndim == 2 else p, params)
        return left, right

    def update(updates, state, params=None):
        del params

        def add(side):
            def leaf(factor, g):
                return factor + (g @ g.T if side == 0 else g.T @ g) if g.ndim == 2 else factor

            return jax.tree.map(leaf, state[side], updates)

        new = add(0), add(1)
        moved = jax.tree.map(
            lambda g, left, right: root(left) @ g @ root(right) if g.ndim == 2 else g, updates, *new
        )
        return moved, new

    return optax.GradientTransformation(init, update)


OTHER_BASIS = {
    "galore": lambda: optax.contrib.galore(0.1),
    "galore of rank 3": lambda: optax.contrib.galore(0.1, rank=3),
    "galore that projects anew": lambda: optax.contrib.galore(0.1, update_proj_gap=2),
    "kronecker factors": lambda: optax.chain(kronecker_factors(), optax.scale(-0.1)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OTHER_BASIS)
def test_state_in_another_basis_is_that_of_masked_gradients(name, shape):
    """Masked gradients in, masked updates out: projections, factors and moments in between.

    Scaling by the power 0 of a mask's density, the recipe of SμPar, changes nothing.
    """
    params, mask, grads = example(shape)
    inner = optax.chain(OTHER_BASIS[name](), eoi.scale_by_density(mask, 0.0))
    tx = eoi.static_sparse(inner, mask)
    sparse = dense = eoi.masks.apply(mask, params)
    state, expected = tx.init(sparse), inner.init(dense)
    step, reference = jax.jit(tx.update), jax.jit(inner.update)
    for gradient in grads:
        updates, state = step(gradient, state, sparse)
        sparse = optax.apply_updates(sparse, updates)
        updates, expected = reference(eoi.masks.apply(mask, gradient), expected, dense)
        dense = optax.apply_updates(dense, eoi.masks.apply(mask, updates))
    for found, right in zip(
        jax.tree.leaves((sparse, state.inner_state)),
        jax.tree.leaves((dense, expected)),
        strict=True,
    ):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


def poisoned(state, shape):
    """Write a number over every array of a kernel's shape."""
    return jax.tree.map(
        lambda leaf: jnp.full(shape, 7.0) if np.shape(leaf) == shape else leaf, state
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tx", "shape", "copies"),
    [
        (optax.adam(0.1), (6, 6), 2),
        (optax.adafactor(0.1), (3, 130), 1),  # too narrow to be factored, as long as it is
        (optax.adafactor(0.1), (127, 128), 1),
        (optax.adafactor(0.1), (2, 2, 3, 4), 1),
        (optax.contrib.muon(0.1), (4, 9), 1),
        (optax.lamb(0.1), (1, 5), 2),
    ],
)
def test_copies_are_found_at_every_shape(tx, shape, copies):
    params, mask, grads = example(shape)
    outer = eoi.static_sparse(tx, mask)
    state = outer.init(params)
    spoiled = state._replace(inner_state=poisoned(state.inner_state, shape))
    _, after = outer.update(grads[0], spoiled, params)
    arrays = [leaf for leaf in jax.tree.leaves(after.inner_state) if np.shape(leaf) == shape]
    assert len(arrays) >= copies
    for leaf in arrays:
        np.testing.assert_array_equal(np.asarray(leaf)[~np.asarray(mask["kernel"])], 0.0)
        assert np.any(leaf)


@pytest.mark.parametrize("longer_first", [True, False])
def test_axes_in_an_order_of_their_own_are_no_copy(longer_first):
    """An array that is stored with its longer axis first, or last, of a kernel that is square."""

    def stored(leaf):
        return jnp.full(sorted(leaf.shape, reverse=longer_first), 7.0)

    def init(params):
        return jax.tree.map(stored, params)

    def update(updates, state, params=None):
        del params
        return updates, jax.tree.map(lambda leaf: leaf + 1, state)

    inner = optax.GradientTransformation(init, update)
    params, mask, grads = example((6, 6))
    tx = eoi.static_sparse(inner, mask)
    _, after = tx.update(grads[0], tx.init(params), params)
    np.testing.assert_array_equal(after.inner_state["kernel"], 8.0)


def test_an_optimizer_for_one_shape_is_judged_by_that_shape():
    def init(params):
        assert params["kernel"].shape == (6, 6)
        return optax.trace(0.9).init(params)

    params, mask, grads = example((6, 6))
    tx = eoi.static_sparse(optax.GradientTransformation(init, optax.trace(0.9).update), mask)
    state = tx.init(params)
    spoiled = state._replace(inner_state=poisoned(state.inner_state, (6, 6)))
    _, after = tx.update(grads[0], spoiled, params)
    masked = ~np.asarray(mask["kernel"])
    np.testing.assert_array_equal(np.asarray(after.inner_state.trace["kernel"])[masked], 0.0)


# --- functions that are passed through update ---------------------------------------------------

TARGET = jnp.asarray(np.random.default_rng(5).normal(size=(3, 4)), jnp.float32)
KEPT = np.random.default_rng(6).random((3, 4)) < 0.5


def loss(params):
    """Couple all weights, so that each has an influence on the gradients of the others."""
    kernel = params["kernel"]
    return jnp.sum((kernel - TARGET) ** 2) + jnp.sum(kernel) ** 2 + params["bias"].sum() ** 2


def loss_of_kept(params):
    kernel = jnp.zeros((3, 4)).at[KEPT].set(params["kernel"])
    return loss({"kernel": kernel, "bias": params["bias"]})


def sam(loss):
    outer, adversary = optax.sgd(0.1, 0.9), optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    tx = optax.contrib.sam(outer, adversary, opaque_mode=True)
    return tx, lambda params: {"grad_fn": lambda p, i: jax.grad(loss)(p)}


def line_search(make):
    def method(loss):
        def arguments(params):
            value, grad = jax.value_and_grad(loss)(params)
            return {"value": value, "grad": grad, "value_fn": loss}

        return make(), arguments

    return method


def sophia(loss):
    return optax.contrib.sophia(0.1, update_interval=1), lambda params: {"obj_fn": loss}


METHODS = {
    "sam": sam,
    "zoom line search": line_search(lambda: optax.lbfgs()),
    "backtracking": line_search(
        lambda: optax.chain(
            optax.sgd(0.5), optax.scale_by_backtracking_linesearch(max_backtracking_steps=8)
        )
    ),
    "sophia": sophia,
}


def train(tx, arguments, loss, params):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, **arguments(params))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_functions_see_masked_parameters_and_return_masked_gradients(name):
    mask = {"kernel": jnp.asarray(KEPT), "bias": jnp.array(True)}
    dense = {"kernel": jnp.full((3, 4), 2.0), "bias": jnp.ones(2)}

    def sparse(params):
        tx, arguments = METHODS[name](loss)
        return train(eoi.static_sparse(tx, mask), arguments, loss, params)

    found = sparse(eoi.masks.apply(mask, dense))
    assert not np.asarray(found["kernel"])[~KEPT].any()
    assert np.all(np.asarray(found["kernel"])[KEPT] != 2.0)
    if name != "sophia":  # it draws a random number for each weight, kept or not
        kept = {"kernel": dense["kernel"][KEPT], "bias": dense["bias"]}
        tx, arguments = METHODS[name](loss_of_kept)
        alone = train(tx, arguments, loss_of_kept, kept)
        np.testing.assert_allclose(found["kernel"][KEPT], alone["kernel"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found["bias"], alone["bias"], rtol=1e-3, atol=1e-4)


def test_a_function_is_given_what_it_asks_for():
    """Any argument and any part of a result that is a tree of gradients; its signature stays."""
    seen = []

    def function(scale, params, *, shift):
        seen.append((scale, params["kernel"], shift["kernel"]))
        return scale, {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(1)}

    def update(updates, state, params=None, **extra):
        scale, gradient = extra["function"](3.0, updates, shift=params)
        assert scale == 3.0
        return gradient, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    mask = {"kernel": jnp.array([[True, False]]), "bias": jnp.array(True)}
    params = {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.ones(1)}
    tx = eoi.static_sparse(inner, mask)
    dirty = {"kernel": jnp.array([[5.0, 5.0]]), "bias": jnp.ones(1)}
    updates, _ = tx.update(dirty, tx.init(params), dirty, function=function)
    assert updates["kernel"].tolist() == [[1.0, -5.0]]
    [(scale, kernel, shift)] = seen
    assert (scale, kernel.tolist(), shift.tolist()) == (3.0, [[5.0, 0.0]], [[5.0, 0.0]])
