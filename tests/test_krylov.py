"""Laws of spectra that are estimated from products; the oracle is NumPy's dense SVD in float64."""

import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses

import eoi_jax as eoi
from eoi_jax import spectrum
from eoi_jax.spectrum import krylov

KEY = jax.random.key(0)
SHAPES = [(24, 24), (10, 24), (24, 10)]
FEWER_STEPS = [(SHAPES[0], 1), (SHAPES[0], 5), (SHAPES[1], 5)]
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def with_singular_values(seed: int, shape: tuple[int, int], values) -> np.ndarray:
    left = np.linalg.qr(normal(seed, shape[0], len(values)))[0]
    right = np.linalg.qr(normal(seed + 1, shape[1], len(values)))[0]
    return (left * np.asarray(values)) @ right.T


def rotations_of_pairs(size: int) -> np.ndarray:
    matrix = np.eye(size)
    for i, angle in zip(range(0, size - 1, 2), normal(3, size), strict=False):
        cos, sin = np.cos(angle), np.sin(angle)
        matrix[i : i + 2, i : i + 2] = [[cos, -sin], [sin, cos]]
    return matrix


def isometries(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Matrices whose singular values are all 1."""
    rows, columns = shape
    size = max(shape)
    return {
        "identity": np.eye(rows, columns),
        "permutation": np.eye(size)[np.random.default_rng(0).permutation(size)][:rows, :columns],
        "cycle": np.roll(np.eye(size), 1, axis=0)[:rows, :columns],
        "rotations": rotations_of_pairs(size)[:rows, :columns],
        "sparse orthogonal": np.asarray(
            eoi.orthogonal(KEY, shape, 0.2, dtype=jnp.result_type(float)), np.float64
        ),
        "orthogonal": with_singular_values(0, shape, np.ones(min(shape))),
    }


def others(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    side = min(shape)
    clustered = np.concatenate([[3.0], np.ones(side // 2), np.full(side - 1 - side // 2, 1e-3)])
    close = 1 + 1e-4 * np.arange(side)
    return {
        "zero": np.zeros(shape),
        "rank one": np.outer(normal(1, shape[0]), normal(2, shape[1])),
        "rank four": with_singular_values(2, shape, [2.0, 1.0, 1.0, 0.5]),
        "one entry": 0.3 * np.eye(1, shape[0] * shape[1]).reshape(shape),
        "shift": np.eye(*shape, k=1),
        "diagonal": np.diag(clustered) @ np.eye(side, shape[1])
        if shape[0] <= shape[1]
        else np.eye(shape[0], side) @ np.diag(clustered),
        "clustered": with_singular_values(4, shape, clustered),
        "close": with_singular_values(6, shape, close),
        "normal": normal(5, *shape),
    }


def starts(side: int) -> np.ndarray:
    """Gaussian, unit and ±1 vectors."""
    return np.stack([normal(7, side), np.eye(side)[0], np.eye(side)[-1], np.sign(normal(8, side))])


def estimate(shape, dtype, num_steps, matrices):
    """Both estimates for each matrix from each start: one program for all of them."""

    def one(matrix, start):
        fn, x = functools.partial(jnp.matmul, matrix), jnp.zeros((1, shape[1]), dtype)
        with mock.patch.object(krylov, "_starts", return_value=start[None, None]):
            factors = krylov._map_examples(
                KEY, fn, x, num_probes=1, num_steps=num_steps, batch_size=1
            )
        return krylov._ends(factors), krylov._quadrature(factors)

    each_start = jax.vmap(one, in_axes=(None, 0))
    each = jax.jit(lambda all_matrices, s: jax.lax.map(lambda m: each_start(m, s), all_matrices))
    ends, density = each(np.stack(matrices).astype(dtype), starts(min(shape)).astype(dtype))
    ends = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[..., 0], ends)
    density = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[..., 0, 0, :], density)
    return ends, density


@functools.cache
def results(shape, dtype, num_steps):
    """Names, matrices rounded to the dtype, their singular values, and both estimates."""
    named = isometries(shape) | others(shape)
    matrices = [matrix.astype(dtype).astype(np.float64) for matrix in named.values()]
    values = np.stack([np.linalg.svd(matrix, compute_uv=False) for matrix in matrices])
    return list(named), matrices, values, *estimate(shape, dtype, num_steps, matrices)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


# --- complete factorizations ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_steps_as_the_smaller_side_are_exact_from_any_start(shape, dtype):
    names, _, values, ends, density = results(shape, dtype, 1000)
    assert density.nodes.shape == (len(names), 4, min(shape))
    for i, name in enumerate(names):
        tolerance = TOLERANCE[dtype] * values[i, 0]
        for field, expected in [("largest", values[i, 0]), ("smallest", values[i, -1])]:
            error = np.abs(getattr(ends, field)[i] - expected).max()
            assert error <= tolerance, (name, field, error)
        assert ends.largest_residual[i].max() <= tolerance, name
        assert ends.smallest_residual[i].max() <= tolerance, name
        # Inside a cluster the dense SVD of JAX is off by as much.
        error = np.abs(density.nodes[i] - values[i]).max()
        assert error <= 2 * tolerance, (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_the_shares_of_the_start_along_singular_vectors(shape, x64):
    names, matrices, _, _, density = results(shape, "float64", 1000)
    i = names.index("normal")
    left, _, right = np.linalg.svd(matrices[i], full_matrices=False)
    vectors = right if shape[1] <= shape[0] else left.T
    start = starts(min(shape))
    shares = (start @ vectors.T) ** 2 / (start**2).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(density.weights[i], shares, atol=1e-10)


# --- fewer steps ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "num_steps"), FEWER_STEPS)
def test_estimates_are_bounds_and_a_value_is_within_the_residual(shape, num_steps, dtype):
    names, _, values, ends, density = results(shape, dtype, num_steps)
    assert density.nodes.shape == (len(names), 4, num_steps)
    for i, name in enumerate(names):
        slack = TOLERANCE[dtype] * values[i, 0]
        assert (ends.largest[i] <= values[i, 0] + slack).all(), name
        assert (ends.smallest[i] >= values[i, -1] - slack).all(), name
        assert (ends.smallest[i] <= ends.largest[i]).all(), name
        for estimated, residual in [
            (ends.largest[i], ends.largest_residual[i]),
            (ends.smallest[i], ends.smallest_residual[i]),
        ]:
            distance = np.abs(estimated[:, None] - values[i]).min(axis=-1)
            assert (distance <= residual + slack).all(), (name, distance, residual)


@pytest.mark.parametrize(("shape", "num_steps"), FEWER_STEPS)
def test_isometries_have_ones_and_zero_maps_zeros_after_any_number_of_steps(
    shape, num_steps, dtype
):
    names, _, _, ends, density = results(shape, dtype, num_steps)
    for name in [*isometries(shape), "zero"]:
        i, expected = names.index(name), 0.0 if name == "zero" else 1.0
        for result in (ends.largest[i], ends.smallest[i], density.nodes[i]):
            np.testing.assert_allclose(result, expected, atol=TOLERANCE[dtype], err_msg=name)
        for residual in (ends.largest_residual[i], ends.smallest_residual[i]):
            np.testing.assert_allclose(residual, 0.0, atol=TOLERANCE[dtype], err_msg=name)
        np.testing.assert_allclose(density.weights[i].sum(axis=-1), 1.0, atol=1e-6)


@pytest.mark.parametrize(("shape", "num_steps"), FEWER_STEPS)
def test_quadrature_is_exact_for_twice_as_many_moments_as_steps(shape, num_steps, x64):
    names, matrices, values, _, density = results(shape, "float64", num_steps)
    start = starts(min(shape))
    start /= np.linalg.norm(start, axis=-1, keepdims=True)
    for i, name in enumerate(names):
        matrix = matrices[i] if shape[1] <= shape[0] else matrices[i].T
        image = start
        for p in range(2 * num_steps):
            expected = (start * image).sum(axis=-1)
            moment = (density.weights[i] * density.nodes[i] ** (2 * p)).sum(axis=-1)
            slack = 1e-11 * max(1.0, values[i, 0]) ** (2 * p)
            np.testing.assert_allclose(moment, expected, rtol=0, atol=slack, err_msg=f"{name} {p}")
            image = (image @ matrix.T) @ matrix
        assert (density.weights[i] >= 0).all()
        # One moment more is not exact: the quadrature is no better than Gauss's.
        if name == "normal" and num_steps == 1:
            moment = (density.weights[i] * density.nodes[i] ** (4 * num_steps)).sum(axis=-1)
            assert (np.abs(moment / (start * image).sum(axis=-1) - 1) > 1e-3).all()


@pytest.mark.slow
def test_a_largest_value_that_stands_apart_is_found_in_a_few_steps():
    values = np.concatenate([[1.0], np.linspace(0.5, 0.0, 199)])
    matrix = with_singular_values(0, (200, 300), values).astype(np.float32)
    ends = spectrum.extreme_singular_values(
        KEY, functools.partial(jnp.matmul, matrix), jnp.ones((1, 300)), num_steps=20
    )
    np.testing.assert_allclose(ends.largest, 1.0, atol=1e-6)
    assert ends.largest_residual < 1e-4
    # The smallest has neighbors: no more than a bound, and the residual says so.
    assert ends.smallest > 1e-4
    assert ends.smallest_residual > 1e-4


# --- probes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_moments_are_unbiased_with_the_stated_standard_error(x64):
    # Large values on a diagonal: ±1 probes would have no variance here, other than stated.
    values, probes = np.linspace(0.1, 1.5, 30), 2000
    nodes, weights = spectrum.spectral_density(
        KEY, lambda x: values * x, jnp.ones((1, 30)), num_probes=probes, num_steps=3
    )
    np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1 / probes, rtol=1e-12)
    for p in range(1, 6):
        samples = probes * np.sum(weights * nodes ** (2 * p), axis=-1)[0]
        error = (values ** (2 * p)).std() * np.sqrt(2 / 32 / probes)
        assert abs(samples.mean() - (values ** (2 * p)).mean()) < 4 * error
        # Relative standard error of a variance: about 0.1 for the heavy tail of these samples.
        np.testing.assert_allclose(samples.std() / np.sqrt(probes), error, rtol=0.2)


@pytest.mark.slow
def test_complete_probes_weigh_each_value_equally_on_average(x64):
    values, probes = np.arange(1.0, 9.0), 500
    nodes, weights = spectrum.spectral_density(
        KEY, lambda x: values * x, jnp.ones((1, 8)), num_probes=probes
    )
    np.testing.assert_allclose(nodes, np.broadcast_to(values[::-1], (1, probes, 8)), rtol=1e-12)
    # A squared component of a random unit vector has the law Beta(1/2, 7/2).
    error = np.sqrt(2 * 7 / (64 * 10) / probes)
    assert np.abs(probes * weights[0].mean(axis=0) - 1 / 8).max() < 4 * error


@pytest.mark.slow
def test_the_share_of_zeros_is_found():
    # 30 of 40 values are 0, though the map is wide: the 60 other inputs add none.
    matrix = with_singular_values(0, (40, 100), np.linspace(1, 2, 10)).astype(np.float32)
    probes = 300
    nodes, weights = spectrum.spectral_density(
        KEY, lambda x: matrix @ x, jnp.ones((1, 100)), num_probes=probes, num_steps=20
    )
    share = jnp.sum(jnp.where(nodes < 0.5, weights, 0))
    error = np.sqrt(2 * 10 * 30 / (40**2 * 42) / probes)
    assert abs(share - 0.75) < 4 * error
    assert jnp.sum(jnp.where((nodes > 1e-5) & (nodes < 0.99), weights, 0)) < 1e-5


# --- networks ---------------------------------------------------------------------------------


def tanh_network(x):
    first, second = normal(1, 6, 5).astype(np.float32), normal(2, 5, 4).astype(np.float32)
    return jnp.tanh(jnp.tanh(x @ first) @ second)


def circular(image, kernel, stride=1):
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="wrap")[None]
    dims = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(padded, kernel, strides, "VALID", dimension_numbers=dims)[0]


def conv_network(image):
    first, second = normal(4, 3, 3, 2, 4).astype(np.float32), normal(5, 3, 3, 4, 4)
    hidden = jnp.tanh(circular(image, first / 3, stride=2))
    hidden = jnp.tanh(circular(hidden, second.astype(np.float32) / 6))
    return hidden.mean(axis=(0, 1)) @ normal(6, 4, 3).astype(np.float32), hidden


@pytest.mark.slow
def test_convolutional_networks_have_the_ends_of_their_jacobians():
    x = normal(0, 3, 6, 6, 2).astype(np.float32)

    @jax.checkpoint
    def logits(image):
        return conv_network(image)[0]

    values = spectrum.singular_values(logits, x)
    ends = spectrum.extreme_singular_values(KEY, logits, x)
    chex.assert_shape(list(ends), (3,))
    chex.assert_type(list(ends), jnp.float32)
    tolerance = 1e-6 * values.max()
    np.testing.assert_allclose(ends.largest, values[:, 0], atol=tolerance)
    np.testing.assert_allclose(ends.smallest, values[:, -1], atol=tolerance)
    np.testing.assert_allclose(ends[2:], 0.0, atol=tolerance)


@pytest.mark.slow
def test_complete_nodes_are_the_values_of_a_convolutions_jacobian():
    x = normal(0, 2, 6, 6, 2).astype(np.float32)

    def features(image):
        return conv_network(image)[1]

    values = spectrum.singular_values(features, x)
    nodes, weights = spectrum.spectral_density(KEY, features, x, num_probes=2)
    chex.assert_shape([nodes, weights], (2, 2, 36))
    chex.assert_type([nodes, weights], jnp.float32)
    expected = np.broadcast_to(values[:, None], nodes.shape)
    np.testing.assert_allclose(nodes, expected, atol=2e-6 * values.max())


@pytest.mark.slow
def test_a_deep_scanned_sparse_orthogonal_stack_stays_isometric():
    stack = jax.vmap(lambda key: eoi.orthogonal(key, (32, 32), 0.2))(jax.random.split(KEY, 300))

    def network(x):
        return jax.lax.scan(lambda h, w: (w @ h, None), x, stack)[0]

    x = normal(0, 2, 32).astype(np.float32)
    ends = spectrum.extreme_singular_values(KEY, network, x, num_steps=8)
    np.testing.assert_allclose(ends.largest, 1.0, atol=2e-5)
    np.testing.assert_allclose(ends.smallest, 1.0, atol=2e-5)
    nodes, _ = spectrum.spectral_density(KEY, network, x, num_steps=32, num_probes=3)
    np.testing.assert_allclose(nodes, 1.0, atol=2e-5)


@pytest.mark.slow
def test_a_batch_is_its_examples_one_by_one():
    x = normal(0, 5, 6).astype(np.float32)
    few = functools.partial(spectrum.extreme_singular_values, KEY, tanh_network, num_steps=2)
    compiled, together = jax.jit(few), few(x)
    chex.assert_trees_all_close(compiled(x), together, rtol=1e-5)
    chex.assert_trees_all_close(few(x, batch_size=3), together, rtol=1e-5)
    first = jax.tree.map(lambda leaf: leaf[:2], together)
    chex.assert_trees_all_close(few(x[:2]), first, rtol=1e-5)
    same = compiled(np.broadcast_to(x[0], x.shape))
    assert len(np.unique(same.largest)) == 5, "one start for two examples"


@pytest.mark.slow
def test_the_key_decides():
    matrix = normal(0, 40, 30).astype(np.float32)

    @jax.jit
    def few(key):
        x = jnp.ones((2, 30))
        return spectrum.spectral_density(key, lambda v: matrix @ v, x, num_probes=3, num_steps=2)

    keys = jax.random.split(jax.random.key(1), 2)
    each = [few(key) for key in keys]
    chex.assert_trees_all_equal(few(keys[0]), each[0])
    largest = np.stack([nodes[..., 0] for nodes, _ in each])
    assert len(np.unique(largest)) == 2 * 2 * 3, "one start for two keys, examples or probes"
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    chex.assert_trees_all_close(jax.vmap(few)(keys), stacked, rtol=1e-4)


@pytest.mark.slow
def test_values_scale_with_the_map():
    matrix = normal(0, 9, 6).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def ends(matrix, num_steps):
        x = jnp.ones((1, 6))
        return spectrum.extreme_singular_values(KEY, lambda v: matrix @ v, x, num_steps=num_steps)

    # The square of these scales is outside of float32.
    for scale in np.float32([1e-25, 1e25]):
        values = np.linalg.svd((scale * matrix).astype(np.float64), compute_uv=False)
        complete = ends(scale * matrix, 6)
        np.testing.assert_allclose(complete.largest, values[0], rtol=2e-6)
        np.testing.assert_allclose(complete.smallest, values[-1], rtol=1e-5)
        few = np.array(ends(scale * matrix, 2)) / scale
        np.testing.assert_allclose(few, np.array(ends(matrix, 2)), rtol=1e-4)


@pytest.mark.slow
def test_numbers_are_one_by_one_maps():
    ends = spectrum.extreme_singular_values(KEY, jnp.square, np.array([1.0, -3.0], np.float32))
    np.testing.assert_allclose(ends.largest, [2.0, 6.0], rtol=1e-6)
    np.testing.assert_array_equal(ends.smallest, ends.largest)
    np.testing.assert_array_equal(ends.smallest_residual, 0.0)


@pytest.mark.parametrize(
    "fn", [lambda x: jnp.zeros(3), lambda x: jnp.maximum(x, 9.0)], ids=["constant", "flat"]
)
def test_functions_that_ignore_their_argument_are_zero_maps(fn):
    ends = spectrum.extreme_singular_values(KEY, fn, jnp.ones((2, 4)))
    np.testing.assert_array_equal(np.array(ends), 0.0)


@pytest.mark.slow
def test_narrow_types_are_widened_first():
    matrix = jnp.asarray(with_singular_values(0, (4, 9), [1.0, 0.5, 0.25, 0.125]), jnp.bfloat16)
    x = jnp.ones((1, 9), jnp.bfloat16)
    ends = spectrum.extreme_singular_values(KEY, lambda v: matrix @ v, x)
    chex.assert_type(list(ends), jnp.float32)
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    np.testing.assert_allclose([ends.largest[0], ends.smallest[0]], values[[0, -1]], atol=1e-6)


@pytest.mark.slow
def test_the_widest_type_of_the_function_is_used(x64):
    matrix = normal(0, 5, 4)
    ends = spectrum.extreme_singular_values(KEY, lambda v: matrix @ v, np.ones((1, 4), np.float32))
    chex.assert_type(list(ends), jnp.float64)
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose([ends.largest[0], ends.smallest[0]], values[[0, -1]], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "num_steps"),
    [
        (spectrum.extreme_singular_values, 1),
        (spectrum.spectral_density, 5),
    ],
)
def test_jacobians_that_are_not_finite_give_nan_for_their_example(function, num_steps):
    x = np.abs(normal(0, 4, 5)).astype(np.float32)
    x[1, 2], x[2, 0] = np.nan, 0.0  # sqrt has slope inf at 0

    def fn(v):
        return jnp.concatenate([jnp.sqrt(v), v])

    for leaf in function(KEY, fn, x, num_steps=num_steps):
        assert np.isnan(leaf[1:3]).all()
        assert np.isfinite(leaf[::3]).all()


@pytest.mark.slow
def test_values_beyond_the_dtype_are_nan():
    ends = spectrum.extreme_singular_values(
        KEY, lambda v: 2e38 * (jnp.sum(v) + v), jnp.ones((1, 30)), num_steps=3
    )
    assert np.isnan(np.array(ends)).all()


# --- programs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [spectrum.extreme_singular_values, spectrum.spectral_density])
@pytest.mark.parametrize("outputs", [2, 5])
def test_every_product_runs_at_the_highest_precision(function, outputs):
    first, second = normal(1, 3, 4).astype(np.float32), normal(2, 4, outputs).astype(np.float32)

    def fn(v):
        return jnp.tanh(v @ first) @ second

    program = str(jax.make_jaxpr(lambda b: function(KEY, fn, b))(jnp.ones((2, 3))))
    products = program.count("dot_general[")
    assert products >= 10
    highest = program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    assert highest + program.count("precision=Precision.HIGHEST") == products
    # Linearized once, and no Jacobian by columns: one product with each weight and its transpose.
    assert program.count("= tanh ") == 1


@pytest.mark.parametrize("function", [spectrum.extreme_singular_values, spectrum.spectral_density])
def test_the_jacobian_is_never_formed(function):
    kernel = normal(0, 3, 3, 1, 1).astype(np.float32)

    def fn(image):
        return jnp.tanh(circular(image, kernel))

    program = jax.make_jaxpr(lambda b: function(KEY, fn, b, num_steps=5))(jnp.ones((2, 20, 20, 1)))
    # Ten probes, five steps, and a direction of 400 inputs and 400 outputs for each.
    assert largest_array(program.jaxpr) <= 10 * 5 * (400 + 400) < 400 * 400


def largest_array(jaxpr) -> int:
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [var.aval.size for var in equation.outvars if hasattr(var.aval, "size")]
        inner = [getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(equation.params)]
        sizes += [largest_array(program) for program in inner if hasattr(program, "eqns")]
    return max(sizes)


@pytest.mark.slow
def test_examples_may_be_sharded():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")

    def batch(x):
        return spectrum.extreme_singular_values(KEY, tanh_network, x)

    x = normal(0, 4, 6).astype(np.float32)
    sharded = jax.jit(jax.shard_map(batch, mesh=mesh, in_specs=spec, out_specs=spec))
    values = spectrum.singular_values(tanh_network, x)
    np.testing.assert_allclose(sharded(x).largest, values[:, 0], rtol=2e-6)


# --- refusals ---------------------------------------------------------------------------------

X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda f: f(0, jnp.sin, X), ["key=0"]),
        (lambda f: f(jax.random.split(KEY), jnp.sin, X), ["key", "(2,)"]),
        (lambda f: f(KEY, jnp.sin, np.ones((2, 3), np.int32)), ["x.dtype=int32"]),
        (lambda f: f(KEY, jnp.sin, 1.0), ["x.ndim=0"]),
        (lambda f: f(KEY, jnp.sin, np.ones((0, 3), np.float32)), ["x.shape=(0, 3)"]),
        (lambda f: f(KEY, lambda x: {"logits": x}, X), ["fn", "logits"]),
        (lambda f: f(KEY, jnp.argmax, X), ["fn", "int"]),
        (lambda f: f(KEY, lambda x: x[:0], X), ["fn", "(0,)"]),
        (lambda f: f(KEY, jnp.sin, X, num_steps=0), ["num_steps=0"]),
        (lambda f: f(KEY, jnp.sin, X, num_steps=2.0), ["num_steps=2.0"]),
        (lambda f: f(KEY, jnp.sin, X, batch_size=0), ["batch_size=0"]),
    ],
)
@pytest.mark.parametrize("function", [spectrum.extreme_singular_values, spectrum.spectral_density])
def test_what_has_no_spectrum_is_refused(function, call, named):
    with refuses(*named):
        call(function)


def test_at_least_one_probe_is_taken():
    with refuses("num_probes=0"):
        spectrum.spectral_density(KEY, jnp.sin, X, num_probes=0)
