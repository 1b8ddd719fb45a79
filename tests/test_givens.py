import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses
from hypothesis import given
from hypothesis import strategies as st

from eoi_jax import givens, planes, rotation
from eoi_jax._internal import waves

KEY = jax.random.key(7)


def sequential_waves(i, j, size):
    """The recursion that defines waves, one rotation after another."""
    last = np.full(size, -1)
    out = np.empty(len(i), int)
    for t, (a, b) in enumerate(zip(i, j, strict=True)):
        out[t] = last[a] = last[b] = 1 + max(last[a], last[b])
    return out


def sequential_supports(i, j, shape):
    """Supports after every prefix, by unions of Python sets of columns."""
    size, columns = max(shape), min(shape)
    rows = [{r} if r < columns else set() for r in range(size)]
    counts = [columns]
    for a, b in zip(i, j, strict=True):
        rows[a] = rows[b] = rows[a] | rows[b]
        counts.append(sum(map(len, rows)))
    full = np.zeros((size, columns), bool)
    for r, entries in enumerate(rows):
        full[r, sorted(entries)] = True
    return (full if shape[0] >= shape[1] else full.T), np.array(counts)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_sample_is_a_function_of_key_and_index(impl):
    key, other = jax.random.split(jax.random.key(3, impl=impl))
    long = givens.sample(key, 50, 200)
    short = givens.sample(key, 50, 80)
    tail = givens.sample(key, 50, 120, first=80)
    chex.assert_trees_all_equal(long, jax.tree.map(lambda *x: jnp.concatenate(x), short, tail))
    chex.assert_trees_all_equal(long, jax.jit(lambda k: givens.sample(k, 50, 200))(key))
    batched = jax.vmap(lambda k: givens.sample(k, 50, 80))(jnp.stack([other, key]))
    chex.assert_trees_all_equal(short, jax.tree.map(lambda x: x[1], batched))
    assert (givens.sample(other, 50, 80).i != short.i).any()


def test_planes_are_uniform_over_pairs():
    size, draws = 6, 60_000
    rotations = givens.sample(KEY, size, draws)
    counts = np.zeros((size, size))
    np.add.at(counts, (np.asarray(rotations.i), np.asarray(rotations.j)), 1)
    assert np.all(np.diag(counts) == 0)
    expected = draws / (size * (size - 1))
    pairs = counts[~np.eye(size, dtype=bool)]
    chi2 = ((pairs - expected) ** 2 / expected).sum()
    freedom = len(pairs) - 1
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)  # 4 standard errors


def test_angles_are_uniform_and_never_trivial():
    theta = np.asarray(givens.sample(KEY, 10, 100_000).theta, np.float64)
    assert theta.min() > 0
    assert theta.max() < 2 * np.pi
    assert np.all(np.sin(theta) != 0)
    assert np.all(np.cos(theta) != 0)
    standard_error = 1 / math.sqrt(len(theta))
    for harmonic in (1, 2, 3):  # E cos(kθ) = E sin(kθ) = 0, each with variance 1/2
        assert abs(np.cos(harmonic * theta).mean()) < 4 * standard_error / math.sqrt(2)
        assert abs(np.sin(harmonic * theta).mean()) < 4 * standard_error / math.sqrt(2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**31 - 1))
def test_high_word_of_a_product(bits, bound):
    assert int(planes._below(jnp.uint32(bits), bound)) == bits * bound >> 32


@pytest.mark.usefixtures("x64")
def test_float64_angles_use_53_bits():
    theta = givens.sample(KEY, 10, 1000, dtype=jnp.float64).theta
    chex.assert_type(theta, jnp.float64)
    assert (theta != theta.astype(jnp.float32)).all()


def test_no_random_words_give_a_trivial_angle():
    """All words 0 or all 1 are the ends of the law, which 100 000 draws do not meet."""
    for word in (0, 2**32 - 1):
        theta = float(givens._uniform(jnp.full(2, word, jnp.uint32), jnp.float32))
        assert 0 < theta < 2 * math.pi
        assert math.sin(theta) != 0


@pytest.mark.slow
def test_angle_laws():
    constant = givens.sample(KEY, 10, 20, angles=0.25)
    np.testing.assert_array_equal(constant.theta, np.full(20, 0.25, np.float32))
    law = givens.sample(KEY, 10, 20, angles=lambda key, dtype: jax.random.normal(key, (), dtype))
    assert len(np.unique(law.theta)) == 20
    uniform = givens.sample(KEY, 10, 20)
    chex.assert_trees_all_equal(uniform[:2], constant[:2])  # planes do not depend on the angles


def test_from_pairs_keeps_the_planes():
    pairs = np.array([(0, 1), (5, 2), (1, 2)])
    rotations = givens.from_pairs(KEY, pairs)
    np.testing.assert_array_equal(np.stack(rotations[:2], 1), pairs)
    assert len(np.unique(rotations.theta)) == 3


@pytest.mark.slow
@given(st.integers(0, 2**31 - 1), st.sampled_from([(2, 5), (7, 30), (40, 100)]))
def test_waves_equal_the_sequential_recursion(seed, sizes):
    size, length = sizes
    rotations = givens.sample(jax.random.key(seed), size, length)
    wave = np.asarray(givens.waves(rotations, size))
    np.testing.assert_array_equal(wave, sequential_waves(*np.stack(rotations[:2]), size))
    for w in range(wave.max() + 1):
        touched = np.concatenate([np.asarray(rotations.i)[wave == w], rotations.j[wave == w]])
        assert len(touched) == len(set(touched.tolist()))


@pytest.mark.slow
def test_waves_of_a_prefix_are_a_prefix_of_the_waves():
    rotations = givens.sample(KEY, 20, 90)
    prefix = jax.tree.map(lambda x: x[:37], rotations)
    np.testing.assert_array_equal(givens.waves(prefix, 20), givens.waves(rotations, 20)[:37])
    assert givens.waves(givens.sample(KEY, 20, 0), 20).shape == (0,)


@pytest.mark.slow
def test_a_chain_has_as_many_waves_as_rotations():
    chain = givens.from_pairs(KEY, [(t, t + 1) for t in range(70)])
    np.testing.assert_array_equal(givens.waves(chain, 71), np.arange(70))


@pytest.mark.slow
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([(2, 2), (40, 40), (9, 33), (70, 5), (1, 12)]),
)
def test_support_equals_the_integer_simulation(seed, shape):
    rotations = givens.sample(jax.random.key(seed), max(shape), 60)
    expected, counts = sequential_supports(*np.stack(rotations[:2]).tolist(), shape)
    np.testing.assert_array_equal(givens.support(rotations, shape), expected)
    np.testing.assert_array_equal(givens.num_nonzeros(rotations, shape), counts)


@pytest.mark.slow
def test_support_is_where_the_product_is_not_zero():
    rotations = givens.sample(KEY, 60, 90)
    product = rotation.as_matrix(rotations, 60)
    np.testing.assert_array_equal(givens.support(rotations, (60, 60)), product != 0)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 3, 64, 100])
def test_the_width_of_a_block_changes_nothing(width):
    size, length, count = 30, 100, 61
    rotations = givens.sample(KEY, size, length)
    wave = jnp.where(jnp.arange(length) < count, givens.waves(rotations, size), length)
    order = jnp.argsort(wave, stable=True)
    ordered = (*(leaf[order] for leaf in rotations), order, wave[order])

    def note(carry, block):
        seen, clock = carry
        return seen.at[block.position].set(clock, mode="drop"), clock + 1

    start = (jnp.full(length, -1), 0)
    seen, _ = waves._scan_blocks(note, start, ordered, count, size=size, width=width)
    assert (seen[:count] >= 0).all(), "a rotation was left out"
    assert (seen[count:] == -1).all(), "a rotation past the count was applied"
    in_time = np.argsort(seen[:count], kind="stable")
    assert (np.diff(np.asarray(wave)[in_time]) >= 0).all()
    assert np.bincount(seen[:count]).max() <= width


@pytest.mark.parametrize("bound", [10, 2**31 - 1])
def test_stable_argsort(bound):
    values = jax.random.randint(KEY, (500,), 0, min(bound, 10))
    expected = np.argsort(values, kind="stable")
    np.testing.assert_array_equal(waves._stable_argsort(values, bound=bound), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: givens.sample(KEY, 1, 3), r"size=1"),
        (lambda: givens.sample(KEY, 5, -1), r"num_rotations=-1"),
        (lambda: givens.sample(KEY, 5, 1.5), r"num_rotations=1.5"),
        (lambda: givens.sample(KEY, 5, 1, first=-2), r"first=-2"),
        (lambda: givens.sample(KEY, 5, 1, dtype=int), r"dtype='int\d+'"),
        (lambda: givens.from_pairs(KEY, [(0, 1), (2, 2)]), r"pairs\[1\]=\(2, 2\)"),
        (lambda: givens.from_pairs(KEY, [(0, -1)]), r"pairs\[0\]=\(0, -1\)"),
        (lambda: givens.from_pairs(KEY, [(2**32 + 1, 1)]), r"pairs\[0\]="),
        (lambda: givens.from_pairs(KEY, [0, 1]), r"pairs.shape=\(2,\)"),
        (lambda: givens.from_pairs(KEY, [(0.0, 1.0)]), r"pairs.dtype='float64'"),
        (lambda: givens.support(givens.sample(KEY, 5, 1), (5, 5, 5)), r"shape=\(5, 5, 5\)"),
        (lambda: givens.num_nonzeros(givens.sample(KEY, 5, 1), (2**16, 2**15)), r"2\*\*31"),
        (lambda: givens.waves(givens.sample(KEY, 9, 50), 4), r"rotations\[\d+\] has the plane"),
        (lambda: givens.support(givens.sample(KEY, 9, 50), (4, 4)), r"in \[0, 4\)"),
        (
            lambda: givens.waves(givens.Rotations(*3 * (jnp.zeros(2, int),)), 4),
            r"rotations\[0\] has the plane \(0, 0\)",
        ),
        (
            lambda: givens.waves(givens.Rotations(jnp.zeros(2), jnp.ones(1), jnp.ones(1)), 4),
            r"rotations .*\(2,\), \(1,\), \(1,\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_traced_plane_of_one_coordinate_does_not_hang():
    wave = jax.jit(lambda i: givens.waves(givens.Rotations(i, i, jnp.ones(3)), 4))(jnp.arange(3))
    assert wave.shape == (3,)


def test_the_first_pair_that_is_no_plane_is_named():
    with refuses("pairs[1]", "(2, 2)"):
        givens.from_pairs(jax.random.key(0), [(0, 1), (2, 2), (1, 0), (3, 3)])


def test_pairs_reach_to_the_last_coordinate_of_int32():
    rotations = givens.from_pairs(jax.random.key(0), np.array([(0, 2**31 - 1)]))
    assert int(rotations.j[0]) == 2**31 - 1
    with refuses("pairs[0]", str(2**31)):
        givens.from_pairs(jax.random.key(0), np.array([(0, 2**31)]))
