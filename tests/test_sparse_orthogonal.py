import functools
import math

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gram_error, refuses
from hypothesis import given
from hypothesis import strategies as st

from eoi_jax import givens, planes
from eoi_jax._internal import drawing, waves
from eoi_jax.sparse_orthogonal import orthogonal

KEY = jax.random.key(5)
SHAPES = [(1, 1), (2, 2), (1, 9), (9, 1), (12, 40), (40, 12), (33, 33), (65, 64)]


def density_of(w):
    return np.count_nonzero(np.asarray(w)) / w.size


def paper_law(generator, shape, density):
    """One matrix of the paper's law, rotation by rotation in float64 NumPy.

    Returns the matrix and the number of rotations.
    """
    size, columns = max(shape), min(shape)
    w = np.eye(size, columns)
    rotations, target = 0, density * size * columns
    while np.count_nonzero(w) < target:
        before = w.copy()
        i, j = generator.choice(size, 2, replace=False)
        theta = generator.uniform(0, 2 * np.pi)
        w[i], w[j] = (
            np.cos(theta) * w[i] + np.sin(theta) * w[j],
            -np.sin(theta) * w[i] + np.cos(theta) * w[j],
        )
        rotations += 1
    if rotations and target - np.count_nonzero(before) < np.count_nonzero(w) - target:
        w, rotations = before, rotations - 1
    return (w if shape[0] >= shape[1] else w.T), rotations


@pytest.mark.slow
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from(SHAPES),
    st.floats(0, 1),
    st.sampled_from([1.0, 1.0247, 3.0]),
)
def test_exactly_orthogonal_at_the_density_asked_for(seed, shape, position, scale):
    size = max(shape)
    density = 1 / size + position * (1 - 1 / size)
    w = orthogonal(jax.random.key(seed), shape, density, scale=scale)
    chex.assert_shape(w, shape)
    chex.assert_type(w, jnp.float32)
    assert gram_error(w, scale) <= 1e-5
    assert abs(density_of(w) - density) <= 0.5 / size + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 3000)])
@pytest.mark.parametrize("density", [0.01, 0.5])
def test_exact_at_large_sizes(shape, density):
    w = orthogonal(KEY, shape, density)
    tall = w if shape[0] >= shape[1] else w.T
    gram = jnp.dot(tall.T, tall, precision="highest")
    assert jnp.abs(gram - jnp.eye(len(gram))).max() <= 1e-5
    assert abs(density_of(w) - density) <= 0.5 / max(shape) + 1e-6


@pytest.mark.slow
def test_the_ends_of_the_range():
    one_hot = orthogonal(KEY, (12, 40), 1 / 40)
    np.testing.assert_array_equal(one_hot, np.eye(12, 40))
    assert density_of(orthogonal(KEY, (20, 20), 1.0)) == 1.0
    np.testing.assert_array_equal(orthogonal(KEY, (1, 1), 1.0), [[1.0]])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(40, 40), (15, 50), (50, 15)])
@pytest.mark.parametrize("density", [0.1, 0.37])
def test_support_is_that_of_the_stopped_sequence(shape, density):
    """Replay the same rotations one by one on integers, stop by the definition, compare exactly."""
    size, columns = max(shape), min(shape)
    rotations = givens.sample(KEY, size, 8 * size)
    supports = [np.eye(size, columns, dtype=bool)]
    for i, j in zip(np.asarray(rotations.i), np.asarray(rotations.j), strict=True):
        supports.append(supports[-1].copy())
        supports[-1][[i, j]] = supports[-1][i] | supports[-1][j]
    counts = np.count_nonzero(supports, axis=(1, 2))
    target = density * (size * columns)
    crossing = int(np.argmax(counts >= target))
    nearer = counts[crossing] - target <= target - counts[crossing - 1]
    stop = crossing if nearer else crossing - 1
    w = orthogonal(KEY, shape, density)
    expected = supports[stop]
    np.testing.assert_array_equal(w != 0, expected if shape[0] == size else expected.T)
    assert abs(counts[stop] - target) == np.abs(counts - target).min()


@pytest.mark.slow
@pytest.mark.parametrize("traced", [False, True])
def test_of_two_counts_equally_near_the_later_is_kept(traced):
    """The first rotation of a 2 x 2 identity takes it from 2 non-zeros to 4; the target is 3."""
    draw = functools.partial(orthogonal, KEY, (2, 2))
    assert np.count_nonzero((jax.jit(draw) if traced else draw)(0.75)) == 4
    assert np.count_nonzero((jax.jit(draw) if traced else draw)(0.7499)) == 2
    below = functools.partial(draw, stopping="at_most")
    assert np.count_nonzero((jax.jit(below) if traced else below)(0.75)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "density"), [((20, 20), 0.3), ((10, 30), 0.2), ((30, 10), 0.2)])
def test_law_equals_the_paper_law(shape, density):
    """Means of statistics of many matrices, ours against NumPy's, within 4.5 standard errors."""
    draws = 1500
    generator = np.random.default_rng(0)
    theirs = [paper_law(generator, shape, density) for _ in range(draws)]
    keys = jax.random.split(KEY, draws)
    ours = np.asarray(jax.vmap(lambda key: orthogonal(key, shape, density))(keys), np.float64)
    theirs = np.stack([w for w, _ in theirs])

    def statistics(w):
        if shape[0] < shape[1]:
            w = w.transpose(0, 2, 1)
        per_row = (w != 0).sum(2)
        return {
            "density": (w != 0).mean((1, 2)),
            "entries": w.mean((1, 2)),
            "diagonal": np.abs(np.diagonal(w, axis1=1, axis2=2)).mean(1),
            "fourth moment": (w**4).mean((1, 2)),
            "one-hot rows": (per_row == 1).mean(1),
            "empty rows": (per_row == 0).mean(1),
            "square of the row counts": (per_row**2).mean(1),
            "small entries": ((np.abs(w) < 0.1) & (w != 0)).mean((1, 2)),
            "first corner": np.abs(w[:, 0, 0]),
            "last corner": np.abs(w[:, -1, -1]),
        }

    for name, mine, other in zip(
        statistics(ours), statistics(ours).values(), statistics(theirs).values(), strict=True
    ):
        standard_error = math.sqrt((mine.var() + other.var()) / draws) + 1e-12
        deviation = abs(mine.mean() - other.mean()) / standard_error
        assert deviation < 4.5, f"{name}: {deviation:.1f} standard errors apart"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (24, 40), (40, 24)])
def test_one_key_is_one_matrix(shape):
    """Eager, jitted, vmapped, looped, with static and traced density."""
    keys = jax.random.split(KEY, 3)
    densities = np.array([0.1, 0.25, 0.6], np.float32)
    eager = np.stack([orthogonal(k, shape, float(d)) for k, d in zip(keys, densities, strict=True)])
    assert len({w.tobytes() for w in eager}) == 3

    def draw(key, density):
        return orthogonal(key, shape, density)

    for name, other in {
        "jit": np.stack([jax.jit(draw)(k, d) for k, d in zip(keys, densities, strict=True)]),
        "vmap": jax.vmap(draw)(keys, densities),
        "jit of vmap": jax.jit(jax.vmap(draw))(keys, densities),
        "scan": jax.lax.scan(lambda _, x: (0, draw(*x)), 0, (keys, jnp.asarray(densities)))[1],
    }.items():
        np.testing.assert_array_equal(other != 0, eager != 0, err_msg=name)
        np.testing.assert_allclose(other, eager, atol=1e-6, err_msg=name)
    again = orthogonal(keys[0], shape, float(densities[0]))
    np.testing.assert_array_equal(again, eager[0])


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_every_kind_of_key(impl):
    keys = jax.random.split(jax.random.key(2, impl=impl), 2)
    looped = jnp.stack([orthogonal(key, (20, 20), 0.2) for key in keys])
    np.testing.assert_allclose(
        jax.vmap(lambda k: orthogonal(k, (20, 20), 0.2))(keys), looped, atol=1e-6
    )
    assert (looped[0] != looped[1]).any()


@pytest.mark.slow
def test_old_style_keys():
    old = orthogonal(jax.random.PRNGKey(3), (20, 20), 0.2)
    np.testing.assert_array_equal(old, orthogonal(jax.random.key(3), (20, 20), 0.2))


@pytest.mark.slow
@pytest.mark.parametrize(("density", "at_most"), [(0.15, False), (0.9, False), (0.15, True)])
def test_the_length_of_a_segment_changes_nothing(density, at_most):
    def draw(segment):
        law = drawing.Law((40, 30), segment, givens.uniform_angle, at_most)
        return drawing.draw(KEY, jnp.float32(density), jnp.float32(1), law)

    long = draw(segment=400)
    for segment in (1, 7, 64):
        np.testing.assert_array_equal(draw(segment=segment) != 0, long != 0)
        np.testing.assert_allclose(draw(segment=segment), long, atol=1e-6)


@functools.cache
def drawn_by(stopping, shape):
    """Draw a batch of one density: one program for all densities."""
    draw = functools.partial(orthogonal, shape=shape, stopping=stopping)
    return jax.jit(jax.vmap(lambda key, density: draw(key, density=density), (0, None)))


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.02, 1 / 3, 1.0])
@pytest.mark.parametrize("shape", [(30, 30), (20, 50)])
def test_at_most_stops_before_the_rotation_that_exceeds_the_budget(shape, density):
    density = max(density, 1 / max(shape))
    budget = math.floor(density * math.prod(shape) + 0.5)
    keys = jax.random.split(KEY, 20)
    below = drawn_by("at_most", shape)(keys, density)
    counts = np.count_nonzero(below, axis=(1, 2))
    assert counts.max() <= budget
    assert counts.min() > budget - min(shape)  # a rotation adds at most one to each vector
    assert max(gram_error(matrix) for matrix in below) < 1e-5
    # The paper's rule is at the same count or one rotation further.
    closest = np.count_nonzero(drawn_by("closest", shape)(keys, density), axis=(1, 2))
    same = (closest == counts) | (closest > budget) | (counts == budget)
    assert same.all()
    # For a count, in a corner of zeros, and among matrices of another shape: the same matrices.
    size, columns = max(shape), min(shape)
    both = (jnp.tile(keys, 2), [budget] * 20 + [40] * 20, [size] * 20 + [10] * 20)
    padded = drawn_padded(*both, [columns] * 20 + [9] * 20, padded=(64, 52))
    by_count = padded[:20, :size, :columns]
    np.testing.assert_array_equal(below, by_count if shape[0] == size else by_count.mT)
    assert np.count_nonzero(padded[:20]) == np.count_nonzero(by_count)
    assert np.count_nonzero(padded[20:]) == np.count_nonzero(padded[20:, :10, :9]) <= 40 * 20


def drawn_padded(keys, *numbers, padded):
    law = drawing.Law(padded, 2 * padded[0], givens.uniform_angle, at_most=True)
    return drawing.draw_padded(keys, *(jnp.asarray(n, jnp.int32) for n in numbers), law, "float32")


@pytest.mark.slow
def test_every_matrix_of_a_batch_keeps_to_a_budget_of_its_own():
    budgets = jnp.array([16, 30, 100, 128, 256, 15, 257])
    keys = jax.random.split(KEY, 7)
    batch = drawn_padded(keys, budgets, [16] * 7, [16] * 7, padded=(20, 17))
    counts = np.count_nonzero(batch, axis=(1, 2))[:5]
    assert (counts <= budgets[:5]).all()
    assert (counts > budgets[:5] - 16).all()
    # No matrix has so few non-zeros, or so many.
    assert np.isnan(batch).any((1, 2)).tolist() == [False] * 5 + [True] * 2


@pytest.mark.slow
def test_at_most_has_the_budget_of_fill_where_float32_would_not():
    """0.1000499999 of 10 000 is 1000, and 1001 if the density is rounded to float32."""
    keys = jax.random.split(KEY, 100)
    draw = functools.partial(orthogonal, shape=(100, 100), density=0.1000499999)
    batch = jax.vmap(functools.partial(draw, stopping="at_most"))(keys)
    assert np.count_nonzero(batch, axis=(1, 2)).max() == 1000


def test_an_unknown_stopping_rule_is_refused():
    with refuses("stopping", "'below'", "'closest'", "'at_most'"):
        orthogonal(KEY, (4, 4), 0.5, stopping="below")


@pytest.mark.slow
def test_a_new_density_compiles_nothing():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def draw(key, density):
        return orthogonal(key, (40, 40), density)

    for density in (0.03, 0.2, 0.8):
        assert abs(density_of(draw(KEY, density)) - density) <= 0.5 / 40 + 1e-6


@pytest.mark.slow
def test_a_traced_density_out_of_range_gives_nan():
    draw = jax.jit(lambda density: orthogonal(KEY, (20, 20), density))
    for bad in (0.0, -0.5, 0.01, 1.5, math.nan, math.inf):
        assert jnp.isnan(draw(bad)).any(), bad


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_float32_cast_last(dtype):
    w = orthogonal(KEY, (64, 64), 0.2, scale=1.5, dtype=dtype)
    chex.assert_type(w, dtype)
    np.testing.assert_array_equal(w, orthogonal(KEY, (64, 64), 0.2, scale=1.5).astype(dtype))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_float64_is_float64_throughout():
    for shape in ((100, 100), (30, 80)):
        w = orthogonal(KEY, shape, 0.3, dtype=jnp.float64)
        chex.assert_type(w, jnp.float64)
        assert gram_error(w) <= 1e-14
        assert abs(density_of(w) - 0.3) <= 0.5 / max(shape)


@pytest.mark.slow
@pytest.mark.parametrize("column_axis", [0, 1, 2, 3, -1, -4])
def test_axes_follow_jax(column_axis):
    shape = (3, 4, 5, 6)
    w = orthogonal(KEY, shape, 0.2, column_axis=column_axis)
    reference = jax.nn.initializers.orthogonal(column_axis=column_axis)(KEY, shape)
    chex.assert_equal_shape([w, reference])
    for matrix in (w, reference):
        flat = np.moveaxis(np.asarray(matrix), column_axis, -1).reshape(-1, shape[column_axis])
        assert gram_error(flat) <= 1e-5


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 0, 2)])
def test_an_empty_shape_gives_an_empty_array(shape):
    chex.assert_shape(orthogonal(KEY, shape, 0.5), shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_permuting_keeps_the_laws_and_unties_the_diagonal(shape):
    keys = jax.random.split(KEY, 400)
    draw = functools.partial(orthogonal, shape=shape, density=1 / 25, permute=True)
    ws = np.asarray(jax.vmap(lambda key: draw(key))(keys))
    for w in ws[:5]:
        assert gram_error(w) <= 1e-5
        assert abs(density_of(w) - 1 / 25) <= 0.5 / 50 + 1e-6
    share = (ws != 0).mean(0)  # each entry is a mean of 400 Bernoulli(1/25)
    standard_error = math.sqrt(0.04 * 0.96 / len(keys))
    assert np.abs(share - 0.04).max() < 5.5 * standard_error
    assert abs((ws[ws != 0] > 0).mean() - 0.5) < 0.02
    np.testing.assert_array_equal(ws[0], draw(keys[0]))


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [1, 45, 80])
@pytest.mark.parametrize("shape", [(60, 60), (20, 50)])
def test_constant_angles_are_counted_on_the_floats(degrees, shape):
    w = orthogonal(KEY, shape, 0.2, angles=math.radians(degrees))
    assert gram_error(w) <= 1e-5
    assert abs(density_of(w) - 0.2) <= 0.5 / max(shape) + 1e-6


@pytest.mark.slow
def test_an_angle_law_of_ones_own():
    w = orthogonal(KEY, (40, 40), 0.3, angles=lambda key, dtype: jax.random.normal(key, (), dtype))
    assert gram_error(w) <= 1e-5
    assert abs(density_of(w) - 0.3) <= 0.5 / 40 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(40, 40), (20, 50)])
def test_a_law_that_is_declared_continuous_draws_the_same_matrix(shape):
    """Whether supports are counted on integers is said by the law, and changes no matrix of one."""

    def law(key, dtype):
        return jax.random.uniform(key, (), dtype, 0.1, 1.4)

    on_floats = orthogonal(KEY, shape, 0.3, angles=law)
    on_integers = orthogonal(KEY, shape, 0.3, angles=givens.continuous(lambda *a: law(*a)))
    np.testing.assert_array_equal(on_integers != 0, on_floats != 0)
    np.testing.assert_allclose(on_integers, on_floats, atol=1e-6)


@pytest.mark.slow
def test_an_angle_law_that_reaches_no_density_gives_nan():
    w = orthogonal(KEY, (8, 8), 0.5, angles=lambda key, dtype: jnp.zeros((), dtype))
    assert jnp.isnan(w).all()


def test_shapes_without_arrays():
    out = jax.eval_shape(lambda k: orthogonal(k, (300, 200), 0.1, dtype=jnp.bfloat16), KEY)
    assert (out.shape, out.dtype) == ((300, 200), jnp.bfloat16)


@pytest.mark.slow
def test_one_program_lowers_for_every_platform():
    draw = jax.jit(lambda key, density: orthogonal(key, (24, 40), density))
    exported = jax.export.export(draw, platforms=("cpu", "cuda", "tpu"))(KEY, jnp.float32(0.25))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    assert "callback" not in exported.mlir_module()
    np.testing.assert_allclose(
        exported.call(KEY, jnp.float32(0.25)), orthogonal(KEY, (24, 40), 0.25), atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [1024, 2048])
def test_temporary_memory_is_below_three_outputs(size):
    draw = jax.jit(lambda key: orthogonal(key, (size, size), 0.1))
    analysis = draw.lower(KEY).compile().memory_analysis()
    assert analysis.temp_size_in_bytes <= 3 * analysis.output_size_in_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"density=0.0"),
        ({"density": -0.1}, r"density=-0.1"),
        ({"density": 1.5}, r"density=1.5"),
        ({"density": math.nan}, r"density=nan"),
        ({"density": 0.02}, r"density=0.02"),
        ({"density": "0.1x"}, r"density='0.1x'"),
        ({"density": np.array([0.1, 0.2])}, r"is not a number in \(0, 1\]"),
        ({"shape": (20,)}, r"shape=\(20,\)"),
        ({"shape": (20, -1)}, r"shape=\(20, -1\)"),
        ({"shape": (20, 1.5)}, r"shape=\(20, 1.5\)"),
        ({"shape": (2**31, 1)}, r"has a side of the matrix outside \[1, 2\*\*31\)"),
        ({"shape": (2**16, 2**16), "density": 0.6}, r"density=0.6 is outside \[.*, 0.49998\d\]"),
        ({"dtype": jnp.int32}, r"dtype='int32'"),
        ({"dtype": jnp.complex64}, r"dtype='complex64'"),
        ({"column_axis": 2}, r"column_axis=2"),
        ({"scale": math.inf}, r"scale=inf"),
        ({"angles": math.pi / 2}, r"angles=1.57\d+"),
        ({"angles": "uniform"}, r"angles='uniform'"),
        ({"angles": lambda key, dtype: jnp.ones(2)}, r"returns shape \(2,\), outside \(\)"),
        ({"dtype": "floaty"}, r"dtype='floaty'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"shape": (20, 10), "density": 0.1, **arguments}
    with pytest.raises(ValueError, match=message):
        orthogonal(KEY, **arguments)


@functools.cache
def drawn_on_a_core(keys):
    return np.stack([orthogonal(key, (50, 30), 0.3) for key in jax.random.split(KEY, keys)])


@pytest.mark.slow
def test_what_accelerators_run_gives_the_same_matrix(monkeypatch):
    """Wide blocks and batched loops, which a CPU does not choose, forced upon it."""
    keys, expected = jax.random.split(KEY, 3), drawn_on_a_core(3)

    def accelerator(*operands, default, **platforms):
        assert "cpu" in platforms
        return default(*operands)

    jax.clear_caches()
    monkeypatch.setattr(jax.lax, "platform_dependent", accelerator)
    try:
        batch = jax.vmap(lambda key, d: orthogonal(key, (50, 30), d), (0, None))(keys, 0.3)
        alone = orthogonal(keys[0], (50, 30), 0.3)
    finally:
        jax.clear_caches()  # or later calls would find these programs
    for found, right in ((batch, expected), (alone, expected[0])):
        np.testing.assert_array_equal(found != 0, right != 0)
        np.testing.assert_allclose(found, right, atol=1e-6)


@pytest.mark.slow
def test_the_scale_may_be_differentiated():
    def total(scale):
        return orthogonal(KEY, (20, 20), 0.2, scale=scale).sum()

    np.testing.assert_allclose(jax.grad(total)(2.0), total(1.0), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(total)(2.0), total(2.0), rtol=1e-5)


def test_the_largest_shapes_can_be_traced():
    for shape in ((1, 2**27), (2**15, 2**15 + 2**14), (2, 2**30 - 1)):
        out = jax.eval_shape(lambda key, d, shape=shape: orthogonal(key, shape, d), KEY, 0.5)
        assert out.shape == shape


@pytest.mark.slow
def test_a_constant_angle_may_be_an_array():
    w = orthogonal(KEY, (20, 20), 0.2, angles=jnp.float32(0.5))
    np.testing.assert_allclose(w, orthogonal(KEY, (20, 20), 0.2, angles=0.5), atol=1e-6)


def test_a_traced_scale_is_a_scalar():
    with pytest.raises(ValueError, match=r"scale=.*"):
        jax.jit(lambda scale: orthogonal(KEY, (4, 4), 0.5, scale=scale))(jnp.ones(4))


# --- balanced outputs ----------------------------------------------------------------------------


@functools.cache
def balanced_draw(shape, law):
    return jax.jit(functools.partial(orthogonal, shape=shape, planes=law, balance_outputs=True))


@pytest.mark.slow
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([(3, 16), (16, 17)]),
    st.floats(0, 1),
    st.sampled_from([planes.independent, planes.matching]),
)
def test_balanced_columns_have_half_of_their_fair_share_or_more(seed, shape, position, law):
    n, m = shape
    density = 1 / n + position * (1 - 1 / n)
    w = np.asarray(balanced_draw(shape, law)(jax.random.key(seed), density=density), np.float64)
    assert np.linalg.norm(w, axis=0).min() >= 0.5 * math.sqrt(n / m)
    assert gram_error(w) <= 1e-5
    assert abs(density_of(w) - density) <= 0.5 / m + 1e-6


@pytest.mark.slow
def test_the_balanced_start_is_the_identity_side_by_side():
    """Two columns for each of the first two rows, and one for the third."""
    w = orthogonal(KEY, (3, 5), 1 / 3, balance_outputs=True)
    half = math.sqrt(0.5)
    expected = [[half, 0, 0, -half, 0], [0, half, 0, 0, -half], [0, 0, 1, 0, 0]]
    np.testing.assert_allclose(w, expected, atol=1e-6)


@pytest.mark.slow
def test_balance_changes_nothing_where_columns_are_orthonormal():
    draw = functools.partial(orthogonal, KEY, (40, 15), 0.1)
    np.testing.assert_array_equal(draw(balance_outputs=True), draw())


@pytest.mark.slow
def test_whether_to_balance_may_be_traced():
    draw = functools.partial(orthogonal, KEY, (6, 20))
    traced = jax.jit(lambda density, balance: draw(density, balance_outputs=balance))
    for density, balance in ((0.1, False), (0.3, False), (0.3, True)):
        w = draw(density, balance_outputs=balance)
        np.testing.assert_allclose(traced(density, balance), w, atol=1e-6)
    assert jnp.isnan(traced(0.1, True)).any()
    with refuses("density", 0.1, "0.166667", "balance_outputs"):
        draw(0.1, balance_outputs=True)


@pytest.mark.slow
def test_a_batch_of_balanced_matrices_is_the_loop():
    keys = jax.random.split(KEY, 3)
    draw = functools.partial(orthogonal, shape=(6, 20), density=0.3, balance_outputs=True)
    batch = jax.vmap(draw)(keys)
    np.testing.assert_allclose(batch, jnp.stack([draw(key) for key in keys]), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("angles", [givens.hadamard_angle, 0.7], ids=["hadamard", "constant"])
def test_balance_holds_for_laws_that_are_counted_on_the_floats(angles):
    w = orthogonal(KEY, (7, 40), 0.5, angles=angles, balance_outputs=True)
    assert np.linalg.norm(w, axis=0).min() >= 0.5 * math.sqrt(7 / 40)
    assert gram_error(w) <= 1e-5
    assert abs(density_of(w) - 0.5) <= 0.5 / 40 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_bound_scales_with_the_matrix(scale):
    w = orthogonal(KEY, (7, 40), 0.5, scale=scale, balance_outputs=True)
    expected = orthogonal(KEY, (7, 40), 0.5, balance_outputs=True)
    np.testing.assert_allclose(w / scale, expected, rtol=1e-5)


@pytest.mark.slow
def test_rounding_to_bfloat16_keeps_the_bound():
    draw = functools.partial(orthogonal, shape=(3, 16), density=0.9, balance_outputs=True)
    ws = jax.vmap(functools.partial(draw, dtype=jnp.bfloat16))(jax.random.split(KEY, 100))
    norms = np.linalg.norm(np.asarray(ws, np.float64), axis=1)
    assert norms.min() >= 0.5 * math.sqrt(3 / 16)


@pytest.mark.slow
def test_squeezed_angles_are_uniform_among_those_that_keep_the_floor():
    """And no angle moves where all of them keep it, as for orthogonal rows of one norm."""
    generator = np.random.default_rng(0)
    theta = jnp.asarray(generator.uniform(0, 2 * math.pi, 20_000), jnp.float32)
    a, b, floor = np.array([1.0, 0.2]), np.array([0.9, -0.3]), 0.4

    def norms(angles):
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack([((cos * a + sin * b) ** 2).sum(1), ((cos * b - sin * a) ** 2).sum(1)])

    def squeezed(left, right):
        rows = [jnp.tile(jnp.asarray(row, jnp.float32), (len(theta), 1)) for row in (left, right)]
        return np.asarray(waves.squeeze_angles(theta, *rows, jnp.float32(floor)))

    found = squeezed(a, b)
    assert norms(found).min() >= floor - 1e-5
    grid = np.linspace(0, 2 * math.pi, 100_001)
    allowed = norms(grid).min(axis=0) >= floor
    assert 0.2 < allowed.mean() < 0.8
    # The distribution functions, by Kolmogorov and Smirnov's distance: 1.95 is exceeded by 0.1 %.
    expected = np.cumsum(allowed) / allowed.sum()
    at = np.interp(np.sort(found % (2 * math.pi)), grid, expected)
    distance = np.abs(at - (np.arange(len(at)) + 0.5) / len(at)).max()
    assert distance * math.sqrt(len(at)) < 1.95
    np.testing.assert_array_equal(squeezed([1, 0], [0, 1]), theta)


@pytest.mark.parametrize("at_most", [False, True])
def test_targets_of_huge_matrices_fit_a_word(at_most):
    rows = columns = 2**16
    most = drawing.countable_nonzeros(rows, columns)

    @jax.jit
    def doubled(density):
        return drawing._doubled(density, rows, columns, (columns, most), at_most)

    for density in (2.0**-16, 0.05, most / 2**32):
        goal = doubled(density)
        assert bool(goal.is_valid)
        assert abs(int(goal.twice) / 2 - density * 2**32) <= 3 * 2**-23 * density * 2**32 + 1
        assert int(goal.twice) + 2 * columns < 2**32
    for density in (2.0**-17, 0.5, 1.0):
        assert not bool(doubled(density).is_valid)
    # A matrix whose entries can all be counted can be full.
    assert drawing.countable_nonzeros(2**31 - 1, 1) == 2**31 - 1
