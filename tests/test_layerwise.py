"""Laws of spectra along layers and along training; the oracle is the Jacobian of each prefix."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refuses

import eoi_jax as eoi
from eoi_jax import spectrum

KEY = jax.random.key(5)
DEPTH, WIDTH = 5, 4


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tanh_layer(params, h):
    return jnp.tanh(h @ params["w"] + params["b"])


def tanh_stack(dtype=np.float32, depth=DEPTH):
    return {
        "w": normal(0, depth, WIDTH, WIDTH).astype(dtype) / 2,
        "b": normal(1, depth, WIDTH).astype(dtype) / 2,
    }


def linear_layer(matrix, h):
    return matrix @ h


def prefix_values(step_fn, stack, x, embed=None):
    """Singular values of the Jacobian of every prefix of the network, each by itself."""
    depth = len(jax.tree.leaves(stack)[0])

    def prefix(example, layers):
        h = example if embed is None else embed(example)
        for layer in range(layers):
            h = step_fn(jax.tree.map(lambda leaf: leaf[layer], stack), h)  # noqa: B023
        return h.ravel()

    rows = []
    for layers in range(1, depth + 1):
        jacobians = jax.vmap(jax.jacobian(lambda e: prefix(e, layers)))(x)  # noqa: B023
        jacobians = np.asarray(jacobians).reshape(len(x), jacobians.shape[1], -1)
        rows.append(np.linalg.svd(jacobians, compute_uv=False))
    return np.stack(rows)


# --- along the layers -------------------------------------------------------------------------


@pytest.mark.slow
def test_values_are_those_of_every_prefix(x64):
    stack, x = tanh_stack(np.float64), normal(2, 3, WIDTH).astype(np.float64)
    values = spectrum.layerwise(tanh_layer, stack, x)
    chex.assert_shape(values, (DEPTH, 3, WIDTH))
    assert values.dtype == jnp.float64
    np.testing.assert_allclose(values, prefix_values(tanh_layer, stack, x), rtol=0, atol=1e-13)
    assert (np.diff(values, axis=-1) <= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [3, WIDTH, 9])
def test_jacobians_start_at_the_input_of_an_embedding(inputs, x64):
    first = normal(3, inputs, WIDTH).astype(np.float64)
    stack, x = tanh_stack(np.float64), normal(2, 3, inputs).astype(np.float64)

    def embed(example):
        return jnp.sin(example @ first)

    values = spectrum.layerwise(tanh_layer, stack, x, embed=embed)
    chex.assert_shape(values, (DEPTH, 3, min(inputs, WIDTH)))
    expected = prefix_values(tanh_layer, stack, x, embed)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("example", [(4, 2), (3, 8)])
def test_states_and_examples_may_have_several_axes(example, x64):
    kernels = normal(0, 3, 3, 2, 2).astype(np.float64)
    x = normal(1, 2, *example).astype(np.float64)

    def step(kernel, h):  # a circular convolution along the first axis
        taps = jnp.stack([jnp.roll(h, shift, 0) for shift in (1, 0, -1)])
        return jnp.sin(jnp.einsum("tpi,tio->po", taps, kernel))

    def embed(grid):
        return grid.ravel()[:8].reshape(4, 2) ** 2

    values = spectrum.layerwise(step, kernels, x, embed=embed)
    chex.assert_shape(values, (3, 2, 8))
    np.testing.assert_allclose(values, prefix_values(step, kernels, x, embed), rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "layers"),
    [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (5, [5]), (9, [5])],
)
def test_every_takes_some_layers_and_always_the_last(every, layers):
    stack, x = tanh_stack(), normal(2, 3, WIDTH)
    some = spectrum.layerwise(tanh_layer, stack, x, every=every)
    chex.assert_shape(some, (len(layers), 3, WIDTH))
    each = spectrum.layerwise(tanh_layer, stack, x)
    np.testing.assert_allclose(some, each[jnp.array(layers) - 1], atol=1e-6)


def test_the_last_layer_has_the_values_of_the_network():
    stack, x = tanh_stack(), normal(2, 3, WIDTH)

    def network(example):
        return jax.lax.scan(lambda h, params: (tanh_layer(params, h), None), example, stack)[0]

    values = spectrum.layerwise(tanh_layer, stack, x)[-1]
    np.testing.assert_allclose(values, spectrum.singular_values(network, x), atol=1e-6)


@pytest.mark.slow
def test_a_thousand_exactly_orthogonal_layers_are_isometric_after_each():
    keys = jax.random.split(KEY, 1000)
    draw = jax.jit(jax.vmap(lambda key, density: eoi.orthogonal(key, (16, 16), density), (0, None)))
    measure = jax.jit(lambda stack, x: spectrum.layerwise(linear_layer, stack, x))
    for density in (1 / 16, 0.1, 0.2, 0.5, 1.0):
        values = measure(draw(keys, density), normal(0, 2, 16))
        chex.assert_shape(values, (1000, 2, 16))
        np.testing.assert_allclose(values, 1, atol=2e-5)


def test_it_shows_the_layer_where_isometry_is_lost():
    stack = np.stack([np.linalg.qr(matrix)[0] for matrix in normal(0, 6, 8, 8)])
    stack[3] *= 0.5
    values = spectrum.layerwise(linear_layer, stack, normal(1, 1, 8))[:, 0]
    np.testing.assert_allclose(values[:3], 1, atol=2e-6)
    np.testing.assert_allclose(values[3:], 0.5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_nothing(batch_size):
    stack, x = tanh_stack(), normal(2, 7, WIDTH)
    expected = spectrum.layerwise(tanh_layer, stack, x, every=2)
    values = spectrum.layerwise(tanh_layer, stack, x, every=2, batch_size=batch_size)
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_compiled_is_eager():
    stack, x = tanh_stack(), normal(2, 3, WIDTH)
    compiled = jax.jit(lambda s, b: spectrum.layerwise(tanh_layer, s, b))(stack, x)
    np.testing.assert_allclose(compiled, spectrum.layerwise(tanh_layer, stack, x), atol=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_memory_grows_neither_with_all_jacobians_nor_with_the_stack(every):
    def scratch(depth):
        stack = jax.ShapeDtypeStruct((depth, 32, 32), jnp.float32)
        x = jax.ShapeDtypeStruct((8, 32), jnp.float32)

        def measure(stack, x):
            return spectrum.layerwise(linear_layer, stack, x, every=every)

        return jax.jit(measure).lower(stack, x).compile().memory_analysis().temp_size_in_bytes

    stack, jacobians, values = 300 * 32 * 32 * 4, 300 * 8 * 32 * 32 * 4, 300 * 8 * 32 * 4
    assert scratch(310) - scratch(10) <= values < min(stack, jacobians) / 2


def test_every_product_runs_at_the_highest_precision():
    first = normal(3, 9, WIDTH)
    program = str(
        jax.make_jaxpr(
            lambda s, b: spectrum.layerwise(tanh_layer, s, b, embed=lambda e: e @ first, every=2)
        )(tanh_stack(), normal(2, 3, 9))
    )
    products = program.count("dot_general[")
    assert products >= 4
    assert products == program.count("precision=Precision.HIGHEST") + program.count(
        "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    )


@pytest.mark.slow
def test_narrow_types_are_widened_before_the_factorization():
    stack = jnp.stack([jnp.diag(jnp.array([4.0, 0.5, 0.25]))] * 3).astype(jnp.bfloat16)
    x = jnp.ones((1, 5), jnp.bfloat16)
    values = spectrum.layerwise(linear_layer, stack, x[:, :3])
    chex.assert_type(values, jnp.float32)
    np.testing.assert_array_equal(values[-1, 0], [64.0, 0.125, 0.015625])
    reduced = spectrum.layerwise(linear_layer, stack, x, embed=lambda e: e[:3])
    np.testing.assert_allclose(reduced, values, rtol=1e-2)


def test_no_implicit_promotion():
    stack, x = jnp.ones((3, 4, 4), jnp.bfloat16), jnp.ones((2, 6), jnp.bfloat16)
    watch = spectrum.monitor(
        lambda w: spectrum.layerwise(linear_layer, w, x, embed=lambda e: e[:4], every=2), every=2
    )
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.jit(watch)(jnp.int32(2), stack)


@pytest.mark.slow
def test_what_is_not_finite_is_shown_from_its_layer_and_example_on():
    stack, x = tanh_stack(), normal(2, 3, WIDTH)
    x[1, 0] = np.nan
    values = np.asarray(spectrum.layerwise(tanh_layer, stack, x))
    assert np.isnan(values[:, 1]).all()
    good = spectrum.layerwise(tanh_layer, stack, x[[0, 2]])
    np.testing.assert_allclose(values[:, [0, 2]], good, atol=1e-6)
    growing = np.stack([1e15 * np.eye(3, dtype=np.float32)] * 4)
    late = np.asarray(spectrum.layerwise(linear_layer, growing, np.ones((1, 3), np.float32)))
    np.testing.assert_allclose(late[:2, 0], [[1e15] * 3, [1e30] * 3], rtol=1e-5)
    assert np.isnan(late[2:]).all()
    reduced = spectrum.layerwise(
        linear_layer, growing[:2], np.zeros((1, 5), np.float32), embed=lambda e: jnp.sqrt(e[:3])
    )
    assert np.isnan(reduced).all()


STACK, X = tanh_stack(), normal(2, 3, WIDTH)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda f: f(tanh_layer, STACK, X.astype(int)), ["x.dtype=int"]),
        (lambda f: f(tanh_layer, STACK, np.float32(1)), ["x.ndim=0"]),
        (lambda f: f(tanh_layer, STACK, X[:0]), ["x.shape=(0, 4)"]),
        (lambda f: f(tanh_layer, STACK, X, every=0), ["every=0"]),
        (lambda f: f(tanh_layer, STACK, X, batch_size=0), ["batch_size=0"]),
        (lambda f: f(tanh_layer, {**STACK, "b": X}, X), ["stacked_params", "[(3,), (5,)]"]),
        (lambda f: f(linear_layer, 2.0, X), ["stacked_params", "[()]"]),
        (lambda f: f(linear_layer, np.ones((0, 4, 4)), X), ["stacked_params", "[(0,)]"]),
        (lambda f: f(lambda p, h: h, {}, X), ["stacked_params", "[]"]),
        (lambda f: f(lambda p, h: h[:2], STACK, X), ["step_fn", "h=", "(2,)"]),
        (lambda f: f(lambda p, h: (h, h), STACK, X), ["step_fn", "h=", "(4,)"]),
        (lambda f: f(lambda p, h: h.astype("bfloat16"), STACK, X), ["step_fn", "bfloat16"]),
        (lambda f: f(tanh_layer, STACK, X, embed=lambda e: (e, e)), ["embed", "(4,)"]),
        (lambda f: f(tanh_layer, STACK, X, embed=jnp.argsort), ["embed", "int"]),
    ],
)
def test_what_is_no_stack_of_layers_is_refused(call, named):
    with refuses(*named):
        call(spectrum.layerwise)


# --- along training ---------------------------------------------------------------------------


def network(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])


def network_params():
    return {"a": jnp.asarray(normal(0, 6, 4)), "b": jnp.asarray(normal(1, 4, 3))}


BATCH = normal(2, 5, 6)


def isometry(params, batch=BATCH):
    return spectrum.summarize(spectrum.singular_values(lambda x: network(params, x), batch))


def assert_same(found, expected):
    """Compare what rounding leaves alone: a ratio to a small value it does not."""
    assert isinstance(found, spectrum.SpectrumSummary)
    chex.assert_trees_all_close(found[:4], expected[:4], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_it_measures_on_schedule_and_compiles_once():
    chex.clear_trace_counter()
    watch = spectrum.monitor(chex.assert_max_traces(isometry, n=1), every=3)
    params = network_params()
    for step in range(8):
        params = jax.tree.map(lambda leaf: 0.9 * leaf, params)
        found = watch(step, params)
        if step % 3:
            assert found is None
        else:
            assert_same(found, isometry(params))


@pytest.mark.parametrize("number", [int, np.int64, jnp.int32, jnp.asarray])
def test_steps_are_integers_of_any_kind(number):
    watch = spectrum.monitor(lambda params: params.sum(), every=2)
    assert watch(number(4), jnp.ones(3)) == 3
    assert watch(number(5), jnp.ones(3)) is None


def test_further_arguments_are_passed_on():
    watch, other = spectrum.monitor(isometry, every=1), normal(3, 5, 6)
    found = watch(0, network_params(), other)
    assert_same(found, isometry(network_params(), other))


def test_a_network_that_diverged_is_shown():
    found = spectrum.monitor(isometry, every=1)(
        0, {**network_params(), "b": jnp.full((4, 3), jnp.nan)}
    )
    assert np.isnan(found.mean)


def test_in_a_compiled_loop_steps_that_are_not_due_are_nan():
    watch = spectrum.monitor(isometry, every=3)
    tx = optax.sgd(0.1)

    def loss(params):
        return jnp.sum(jax.vmap(lambda x: network(params, x))(BATCH) ** 2)

    def update(carry, step):
        params, state = carry
        found = watch(step, params)
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), (params, found)

    @jax.jit
    def train(params):
        return jax.lax.scan(update, (params, tx.init(params)), jnp.arange(7))[1]

    history, found = train(network_params())
    assert isinstance(found, spectrum.SpectrumSummary)
    for step in range(7):
        row = jax.tree.map(lambda leaf: leaf[step], found)  # noqa: B023
        if step % 3:
            assert all(np.isnan(number) for number in row)
        else:
            params = jax.tree.map(lambda leaf: leaf[step], history)  # noqa: B023
            assert_same(row, isometry(params))


def test_steps_that_are_not_due_cost_no_factorization():
    watch = spectrum.monitor(isometry, every=3)
    program = jax.make_jaxpr(watch)(jnp.int32(0), network_params())
    assert not any("svd" in str(e.primitive) for e in program.eqns)
    [conditional] = [e for e in program.eqns if e.primitive.name == "cond"]
    assert ["svd" in str(branch) for branch in conditional.params["branches"]] == [False, True]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: spectrum.monitor(isometry, every=0), ["every=0"]),
        (lambda: spectrum.monitor(isometry, every=1)(0.5, {}), ["step=0.5"]),
        (
            lambda: jax.jit(spectrum.monitor(lambda p: p.argmax(), every=1))(0, jnp.ones(3)),
            ["measure", "int"],
        ),
    ],
)
def test_what_cannot_be_monitored_is_refused(call, named):
    with refuses(*named):
        call()
