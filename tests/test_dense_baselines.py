import math
from itertools import pairwise

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eoi_jax.initializers import conv_orthogonal, delta_orthogonal

KEY = jax.random.key(3)
INITS = {"delta": delta_orthogonal, "conv": conv_orthogonal}
both = pytest.mark.parametrize("name", INITS)
# One, two and three spatial axes, even and odd, of one and of different sizes; inputs below,
# equal to and above outputs.
SHAPES = [
    (3, 4, 6),
    (4, 5, 3),
    (3, 3, 4, 4),
    (1, 4, 1, 3),
    (2, 3, 6, 4),
    (3, 2, 2, 3, 5),
]


def circular_spectrum(kernel, grid=5):
    """Singular values of a circular convolution: those of its matrix at each frequency."""
    kernel = np.asarray(kernel, np.float64)
    axes = tuple(range(kernel.ndim - 2))
    wrapped = np.zeros((*[grid] * len(axes), *kernel.shape[-2:]))
    for tap in np.ndindex(*kernel.shape[:-2]):
        wrapped[tuple(p % grid for p in tap)] += kernel[tap]
    return np.linalg.svd(np.fft.fftn(wrapped, axes=axes), compute_uv=False)


def test_the_oracle_is_the_spectrum_of_the_convolution():
    kernel = np.random.default_rng(0).normal(size=(2, 3, 4, 2))
    columns = []
    for x in np.eye(4 * 4 * 4).reshape(-1, 4, 4, 4):
        y = 0.0
        for tap in np.ndindex(2, 3):
            y = y + np.roll(x, tap, (0, 1)) @ kernel[tap]
        columns.append(y.ravel())
    values = np.linalg.svd(np.stack(columns), compute_uv=False)
    np.testing.assert_allclose(
        np.sort(values), np.sort(circular_spectrum(kernel, 4).ravel()), atol=1e-10
    )


@pytest.mark.slow
@both
@pytest.mark.parametrize("shape", SHAPES)
def test_all_singular_values_of_the_circular_convolution_are_one(name, shape):
    """There are min(inputs, outputs) at each frequency: with more inputs the rest are 0."""
    kernel = INITS[name]()(KEY, shape, jnp.float32)
    chex.assert_shape(kernel, shape)
    chex.assert_type(kernel, jnp.float32)
    for grid in (2, 5, 6):  # a grid of 2 is smaller than the kernel, which then wraps
        np.testing.assert_allclose(circular_spectrum(kernel, grid), 1, atol=1e-5)


@both
def test_float64_and_scale(name, x64):
    kernel = INITS[name](scale=1.5)(KEY, (3, 2, 6, 4), jnp.float64)
    chex.assert_type(kernel, jnp.float64)
    np.testing.assert_allclose(circular_spectrum(kernel), 1.5, atol=1e-12)


@both
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_dtypes_are_cast_last(name, dtype):
    kernel = INITS[name](dtype=dtype)(KEY, (3, 4, 6))
    chex.assert_type(kernel, dtype)
    wide = INITS[name]()(KEY, (3, 4, 6), jnp.float32)
    np.testing.assert_array_equal(kernel, wide.astype(dtype))
    np.testing.assert_array_equal(INITS[name]()(KEY, (3, 4, 6), None), wide)


@both
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(3, 8, 2), (1, 7, 7)])
def test_every_group_is_an_isometry_of_its_own(name, inputs, outputs, groups):
    shape = (3, 2, inputs, outputs)
    kernel = INITS[name](feature_group_count=groups)(KEY, shape, jnp.float32)
    chex.assert_shape(kernel, shape)
    parts = np.split(np.asarray(kernel), groups, axis=-1)
    for part in parts:
        np.testing.assert_allclose(circular_spectrum(part), 1, atol=1e-5)
    assert any((left != right).any() for left, right in pairwise(parts))


@both
def test_one_key_one_kernel(name):
    def draw(key):
        return INITS[name]()(key, (3, 4, 6), jnp.float32)

    keys = jax.random.split(KEY, 3)
    looped = jnp.stack([draw(key) for key in keys])
    np.testing.assert_array_equal(looped[0], draw(keys[0]))
    np.testing.assert_allclose(jax.jit(draw)(keys[0]), looped[0], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(draw)(keys), looped, atol=1e-6)
    assert (looped[0] != looped[1]).any()
    assert (looped[1] != looped[2]).any()


@both
def test_the_scale_may_be_traced_and_differentiated(name):
    def draw(scale):
        return INITS[name](scale=scale)(KEY, (3, 4, 6), jnp.float32)

    unit = draw(1.0)
    np.testing.assert_allclose(jax.jacfwd(draw)(2.0), unit, rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 5, 5), (2, 3, 4, 6)])
def test_delta_has_the_law_of_jax(shape):
    """The same taps are zero, and entries of the center have the same first moments."""

    def draw(init):
        return np.asarray(
            jax.vmap(lambda key: init(key, shape, jnp.float32))(jax.random.split(KEY, 1000))
        )

    ours, theirs = draw(delta_orthogonal()), draw(jax.nn.initializers.delta_orthogonal())
    np.testing.assert_array_equal((ours != 0).any(0), (theirs != 0).any(0))
    center = (0, *((size - 1) // 2 for size in shape[:-2]))
    ours, theirs = (x[:, *center[1:]].astype(np.float64) for x in (ours, theirs))
    gram = ours @ np.swapaxes(ours, 1, 2)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(shape[-2]), gram.shape), atol=1e-5)
    for power in (1, 2, 3, 4):
        left, right = ours**power, theirs**power
        error = np.sqrt((left.var(0) + right.var(0)) / 1000)
        assert (np.abs(left.mean(0) - right.mean(0)) <= 4.5 * error).all(), power


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (5, 3), (1, 1)])
def test_the_center_of_delta_is_haar(inputs, outputs):
    """Invariance under both sides: moments of one entry, and of the trace where it is square."""
    draws, many = 3000, max(inputs, outputs)
    keys = jax.random.split(KEY, draws)
    init = delta_orthogonal()
    taps = jax.vmap(lambda key: init(key, (1, inputs, outputs), jnp.float32)[0])(keys)
    taps = np.asarray(taps, np.float64)
    for power, expected in [(1, 0), (2, 1 / many), (3, 0), (4, 3 / (many * (many + 2)))]:
        moments = taps**power
        error = moments.std(0) / math.sqrt(draws)
        assert (np.abs(moments.mean(0) - expected) <= 4.5 * error + 1e-6).all(), power
    if inputs == outputs:
        trace = np.trace(taps, axis1=1, axis2=2)
        assert abs(trace.mean()) <= 4 / math.sqrt(draws)
        error = (trace**2).std() / math.sqrt(draws)
        assert abs((trace**2).mean() - 1) <= 4 * error + 1e-6
        signs = np.linalg.det(taps)
        assert abs(signs.mean()) <= 4 / math.sqrt(draws)


def test_a_kernel_of_two_taps_is_made_of_projections():
    """Of W = H P_i Q_j both factors are recovered: H is the sum of all taps."""
    kernel = np.asarray(conv_orthogonal()(KEY, (2, 2, 6, 6), jnp.float32), np.float64)
    h = kernel.sum((0, 1))
    np.testing.assert_allclose(h @ h.T, np.eye(6), atol=1e-5)
    p, q = h.T @ kernel[0].sum(0), h.T @ kernel[:, 0].sum(0)
    for projection in (p, q):
        np.testing.assert_allclose(projection, projection.T, atol=1e-5)
        np.testing.assert_allclose(projection @ projection, projection, atol=1e-5)
    for i, left in enumerate((p, np.eye(6) - p)):
        for j, right in enumerate((q, np.eye(6) - q)):
            np.testing.assert_allclose(kernel[i, j], h @ left @ right, atol=1e-5)


def test_ranks_are_binomial_and_independent_of_the_rest():
    draws, size = 2000, 4
    init = conv_orthogonal()
    keys = jax.random.split(KEY, draws)
    kernels = jax.vmap(lambda key: init(key, (2, size, size), jnp.float32))(keys)
    ranks = (np.asarray(kernels[:, 0], np.float64) ** 2).sum((1, 2))
    np.testing.assert_allclose(ranks, np.round(ranks), atol=1e-4)
    counts = np.bincount(np.round(ranks).astype(int), minlength=size + 1)
    p = np.array([math.comb(size, rank) for rank in range(size + 1)]) / 2**size
    assert (np.abs(counts - draws * p) <= 4 * np.sqrt(draws * p * (1 - p))).all()


@pytest.mark.parametrize("shape", [(4, 3, 3), (3, 2, 4, 3)])
def test_the_norm_is_spread_over_the_taps_binomially(shape):
    draws, few = 1000, min(shape[-2:])
    init = conv_orthogonal()
    keys = jax.random.split(KEY, draws)
    kernels = jax.vmap(lambda key: init(key, shape, jnp.float32))(keys)
    energy = (np.asarray(kernels, np.float64) ** 2).sum((-2, -1))
    np.testing.assert_allclose(energy.reshape(draws, -1).sum(-1), few, rtol=1e-5)
    for tap in np.ndindex(*shape[:-2]):
        pairs = list(zip(shape[:-2], tap, strict=True))
        share = math.prod(math.comb(k - 1, p) / 2 ** (k - 1) for k, p in pairs)
        own = energy[(slice(None), *tap)]
        assert abs(own.mean() - few * share) <= 4.5 * own.std() / math.sqrt(draws), tap


def test_with_one_tap_both_are_haar_matrices():
    for name in INITS:
        tap = np.asarray(INITS[name]()(KEY, (1, 1, 5, 7), jnp.float32), np.float64)[0, 0]
        np.testing.assert_allclose(tap @ tap.T, np.eye(5), atol=1e-5)


@both
@pytest.mark.parametrize("size", [(4,), (2, 3)])
def test_in_flax_convolutions_norms_are_kept(name, size):
    init = INITS[name](feature_group_count=2)
    layer = nn.Conv(12, size, padding="CIRCULAR", feature_group_count=2, kernel_init=init)
    x = jax.random.normal(KEY, (2, *[6] * len(size), 8))
    y, _ = layer.init_with_output(KEY, x)

    def norms(array):
        array = array.reshape(*array.shape[:-1], 2, -1)
        every_pixel = (-1,)
        together = (*range(1, array.ndim - 2), array.ndim - 1)
        return jnp.sqrt((array**2).sum(every_pixel if name == "delta" else together))

    np.testing.assert_allclose(norms(y), norms(x), rtol=1e-5)


@pytest.mark.slow
def test_in_transposed_convolutions_norms_are_kept():
    x = jax.random.normal(KEY, (2, 6, 6, 8))
    layer = nn.ConvTranspose(8, (4, 3), kernel_init=delta_orthogonal(transposed=True))
    y, _ = layer.init_with_output(KEY, x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    x = jax.random.normal(KEY, (2, 6, 4))
    layer = nn.ConvTranspose(6, (3,), padding="CIRCULAR", kernel_init=conv_orthogonal())
    y, _ = layer.init_with_output(KEY, x)
    np.testing.assert_allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-5)


@both
def test_under_nnx_vmap_and_sharding(name):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return nnx.Conv(4, 6, (3,), kernel_init=INITS[name](), rngs=rngs)

    kernels = np.asarray(build(nnx.Rngs(0)).kernel[...])
    for kernel in kernels:
        np.testing.assert_allclose(circular_spectrum(kernel), 1, atol=1e-5)
    assert len({kernel.tobytes() for kernel in kernels}) == 3
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x", None))
    kernel = INITS[name]()(KEY, (3, 4, 6), jnp.float32, out_sharding=sharding)
    assert kernel.sharding == sharding


@both
def test_strict_modes(name):
    modes = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with modes[0], modes[1], jax.debug_nans(True):
        INITS[name](scale=2.0)(KEY, (3, 4, 6), jnp.bfloat16)


@both
def test_empty_kernels(name):
    for shape in [(3, 0, 4), (3, 4, 0), (0, 4, 4)]:
        chex.assert_shape(INITS[name]()(KEY, shape, jnp.float32), shape)


@both
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda make: make(scale=math.nan), r"scale=nan"),
        (lambda make: make(scale="2"), r"scale='2'"),
        (lambda make: make(dtype=int), r"dtype='int\d+'"),
        (lambda make: make(feature_group_count=0), r"feature_group_count=0"),
        (
            lambda make: make(feature_group_count=3)(KEY, (3, 8, 8)),
            r"feature_group_count=3 .*8",
        ),
        (lambda make: make()(KEY, (8, 8)), r"shape=\(8, 8\)"),
        (lambda make: make()(KEY, (3, 8, 8), jnp.int8), r"dtype='int8'"),
    ],
)
def test_bad_arguments_are_named(name, call, message):
    with pytest.raises(ValueError, match=message):
        call(INITS[name])
