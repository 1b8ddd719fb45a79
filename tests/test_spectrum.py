"""Laws of Jacobians, their singular values and orthogonality; the oracle is float64 NumPy."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gram_error, refuses
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eoi_jax import spectrum

KEY = jax.random.key(0)
SHAPES = [(3, 8), (8, 3), (5, 5), (1, 6), (6, 1)]


def normal(seed: int, *shape: int) -> np.ndarray:
    """Float32 numbers, so that float64 oracles and float32 functions start from the same."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_singular_values(seed: int, shape: tuple[int, int], values) -> np.ndarray:
    left, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(shape[0], len(values))))
    right, _ = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(shape[1], len(values))))
    return (left * np.asarray(values)) @ right.T


def linear(matrix):
    matrix = jnp.asarray(matrix)
    return lambda x: matrix @ x


def tanh_network(dtype=np.float32):
    first, second = normal(1, 6, 4).astype(dtype), normal(2, 4, 3).astype(dtype)
    return lambda x: jnp.tanh(jnp.tanh(x @ first) @ second)


# --- Jacobians --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_jacobian_of_a_linear_network_is_the_product_of_its_matrices(shape, mode):
    outputs, inputs = shape
    first, second = normal(0, 4, inputs), normal(1, outputs, 4)
    x = normal(2, 3, inputs)
    jacobian = spectrum.jacobian(lambda v: second @ (first @ v), x, mode=mode)
    chex.assert_shape(jacobian, (3, outputs, inputs))
    product = second.astype(np.float64) @ first.astype(np.float64)
    np.testing.assert_allclose(jacobian, np.broadcast_to(product, (3, *shape)), atol=2e-6)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_axes_are_flattened_in_row_major_order(mode):
    tensor = normal(0, 2, 3, 4, 5)
    jacobian = spectrum.jacobian(
        lambda v: jnp.tensordot(tensor, v, 2), normal(1, 2, 4, 5), mode=mode
    )
    expected = np.broadcast_to(tensor.reshape(6, 20), (2, 6, 20))
    np.testing.assert_allclose(jacobian, expected, atol=1e-6)


def test_scalar_examples_and_scalar_outputs_are_one_by_one():
    jacobian = spectrum.jacobian(jnp.square, np.array([1.0, 3.0], np.float32))
    np.testing.assert_array_equal(jacobian, [[[2.0]], [[6.0]]])


@pytest.mark.slow
def test_jacobian_is_the_central_difference_quotient(x64):
    fn, x, step = tanh_network(np.float64), normal(3, 4, 6).astype(np.float64), 1e-6
    jacobian = spectrum.jacobian(fn, x)
    assert jacobian.dtype == jnp.float64
    for j in range(6):
        shift = step * np.eye(6)[j]
        quotient = (jax.vmap(fn)(x + shift) - jax.vmap(fn)(x - shift)) / (2 * step)
        np.testing.assert_allclose(jacobian[:, :, j], quotient, atol=1e-9)
    values = np.linalg.svd(np.asarray(jacobian), compute_uv=False)
    np.testing.assert_allclose(spectrum.singular_values(fn, x), values, rtol=1e-12)


@pytest.mark.slow
def test_forward_mode_is_reverse_mode():
    fn, x = tanh_network(), normal(3, 5, 6)
    forward = spectrum.jacobian(fn, x, mode="forward")
    np.testing.assert_allclose(forward, spectrum.jacobian(fn, x, mode="reverse"), atol=1e-6)


@jax.custom_vjp
def only_in_reverse(x):
    return x * x


only_in_reverse.defvjp(lambda x: (x * x, x), lambda x, cotangent: (2 * x * cotangent,))


def only_in_forward(x):
    return jax.lax.while_loop(lambda carry: carry[0] < 2, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1]


def test_auto_mode_takes_the_smaller_number_of_passes():
    x = normal(0, 2, 4)
    fewer = spectrum.jacobian(lambda v: only_in_reverse(v)[:3], x)
    np.testing.assert_allclose(fewer, 2 * x[:, None] * np.eye(4)[:3], rtol=1e-6)
    more = spectrum.jacobian(lambda v: jnp.tile(only_in_forward(v), 2), x)
    np.testing.assert_array_equal(more, np.broadcast_to(4 * np.tile(np.eye(4), (2, 1)), (2, 8, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [3, 100])
def test_batch_size_changes_nothing(batch_size):
    fn, x = tanh_network(), normal(3, 7, 6)
    np.testing.assert_allclose(
        spectrum.jacobian(fn, x, batch_size=batch_size), spectrum.jacobian(fn, x), atol=1e-6
    )
    np.testing.assert_allclose(
        spectrum.singular_values(fn, x, batch_size=batch_size),
        spectrum.singular_values(fn, x),
        atol=1e-6,
    )


def test_every_product_runs_at_the_highest_precision():
    fn, x = tanh_network(), normal(3, 7, 6)
    convolution = normal(4, 3, 2, 5)

    def network(v):
        grid = jax.lax.conv_general_dilated(
            v.reshape(1, 3, 2), convolution, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.concatenate([fn(v), grid.ravel()])

    for mode in ("forward", "reverse"):
        program = str(jax.make_jaxpr(lambda b: spectrum.jacobian(network, b, mode=mode))(x))  # noqa: B023
        products = program.count("dot_general[") + program.count("conv_general_dilated[")
        highest = program.count("precision=Precision.HIGHEST") + program.count(
            "precision=(Precision.HIGHEST, Precision.HIGHEST)"
        )
        assert products >= 5
        assert highest == products


# --- singular values --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_numpy(shape):
    matrix = normal(0, *shape)
    values = spectrum.singular_values(linear(matrix), normal(1, 2, shape[1]))
    chex.assert_shape(values, (2, min(shape)))
    chex.assert_type(values, jnp.float32)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(values, np.broadcast_to(expected, values.shape), rtol=2e-6)
    assert (np.diff(values, axis=-1) <= 0).all()


@pytest.mark.parametrize("shape", [(4, 40), (40, 4), (4, 4)])
def test_small_singular_values_keep_their_digits(shape):
    # Through a float32 Gram matrix, 1e-5 would drown in the square root of 1e-7.
    expected = np.array([1.0, 1e-2, 1e-4, 1e-5])
    matrix = with_singular_values(0, shape, expected).astype(np.float32)
    values = spectrum.singular_values(linear(matrix), np.ones((1, shape[1]), np.float32))
    np.testing.assert_allclose(values[0], expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_singular_values_scale_with_the_matrix(scale):
    # The square of these scales is outside of float32.
    matrix = (normal(0, 3, 9) * scale).astype(np.float32)
    values = spectrum.singular_values(linear(matrix), np.ones((1, 9), np.float32))
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(values[0], expected, rtol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_isometries_have_ones_and_zero_maps_zeros(shape):
    x = normal(0, 3, shape[1])
    isometry = with_singular_values(0, shape, np.ones(min(shape))).astype(np.float32)
    np.testing.assert_allclose(spectrum.singular_values(linear(isometry), x), 1.0, atol=1e-6)
    zeros = spectrum.singular_values(linear(np.zeros(shape, np.float32)), x)
    np.testing.assert_array_equal(zeros, np.zeros((3, min(shape))))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_rank_is_the_number_of_values_above_rounding(shape):
    matrix = with_singular_values(0, shape, [2.0, 1.0]).astype(np.float32)
    values = spectrum.singular_values(linear(matrix), np.ones((1, shape[1]), np.float32))[0]
    np.testing.assert_allclose(values[:2], [2.0, 1.0], rtol=1e-6)
    assert values[2:].max() < 1e-6


def test_values_differ_among_examples():
    x = normal(0, 3, 4)
    values = spectrum.singular_values(jnp.tanh, x)
    expected = np.sort(1 / np.cosh(x.astype(np.float64)) ** 2, axis=-1)[:, ::-1]
    np.testing.assert_allclose(values, expected, rtol=2e-6)


@pytest.mark.slow
def test_compiled_is_eager():
    fn, x = tanh_network(), normal(3, 5, 6)
    eager = spectrum.singular_values(fn, x)
    compiled = jax.jit(lambda b: spectrum.singular_values(fn, b))(x)
    np.testing.assert_allclose(compiled, eager, atol=1e-6)


def test_narrow_types_are_widened_before_the_factorization():
    matrix = jnp.asarray(with_singular_values(0, (4, 9), [1.0, 0.5, 0.25, 0.125]), jnp.bfloat16)
    values = spectrum.singular_values(linear(matrix), jnp.ones((1, 9), jnp.bfloat16))
    chex.assert_type(values, jnp.float32)
    expected = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    np.testing.assert_allclose(values[0], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_deep_scanned_orthogonal_stack_stays_isometric():
    stack = np.linalg.qr(np.random.default_rng(0).normal(size=(200, 32, 32)))[0].astype(np.float32)

    def network(x):
        return jax.lax.scan(lambda h, w: (w @ h, None), x, stack)[0][:10]

    values = spectrum.singular_values(network, normal(0, 4, 32))
    np.testing.assert_allclose(values, 1.0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_jacobians_that_are_not_finite_are_counted(bad):
    x = normal(0, 5, 3)
    x[1, 0] = x[4, 2] = bad

    def fn(v):
        return jnp.concatenate([v[:2] * v[1:], v])

    for batch_size in (None, 2):
        with refuses("fn", "2 of 5", error=FloatingPointError):
            spectrum.singular_values(fn, x, batch_size=batch_size)
    compiled = np.asarray(jax.jit(lambda b: spectrum.singular_values(fn, b))(x))
    good = [0, 2, 3]
    assert np.isnan(compiled[[1, 4]]).all()
    np.testing.assert_allclose(compiled[good], spectrum.singular_values(fn, x[good]), atol=1e-6)


def test_jacobian_shows_what_is_not_finite():
    jacobian = spectrum.jacobian(jnp.sqrt, np.array([[0.0, 4.0]], np.float32))
    assert np.isinf(jacobian[0, 0, 0])
    assert jacobian[0, 1, 1] == 0.25


# --- summaries --------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    hnp.arrays(
        np.float32, st.sampled_from([(1,), (6,), (3, 4)]), elements=st.floats(0, 4, width=16)
    )
)
def test_summary_is_that_of_numpy(values):
    summary = spectrum.summarize(values)
    chex.assert_shape(list(summary), ())
    chex.assert_type(list(summary), jnp.float32)
    exact = values.astype(np.float64)
    np.testing.assert_allclose(summary.mean, exact.mean(), rtol=1e-6)
    np.testing.assert_allclose(summary.std, exact.std(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(summary.variance, exact.var(), rtol=1e-5, atol=1e-6)
    assert summary.min == values.min()
    assert summary.max == values.max()
    condition = values.max() / values.min() if values.min() > 0 else math.inf
    np.testing.assert_allclose(summary.condition_number, condition, rtol=1e-6)
    np.testing.assert_allclose(summary.near_one, (np.abs(exact - 1) <= 1e-3).mean(), rtol=1e-6)


def test_summary_pools_all_axes():
    values = np.abs(normal(0, 4, 5))
    pooled = spectrum.summarize(values.ravel())
    chex.assert_trees_all_close(spectrum.summarize(values), pooled, rtol=1e-6)


def test_spread_is_resolved_next_to_isometry():
    # The mean of the squares, 1 + 1e-11, is 1 in float32: only centered numbers show a spread.
    values = 1 + 3e-6 * normal(0, 1000)
    summary = spectrum.summarize(values)
    np.testing.assert_allclose(summary.std, values.astype(np.float64).std(), rtol=1e-2)
    assert summary.near_one == 1.0


def test_near_one_has_the_stated_width():
    summary = spectrum.summarize(np.array([0.9985, 0.9992, 1.0, 1.0008, 1.0015]))
    np.testing.assert_allclose(summary.near_one, 0.6, rtol=1e-6)


def test_summary_of_zeros_has_an_infinite_condition():
    summary = spectrum.summarize(np.zeros((2, 3)))
    assert (summary.mean, summary.std, summary.max) == (0.0, 0.0, 0.0)
    assert summary.condition_number == math.inf


def test_nan_is_not_hidden_by_a_summary():
    summary = spectrum.summarize(np.array([1.0, np.nan]))
    assert all(np.isnan(x) for x in summary[:5])
    assert summary.near_one == 0.5


def test_compiled_summary_is_the_eager_one():
    values = np.abs(normal(0, 4, 5))
    eager, compiled = spectrum.summarize(values), jax.jit(spectrum.summarize)(values)
    assert isinstance(compiled, spectrum.SpectrumSummary)
    chex.assert_trees_all_close(compiled, eager, rtol=1e-6)


# --- orthogonality ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
def test_scaled_identities_have_no_error(shape):
    for scale in (1.0, -2.0, 1e-30):
        assert spectrum.orthogonality_error(scale * jnp.eye(*shape), scale=scale) == 0.0


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 5)])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_error_is_that_of_the_smaller_gram_matrix(shape, scale):
    matrix = normal(0, *shape)
    error = spectrum.orthogonality_error(matrix, scale=scale)
    chex.assert_type(error, jnp.float32)
    np.testing.assert_allclose(error, gram_error(matrix, scale), rtol=3e-6)
    compiled = jax.jit(lambda m, s: spectrum.orthogonality_error(m, scale=s))(matrix, scale)
    np.testing.assert_allclose(compiled, error, rtol=3e-6)


def test_a_perturbed_entry_is_found():
    matrix = np.eye(4, dtype=np.float32)
    matrix[2, 1] = 1e-3
    np.testing.assert_allclose(spectrum.orthogonality_error(matrix), 1e-3, rtol=1e-6)


def test_leading_axes_are_a_batch():
    matrices = normal(0, 2, 3, 5, 4)
    each = [[spectrum.orthogonality_error(m) for m in row] for row in matrices]
    errors = spectrum.orthogonality_error(matrices)
    chex.assert_shape(errors, (2, 3))
    np.testing.assert_allclose(errors, np.array(each), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(spectrum.orthogonality_error)(matrices), errors, rtol=1e-6)


@pytest.mark.slow
def test_error_is_computed_in_float32_or_wider(x64):
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 30)))[0]
    assert spectrum.orthogonality_error(q).dtype == jnp.float64
    assert spectrum.orthogonality_error(q) < 1e-14
    chex.assert_type(spectrum.orthogonality_error(jnp.asarray(q, jnp.bfloat16)), jnp.float32)


def test_errors_of_empty_and_undefined_matrices():
    assert spectrum.orthogonality_error(np.zeros((0, 3), np.float32)) == 0.0
    assert np.isnan(spectrum.orthogonality_error(np.array([[np.nan, 0.0], [0.0, 1.0]])))


# --- refusals ---------------------------------------------------------------------------------

X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda f: f(jnp.sin, np.ones((2, 3), np.int32)), ["x.dtype=int32"]),
        (lambda f: f(jnp.sin, np.ones((2, 3), bool)), ["x.dtype=bool"]),
        (lambda f: f(jnp.sin, np.ones((2, 3), np.complex64)), ["x.dtype=complex64"]),
        (lambda f: f(jnp.sin, 1.0), ["x.ndim=0", "x[None]"]),
        (lambda f: f(jnp.sin, np.ones((0, 3), np.float32)), ["x.shape=(0, 3)"]),
        (lambda f: f(jnp.sin, np.ones((2, 0), np.float32)), ["x.shape=(2, 0)"]),
        (lambda f: f(lambda x: {"logits": x}, X), ["fn", "logits"]),
        (lambda f: f(lambda x: (x, x), X), ["fn", "(*, *)"]),
        (lambda f: f(lambda x: None, X), ["fn", "None"]),
        (lambda f: f(jnp.argmax, X), ["fn", "int"]),
        (lambda f: f(lambda x: x[:0], X), ["fn", "(0,)"]),
        (lambda f: f(jnp.sin, X, batch_size=0), ["batch_size=0"]),
        (lambda f: f(jnp.sin, X, batch_size=1.5), ["batch_size=1.5"]),
    ],
)
@pytest.mark.parametrize("function", [spectrum.jacobian, spectrum.singular_values])
def test_what_has_no_spectrum_is_refused(function, call, named):
    with refuses(*named):
        call(function)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: spectrum.jacobian(jnp.sin, X, mode="both"), ["mode='both'"]),
        (lambda: spectrum.summarize(np.zeros((0, 3))), ["values.shape=(0, 3)"]),
        (lambda: spectrum.summarize(np.ones(3, np.complex64)), ["values.dtype=complex64"]),
        (lambda: spectrum.orthogonality_error(np.ones(3)), ["matrix.ndim=1"]),
        (lambda: spectrum.orthogonality_error(np.eye(3) * 1j), ["matrix.dtype=complex"]),
        (lambda: spectrum.orthogonality_error(np.eye(3), scale=0), ["scale=0.0"]),
        (lambda: spectrum.orthogonality_error(np.eye(3), scale=np.nan), ["scale=nan"]),
    ],
)
def test_what_cannot_be_measured_is_refused(call, named):
    with refuses(*named):
        call()


def test_refusals_hold_while_tracing():
    with refuses("x.dtype=int32"):
        jax.jit(lambda x: spectrum.singular_values(jnp.sin, x))(np.ones((2, 3), np.int32))


KERNEL = np.ones((3, 3, 2, 2), np.float32)
# Functions of one example, and an example of each.
OF_ONE_EXAMPLE = {
    "a matrix": (lambda x: x @ np.ones((4, 4), np.float32), np.ones(4, np.float32)),
    "an index": (lambda x: x[0] * x, np.ones(4, np.float32)),
    "a convolution": (
        lambda x: jax.lax.conv_general_dilated(
            x[None], KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[0],
        np.ones((5, 5, 2), np.float32),
    ),
}
MEASURES = {
    "jacobian": spectrum.jacobian,
    "singular_values": spectrum.singular_values,
    "extreme_singular_values": lambda fn, x: spectrum.extreme_singular_values(KEY, fn, x),
    "spectral_density": lambda fn, x: spectrum.spectral_density(KEY, fn, x),
    "layerwise": lambda fn, x: spectrum.layerwise(
        lambda scale, h: scale * fn(h), np.ones(2, np.float32), x
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fn", OF_ONE_EXAMPLE)
@pytest.mark.parametrize("measure", MEASURES)
def test_an_example_in_place_of_a_batch_is_named_with_the_error_of_the_function(measure, fn):
    fn, example = OF_ONE_EXAMPLE[fn]
    with refuses(f"x.shape={example.shape}", "x[None]") as raised:
        MEASURES[measure](fn, example)
    with pytest.raises(type(raised.value.__cause__)):
        fn(jnp.asarray(example)[0])
    MEASURES[measure](fn, example[None])


@pytest.mark.parametrize("measure", MEASURES)
def test_an_error_of_the_function_itself_is_left_as_it_is(measure):
    def fn(x):
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        MEASURES[measure](fn, X)
