"""Laws of approximated isometry; the oracles are float64 NumPy descents and matchings."""

import functools
from itertools import permutations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gram_error, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eoi_jax import networks
from eoi_jax.isometry import approximate_isometry, structural_rank

OBJECTIVES = ["frobenius", "log_det"]


def problem(seed: int, shape: tuple[int, ...], density: float):
    """A start of float32 numbers and a mask with an exact count; all columns and rows in use."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    mask.flat[rng.permutation(mask.size)[: round(density * mask.size)]] = True
    columns = shape[-1]
    scale = np.sqrt(max(columns, mask.size // columns))
    return (rng.normal(size=shape) / scale).astype(np.float32), mask


def singular_values(kernel) -> np.ndarray:
    """Singular values of the last two axes, in float64."""
    return np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)


# --- oracles ----------------------------------------------------------------------------------


def frobenius_loss(w: np.ndarray, scale: float) -> float:
    """The published loss of one matrix, as it stands there."""
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return np.linalg.norm(gram - scale**2 * np.eye(len(gram)))


def frobenius_gradient(w: np.ndarray, scale: float) -> np.ndarray:
    if w.shape[0] > w.shape[1]:
        return frobenius_gradient(w.T, scale).T
    error = w @ w.T - scale**2 * np.eye(len(w))
    return 2 * error @ w / np.linalg.norm(error)


def frobenius_descent(w, mask, scale, num_steps, rate=0.1):
    w = np.where(mask, w, 0.0).astype(np.float64)
    for _ in range(num_steps):
        w = w - rate * mask * frobenius_gradient(w, scale)
    return w


def log_det_loss(v: np.ndarray, epsilon: float) -> float:
    gram = v @ v.T
    _, log_det = np.linalg.slogdet(gram + epsilon * np.eye(len(v)))
    return np.trace(gram) - (1 + epsilon) * log_det


def log_det_gradient(v: np.ndarray, epsilon: float) -> np.ndarray:
    return 2 * v - 2 * (1 + epsilon) * np.linalg.inv(v @ v.T + epsilon * np.eye(len(v))) @ v


def log_det_descent(v, mask, num_steps, rate=0.05, decay=0.9):
    """Adam with a step that falls with the root of the error and linearly in time."""
    v = np.where(mask, v, 0.0).astype(np.float64)
    v *= np.sqrt(len(v) / np.sum(v**2))
    mean, square = np.zeros_like(v), np.zeros_like(v)
    for step in range(num_steps):
        gradient = mask * log_det_gradient(v, 10 ** (-10 + 6 * step / num_steps))
        mean = decay * mean + (1 - decay) * gradient
        square = decay * square + (1 - decay) * gradient**2
        correction = 1 - decay ** (step + 1)
        update = (mean / correction) / (np.sqrt(square / correction) + 1e-8)
        error = np.abs(v @ v.T - np.eye(len(v))).max()
        size = rate * np.sqrt(len(v) / mask.sum()) * np.sqrt(min(error, 1))
        v = v - size * (1 - step / num_steps) * update
    return v


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_the_oracles_gradients_are_the_difference_quotients_of_their_losses(shape):
    w, step = np.random.default_rng(0).normal(size=shape), 1e-6
    pairs = [(lambda w: frobenius_loss(w, 1.3), frobenius_gradient(w, 1.3))]
    if shape[0] <= shape[1]:
        pairs.append((lambda w: log_det_loss(w, 0.1), log_det_gradient(w, 0.1)))
    for loss, gradient in pairs:
        for index in np.ndindex(shape):
            shift = np.zeros(shape)
            shift[index] = step
            quotient = (loss(w + shift) - loss(w - shift)) / (2 * step)
            np.testing.assert_allclose(gradient[index], quotient, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_frobenius_is_the_published_descent(x64, shape, scale):
    w, mask = problem(1, shape, 0.6)
    found = approximate_isometry(w.astype(np.float64), mask, scale=scale, num_steps=50)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, frobenius_descent(w, mask, scale, 50), rtol=1e-8, atol=1e-12)


def test_log_det_is_adam_on_the_stated_loss(x64):
    w, mask = problem(2, (6, 9), 0.6)
    options = {"objective": "log_det", "num_steps": 30, "tolerance": 1e-12}
    found = approximate_isometry(w.astype(np.float64), mask, **options)
    np.testing.assert_allclose(found, log_det_descent(w, mask, 30), rtol=1e-6, atol=1e-9)
    tall = approximate_isometry(w.T.astype(np.float64), mask.T, scale=3.0, **options)
    np.testing.assert_allclose(tall, 3.0 * found.T, rtol=1e-6, atol=1e-9)


def test_the_learning_rate_is_that_of_the_loss(x64):
    w, mask = problem(3, (6, 9), 0.6)
    found = approximate_isometry(w.astype(np.float64), mask, learning_rate=0.02, num_steps=20)
    np.testing.assert_allclose(found, frobenius_descent(w, mask, 1.0, 20, rate=0.02), atol=1e-12)


# --- where it ends ----------------------------------------------------------------------------


def stack_of_problems(num: int, shape: tuple[int, int], density: float):
    kernels, masks = zip(*(problem(seed, shape, density) for seed in range(num)), strict=True)
    return np.stack(kernels), np.stack(masks)


@pytest.mark.slow
def test_frobenius_stalls_where_the_mask_is_sparse():
    kernels, masks = stack_of_problems(6, (48, 48), 0.12)
    ranks = structural_rank(masks, batch_axes=1)
    assert np.sum(ranks == 48) >= 4
    values = singular_values(approximate_isometry(kernels, masks, batch_axes=1))
    assert (values[:, -1] < 1e-6).all()
    assert (values.mean(axis=1) < 0.995).all()


@pytest.mark.slow
def test_log_det_reaches_the_structural_rank_where_frobenius_does_not():
    kernels, masks = stack_of_problems(8, (24, 24), 0.15)
    ranks = structural_rank(masks, batch_axes=1)
    assert set(ranks) == {22, 23, 24}
    stalled = singular_values(approximate_isometry(kernels, masks, batch_axes=1, num_steps=5000))
    assert np.sum(np.sum(stalled > 1e-6, axis=1) < ranks) >= 6

    found = approximate_isometry(kernels, masks, objective="log_det", num_steps=600, batch_axes=1)
    for values, rank in zip(singular_values(found), ranks, strict=True):
        np.testing.assert_allclose(values[:rank], 1.0, atol=1e-3)
        np.testing.assert_allclose(values[rank:], 0.0, atol=1e-6)
    # The price of so sparse a mask: most of its weights go to zero.
    assert np.mean(np.abs(np.asarray(found)[masks]) < 1e-3) > 0.5


@pytest.mark.slow
def test_frobenius_nears_isometry_where_the_mask_is_half_full():
    kernel, mask = problem(0, (100, 100), 0.5)
    values = singular_values(approximate_isometry(kernel, mask))
    np.testing.assert_allclose(values, 1.0, atol=0.05)
    assert not np.allclose(values, 1.0, atol=1e-3), "its steps do not shrink"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rank_is_bounded_by_the_mask(objective):
    """A mask that misses 3 ranks: 2 empty rows, and 2 rows whose only column is the same."""
    kernel, mask = problem(4, (24, 24), 0.5)
    mask[:2] = False
    mask[2:4] = np.arange(24) == 7
    rank = structural_rank(mask)
    assert rank == 21
    values = singular_values(approximate_isometry(kernel, mask, objective=objective))
    assert np.sum(values < 1e-5) >= 24 - rank
    if objective == "log_det":
        np.testing.assert_allclose(values[:rank], 1.0, atol=1e-3)


def test_log_det_finds_the_only_isometries_of_a_triangle():
    kernel, _ = problem(5, (8, 8), 1.0)
    found = approximate_isometry(kernel, np.tri(8, dtype=bool), objective="log_det")
    np.testing.assert_allclose(np.abs(found), np.eye(8), atol=1e-4)


@pytest.mark.slow
def test_log_det_stops_at_its_tolerance(x64):
    kernel, mask = problem(6, (20, 30), 0.5)
    kernel = kernel.astype(np.float64)
    errors = []
    for tolerance in (1e-2, 1e-4, 1e-8):
        found = approximate_isometry(kernel, mask, objective="log_det", tolerance=tolerance)
        errors.append(np.abs(np.asarray(found @ found.T) - np.eye(20)).max())
        assert errors[-1] <= tolerance
    assert errors[0] > 1e-4 > errors[1] > 1e-8, "no step is taken that is not needed"


def test_log_det_bears_starts_of_any_size():
    kernel, mask = problem(7, (12, 30), 0.5)
    for size in (1e-6, 1.0, 1e6):
        found = approximate_isometry(size * kernel, mask, objective="log_det")
        np.testing.assert_allclose(singular_values(found), 1.0, atol=1e-4)


# --- fixed points -----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exact_isometry_stays(objective):
    identity, permutation = np.eye(8, dtype=np.float32), np.eye(8, dtype=np.float32)[::-1]
    for kernel, mask in [
        (identity, np.ones((8, 8), bool)),
        (permutation, permutation != 0),
        (2 * permutation, np.ones((8, 8), bool)),
    ]:
        with jax.debug_nans(True):
            found = approximate_isometry(
                kernel, mask, objective=objective, scale=kernel.max(), num_steps=5
            )
        np.testing.assert_array_equal(found, kernel)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_stays_zero(objective):
    zero = np.zeros((8, 8), np.float32)
    with jax.debug_nans(True):
        for mask in (zero == 0, zero != 0):
            found = approximate_isometry(zero, mask, objective=objective, num_steps=5)
            np.testing.assert_array_equal(found, zero)
        kernel, _ = problem(8, (8, 8), 1.0)
        found = approximate_isometry(kernel, zero != 0, objective=objective, num_steps=5)
        np.testing.assert_array_equal(found, zero)


# --- shapes, stacks, dtypes, transformations --------------------------------------------------

SHAPES = [
    ((5, 8), -1, 0),
    ((3, 3, 2, 4), -1, 0),
    ((2, 3, 4, 5), 2, 1),
    ((0, 4), -1, 0),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("shape", "column_axis", "batch_axes"), SHAPES)
def test_values_off_the_mask_are_zero_and_ignored(shape, column_axis, batch_axes, objective):
    kernel, mask = problem(9, shape, 0.7)
    options = {"column_axis": column_axis, "batch_axes": batch_axes, "objective": objective}
    found = approximate_isometry(kernel, mask, num_steps=20, scale=0.7, **options)
    chex.assert_shape(found, shape)
    assert found.dtype == jnp.float32
    assert not np.asarray(found)[~mask].any()
    assert not np.allclose(found, np.where(mask, kernel, 0)) or kernel.size == 0, "it moves"
    other = np.where(mask, kernel, 7.0)
    again = approximate_isometry(other, mask, num_steps=20, scale=0.7, **options)
    np.testing.assert_array_equal(found, again)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_kernel_is_its_columns_by_all_other_axes(objective):
    kernel, mask = problem(10, (3, 2, 4, 5), 0.6)
    options = {"objective": objective, "num_steps": 20}
    found = approximate_isometry(kernel, mask, **options)
    flat = approximate_isometry(kernel.reshape(24, 5), mask.reshape(24, 5), **options)
    np.testing.assert_allclose(found, flat.reshape(kernel.shape), atol=1e-5)
    moved = approximate_isometry(
        np.moveaxis(kernel, -1, 1), np.moveaxis(mask, -1, 1), column_axis=1, **options
    )
    np.testing.assert_allclose(moved, np.moveaxis(np.asarray(found), -1, 1), atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stack_is_its_layers(x64, objective):
    kernels, masks = problem(11, (2, 3, 8, 8), 0.7)
    kernels = kernels.astype(np.float64)
    # One layer is done before it starts, one can never be; the others stop in between.
    kernels[0, 0], masks[0, 1, 0] = np.eye(8), False
    masks[0, 0] |= np.eye(8, dtype=bool)
    kernels[0, 0][~np.eye(8, dtype=bool)] = 0
    options = {"objective": objective, "num_steps": 200}
    if objective == "log_det":
        options["tolerance"] = 0.05
    stack = approximate_isometry(kernels, masks, batch_axes=2, **options)
    for index in np.ndindex(2, 3):
        alone = approximate_isometry(kernels[index], masks[index], **options)
        np.testing.assert_allclose(stack[index], alone, atol=1e-8)
    np.testing.assert_array_equal(stack[0, 0], np.eye(8))
    if objective == "log_det":
        done = (
            np.abs(np.matmul(stack, np.swapaxes(stack, -1, -2)) - np.eye(8)).max((-1, -2)) <= 0.05
        )
        assert done.sum() == 5, "all but the impossible one stop by themselves"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_jit_and_vmap_change_nothing(objective):
    kernels, masks = problem(12, (3, 6, 9), 0.7)

    def function(kernel, mask, scale):
        return approximate_isometry(kernel, mask, scale=scale, objective=objective, num_steps=20)

    loop = np.stack([function(k, m, 1.5) for k, m in zip(kernels, masks, strict=True)])
    jitted = jax.jit(function)(kernels[0], masks[0], 1.5)
    np.testing.assert_allclose(jitted, loop[0], atol=1e-6)
    mapped = jax.jit(jax.vmap(function, (0, 0, None)))(kernels, masks, 1.5)
    np.testing.assert_allclose(mapped, loop, atol=1e-5)
    scales = jax.vmap(function, (None, None, 0))(kernels[0], masks[0], jnp.array([1.5, 3.0]))
    np.testing.assert_allclose(scales[0], loop[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_narrow_kernels_are_computed_in_float32_and_cast_last(objective, dtype):
    kernel, mask = problem(13, (6, 9), 0.7)
    narrow = jnp.asarray(kernel, dtype)
    options = {"objective": objective, "num_steps": 20, "scale": 1.5}
    found = approximate_isometry(narrow, mask, **options)
    assert found.dtype == dtype
    single = approximate_isometry(narrow.astype(jnp.float32), mask, **options)
    chex.assert_trees_all_equal(found, single.astype(dtype))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_implicit_promotion(objective):
    kernel, mask = problem(14, (6, 9), 0.7)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        approximate_isometry(kernel, mask, objective=objective, scale=2.0, num_steps=3)


# --- structural rank --------------------------------------------------------------------------


@settings(max_examples=60)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 5), st.integers(1, 5))))
def test_structural_rank_is_the_best_matching_and_the_generic_rank(mask):
    as_rows = mask if mask.shape[0] <= mask.shape[1] else mask.T
    rows = range(len(as_rows))
    best = max(
        sum(bool(as_rows[i, columns[i]]) for i in rows)
        for columns in permutations(range(as_rows.shape[1]), len(as_rows))
    )
    assert structural_rank(mask) == best
    values = np.where(mask, np.random.default_rng(0).normal(size=mask.shape), 0.0)
    assert np.linalg.matrix_rank(values) == best


def test_structural_rank_of_known_masks():
    assert structural_rank(np.eye(7, 9, dtype=bool)) == 7
    assert structural_rank(np.tri(6, k=-1, dtype=bool)) == 5
    assert structural_rank(np.ones((3, 3, 2, 4), bool)) == 4
    assert structural_rank(jnp.zeros((4, 3), bool)) == 0
    assert structural_rank(np.zeros((0, 3), bool)) == 0
    # One row of a (2·3) × 5 matrix, or one column of a 5 × (2·3) one: the axis decides.
    mask = np.zeros((2, 5, 3), bool)
    mask[1, :, 2] = True
    assert structural_rank(mask, column_axis=1) == 1
    mask[0, 3] = True
    assert structural_rank(mask, column_axis=1) == structural_rank(np.moveaxis(mask, 1, 2)) == 2


def test_structural_rank_of_a_stack_is_that_of_its_layers():
    masks = np.stack([np.tri(4, k=-k, dtype=bool) for k in range(4)]).reshape(2, 2, 4, 4)
    ranks = structural_rank(masks, batch_axes=2)
    np.testing.assert_array_equal(ranks, [[4, 3], [2, 1]])
    assert structural_rank(masks[:0], batch_axes=1, column_axis=2).shape == (0,)


# --- errors -----------------------------------------------------------------------------------

KERNEL, MASK = np.ones((4, 6), np.float32), np.ones((4, 6), bool)
WITH_NAN = np.where(np.arange(6) == 2, np.nan, KERNEL)
BAD_CALLS = [
    ((KERNEL, MASK[:3]), {}, ["mask", "(3, 6)", "(4, 6)"]),
    ((KERNEL, True), {}, ["mask", "()", "(4, 6)"]),
    ((KERNEL, KERNEL), {}, ["mask", "float32"]),
    ((KERNEL.astype(int), MASK), {}, ["kernel.dtype='int"]),
    ((KERNEL.astype(np.complex64), MASK), {}, ["kernel.dtype='complex64'"]),
    ((WITH_NAN, MASK), {}, ["kernel", "4 of 24"]),
    ((KERNEL[0], MASK[0]), {}, ["kernel.shape=(6,)"]),
    ((KERNEL, MASK), {"batch_axes": 1}, ["kernel.shape=(4, 6)"]),
    ((KERNEL, MASK), {"batch_axes": -1}, ["batch_axes=-1"]),
    ((KERNEL, MASK), {"column_axis": 2}, ["column_axis=2", "[-2, 1]"]),
    ((KERNEL[None], MASK[None]), {"batch_axes": 1, "column_axis": 0}, ["column_axis=0", "[1, 2]"]),
    ((KERNEL, MASK), {"scale": 0.0}, ["scale=0.0", "(0, inf)"]),
    ((KERNEL, MASK), {"scale": -1.0}, ["scale=-1.0", "(0, inf)"]),
    ((KERNEL, MASK), {"scale": np.inf}, ["scale=inf"]),
    ((KERNEL, MASK), {"objective": "l2"}, ["objective='l2'", "'frobenius'", "'log_det'"]),
    ((KERNEL, MASK), {"num_steps": 0}, ["num_steps=0"]),
    ((KERNEL, MASK), {"num_steps": 1.5}, ["num_steps=1.5"]),
    ((KERNEL, MASK), {"learning_rate": 0}, ["learning_rate=0.0"]),
    ((KERNEL, MASK), {"tolerance": 1e-3}, ["tolerance=0.001", "'frobenius'", "'log_det'"]),
    ((KERNEL, MASK), {"tolerance": -1.0, "objective": "log_det"}, ["tolerance=-1.0", "(0, inf)"]),
]


@pytest.mark.parametrize(("arguments", "options", "named"), BAD_CALLS)
def test_errors_name_the_argument_its_value_and_the_range(arguments, options, named):
    with refuses(*named):
        approximate_isometry(*arguments, **options)


def test_structural_rank_refuses_what_it_cannot_read():
    with refuses("mask", "float32"):
        structural_rank(KERNEL)
    with refuses("mask="):
        jax.jit(structural_rank)(MASK)
    with refuses("mask.shape=(6,)"):
        structural_rank(MASK[0])


def test_static_values_are_checked_while_tracing_and_traced_ones_left_alone():
    with refuses("scale=-1.0"):
        jax.jit(lambda k: approximate_isometry(k, MASK, scale=-1.0))(KERNEL)
    mask = np.arange(24).reshape(4, 6) % 5 != 0
    traced = jax.jit(lambda k: approximate_isometry(k, mask, num_steps=2))(WITH_NAN)
    assert np.isnan(traced).any(), "what cannot be checked is not hidden"
    assert not np.asarray(traced)[~mask].any()


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "rate"), [("frobenius", 3.0), ("log_det", 1e4)])
def test_a_descent_that_diverges_is_no_result(objective, rate):
    start = jax.random.normal(jax.random.key(3), (2, 8, 8)) / 8**0.5
    mask = jnp.ones(start.shape, bool)
    options = {"objective": objective, "num_steps": 40, "batch_axes": 1}
    descend = functools.partial(approximate_isometry, **options)
    with refuses(f"learning_rate={rate}", "2 of 2 layers", error=FloatingPointError):
        descend(start, mask, learning_rate=rate)
    traced = jax.jit(descend)(start, mask, learning_rate=rate)
    assert np.isnan(traced).all()
    # One layer that diverges leaves the others as they are.
    lone = jax.jit(descend)(start.at[1].multiply(1e18), mask)
    np.testing.assert_allclose(lone[0], descend(start, mask)[0], atol=1e-5)
    assert np.isnan(lone[1]).all()
    with refuses("params[kernel]", f"learning_rate={rate}", error=FloatingPointError):
        networks.approximate_isometry(
            {"kernel": start[0]},
            {"kernel": mask[0]},
            objective=objective,
            learning_rate=rate,
            num_steps=40,
        )


@pytest.mark.parametrize("objective", ["frobenius", "log_det"])
def test_a_start_that_is_isometric_does_not_count_as_diverging(objective):
    """The steps of a norm's gradient leave a norm of their own size, above that of the start."""
    start = jnp.eye(8)
    for rate in (0.01, 0.1, 0.5):
        found = approximate_isometry(
            start, jnp.ones((8, 8), bool), objective=objective, learning_rate=rate, num_steps=31
        )
        assert gram_error(found) < 4 * rate * (1 + rate)


def test_a_scale_far_from_the_kernel_is_refused():
    with refuses("scale=1e-25", "kernel"):
        approximate_isometry(jnp.eye(4), jnp.ones((4, 4), bool), scale=1e-25)
