"""Laws of selection by threshold: exactly so many, the right ones, ties in order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eoi_jax._internal import selection

DTYPES = ["bfloat16", "float16", "float32", "float64"]
smallest = jax.jit(selection.smallest)
SPECIAL = [0.0, -0.0, np.inf, -np.inf, 1.0, -1.0, 1e-42, -1e-42, 3e-39, 65504.0]


@pytest.fixture(params=DTYPES)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


def oracle(arrays, count):
    """Flat positions of the largest entries by a stable sort."""
    wide = np.concatenate([np.asarray(array, np.float64) for array in arrays])
    return np.sort(np.argsort(-wide, kind="stable")[:count])


def positions(selected):
    return np.flatnonzero(np.concatenate([np.asarray(leaf) for leaf in selected]))


def test_ordered_bits_compare_as_the_floats_do(dtype):
    """All patterns of 16 bits; of more, random ones: infinities, subnormals, NaN and both zeros."""
    unsigned = np.dtype(f"uint{8 * dtype.itemsize}")
    if dtype.itemsize == 2:
        values = np.arange(2**16).astype(unsigned).view(dtype)
    else:
        random = np.frombuffer(np.random.default_rng(0).bytes(4096 * dtype.itemsize), dtype)
        values = np.concatenate([random, np.array(SPECIAL, dtype), np.array([np.nan], dtype)])
    keys = np.asarray(selection.ordered_bits(jnp.asarray(values)))
    assert keys.dtype == unsigned
    with np.errstate(invalid="ignore"):  # signaling NaN
        nan = np.isnan(values)
    assert nan.any()
    np.testing.assert_array_equal(keys == 0, nan)
    order = np.argsort(keys[~nan], kind="stable")
    ordered, ordered_keys = values[~nan][order], keys[~nan][order]
    np.testing.assert_array_equal(ordered[1:] > ordered[:-1], ordered_keys[1:] > ordered_keys[:-1])
    assert (ordered[1:] >= ordered[:-1]).all()


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 60),
    values=st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=5),
)
@pytest.mark.parametrize("name", DTYPES)
def test_largest_of_several_arrays_equals_a_stable_sort(name, seed, count, values):
    with jax.enable_x64(name == "float64"):
        generator = np.random.default_rng(seed)
        arrays = [generator.choice(values, size).astype(jnp.dtype(name)) for size in (30, 0, 17)]
        arrays.append(generator.standard_normal(13).astype(jnp.dtype(name)))
        selected = selection.largest([jnp.asarray(array) for array in arrays], count)
        assert [leaf.shape for leaf in selected] == [(30,), (0,), (17,), (13,)]
        np.testing.assert_array_equal(positions(selected), oracle(arrays, count))


def test_arrays_of_several_dtypes_compare_by_value():
    arrays = [
        jnp.array([1.0, 300.0, -2.0], jnp.bfloat16),
        jnp.array([1.0009765625, 0.5, 2.0], jnp.float16),
        jnp.array([1.0001, -2.0, 300.0001], jnp.float32),
    ]
    for count in range(10):
        selected = selection.largest(arrays, count)
        np.testing.assert_array_equal(positions(selected), oracle(arrays, count))


def test_nan_is_the_lowest():
    scores = [jnp.array([jnp.nan, -jnp.inf, -jnp.nan, 0.0])]
    assert positions(selection.largest(scores, 2)).tolist() == [1, 3]
    assert positions(selection.largest(scores, 3)).tolist() == [0, 1, 3]


@pytest.mark.parametrize(("count", "number"), [(-3, 0), (0, 0), (4, 4), (9, 4)])
def test_counts_out_of_range_select_nothing_or_everything(count, number):
    keys = jnp.array([0, 5, 2**32 - 1, 5], jnp.uint32)
    for eligible in (jnp.ones(4, bool), jnp.array([True, True, True, False])):
        chosen = smallest(keys, eligible, jnp.int32(count))
        assert int(chosen.sum()) == min(number, int(eligible.sum()))
    assert len(positions(selection.largest([jnp.ones(4)], count))) == number


def test_no_arrays_no_selection():
    assert selection.largest([], 3) == []


def test_nothing_is_sorted_or_put_together():
    scores = [jnp.ones(8), jnp.ones(5)]
    program = str(jax.make_jaxpr(selection.largest)(scores, 3))
    assert " sort" not in program
    assert "concatenate" not in program
    assert "while" in program or "scan" in program


@given(st.integers(0, 2**31 - 1), st.sampled_from([2, 2**16, 2**32]), st.integers(0, 60))
def test_smallest_equals_a_stable_sort(seed, bound, count):
    generator = np.random.default_rng(seed)
    values = generator.integers(0, bound, 60, dtype=np.uint64).astype(np.uint32)
    eligible = generator.random(60) < 0.7
    order = [i for i in np.argsort(values, kind="stable") if eligible[i]]
    chosen = smallest(jnp.asarray(values), jnp.asarray(eligible), jnp.int32(count))
    assert sorted(order[:count]) == np.flatnonzero(chosen).tolist()


def test_fractions():
    assert selection.fraction([1, 2], [4, 8]) == 0.25
    assert selection.fraction([], []) == 1.0
    traced = jax.jit(lambda part, whole: selection.fraction([part, 1], [whole, 0]))
    assert float(traced(2, 4)) == 0.75
    assert float(jax.jit(lambda part, whole: selection.fraction([part], [whole]))(0, 0)) == 1.0
    # 2^31 and more: beyond the counts of one array.
    assert float(jax.jit(lambda n: selection.fraction([n, n], [n, n, n, n]))(2**30)) == 0.5


@pytest.mark.parametrize("size", [2**24 + 3, 2**25 + 3, 2**31 - 1])
def test_no_traced_count_exceeds_its_size(size):
    """float32 rounds these sizes up."""
    assert int(jax.jit(lambda density: selection.target_count(density, size))(1.0)) == size


def test_remainders_that_differ_by_rounding_alone_go_in_order():
    thirds = np.array([1 / 3, 1 - 2 / 3, 0.1 + 0.2 + 1 / 3 - 0.3, 1.0])
    sizes = np.array([5, 5, 5, 5])
    counts = selection.round_to_total(thirds, sizes, 2)
    assert counts.tolist() == [1, 0, 0, 1]
    counts = selection.round_to_total(thirds[::-1].copy(), sizes, 3)
    assert counts.tolist() == [1, 1, 1, 0]


def test_entries_are_selected_in_arrays_of_any_shape():
    generator = np.random.default_rng(3)
    arrays = [generator.integers(0, 3, shape).astype(np.float32) for shape in ((4, 5), (2, 3, 4))]
    for count in (0, 7, 20, 44):
        selected = selection.largest([jnp.asarray(array) for array in arrays], count)
        assert [leaf.shape for leaf in selected] == [(4, 5), (2, 3, 4)]
        flat = [array.ravel() for array in arrays]
        found = positions([np.ravel(leaf) for leaf in selected])
        np.testing.assert_array_equal(found, oracle(flat, count))


@pytest.mark.parametrize("num_axes", [0, 1, 2])
def test_layers_are_selected_one_by_one(num_axes):
    generator = np.random.default_rng(4)
    scores = generator.integers(0, 4, (2, 3, 4, 5)).astype(np.float32)
    counts = generator.integers(0, 21, scores.shape[:num_axes])
    found = np.asarray(selection.largest_of_layers(jnp.asarray(scores), jnp.asarray(counts)))
    layers = scores.reshape(max(counts.size, 1), -1)
    for layer, row, count in zip(layers, found.reshape(layers.shape), counts.flat, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), oracle([layer], count))
