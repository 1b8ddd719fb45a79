"""Block-sparse matrices: exactly orthogonal, balanced, and equal to their dense selves in use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gram_error, refuses
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

import eoi_jax as eoi
from eoi_jax import blocks, spectrum
from eoi_jax._internal.haar import haar_by_reflections

KEY = jax.random.key(17)
# Shape, density, block size, and the blocks in each row of blocks and each column of blocks.
BALANCED = {
    "square": ((16, 16), 1 / 2, 4, 2, 2),
    "of three": ((24, 24), 1 / 2, 4, 3, 3),
    "of four": ((16, 16), 1 / 2, 2, 4, 4),
    "one block": ((12, 12), 1 / 4, 3, 1, 1),
    "wide": ((16, 32), 1 / 2, 4, 4, 2),
    "tall": ((32, 16), 1 / 2, 4, 2, 4),
}


def draw(name, key):
    shape, density, size, *_ = BALANCED[name]
    return blocks.orthogonal(key, shape, density, block_size=size)


def tiles(matrix, size):
    """A dense matrix by its blocks: (inputs / b, outputs / b, b, b)."""
    inputs, outputs = matrix.shape
    shaped = np.asarray(matrix).reshape(inputs // size, size, outputs // size, size)
    return shaped.transpose(0, 2, 1, 3)


def ragged():
    """A matrix with a row of blocks and a column of blocks without any, and the others uneven."""
    pattern = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]], bool)
    mask = np.kron(pattern, np.ones((2, 2), bool))
    return blocks.from_dense(jnp.where(mask, jax.random.normal(KEY, mask.shape), 0), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", BALANCED)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_draw_is_orthogonal_and_every_row_and_column_has_as_many_blocks(name, seed):
    (shape, density, size, in_row, in_column), w = BALANCED[name], draw(name, jax.random.key(seed))
    dense = np.asarray(w.to_dense())
    # The largest error of 2400 draws was 1.8e-6, of their blocks 2.1e-6.
    assert gram_error(dense) < 4e-6
    assert w.shape == dense.shape == shape
    kept = (tiles(dense, size) != 0).any((2, 3))
    assert (kept.sum(1) == in_row).all()
    assert (kept.sum(0) == in_column).all()
    assert w.density == kept.mean() == density
    # Each block is orthogonal up to a factor.
    found = tiles(dense, size)[kept]
    grams = found @ found.swapaxes(1, 2)
    factors = grams[:, :1, :1]
    np.testing.assert_allclose(grams, factors * np.eye(size), atol=4e-6)


@pytest.mark.slow
def test_a_draw_of_float64_is_orthogonal_to_its_rounding(x64):
    for shape in ((24, 24), (24, 48)):
        w = blocks.orthogonal(KEY, shape, 1 / 2, block_size=4, scale=3.0, dtype=jnp.float64)
        assert gram_error(w.to_dense(), 3.0) < 1e-14


@pytest.mark.slow
def test_a_density_between_gives_some_rows_and_columns_one_block_more():
    w = blocks.orthogonal(KEY, (20, 20), 1 / 2, block_size=2)  # 5 of 10 blocks: divides 10
    assert w.values.shape == (2, 5, 2, 10)  # five rows have met
    w = blocks.orthogonal(KEY, (20, 20), 0.25, block_size=2)  # 2.5 blocks
    assert w.values.shape == (10, 3, 2, 2)
    kept = (tiles(w.to_dense(), 2) != 0).any((2, 3))
    for counts in (kept.sum(0), kept.sum(1)):
        assert set(counts.tolist()) == {2, 3}
    assert gram_error(w.to_dense()) < 2e-6
    assert w.density == kept.mean() == pytest.approx(0.25, abs=0.025)
    assert (np.asarray(w.mask()) == (np.asarray(w.to_dense()) != 0)).all()


@pytest.mark.parametrize("density", np.linspace(1 / 16, 1, 9).tolist())
@pytest.mark.parametrize("sides", [(16, 16), (48, 16), (17, 17)])
def test_a_plan_covers_the_matrix_and_is_near_to_the_density(sides, density):
    rows, columns = sides
    parts = blocks.drawing._plan(rows, columns, density)
    assert (sum(p.rows for p in parts), sum(p.columns for p in parts)) == sides
    assert all(p.rows % p.per_row == 0 == p.columns % p.per_row for p in parts)
    assert all(p.rows >= p.columns for p in parts)
    reached = sum(p.rows * p.per_row for p in parts) / (rows * columns)
    assert abs(reached - density) <= 0.1 * density


@pytest.mark.slow
def test_patterns_differ_from_key_to_key_and_reach_every_place():
    drawn = jax.vmap(lambda key: draw("square", key))(jax.random.split(KEY, 200))
    masks = np.asarray(drawn.mask())[:, ::4, ::4]
    # Each of the 16 blocks is kept in half of the draws: 5 standard errors.
    np.testing.assert_allclose(masks.mean(0), 0.5, atol=5 * 0.5 / np.sqrt(200))
    # The first two rows share two columns of four, the other two the others.
    assert len({mask.tobytes() for mask in masks}) == 6


@pytest.mark.slow
def test_a_narrow_draw_is_the_wide_one_rounded():
    narrow = blocks.orthogonal(KEY, (16, 16), 1 / 2, block_size=4, dtype=jnp.bfloat16)
    wide = draw("square", KEY)
    assert narrow.dtype == jnp.bfloat16
    assert (narrow.to_dense() == wide.to_dense().astype(jnp.bfloat16)).all()
    assert (narrow.rows == wide.rows).all()


@pytest.mark.slow
@pytest.mark.parametrize("w", [draw("wide", KEY), ragged()], ids=["drawn", "ragged"])
def test_ways_to_dense_and_back_lose_nothing(w):
    dense = np.asarray(w.to_dense())
    np.testing.assert_array_equal(w.T.to_dense(), dense.T)
    np.testing.assert_array_equal(w.mask(), dense != 0)
    assert w.T.shape == dense.T.shape
    assert w.T.density == w.density == (dense != 0).mean()
    for other in (w.T.T, blocks.from_dense(w.to_dense(), w.block_shape)):
        jax.tree.map(np.testing.assert_array_equal, other, w)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), w, w)
    assert stack.shape == (2, *dense.shape)
    assert stack.density == w.density
    np.testing.assert_array_equal(stack.to_dense(), [dense, dense])
    np.testing.assert_array_equal(stack.T.to_dense(), [dense.T, dense.T])
    assert float(jax.jit(lambda w: w.density)(w)) == pytest.approx(w.density)


@pytest.mark.slow
def test_a_mask_keeps_blocks_of_zeros():
    w = blocks.from_dense(jnp.zeros((2, 4), jnp.float16), 2, mask=np.ones((2, 4), bool))
    assert (w.density, w.dtype, w.values.shape) == (1.0, jnp.float16, (2, 1, 2, 2))
    assert np.asarray(w.mask()).all()


@pytest.mark.slow
def test_rows_that_met_are_stored_as_one_block():
    shapes = {name: draw(name, KEY).values.shape for name in BALANCED}
    assert shapes == {
        "square": (2, 2, 4, 8),
        "of three": (2, 3, 4, 12),
        "of four": (4, 4, 2, 4),
        "one block": (4, 1, 3, 3),
        "wide": (4, 2, 4, 8),
        "tall": (4, 2, 8, 4),
    }


@pytest.mark.slow
def test_blocks_of_unequal_sides():
    dense = jnp.zeros((4, 6)).at[0, 1].set(2.0).at[3, 4].set(3.0).at[1, 5].set(4.0)
    w = blocks.from_dense(dense, (2, 3))
    assert (w.values.shape, w.shape, w.block_shape, w.density) == (
        (2, 2, 2, 3),
        (4, 6),
        (2, 3),
        0.75,
    )
    np.testing.assert_array_equal(w.to_dense(), dense)
    np.testing.assert_array_equal(w.T.to_dense(), dense.T)
    assert w.T.block_shape == (3, 2)


def test_matrices_that_blocks_cannot_store_are_refused():
    eye = jnp.eye(4)
    for bad, named in (
        (lambda: blocks.from_dense(eye, 3), "block_size=3"),
        (lambda: blocks.from_dense(eye, 0), "block_size=0"),
        (lambda: blocks.from_dense(eye, 2.0), "block_size=2.0"),
        (lambda: blocks.from_dense(eye, (2, 3)), "block_size=3"),
        (lambda: blocks.from_dense(eye, (2, 2, 1)), "block_size=(2, 2, 1)"),
        (lambda: blocks.from_dense(jnp.ones((2, 4, 4)), 2), "shape=(2, 4, 4)"),
        (lambda: blocks.from_dense(jnp.eye(4, dtype=int), 2), "matrix.dtype='int32'"),
        (lambda: blocks.from_dense(eye * 1j, 2), "matrix.dtype='complex64'"),
        (lambda: blocks.from_dense(0 * eye, 2), "matrix has no block"),
        (lambda: blocks.from_dense(eye, 2, eye[:2] > 0), "mask.shape=(2, 4)"),
        (lambda: blocks.from_dense(eye, 2, eye > 0), "[0:2, 0:2]"),
        (lambda: blocks.from_dense(eye, 2, jnp.ones((4, 4)).at[2:, 2:].set(0) > 0), "[2:4, 2:4]"),
        (lambda: jax.jit(lambda m: blocks.from_dense(m, 2))(eye), "matrix or mask is traced"),
    ):
        with refuses(named):
            bad()


def products(w, x):
    """The product, and gradients of a function of it by x and by the values."""

    def loss(x, values):
        y = x @ dataclasses.replace(w, values=values)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    (dx, dw), y = jax.grad(loss, (0, 1), has_aux=True)(x, w.values)
    return y, dx, dataclasses.replace(w, values=dw).to_dense()


def dense_products(w, x):
    dense, mask = np.asarray(w.to_dense(), np.float64), np.asarray(w.mask())
    x = np.asarray(x, np.float64)
    y = x @ dense
    dy = np.cos(np.arange(y.size).reshape(y.shape))
    dw = x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1]) * mask
    return y, dy @ dense.T, dw


def between():
    return blocks.orthogonal(KEY, (20, 20), 0.25, block_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("w", [draw("wide", KEY), ragged(), between()], ids=["wide", "rag", "+1"])
def test_products_and_gradients_are_those_of_the_dense_matrix(w):
    x = jax.random.normal(jax.random.key(1), (3, 2, w.shape[0]))
    for found, expected in zip(jax.jit(products)(w, x), dense_products(w, x), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(x[0, 0] @ w, (x @ w)[0, 0], atol=1e-6)
    np.testing.assert_allclose(np.asarray(x) @ w, x @ w, atol=1e-6)
    assert (x[:, :0] @ w).shape == (3, 0, w.shape[1])


@pytest.mark.slow
def test_second_derivatives():
    w = ragged()
    x = jax.random.normal(jax.random.key(1), (3, w.shape[0]))

    def product(x, values):
        return x @ dataclasses.replace(w, values=values)

    check_grads(product, (x, w.values), order=2, modes=["rev"], atol=1e-2, rtol=1e-2)

    def loss(values):
        return (jnp.sin(product(x, values)) ** 2).sum()

    # Hessian-vector products, forward over reverse and reverse over reverse.
    _, forward = jax.jvp(jax.grad(loss), (w.values,), (w.values,))
    _, pull = jax.vjp(jax.grad(loss), w.values)
    np.testing.assert_allclose(forward, pull(w.values)[0], atol=1e-4)


@pytest.mark.slow
def test_vmap_over_inputs_and_over_matrices():
    stack = jax.vmap(lambda key: draw("wide", key))(jax.random.split(KEY, 3))
    x = jax.random.normal(jax.random.key(1), (3, 2, 16))

    def at(index, tree):
        return jax.tree.map(lambda leaf: leaf[index], tree)

    for arguments, axes in (
        ((at(0, stack), x), (None, 0)),
        ((stack, x[0]), (0, None)),
        ((stack, x), (0, 0)),
    ):
        mapped = jax.jit(jax.vmap(products, axes))(*arguments)
        for index in range(3):
            pairs = zip(arguments, axes, strict=True)
            one = [at(index, tree) if axis == 0 else tree for tree, axis in pairs]
            for found, expected in zip(mapped, dense_products(*one), strict=True):
                np.testing.assert_allclose(found[index], expected, atol=1e-5)


@pytest.mark.slow
def test_narrow_products_are_summed_in_float32():
    """In bfloat16 a sum of ones stays at 256."""
    w = blocks.from_dense(jnp.ones((512, 512), jnp.bfloat16), 256)
    x = jnp.ones((512, 512), jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: x @ w, x, w)
    dx, dw = pull(jnp.ones_like(y))
    for found in (y, dx, dw.values):
        assert found.dtype == jnp.bfloat16
        assert (found == 512).all()
    mixed = x @ dataclasses.replace(w, values=w.values.astype(jnp.float32))
    assert mixed.dtype == jnp.float32


def test_products_that_make_no_sense_are_refused():
    w, stack = draw("square", KEY), jax.tree.map(lambda leaf: leaf[None], draw("square", KEY))
    for x, matrix, named in (
        (jnp.ones((2, 15)), w, "x.shape=(2, 15)"),
        (jnp.ones(()), w, "x.shape=()"),
        (jnp.ones((2, 16), int), w, "x.dtype='int32'"),
        (jnp.ones((2, 16)) * 1j, w, "x.dtype='complex64'"),
        ("x", w, "x=str"),
        (jnp.ones((2, 16)), stack, "w=(1, 16, 16)"),
        (jnp.ones((2, 16)), w.to_dense(), "w='ArrayImpl'"),
    ):
        with refuses(named):
            blocks.matmul(x, matrix)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"density": 0.1}, ("density=0.1", "[0.25, 1]")),
        ({"density": 1.5}, ("density=1.5",)),
        ({"density": "0.5"}, ("density='0.5'",)),
        ({"density": 0.66, "shape": (12, 12)}, ("density=0.66", "0.555556 and 1")),
        ({"block_size": 5}, ("block_size=5", "divisor of 16")),
        ({"block_size": 0}, ("block_size=0",)),
        ({"block_size": 4.0}, ("block_size=4.0",)),
        ({"shape": (16,)}, ("shape=(16,)",)),
        ({"shape": (2, 16, 16)}, ("shape=(2, 16, 16)",)),
        ({"shape": (16, 0)}, ("shape=(16, 0)",)),
        ({"shape": (16, 18)}, ("block_size=4", "shape=(16, 18)", "divisor of 2")),
        ({"scale": float("nan")}, ("scale=nan",)),
        ({"dtype": jnp.int32}, ("dtype='int32'",)),
    ],
)
def test_draws_that_cannot_be_are_refused(change, named):
    arguments = {"shape": (16, 16), "density": 0.5, "block_size": 4} | change
    with refuses(*named):
        blocks.orthogonal(KEY, **arguments)


@pytest.mark.slow
def test_a_traced_density_is_refused_and_a_traced_scale_is_not():
    with refuses("density=", "is traced"):
        jax.jit(lambda d: blocks.orthogonal(KEY, (16, 16), d, block_size=4))(0.5)
    with refuses("block_size=", "integer"):
        jax.jit(lambda b: blocks.orthogonal(KEY, (16, 16), 0.5, block_size=b))(4)
    scaled = jax.jit(lambda s: blocks.orthogonal(KEY, (16, 16), 0.5, block_size=4, scale=s))(3.0)
    np.testing.assert_allclose(scaled.to_dense(), 3 * draw("square", KEY).to_dense(), atol=1e-6)


@pytest.mark.slow
def test_spectra():
    w = draw("wide", KEY)
    assert float(spectrum.orthogonality_error(w)) < 2e-6
    doubled = dataclasses.replace(w, values=2 * w.values)
    assert float(spectrum.orthogonality_error(doubled, scale=2.0)) < 2e-6
    assert float(spectrum.orthogonality_error(doubled)) == pytest.approx(3, abs=1e-5)
    x = jnp.ones((2, 16))
    np.testing.assert_allclose(spectrum.singular_values(lambda x: x @ w, x), 1, atol=2e-6)
    ends = spectrum.extreme_singular_values(KEY, lambda x: x @ doubled, x, num_steps=4)
    np.testing.assert_allclose([ends.smallest, ends.largest], 2, atol=1e-5)


def test_files_keep_blocks_sparse(tmp_path):
    params = {"layer": {"kernel": draw("wide", KEY), "bias": jnp.ones(32)}}
    path = tmp_path / "net.safetensors"
    eoi.save(path, params, jax.tree.map(lambda leaf: True, params))
    loaded = eoi.load(path, like=params).params
    assert isinstance(loaded["layer"]["kernel"], blocks.BlockSparse)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    # Without a tree to fill the arrays come by their names.
    named = blocks.BlockSparse(**eoi.load(path).params["layer"]["kernel"])
    np.testing.assert_array_equal(named.to_dense(), params["layer"]["kernel"].to_dense())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 5])
def test_reflections_give_orthogonal_matrices(x64, size):
    for matrix in haar_by_reflections(KEY, (7, size, size), jnp.float64):
        assert gram_error(matrix) < 1e-14


@pytest.mark.slow
def test_reflections_give_the_moments_of_the_haar_measure():
    """Moments of entries and pairs of entries of O(3), each to five standard errors."""
    n, draws = 3, 20_000
    q = np.asarray(haar_by_reflections(KEY, (draws, n, n), jnp.float32), np.float64)
    pairs = [q[:, i, j] * q[:, k, m] for i, j, k, m in np.ndindex(n, n, n, n) if i != k and j != m]
    for sample, expected in (
        *((entry, 0) for entry in q.reshape(draws, -1).T),
        *((entry**4, 3 / (n * (n + 2))) for entry in q.reshape(draws, -1).T),
        *((pair, 0) for pair in pairs),
        *((pair**2, (n + 1) / (n * (n - 1) * (n + 2))) for pair in pairs),
        (np.linalg.det(q), 0),
    ):
        assert abs(sample.mean() - expected) < 5 * sample.std() / np.sqrt(draws)
