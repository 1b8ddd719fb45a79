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

import eoi_jax as eoi

KEY = jax.random.key(9)


def tap_of(kernel, transposed=False):
    center = tuple(k // 2 if transposed else (k - 1) // 2 for k in kernel.shape[:-2])
    return kernel[center]


def circular_conv(x, kernel, groups=1):
    """Circular convolution by definition: y[t] = Σ_s x[t + s − c] W[s], in float64 NumPy."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    axes = tuple(range(kernel.ndim - 2))
    outputs = np.split(kernel, groups, axis=-1)
    inputs = np.split(x, groups, axis=-1)
    parts = []
    for part, own in zip(inputs, outputs, strict=True):
        total = 0.0
        for s in np.ndindex(*kernel.shape[:-2]):
            shift = [(k - 1) // 2 - p for k, p in zip(kernel.shape[:-2], s, strict=True)]
            total = total + np.roll(part, shift, axes) @ own[s]
        parts.append(total)
    return np.concatenate(parts, -1)


@pytest.mark.slow
def test_dense_is_orthogonal_with_its_options():
    init = eoi.dense(0.2, scale=2.0, in_axis=1, out_axis=0, permute=True)
    expected = eoi.orthogonal(KEY, (30, 20), 0.2, scale=2.0, permute=True).T
    np.testing.assert_array_equal(init(KEY, (20, 30), jnp.float32), expected)
    chex.assert_type(init(KEY, (20, 30), jnp.bfloat16), jnp.bfloat16)
    chex.assert_type(eoi.dense(0.2, dtype=jnp.float16)(KEY, (20, 30)), jnp.float16)
    np.testing.assert_array_equal(init(KEY, (20, 30), None), expected)


SHAPES = [(5, 6, 6), (3, 3, 8, 8), (4, 2, 6, 16), (3, 3, 16, 6), (1, 1, 8, 12), (2, 3, 2, 8, 8)]


@pytest.mark.slow
@given(st.integers(0, 2**31 - 1), st.sampled_from(SHAPES), st.sampled_from([0.05, 0.1, 0.4, 1.0]))
def test_conv_is_a_sparse_orthogonal_center_tap(seed, shape, density):
    taps, size = math.prod(shape[:-2]), max(shape[-2:])
    density = max(density, 1.0001 / size)
    kernel = eoi.conv(density, scale=1.5)(jax.random.key(seed), shape, jnp.float32)
    chex.assert_shape(kernel, shape)
    tap = tap_of(kernel)
    assert gram_error(tap, 1.5) <= 1e-5
    assert jnp.count_nonzero(kernel) == jnp.count_nonzero(tap), "a weight off the center"
    rule = min(density * taps, math.sqrt(density), 1.0)
    step = 1.0 if rule == density * taps else 0.5  # where the budget binds it is not exceeded
    assert abs((tap != 0).mean() - max(rule, 1 / size)) <= step / size + 1e-6
    assert jnp.count_nonzero(kernel) <= max(density * kernel.size, min(shape[-2:])) + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("spatial", [(5,), (4,), (3, 3), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 6), (4, 10)])
def test_circular_convolution_preserves_norms(spatial, inputs, outputs):
    kernel = eoi.conv(0.3)(KEY, (*spatial, inputs, outputs), jnp.float32)
    x = np.random.default_rng(0).normal(size=(*[7] * len(spatial), inputs))
    y = circular_conv(x, kernel)
    np.testing.assert_allclose(
        np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )  # at every pixel, and so in all


@pytest.mark.slow
def test_more_inputs_than_outputs_is_a_coisometry():
    kernel = eoi.conv(0.3)(KEY, (3, 3, 10, 4), jnp.float32)
    basis = np.eye(5 * 5 * 10).reshape(-1, 5, 5, 10)
    matrix = np.stack([circular_conv(x, kernel).ravel() for x in basis])
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(values[: 5 * 5 * 4], 1, atol=1e-5)
    assert len(values) == 5 * 5 * 4


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["CIRCULAR", "SAME"])
@pytest.mark.parametrize("size", [(3,), (4,), (3, 3), (2, 4), (3, 2, 3)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_flax_conv_preserves_norms_per_group(padding, size, groups):
    layer = nn.Conv(
        16,
        size,
        padding=padding,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=eoi.conv(0.5, feature_group_count=groups),
    )
    x = jax.random.normal(KEY, (2, *[6] * len(size), 8))
    y, variables = layer.init_with_output(KEY, x)
    per_group = (*x.shape[:-1], groups, -1)
    np.testing.assert_allclose(
        jnp.linalg.norm(y.reshape(per_group), axis=-1),
        jnp.linalg.norm(x.reshape(per_group), axis=-1),
        rtol=1e-5,
    )
    kernel = variables["params"]["kernel"]
    if groups == 2:  # with 8 groups each is 1 x 2, and one non-zero is nearest to its density
        left, right = np.split(np.asarray(tap_of(kernel)), groups, axis=1)
        assert (left != right).any()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(3,), (4,), (2, 5)])
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_flax_conv_transpose_preserves_norms(size, transpose_kernel):
    layer = nn.ConvTranspose(
        8,
        size,
        use_bias=False,
        transpose_kernel=transpose_kernel,
        kernel_init=eoi.conv(0.5, transposed=not transpose_kernel),
    )
    x = jax.random.normal(KEY, (2, *[6] * len(size), 8))
    y, _ = layer.init_with_output(KEY, x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_a_depthwise_kernel_is_its_scale_at_the_center():
    kernel = eoi.conv(0.2, scale=1.5, feature_group_count=12)(KEY, (3, 3, 1, 12), jnp.float32)
    expected = np.zeros((3, 3, 1, 12))
    expected[1, 1] = 1.5
    np.testing.assert_array_equal(kernel, expected)
    signed = eoi.conv(0.2, feature_group_count=12, permute=True)(KEY, (3, 3, 1, 12), jnp.float32)
    assert set(np.unique(signed)) == {-1.0, 0.0, 1.0}


@pytest.mark.slow
def test_the_center_density_can_be_chosen():
    kernel = eoi.conv(0.125, center_density=0.125)(KEY, (3, 3, 32, 32), jnp.float32)
    assert abs((tap_of(kernel) != 0).mean() - 0.125) <= 0.5 / 32 + 1e-6


def test_a_chosen_center_density_leaves_the_count_of_the_kernel():
    """Where it is all that the density allows, the kernel still has no more weights than that."""
    draw = jax.jit(lambda key: eoi.conv(0.3, center_density=0.3)(key, (1, 1, 32, 32)))
    traced = jax.jit(lambda key, d: eoi.conv(d, center_density=d)(key, (1, 1, 32, 32)))
    for seed in range(12):  # without the room left for a rotation, 4 of these end above
        kernel = draw(jax.random.key(seed))
        assert 275 <= (kernel != 0).sum() <= 307
        assert (
            eoi.masks.fill(KEY, eoi.masks.support({"kernel": kernel}), 0.3)["kernel"].sum() == 307
        )
        assert (traced(jax.random.key(seed), 0.3) != 0).sum() <= 307


@pytest.mark.slow
def test_densities_may_be_traced():
    def draw(density):
        return eoi.conv(density)(KEY, (3, 3, 16, 16), jnp.float32)

    traced = jax.jit(draw)
    for density in (0.01, 0.1, 0.9):
        np.testing.assert_allclose(traced(density), draw(density), atol=1e-6)
    for bad in (0.001, 2.0, -1.0, math.nan):
        assert jnp.isnan(traced(bad)).any()
    taps = jax.jit(lambda d, own: eoi.conv(d, center_density=own)(KEY, (3, 3, 8, 8), jnp.float32))
    assert not jnp.isnan(taps(0.1, 0.5)).any()
    assert jnp.isnan(taps(0.01, 0.95)).any()
    layers = jax.vmap(lambda k, d: eoi.dense(d)(k, (16, 16), jnp.float32))(
        jax.random.split(KEY, 3), jnp.array([0.1, 0.3, 0.7])
    )
    for layer, density in zip(layers, (0.1, 0.3, 0.7), strict=True):
        assert abs((layer != 0).mean() - density) <= 0.5 / 16 + 1e-6


class Stack(nn.Module):
    """Scanned dense layers."""

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(
            lambda module, x, _: (nn.Dense(16, kernel_init=eoi.dense(0.2))(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=5,
        )
        return layer(self, x, None)[0]


@pytest.mark.slow
def test_under_linen_scan_every_layer_is_its_own():
    params = jax.jit(Stack().init)(KEY, jnp.ones((1, 16)))["params"]
    (kernels,) = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 3]
    chex.assert_shape(kernels, (5, 16, 16))
    for kernel in kernels:
        assert gram_error(kernel) <= 1e-5
    assert len({np.asarray(kernel).tobytes() for kernel in kernels}) == 5


@pytest.mark.slow
def test_under_linen_vmap():
    layers = nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, axis_size=3
    )(16, kernel_init=eoi.dense(0.2))
    kernels = layers.init(KEY, jnp.ones((3, 1, 8)))["params"]["kernel"]
    chex.assert_shape(kernels, (3, 8, 16))
    assert max(gram_error(kernel) for kernel in kernels) <= 1e-5


@pytest.mark.slow
def test_under_nnx():
    layer = nnx.Linear(12, 24, kernel_init=eoi.dense(0.2), rngs=nnx.Rngs(0))
    assert gram_error(layer.kernel[...]) <= 1e-5

    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return nnx.Conv(8, 8, (3, 3), kernel_init=eoi.conv(0.2), rngs=rngs)

    kernels = build(nnx.Rngs(0)).kernel[...]
    chex.assert_shape(kernels, (4, 3, 3, 8, 8))
    assert max(gram_error(tap_of(kernel)) for kernel in kernels) <= 1e-5
    assert len({np.asarray(kernel).tobytes() for kernel in kernels}) == 4


def test_shapes_without_arrays():
    model = nn.Sequential(
        [nn.Conv(8, (3, 3), kernel_init=eoi.conv(0.2)), nn.Dense(9, kernel_init=eoi.dense(0.2))]
    )
    shapes = jax.eval_shape(model.init, KEY, jnp.ones((1, 4, 4, 8)))
    assert shapes["params"]["layers_0"]["kernel"].shape == (3, 3, 8, 8)


@pytest.mark.slow
def test_out_sharding():
    explicit = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((1,), ("x",), axis_types=(explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    kernel = eoi.dense(0.2)(KEY, (16, 16), jnp.float32, out_sharding=sharding)
    assert kernel.sharding == sharding
    np.testing.assert_array_equal(kernel, eoi.dense(0.2)(KEY, (16, 16), jnp.float32))


def test_empty_kernels():
    chex.assert_shape(eoi.conv(0.2)(KEY, (3, 3, 0, 4), jnp.float32), (3, 3, 0, 4))
    chex.assert_shape(eoi.dense(0.2)(KEY, (0, 4), jnp.float32), (0, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eoi.dense(0.0), r"density=0.0"),
        (lambda: eoi.dense(10), r"density=10.0"),
        (lambda: eoi.dense(0.1, scale=math.nan), r"scale=nan"),
        (lambda: eoi.dense(0.1, dtype=int), r"dtype='int\d+'"),
        (lambda: eoi.dense(0.01)(KEY, (8, 9), jnp.float32), r"density=0.01 .*0\.1111"),
        (lambda: eoi.dense(0.1)(KEY, (8,), jnp.float32), r"shape=\(8,\)"),
        (lambda: eoi.conv(0.1, feature_group_count=0), r"feature_group_count=0"),
        (lambda: eoi.conv(0.1, center_density=2.0), r"center_density=2.0"),
        (
            lambda: eoi.conv(0.1, center_density=0.95)(KEY, (3, 3, 8, 8), jnp.float32),
            r"center_density=0.95 .*0\.125.*0\.9",
        ),
        (
            lambda: eoi.conv(0.1, center_density=0.1)(KEY, (3, 3, 8, 8), jnp.float32),
            r"center_density=0.1 .*0\.125",
        ),
        (
            lambda: eoi.conv(0.1, feature_group_count=8)(KEY, (3, 3, 1, 8), jnp.float32),
            r"density=0.1 .*0\.111111",
        ),
        (
            lambda: eoi.conv(0.1, feature_group_count=3)(KEY, (3, 3, 8, 8), jnp.float32),
            r"feature_group_count=3 .*8",
        ),
        (lambda: eoi.conv(0.1)(KEY, (8, 8), jnp.float32), r"shape=\(8, 8\)"),
        (lambda: eoi.conv(0.1)(KEY, (3, 8, 8), jnp.int8), r"dtype='int8'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_a_convolution_never_exceeds_the_budget_that_fill_meets():
    for seed in range(12):
        kernel = eoi.conv(0.1)(jax.random.key(seed), (1, 1, 32, 64), jnp.float32)
        mask = eoi.masks.fill(KEY, eoi.masks.support({"kernel": kernel}), 0.1)
        assert mask["kernel"].sum() == 205


@pytest.mark.slow
def test_a_dense_convolution_of_one_tap_is_dense():
    kernel = eoi.conv(1.0)(jax.random.key(0), (1, 1, 6, 6))
    assert np.all(np.asarray(kernel) != 0)


# --- taps and strides -----------------------------------------------------------------------------

TAPS = ["center", "spread", "spread_both"]
# (taps, inputs of a group, outputs), groups
KERNELS = [
    ((3, 3, 6, 9), 1),
    ((3, 3, 9, 6), 1),
    ((3, 5, 8), 1),
    ((4, 4, 8), 2),
    ((2, 3, 3, 4, 4), 1),
    ((3, 3, 1, 6), 6),
    ((1, 1, 5, 5), 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "groups"), KERNELS, ids=str)
@pytest.mark.parametrize("taps", TAPS)
def test_every_choice_of_taps_is_exactly_isometric(taps, shape, groups):
    """All frequencies of a circular grid; the same matrix, each entry at one tap."""
    key, density = jax.random.key(3), 0.4
    kernel = eoi.conv(density, taps=taps, feature_group_count=groups)(key, shape)
    grid = (4,) * (len(shape) - 2)
    values = eoi.spectrum.conv_singular_values(kernel, grid, feature_group_count=groups)
    np.testing.assert_allclose(values, 1, atol=1e-5)
    window = tuple(range(len(shape) - 2))
    assert ((np.asarray(kernel) != 0).sum(axis=window) <= 1).all()
    balance = taps != "center"  # the default of each
    options = {"feature_group_count": groups, "balance_outputs": balance}
    center = eoi.conv(density, **options)(key, shape)
    np.testing.assert_array_equal(kernel.sum(axis=window), center.sum(axis=window))


@pytest.mark.slow
def test_input_channels_have_taps_of_their_own():
    kernel = np.asarray(eoi.conv(0.3, taps="spread")(jax.random.key(0), (3, 3, 64, 64))) != 0
    used = kernel.any(axis=-1).reshape(9, 64)
    np.testing.assert_array_equal(used.sum(axis=0), 1)
    # Uniform over nine taps: 64 draws leave one out once in 240 keys.
    assert used.any(axis=1).sum() >= 8
    both = np.asarray(eoi.conv(0.3, taps="spread_both")(jax.random.key(0), (3, 3, 64, 64))) != 0
    np.testing.assert_array_equal(both.any(axis=(1, 3)).sum(axis=0), 1)  # a row for each input
    assert set(both.any(axis=(0, 2)).sum(axis=0)) <= {0, 1}  # a column for each output
    other = np.asarray(eoi.conv(0.3, taps="spread")(jax.random.key(1), (3, 3, 64, 64))) != 0
    assert (used != other.any(axis=-1).reshape(9, 64)).any()


def circular(x, kernel, strides, dilation=1):
    """Circular convolution of one picture, by indices: no padding, no library."""
    grid = x.shape[:-1]
    out = np.zeros((*(n // s for n, s in zip(grid, strides, strict=True)), kernel.shape[-1]))
    for tap in np.ndindex(*kernel.shape[:-2]):
        seen = x
        for axis, (position, step) in enumerate(zip(tap, strides, strict=True)):
            seen = np.roll(seen, -position * dilation, axis).take(
                np.arange(0, grid[axis], step), axis
            )
        out += seen @ kernel[tap]
    return out


def dense_operator(kernel, grid, strides, dilation=1):
    size = (*grid, kernel.shape[-2])
    basis = np.eye(int(np.prod(size))).reshape(-1, *size)
    return np.stack([circular(x, kernel, strides, dilation).ravel() for x in basis])


STRIDED = [
    ((3, 3, 2, 8), (2, 2), (4, 6)),  # square: four phases of two channels
    ((3, 3, 2, 5), (2, 2), (4, 4)),
    ((2, 3, 2, 7), (2, 1), (4, 3)),
    ((3, 3, 2, 11), (2, 2), (4, 4)),
    ((5, 3, 4), (3,), (9,)),
    ((4, 2, 4), 2, (8,)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "strides", "grid"), STRIDED, ids=str)
@pytest.mark.parametrize("taps", TAPS)
def test_strided_kernels_see_every_pixel(taps, shape, strides, grid):
    kernel = eoi.conv(0.4, taps=taps, strides=strides)(jax.random.key(2), shape)
    kernel = np.asarray(kernel, np.float64)
    steps = (strides,) * len(grid) if isinstance(strides, int) else strides
    matrix = dense_operator(kernel, grid, steps)
    np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False), 1, atol=1e-5)
    if matrix.shape[0] <= matrix.shape[1]:
        assert (matrix != 0).any(axis=1).all()


@pytest.mark.slow
def test_dilation_changes_nothing():
    kernel = np.asarray(eoi.conv(0.4, taps="spread")(jax.random.key(2), (3, 3, 4)), np.float64)
    values = np.linalg.svd(dense_operator(kernel, (8,), (1,), dilation=3), compute_uv=False)
    np.testing.assert_allclose(values, 1, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("balance", [False, True])
def test_spread_kernels_have_the_non_zeros_of_the_center_and_fill_to_the_budget(balance):
    shape, density, key = (3, 3, 8, 12), 0.3, jax.random.key(0)
    kernels = {
        taps: eoi.conv(density, taps=taps, balance_outputs=balance)(key, shape) for taps in TAPS
    }
    assert len({int((kernel != 0).sum()) for kernel in kernels.values()}) == 1
    for kernel in kernels.values():
        mask = eoi.masks.fill(key, eoi.masks.support({"kernel": kernel}), density)
        assert int(mask["kernel"].sum()) == int(density * kernel.size + 0.5)


def test_balanced_outputs_may_be_traced():
    def draw(balance):
        return eoi.conv(0.2, taps="spread", balance_outputs=balance)(KEY, (3, 3, 4, 16))

    traced = jax.jit(draw)
    for balance in (False, True):
        np.testing.assert_allclose(traced(balance), draw(balance), atol=1e-6)


def test_what_taps_and_strides_refuse():
    key = jax.random.key(0)
    with refuses("taps", "edge"):
        eoi.conv(0.3, taps="edge")
    with refuses("strides", "3", "larger window"):
        eoi.conv(0.3, strides=3)(key, (2, 2, 4, 4))
    with refuses("strides[1]", "4", "larger window"):
        eoi.conv(0.3, strides=(1, 4))(key, (3, 3, 4, 4))
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=rf"strides={wrong}(?!.*window)"):
            eoi.conv(0.3, strides=wrong)(key, (3, 3, 4, 4))
    with refuses("strides", "(2, 2, 2)"):
        eoi.conv(0.3, strides=(2, 2, 2))(key, (3, 3, 4, 4))
    with refuses("strides", "transposed"):
        eoi.conv(0.3, strides=2, transposed=True)(key, (3, 3, 4, 4))


# --- balanced outputs ----------------------------------------------------------------------------


def output_norms(kernel, fair=True):
    """Norms of the outputs, by default over the fair share of one group and one phase."""
    norms = np.linalg.norm(np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]), axis=0)
    return norms / math.sqrt(kernel.shape[-2] / kernel.shape[-1]) if fair else norms


@pytest.mark.slow
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.05, 0.1, 0.3]), st.sampled_from(TAPS[1:]))
def test_no_filter_of_a_spread_kernel_is_dead(seed, density, taps):
    shape = (3, 3, 3, 16)
    kernel = eoi.conv(density, taps=taps)(jax.random.key(seed), shape)
    assert output_norms(kernel).min() >= 0.5
    assert 16 <= jnp.count_nonzero(kernel) <= max(density * kernel.size, 16)
    values = eoi.spectrum.conv_singular_values(kernel, (4, 4))
    np.testing.assert_allclose(values, 1, atol=1e-5)


@pytest.mark.slow
def test_balance_is_by_default_where_taps_are_spread_and_the_density_has_a_non_zero_an_output():
    """Of the 432 weights 13 are too few for 16 outputs, and 22 are not."""
    shape, draw = (3, 3, 3, 16), eoi.conv
    few, enough = 13 / 432, 22 / 432
    default, plain = draw(few, taps="spread"), draw(few, taps="spread", balance_outputs=False)
    np.testing.assert_array_equal(default(KEY, shape), plain(KEY, shape))
    assert output_norms(default(KEY, shape)).min() == 0
    with refuses("density", "0.03009", "0.037037", "balance_outputs"):
        draw(few, taps="spread", balance_outputs=True)(KEY, shape)
    with refuses("center_density", 0.3, "0.333333", "balance_outputs"):
        draw(0.1, center_density=0.3, balance_outputs=True)(KEY, shape)
    assert output_norms(draw(enough)(KEY, shape)).min() == 0
    assert output_norms(draw(enough, balance_outputs=True)(KEY, shape)).min() >= 0.5
    traced = jax.jit(lambda density: draw(density, taps="spread")(KEY, shape))
    for density in (few, 0.2):
        expected = draw(density, taps="spread")(KEY, shape)
        np.testing.assert_allclose(traced(density), expected, atol=1e-6)


@pytest.mark.slow
def test_groups_and_phases_have_fair_shares_of_their_own():
    options = {"taps": "spread", "feature_group_count": 2}
    kernel = eoi.conv(0.2, **options)(KEY, (3, 3, 3, 10))
    for group in jnp.split(kernel, 2, axis=-1):
        assert output_norms(group).min() >= 0.5
    strided = eoi.conv(0.2, taps="spread", strides=2)(KEY, (3, 3, 2, 11))
    assert output_norms(strided, fair=False).min() >= 0.5 * math.sqrt(8 / 11)


@pytest.mark.slow
def test_wide_linear_kernels_are_balanced_on_request():
    balanced = eoi.dense(0.15, balance_outputs=True)(KEY, (8, 40))
    assert output_norms(balanced).min() >= 0.5
    assert output_norms(eoi.dense(0.15)(KEY, (8, 40))).min() == 0
    assert gram_error(balanced) <= 1e-5


@pytest.mark.parametrize("init", [eoi.dense, eoi.conv])
def test_balance_is_a_truth_value_and_not_for_patterns(init):
    with refuses("balance_outputs", "'yes'"):
        init(0.3, balance_outputs="yes")
    band = eoi.planes.within(lambda size: np.ones((size, size), bool))
    with refuses("balance_outputs", True, "within"):
        init(0.3, balance_outputs=True, planes=band)


@pytest.mark.slow
def test_spread_kernels_of_planes_in_a_pattern_stay_inside_it():
    """What balances outputs would start outside: by default such planes do without."""
    blocks = eoi.planes.within(lambda size: np.kron(np.eye(2), np.ones((size // 2,) * 2)) > 0)
    kernel = eoi.conv(0.1, taps="spread", planes=blocks)(KEY, (3, 3, 3, 16))
    connected = np.asarray(kernel).any(axis=(0, 1))
    assert connected[:, :8].any(axis=0).sum() >= 3
    assert not connected[:, 8:].any()
