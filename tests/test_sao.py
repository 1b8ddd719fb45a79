"""Laws of SAO's matrices: orthogonal, in complete blocks, uniformly permuted."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import gram_error, refuses
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

import eoi_jax as eoi
from eoi_jax import sao
from eoi_jax._internal import block_diagonal
from eoi_jax.initializers import sao_conv, sao_dense

KEY = jax.random.key(5)
CASES = [(12, 4), (12, 12), (64, 8), (45, 5), (2, 2)]
RELU_CASES = [(12, 4), (24, 6), (24, 24)]


def parts_of(w):
    """Connected parts of the bipartite graph of rows and columns: labels of both."""
    n = len(w)
    graph = np.zeros((2 * n, 2 * n))
    graph[:n, n:] = np.asarray(w, np.float64) != 0
    count, labels = connected_components(csr_array(graph), directed=False)
    return count, labels[:n], labels[n:]


def check_blocks(w, degree):
    support = np.asarray(w, np.float64) != 0
    n = len(support)
    assert (support.sum(0) == degree).all(), "columns"
    assert (support.sum(1) == degree).all(), "rows"
    count, rows, columns = parts_of(w)
    assert count == n // degree
    for part in range(count):
        block = support[np.ix_(rows == part, columns == part)]
        assert block.shape == (degree, degree), "a part of another size"
        assert block.all(), "a part that is not complete"


@pytest.mark.slow
@given(st.integers(0, 2**31 - 1), st.sampled_from(CASES))
def test_it_is_orthogonal_in_blocks_of_the_degree(seed, case):
    w = sao.orthogonal(jax.random.key(seed), *case, scale=1.5)
    chex.assert_shape(w, (case[0], case[0]))
    chex.assert_type(w, jnp.float32)
    assert gram_error(w, 1.5) <= 1e-5
    check_blocks(w, case[1])


@pytest.mark.slow
def test_float64(x64):
    case = (64, 8)
    w = sao.orthogonal(KEY, *case, dtype=jnp.float64)
    chex.assert_type(w, jnp.float64)
    assert gram_error(w) <= 1e-12
    check_blocks(w, case[1])
    assert gram_error(sao.orthogonal(KEY, *case)) > 1e-9, "float32 stays float32"


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_narrow_dtypes_are_cast_last(dtype, activation):
    w = sao.orthogonal(KEY, 12, 4, activation=activation, dtype=dtype)
    chex.assert_type(w, dtype)
    np.testing.assert_array_equal(
        w, sao.orthogonal(KEY, 12, 4, activation=activation).astype(dtype)
    )
    assert (np.asarray(w, np.float32) != 0).sum() == 12 * 4


def test_a_block_of_two_is_a_uniform_rotation_or_reflection():
    w = jax.vmap(lambda key: sao.orthogonal(key, 2, 2))(jax.random.split(KEY, 4000))
    determinants = np.linalg.det(np.asarray(w, np.float64))
    np.testing.assert_allclose(np.abs(determinants), 1, atol=1e-5)
    assert abs(determinants.mean()) <= 4 / math.sqrt(4000)
    angles = np.arctan2(w[:, 0, 1], w[:, 0, 0])
    for harmonic in range(1, 5):  # cos and sin of a uniform angle have mean 0 and variance 1/2
        bound = 4 * math.sqrt(0.5 / 4000)
        assert abs(np.cos(harmonic * angles).mean()) <= bound
        assert abs(np.sin(harmonic * angles).mean()) <= bound


@pytest.mark.slow
def test_blocks_are_haar():
    """Entries of a Haar matrix have the moments 0, 1/d, 0, 3/(d(d+2)): within 4 errors."""
    size, degree, draws = 12, 4, 1500
    w = jax.vmap(lambda key: sao.orthogonal(key, size, degree))(jax.random.split(KEY, draws))
    w = np.asarray(w, np.float64)
    for power, expected in [
        (1, 0.0),
        (2, 1 / degree),
        (3, 0.0),
        (4, 3 / (degree * (degree + 2))),
    ]:
        per_draw = (w[:, 0, :] ** power).sum(-1) / degree  # one row of each draw: independent
        error = per_draw.std() / math.sqrt(draws)
        assert abs(per_draw.mean() - expected) <= 4 * error + 1e-6, power
    shared = (w[:, 0, :] ** 2 * w[:, 1, :] ** 2).sum(-1)
    shared = shared[((w[:, 0, :] != 0) & (w[:, 1, :] != 0)).any(-1)]  # both rows in one block
    error = shared.std() / math.sqrt(len(shared))
    assert abs(shared.mean() - 1 / (degree + 2)) <= 4 * error


def test_the_permutations_are_uniform():
    """Entry (i, j) is non-zero with probability d/n, rows meet with probability (d-1)/(n-1)."""
    size, degree, draws = 12, 4, 4000
    w = jax.vmap(lambda key: sao.orthogonal(key, size, degree))(jax.random.split(KEY, draws))
    support = np.asarray(w) != 0
    p = degree / size
    deviation = (support.mean(0) - p) / math.sqrt(p * (1 - p) / draws)
    assert np.abs(deviation).max() <= 4.5, "of 144 standard scores"
    assert 0.7 <= deviation.std() <= 1.3
    q = (degree - 1) / (size - 1)
    for transposed in (False, True):
        rows = np.swapaxes(support, 1, 2) if transposed else support
        together = np.einsum("bik,bjk->ij", rows, rows, dtype=float) / degree / draws
        apart = ~np.eye(size, dtype=bool)
        scores = (together[apart] - q) / math.sqrt(q * (1 - q) / draws)
        assert np.abs(scores).max() <= 4.5


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_one_key_one_matrix(activation):
    def draw(key):
        return sao.orthogonal(key, 12, 4, activation=activation)

    keys = jax.random.split(KEY, 3)
    looped = jnp.stack([draw(key) for key in keys])
    np.testing.assert_array_equal(looped[0], draw(keys[0]))
    np.testing.assert_array_equal(looped[0] != 0, jax.jit(draw)(keys[0]) != 0)
    np.testing.assert_allclose(jax.jit(draw)(keys[0]), looped[0], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(draw)(keys), looped, atol=1e-6)
    for i in range(3):
        for j in range(i):
            assert (looped[i] != looped[j]).any(), "values"
            assert ((looped[i] != 0) != (looped[j] != 0)).any(), "support"
    old = jax.random.key_data(keys[0])
    np.testing.assert_array_equal(draw(old), looped[0])


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_scale_may_be_traced_and_differentiated(activation):
    def draw(scale):
        return sao.orthogonal(KEY, 12, 4, activation=activation, scale=scale)

    unit = draw(1.0)
    np.testing.assert_allclose(jax.jit(draw)(2.5), 2.5 * unit, rtol=1e-6)
    np.testing.assert_allclose(jax.jacobian(draw)(2.5), unit, rtol=1e-6)


def pair(u):
    return np.concatenate([np.maximum(u, 0), np.maximum(-u, 0)], -1)


@pytest.mark.slow
@given(st.integers(0, 2**31 - 1), st.sampled_from(RELU_CASES))
def test_the_matrix_for_relu_is_linear_and_isometric_on_pairs(seed, case):
    size, degree = case
    m = np.asarray(
        sao.orthogonal(jax.random.key(seed), size, degree, activation="relu", scale=1.5), np.float64
    )
    w = m[: size // 2, : size // 2]
    np.testing.assert_array_equal(m, np.block([[w, -w], [-w, w]]))
    check_blocks(w, degree // 2)
    assert ((m != 0).sum(0) == degree).all()
    assert ((m != 0).sum(1) == degree).all()
    values = np.linalg.svd(m, compute_uv=False)
    np.testing.assert_allclose(values, np.repeat([3.0, 0.0], size // 2), atol=1e-5)
    u = np.random.default_rng(seed).normal(size=(5, size // 2))
    out = np.maximum(pair(u) @ m, 0)
    np.testing.assert_allclose(out, pair(u @ w), atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(out, axis=-1), 1.5 * np.linalg.norm(u, axis=-1), rtol=1e-5
    )
    both = np.random.default_rng(seed).normal(size=(5, size))  # a signal that is no pair
    np.testing.assert_allclose(
        np.maximum(both @ m, 0), pair((both[:, : size // 2] - both[:, size // 2 :]) @ w), atol=1e-5
    )


@pytest.mark.slow
def test_a_deep_relu_network_is_an_isometry():
    layers = jax.vmap(lambda key: sao.orthogonal(key, 32, 8, activation="relu"))(
        jax.random.split(KEY, 60)
    )

    def network(h):
        return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), h, layers)[0]

    x = jax.random.normal(KEY, (32,))
    with jax.default_matmul_precision("highest"):
        jacobian = jax.jacobian(network)(x)
        values = np.linalg.svd(np.asarray(jacobian, np.float64), compute_uv=False)
        np.testing.assert_allclose(values, np.repeat([math.sqrt(2), 0], 16), atol=1e-4)
        u, v = jax.random.normal(KEY, (2, 16))
        out = network(jnp.asarray(pair(u)))
        np.testing.assert_allclose(jnp.linalg.norm(out), jnp.linalg.norm(u), rtol=1e-4)
        far = network(jnp.asarray(pair(v)))
        signed = (out[:16] - out[16:]) - (far[:16] - far[16:])
        np.testing.assert_allclose(jnp.linalg.norm(signed), jnp.linalg.norm(u - v), rtol=1e-4)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(["tanh", "relu"]))
def test_the_degree_of_a_density_or_the_nearest_ones(size, wanted, activation):
    wanted = min(wanted, size)
    step, minimum = (1, 2) if activation == "tanh" else (2, 4)
    degrees = [d for d in range(minimum, size + 1) if size % d == 0 and d % step == 0]
    for d in degrees:
        assert sao.degree(size, d / size, activation=activation) == d
        assert sao.degree(size, np.float32(d / size), activation=activation) == d
    if wanted in degrees:
        return
    with refuses("density" if degrees else "size", wanted / size if degrees else size) as error:
        sao.degree(size, wanted / size, activation=activation)
    named = {d for d in degrees if f" {d}/{size} = " in str(error.value)}
    below, above = [d for d in degrees if d < wanted], [d for d in degrees if d > wanted]
    assert named == set(below[-1:] + above[:1])


@pytest.mark.slow
def test_dense_and_conv_draw_the_matrix():
    matrix = sao.orthogonal(KEY, 32, 8, scale=1.5)
    np.testing.assert_array_equal(sao_dense(0.25, scale=1.5)(KEY, (32, 32), jnp.float32), matrix)
    np.testing.assert_array_equal(
        sao_dense(0.25, scale=1.5)(KEY, (4, 8, 32), None), matrix.reshape(4, 8, 32)
    )
    chex.assert_type(sao_dense(0.25, dtype=jnp.bfloat16)(KEY, (32, 32)), jnp.bfloat16)
    relu = sao.orthogonal(KEY, 32, 8, activation="relu")
    np.testing.assert_array_equal(sao_dense(0.25, activation="relu")(KEY, (32, 32)), relu)
    for spatial, transposed, center in [
        ((3,), False, (1,)),
        ((4, 5), False, (1, 2)),
        ((4, 5), True, (2, 2)),
        ((1, 2, 3), False, (0, 0, 1)),
    ]:
        expected = np.zeros((*spatial, 32, 32), np.float32)
        expected[center] = matrix
        init = sao_conv(0.25, scale=1.5, transposed=transposed)
        np.testing.assert_array_equal(init(KEY, expected.shape, jnp.float32), expected)
    chex.assert_shape(sao_conv(0.25)(KEY, (3, 3, 0, 0), jnp.float32), (3, 3, 0, 0))
    chex.assert_shape(sao_dense(0.25)(KEY, (0, 0), jnp.float32), (0, 0))


@pytest.mark.parametrize("size", [(3,), (4, 3)])
def test_in_flax_layers_norms_are_kept(size):
    conv = nn.Conv(16, size, padding="CIRCULAR", use_bias=False, kernel_init=sao_conv(0.25))
    x = jax.random.normal(KEY, (2, *[6] * len(size), 16))
    y, variables = conv.init_with_output(KEY, x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    connected = np.asarray(variables["params"]["kernel"]).any(axis=tuple(range(len(size))))
    check_blocks(connected, 4)
    dense = nn.Dense(16, kernel_init=sao_dense(0.25))
    y, _ = dense.init_with_output(KEY, x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_a_transposed_convolution_keeps_norms():
    layer = nn.ConvTranspose(16, (4, 3), kernel_init=sao_conv(0.25, transposed=True))
    x = jax.random.normal(KEY, (2, 6, 6, 16))
    y, _ = layer.init_with_output(KEY, x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.slow
def test_under_nnx_vmap_and_sharding():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return nnx.Linear(16, 16, kernel_init=sao_dense(0.25), rngs=rngs)

    kernels = np.asarray(build(nnx.Rngs(0)).kernel[...])
    for kernel in kernels:
        assert gram_error(kernel) <= 1e-5
        check_blocks(kernel, 4)
    assert len({kernel.tobytes() for kernel in kernels}) == 3
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    kernel = sao_dense(0.25)(KEY, (16, 16), jnp.float32, out_sharding=sharding)
    assert kernel.sharding == sharding


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_strict_modes(activation):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        sao_conv(0.5, activation=activation, scale=2.0)(KEY, (3, 8, 8), jnp.bfloat16)
    with jax.debug_nans(True):
        sao.orthogonal(KEY, 8, 4, activation=activation)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: sao.orthogonal(KEY, 12, 5), ["degree=5", "4 and 6"]),
        (lambda: sao.orthogonal(KEY, 12, 1), ["degree=1", "2"]),
        (lambda: sao.orthogonal(KEY, 12, 24), ["degree=24", "12"]),
        (lambda: sao.orthogonal(KEY, 12, 0), ["degree=0"]),
        (lambda: sao.orthogonal(KEY, 12, 3.0), ["degree=3.0"]),
        (lambda: sao.orthogonal(KEY, 1, 1), ["size=1"]),
        (lambda: sao.orthogonal(KEY, 12, 3, activation="relu"), ["degree=3", "even", "4"]),
        (lambda: sao.orthogonal(KEY, 9, 3, activation="relu"), ["size=9", "even"]),
        (
            lambda: sao.orthogonal(KEY, 12, 3, activation="selu"),
            ["activation='selu'", "'tanh'", "'relu'"],
        ),
        (lambda: sao.orthogonal(KEY, 12, 3, dtype=int), ["dtype='int"]),
        (lambda: sao.orthogonal(KEY, 12, 3, scale=math.inf), ["scale=inf"]),
        (lambda: sao.degree(512, 0.1), ["density=0.1", "32/512 = 0.0625", "64/512 = 0.125"]),
        (lambda: sao.degree(512, 1e-9), ["density=1e-09", "2/512 = 0.00390625"]),
        (lambda: sao.degree(512, 2.0), ["density=2.0"]),
        (lambda: sao.degree(512, 0.125, activation="elu"), ["activation='elu'"]),
        (lambda: jax.jit(lambda d: sao.degree(512, d))(0.125), ["density=", "traced"]),
        (lambda: sao_dense(0.0), ["density=0.0"]),
        (lambda: sao_dense(0.125, activation="elu"), ["activation='elu'"]),
        (lambda: sao_dense(0.125, scale=math.nan), ["scale=nan"]),
        (lambda: sao_dense(0.125, dtype=int), ["dtype='int"]),
        (lambda: sao_dense(0.5)(KEY, (8,)), ["shape=(8,)"]),
        (lambda: sao_dense(0.5)(KEY, (8, 16)), ["shape=(8, 16)", "initializers.orthogonal()"]),
        (lambda: sao_dense(0.1)(KEY, (8, 8)), ["density=0.1", "2/8 = 0.25"]),
        (lambda: sao_dense(0.5)(KEY, (8, 8), jnp.int8), ["dtype='int8'"]),
        (lambda: jax.jit(lambda d: sao_conv(d)(KEY, (3, 8, 8)))(0.5), ["density=", "traced"]),
        (lambda: sao_conv(0.5)(KEY, (8, 8)), ["shape=(8, 8)"]),
        (lambda: sao_conv(0.5)(KEY, (3, 3, 3, 8)), ["shape=(3, 8)", "delta_orthogonal"]),
        (lambda: sao_conv(0.75)(KEY, (3, 8, 8)), ["density=0.75", "4/8 = 0.5", "8/8 = 1"]),
    ],
)
def test_bad_arguments_are_named(call, named):
    with refuses(*named):
        call()


@pytest.mark.slow
def test_no_connection_is_lost_to_rounding(monkeypatch):
    """Blocks with exact zeros, as rounding may make them, keep their support and orthogonality."""

    def identities(key, shape, dtype):
        return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)

    monkeypatch.setattr(block_diagonal, "haar", identities)
    with jax.disable_jit():  # which keeps no program with the wrong blocks
        w = sao.orthogonal(KEY, 6, 3, dtype=jnp.float16)
    check_blocks(w, 3)
    assert gram_error(w) <= 1e-6


def test_the_support_is_a_mask():
    params = {"kernel": sao_dense(0.25)(KEY, (16, 16), jnp.float32), "bias": jnp.zeros(16)}
    mask = eoi.masks.support(params)
    assert eoi.masks.density(mask) == 0.25
