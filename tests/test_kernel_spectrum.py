"""Laws of the spectra of kernels; the oracle of a convolution is its dense matrix in float64."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import refuses

import eoi_jax as eoi
from eoi_jax import spectrum
from eoi_jax.typing import Layout

KEY = jax.random.key(5)

# taps, inputs of a group, outputs, groups, grid
CASES = {
    "odd": ((3,), 2, 3, 1, (5,)),
    "even": ((4,), 3, 2, 1, (6,)),
    "as large as the grid": ((4,), 2, 2, 1, (4,)),
    "wraps once": ((5,), 2, 2, 1, (3,)),
    "wraps three times": ((7,), 1, 2, 1, (2,)),
    "on one position": ((3,), 2, 2, 1, (1,)),
    "groups": ((3,), 2, 6, 3, (4,)),
    "2-D": ((3, 3), 2, 3, 1, (4, 5)),
    "2-D, fewer outputs": ((2, 3), 3, 2, 1, (5, 4)),
    "2-D, wraps": ((5, 4), 2, 2, 1, (2, 3)),
    "2-D, wraps along one axis": ((1, 4), 2, 2, 1, (3, 2)),
    "2-D, groups": ((3, 2), 2, 4, 2, (3, 4)),
    "depthwise": ((3, 3), 1, 4, 4, (4, 3)),
    "depthwise, two outputs each": ((3, 3), 1, 4, 2, (3, 4)),
    "3-D": ((2, 3, 2), 2, 3, 1, (3, 2, 4)),
    "3-D, wraps, groups": ((3, 2, 3), 1, 4, 2, (2, 3, 1)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def svd(matrix) -> np.ndarray:
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def descending(values) -> np.ndarray:
    return np.sort(np.ravel(values))[::-1]


def dense_matrix(kernel, grid, groups):
    """What the convolution does to each unit vector."""
    axes = len(grid)
    size = math.prod(grid) * kernel.shape[-2] * groups
    units = np.eye(size).reshape(size, *grid, -1)
    around = [((taps - 1) // 2, taps // 2) for taps in kernel.shape[:-2]]
    letters = "DHW"[-axes:]
    outputs = jax.lax.conv_general_dilated(
        np.pad(units, [(0, 0), *around, (0, 0)], mode="wrap"),
        np.asarray(kernel, np.float64),
        (1,) * axes,
        "VALID",
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
        precision=jax.lax.Precision.HIGHEST,
    )
    return np.asarray(outputs).reshape(size, -1)


# --- one convolution --------------------------------------------------------------------------


@cases
def test_values_are_those_of_the_dense_matrix(case, x64):
    taps, inputs, outputs, groups, grid = case
    kernel = normal(0, *taps, inputs, outputs).astype(np.float64)
    values = spectrum.conv_singular_values(kernel, grid, feature_group_count=groups)
    chex.assert_shape(values, (math.prod(grid) * groups * min(inputs, outputs // groups),))
    assert values.dtype == jnp.float64
    # The dense matrix has zeros besides, where the smaller side of the groups is the larger one.
    expected = svd(dense_matrix(kernel, grid, groups))
    np.testing.assert_allclose(values, expected[: len(values)], rtol=0, atol=1e-12)
    np.testing.assert_allclose(expected[len(values) :], 0, atol=1e-12)


def test_single_precision_is_near_double_precision():
    kernel = normal(0, 3, 3, 6, 8)
    values = spectrum.conv_singular_values(kernel, (7, 8))
    chex.assert_type(values, jnp.float32)
    wrapped = np.zeros((7, 8, 6, 8))
    wrapped[:3, :3] = kernel
    expected = np.linalg.svd(np.fft.fftn(wrapped, axes=(0, 1)), compute_uv=False)
    np.testing.assert_allclose(values, descending(expected), rtol=0, atol=2e-6 * expected.max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("taps", "inputs", "outputs", "groups"),
    [((3,), 6, 4, 1), ((3, 4), 8, 12, 1), ((3, 3), 4, 8, 2)],
)
def test_exact_orthogonal_convolutions_have_ones_only(taps, inputs, outputs, groups):
    init = eoi.conv(0.3, scale=1.5, feature_group_count=groups)
    kernel = init(KEY, (*taps, inputs, outputs), jnp.float32)
    for grid in (2, 5):  # the smaller one wraps
        values = spectrum.conv_singular_values(
            kernel, [grid] * len(taps), feature_group_count=groups
        )
        np.testing.assert_allclose(values, 1.5, atol=5e-6)


def test_block_convolutions_have_ones_only():
    # All of their taps are used, so the transform matters here.
    kernel = eoi.initializers.conv_orthogonal()(KEY, (3, 3, 4, 6), jnp.float32)
    assert (np.abs(kernel).max((2, 3)) > 0.01).sum() > 1
    np.testing.assert_allclose(spectrum.conv_singular_values(kernel, (6, 5)), 1, atol=5e-6)


@pytest.mark.parametrize("tap", [(0, 0), (1, 1), (2, 3)])
def test_one_tap_repeats_its_values_at_every_position(tap):
    kernel = np.zeros((3, 4, 3, 5), np.float32)
    kernel[tap] = normal(0, 3, 5)
    values = spectrum.conv_singular_values(kernel, (2, 3))
    np.testing.assert_allclose(values, np.repeat(svd(kernel[tap]), 6), rtol=2e-6)


def test_compiled_and_mapped_are_eager():
    kernels = normal(0, 2, 3, 3, 2, 3)

    def measure(kernel):
        return spectrum.conv_singular_values(kernel, (4, 5))

    each = np.stack([measure(kernel) for kernel in kernels])
    np.testing.assert_allclose(jax.vmap(measure)(kernels), each, atol=1e-5)
    np.testing.assert_allclose(jax.jit(measure)(kernels[0]), each[0], atol=1e-5)


def test_narrow_types_are_widened():
    kernel = jnp.asarray(normal(0, 3, 2, 3), jnp.bfloat16)
    values = spectrum.conv_singular_values(kernel, (4,))
    chex.assert_type(values, jnp.float32)
    expected = spectrum.conv_singular_values(kernel.astype(jnp.float32), (4,))
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_has_no_values(bad):
    kernel = normal(0, 3, 2, 4)
    kernel[0, 0, 0] = bad
    values = spectrum.conv_singular_values(kernel, (4,), feature_group_count=2)
    assert values.shape == (16,)
    assert np.isnan(values).all()


def test_no_channels_have_no_values_and_no_taps_have_zeros():
    chex.assert_shape(spectrum.conv_singular_values(np.ones((3, 0, 4)), (5,)), (0,))
    values = spectrum.conv_singular_values(np.ones((0, 2, 4)), (5,))
    np.testing.assert_array_equal(values, np.zeros(10))


K = np.ones((3, 3, 2, 4), np.float32)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda f: f(np.ones((2, 4)), ()), ["kernel.shape=(2, 4)"]),
        (lambda f: f(np.ones((1,) * 6), (1,) * 4), ["kernel.shape=(1, 1, 1, 1, 1, 1)"]),
        (lambda f: f(K * 1j, (4, 4)), ["kernel.dtype=complex"]),
        (lambda f: f(K, (4,)), ["spatial_shape=(4,)", "2"]),
        (lambda f: f(K, 4), ["spatial_shape=4"]),
        (lambda f: f(K, (4, 0)), ["spatial_shape=0"]),
        (lambda f: f(K, (4, 2.5)), ["spatial_shape=2.5"]),
        (lambda f: f(K, (4, 4), feature_group_count=0), ["feature_group_count=0"]),
        (
            lambda f: f(K, (4, 4), feature_group_count=3),
            ["feature_group_count=3", "kernel.shape[-1]=4"],
        ),
    ],
)
def test_what_has_no_spectrum_is_refused(call, named):
    with refuses(*named):
        call(spectrum.conv_singular_values)


# --- the kernels of a tree --------------------------------------------------------------------


def layout_of(**layouts):
    """Layouts by the first name of a path."""
    return lambda path, leaf: layouts.get(path[0].key, Layout())


def single(path, leaf):
    """No kernel is a stack, and none has groups: what a shape of three axes does not say."""
    return Layout()


def test_linear_kernels_are_their_matrices():
    params = {
        "a": {"kernel": normal(0, 6, 4), "bias": normal(1, 4)},
        "b": {"w": normal(2, 3, 5)},
        "scale": normal(3, 4, 4),
    }
    values = spectrum.kernel_singular_values(params)
    assert set(values) == {"a/kernel", "b/w"}
    np.testing.assert_allclose(values["a/kernel"], svd(params["a"]["kernel"]), rtol=2e-6)
    np.testing.assert_allclose(values["b/w"], svd(params["b"]["w"]), rtol=2e-6)
    every = spectrum.kernel_singular_values(params, where=lambda path, leaf: leaf.ndim == 2)
    assert set(every) == {"a/kernel", "b/w", "scale"}
    bare = spectrum.kernel_singular_values(params["scale"], where=lambda path, leaf: True)
    np.testing.assert_allclose(bare["(root)"], every["scale"])


def test_stacks_have_a_row_for_each_layer_and_groups_are_matrices_of_their_own():
    params = {
        "stack": {"kernel": normal(0, 3, 5, 4)},
        "deep": {"kernel": normal(1, 2, 3, 4, 6)},
        "groups": {"kernel": normal(2, 3, 8)},
    }
    layout = layout_of(stack=Layout(1), deep=Layout(2, groups=3), groups=Layout(groups=2))
    values = spectrum.kernel_singular_values(params, layout=layout)
    np.testing.assert_allclose(values["stack/kernel"], svd(params["stack"]["kernel"]), rtol=1e-5)
    blocks = np.moveaxis(params["deep"]["kernel"].reshape(2, 3, 4, 3, 2), -2, 2)
    expected = -np.sort(-svd(blocks).reshape(2, 3, 6), axis=-1)
    np.testing.assert_allclose(values["deep/kernel"], expected, rtol=1e-5)
    halves = np.split(params["groups"]["kernel"], 2, axis=1)
    np.testing.assert_allclose(values["groups/kernel"], descending(svd(halves)), rtol=1e-5)


def test_convolutions_are_measured_on_their_grid():
    params = {
        "plain": {"kernel": normal(0, 3, 3, 2, 4)},
        "stack": {"kernel": normal(1, 5, 3, 2, 2, 4)},
        "line": {"kernel": normal(2, 3, 2, 4)},
        "linear": {"kernel": normal(3, 4, 4)},
    }
    grids = {"plain": (4, 5), "stack": (3, 4), "line": (6,)}
    layout = layout_of(stack=Layout(1, groups=2))
    values = spectrum.kernel_singular_values(
        params, layout=layout, spatial_shape=lambda path, leaf: grids[path[0].key]
    )
    for name in ("plain", "line"):
        expected = spectrum.conv_singular_values(params[name]["kernel"], grids[name])
        np.testing.assert_allclose(values[f"{name}/kernel"], expected, atol=1e-5)
    rows = [
        spectrum.conv_singular_values(kernel, (3, 4), feature_group_count=2)
        for kernel in params["stack"]["kernel"]
    ]
    np.testing.assert_allclose(values["stack/kernel"], np.stack(rows), atol=1e-5)
    np.testing.assert_allclose(values["linear/kernel"], svd(params["linear"]["kernel"]), rtol=1e-5)
    alone = {name: params[name] for name in ("plain", "linear")}
    again = spectrum.kernel_singular_values(alone, spatial_shape=(4, 5))
    np.testing.assert_allclose(again["plain/kernel"], values["plain/kernel"], atol=1e-5)


def test_one_tap_needs_no_grid():
    taps = normal(0, 2, 4, 6)
    stack = np.zeros((2, 3, 3, 4, 6), np.float32)
    stack[0, 1, 1], stack[1, 2, 0] = taps  # each layer has its own tap
    params = {
        "stack": {"kernel": stack},
        "point": {"kernel": normal(1, 1, 1, 4, 6)},
        "zeros": {"kernel": np.zeros((3, 3, 4, 6), np.float32)},
    }
    values = spectrum.kernel_singular_values(params, layout=layout_of(stack=Layout(1)))
    np.testing.assert_allclose(values["stack/kernel"], svd(taps), rtol=1e-5)
    np.testing.assert_allclose(values["point/kernel"], svd(params["point"]["kernel"][0, 0]), 1e-5)
    np.testing.assert_array_equal(values["zeros/kernel"], np.zeros(4))
    on_grid = spectrum.conv_singular_values(stack[0], (3, 2))
    np.testing.assert_allclose(np.repeat(values["stack/kernel"][0], 6), on_grid, rtol=1e-5)


def test_a_function_may_leave_out_the_grid_of_one_tap():
    params = {"a": {"kernel": normal(0, 1, 2, 3)}, "b": {"kernel": normal(1, 3, 2, 3)}}
    values = spectrum.kernel_singular_values(
        params,
        layout=single,
        spatial_shape=lambda path, leaf: (5,) if path[0].key == "b" else None,
    )
    chex.assert_shape(values["a/kernel"], (2,))
    chex.assert_shape(values["b/kernel"], (10,))


@pytest.mark.slow
def test_a_start_of_a_whole_network_is_isometric():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3,), feature_group_count=2, kernel_init=conv)(x)
            return nn.Dense(10, kernel_init=eoi.dense(0.4))(x.reshape(-1))

    conv = eoi.conv(0.4, feature_group_count=2)
    params = Network().init(KEY, jnp.ones((4, 4)))["params"]
    layout = layout_of(Conv_0=Layout(groups=2))
    for spatial_shape in (None, (4,)):
        found = spectrum.kernel_singular_values(params, layout=layout, spatial_shape=spatial_shape)
        assert set(found) == {"Conv_0/kernel", "Dense_0/kernel"}
        for name, values in found.items():
            np.testing.assert_allclose(values, 1, atol=5e-6, err_msg=name)


def test_states_of_nnx_are_trees():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    [values] = spectrum.kernel_singular_values(nnx.state(model, nnx.Param)).values()
    np.testing.assert_allclose(values, svd(model.kernel[...]), rtol=1e-5)


def test_a_tree_is_measured_in_compiled_code():
    params = {"conv": {"kernel": normal(0, 3, 2, 4)}, "dense": {"kernel": normal(1, 4, 4)}}

    def measure(params):
        return spectrum.kernel_singular_values(params, layout=single, spatial_shape=(5,))

    chex.assert_trees_all_close(jax.jit(measure)(params), measure(params), atol=1e-5)


def test_no_implicit_promotion():
    params = {"conv": {"kernel": jnp.ones((3, 2, 4), jnp.bfloat16)}, "w": jnp.ones((4, 4))}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        spectrum.kernel_singular_values(params, layout=single, spatial_shape=(2,))


def test_only_the_layer_that_is_not_finite_has_no_values():
    stack = normal(0, 3, 4, 4)
    stack[1, 2, 3] = np.nan
    [values] = spectrum.kernel_singular_values(
        {"kernel": stack}, layout=lambda path, leaf: Layout(1)
    ).values()
    assert np.isnan(values[1]).all()
    np.testing.assert_allclose(values[jnp.array([0, 2])], svd(stack[[0, 2]]), rtol=1e-5)


def test_empty_kernels_have_no_values():
    values = spectrum.kernel_singular_values(
        {"a": {"kernel": np.zeros((0, 3))}, "b": {"kernel": np.zeros((2, 0, 3))}},
        layout=layout_of(b=Layout(1)),
    )
    chex.assert_shape(values["a/kernel"], (0,))
    chex.assert_shape(values["b/kernel"], (2, 0))


CONV = {"block": {"kernel": normal(0, 3, 3, 2, 4)}}
TWO_TAPS = np.zeros((2, 3, 2, 4), np.float32)
TWO_TAPS[0, 1, 0, 0] = TWO_TAPS[1, :2, 1, 1] = 1  # layers of one tap and of two


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda f: f(CONV), ["params[block/kernel]", "9 taps", "spatial_shape="]),
        (
            lambda f: f({"w": TWO_TAPS}, layout=lambda path, leaf: Layout(1)),
            ["params[w]", "2 taps"],
        ),
        (lambda f: jax.jit(f)(CONV), ["params[block/kernel]", "traced", "spatial_shape="]),
        (lambda f: f(CONV, spatial_shape=(4,)), ["spatial_shape for block/kernel=(4,)", "2"]),
        (lambda f: f(CONV, layout=lambda p, x: Layout(groups=3)), ["layout(block/kernel).groups"]),
        (lambda f: f({"bias": np.ones(3)}), ["params=['bias']", "where="]),
        (
            lambda f: f({"z": np.ones((2, 2)) * 1j}, where=lambda path, leaf: True),
            ["params[z]", "complex"],
        ),
    ],
)
def test_trees_that_cannot_be_measured_are_refused(call, named):
    with refuses(*named):
        call(spectrum.kernel_singular_values)
