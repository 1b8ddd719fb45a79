"""N:M matrices: exactly n of every m inputs, balanced, exactly orthogonal; masks from scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gram_error, refuses
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from eoi_jax import n_to_m

KEY = jax.random.key(23)
# Shape, n, m.
PATTERNS = {
    "2:4": ((16, 16), 2, 4),
    "4:8, wide": ((16, 48), 4, 8),
    "1:4, tall": ((48, 16), 1, 4),
    "2:6": ((36, 36), 2, 6),
    "one part": ((12, 10), 2, 4),
    "few outputs": ((32, 2), 2, 4),
}


def counts(support, m):
    """Non-zeros of each group of m inputs and each output."""
    inputs, outputs = support.shape
    return support.reshape(inputs // m, m, outputs).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_draw_has_n_of_every_m_inputs_and_is_orthogonal(name, seed):
    shape, n, m = PATTERNS[name]
    w = np.asarray(n_to_m.orthogonal(jax.random.key(seed), shape, n, m))
    assert w.shape == shape
    assert (counts(w != 0, m) == n).all()
    assert ((w != 0).sum(1) == shape[1] * n // m).all()
    assert gram_error(w) < 2e-6


@pytest.mark.slow
def test_a_draw_of_float64_is_orthogonal_to_its_rounding(x64):
    for name in ("2:4", "1:4, tall"):
        shape, n, m = PATTERNS[name]
        w = n_to_m.orthogonal(KEY, shape, n, m, scale=3.0, dtype=jnp.float64)
        assert gram_error(w, 3.0) < 1e-14


@pytest.mark.slow
def test_places_and_values_have_no_preference():
    """Each entry is there in half of the draws, with mean 0: to five standard errors."""
    draw = jax.vmap(lambda key: n_to_m.orthogonal(key, (8, 8), 2, 4))
    drawn = np.asarray(draw(jax.random.split(KEY, 2000)), np.float64)
    support = drawn != 0
    np.testing.assert_allclose(support.mean(0), 0.5, atol=5 * 0.5 / np.sqrt(2000))
    for sample, expected in ((drawn, 0), (drawn**2, 1 / 8)):
        bound = 5 * sample.std(0) / np.sqrt(2000)
        assert (np.abs(sample.mean(0) - expected) < bound).all()
    # Two outputs agree in a group, or have its two halves: both occur.
    assert 0 < (support[:, :4, 0] == support[:, :4, 1]).all(1).mean() < 1


@pytest.mark.slow
def test_supports_differ_and_connect_all_inputs():
    """A block-diagonal matrix has two supports, and two components that never meet."""
    support = np.asarray(n_to_m.orthogonal(KEY, (64, 64), 2, 4)) != 0
    assert len({column.tobytes() for column in support.T}) >= 4
    reached = np.eye(64)[0] > 0
    for _ in range(64):
        reached = support[:, support[reached].any(0)].any(1)
    assert reached.all()


def test_narrow_dtypes_keep_the_pattern():
    wide = n_to_m.orthogonal(KEY, (64, 64), 2, 4)
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = n_to_m.orthogonal(KEY, (64, 64), 2, 4, dtype=dtype)
        assert narrow.dtype == dtype
        assert (narrow == wide.astype(dtype)).all()
        assert ((narrow != 0) == (wide != 0)).all()


def test_an_entry_that_rounds_to_zero_is_raised_and_one_outside_is_not():
    values, support = jnp.array([0.0, -1e-30, 0.0, 0.5]), jnp.array([True, True, False, True])
    raised = n_to_m._at_least_rounding(values, support)
    eps = np.finfo(np.float32).eps
    np.testing.assert_array_equal(raised, np.array([eps, -eps, 0, 0.5], np.float32))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 3}, ("n=3", "m=4", "1, 2")),
        ({"n": 0}, ("n=0", "[1, 3]")),
        ({"n": 4}, ("n=4", "[1, 3]")),
        ({"n": 2.0}, ("n=2.0",)),
        ({"m": 1}, ("m=1", "[2, ...)")),
        ({"shape": (18, 16)}, ("shape=(18, 16)", "(4, 2)")),
        ({"shape": (16, 15)}, ("shape=(16, 15)", "(4, 2)")),
        ({"shape": (16,)}, ("shape=(16,)",)),
        ({"shape": (0, 16)}, ("shape=(0, 16)",)),
        ({"shape": (2, 16, 16)}, ("shape=(2, 16, 16)", "jax.vmap")),
        ({"scale": float("nan")}, ("scale=nan",)),
        ({"dtype": jnp.int32}, ("dtype='int32'",)),
    ],
)
def test_draws_that_cannot_be_are_refused(change, named):
    arguments = {"shape": (16, 16), "n": 2, "m": 4} | change
    with refuses(*named):
        n_to_m.orthogonal(KEY, **arguments)


@given(
    scores=arrays.arrays(np.float32, (2, 8, 3), elements=st.integers(-2, 2).map(float)),
    n=st.sampled_from([1, 3]),
)
def test_the_best_of_each_group_are_kept_and_of_equals_the_first(scores, n):
    mask = np.asarray(n_to_m.top_n(scores, n, 4))
    for batch, group, output in np.ndindex(2, 2, 3):
        at = (batch, slice(4 * group, 4 * group + 4), output)
        best = sorted(range(4), key=lambda place: (-scores[at][place], place))[:n]
        assert sorted(np.flatnonzero(mask[at])) == sorted(best)
    turned = n_to_m.top_n(scores.swapaxes(-1, -2), n, 4, axis=-1)
    np.testing.assert_array_equal(turned, mask.swapaxes(-1, -2))


def test_the_support_of_a_draw_is_its_own_projection():
    w = n_to_m.orthogonal(KEY, (64, 64), 2, 4)
    np.testing.assert_array_equal(n_to_m.top_n(jnp.abs(w), 2, 4), w != 0)


def test_scores_that_make_no_mask_are_refused():
    scores = jnp.ones((8, 3))
    for bad, named in (
        (lambda: n_to_m.top_n(scores, 2, 3), "m=3"),
        (lambda: n_to_m.top_n(scores, 4, 4), "n=4"),
        (lambda: n_to_m.top_n(scores, 1, 1), "m=1"),
        (lambda: n_to_m.top_n(scores, 2, 4, axis=2), "axis=2"),
        (lambda: n_to_m.top_n(jnp.ones(8), 2, 4), "axis=-2"),
        (lambda: n_to_m.top_n(scores * 1j, 2, 4), "scores.dtype=complex64"),
        (lambda: n_to_m.top_n(scores.at[0].set(jnp.nan), 2, 4), "scores has NaN"),
        (lambda: n_to_m.top_n("scores", 2, 4), "scores=str"),
    ):
        with refuses(named):
            bad()
    # A traced one cannot be read, and is never kept before a number.
    traced = jax.jit(lambda scores: n_to_m.top_n(scores, 3, 4))(scores.at[0].set(jnp.nan))
    assert traced[:4, 0].tolist() == [False, True, True, True]
