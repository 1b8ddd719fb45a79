"""Laws of the density theory; oracles: enumeration of the planes, simulation, quadrature."""

import itertools
import math

import jax
import numpy as np
import pytest
from helpers import refuses
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special

from eoi_jax import theory

SIZES = (64, 100, 256, 784, 1024)


def enumerated_chain(size: int) -> np.ndarray:
    """Transition matrix, by looking at every plane and a support of each size."""
    matrix = np.zeros((size + 1, size + 1))
    planes = list(itertools.permutations(range(size), 2))
    for k in range(size + 1):
        for i, j in planes:
            matrix[k, k + ((i < k) != (j < k))] += 1 / len(planes)
    return matrix


def exact_curve(size: int, num_rotations: int) -> np.ndarray:
    return np.array([theory.expected_density(size, t) for t in range(num_rotations)])


# --- the distribution -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 12])
@pytest.mark.parametrize("num_rotations", [0, 1, 2, 7, 40])
def test_distribution_is_the_power_of_the_enumerated_transition_matrix(size, num_rotations):
    power = np.linalg.matrix_power(enumerated_chain(size), num_rotations)
    distribution = theory.nonzeros_distribution(size, num_rotations)
    assert distribution.dtype == np.float64
    np.testing.assert_allclose(distribution, power[1], rtol=1e-12, atol=1e-15)


@given(st.integers(1, 300), st.integers(0, 1500))
def test_distribution_is_one_on_the_sizes_that_can_be_reached(size, num_rotations):
    distribution = theory.nonzeros_distribution(size, num_rotations)
    assert distribution.shape == (size + 1,)
    assert distribution.min() >= 0.0
    assert distribution[0] == 0.0
    assert not distribution[num_rotations + 2 :].any()
    np.testing.assert_allclose(distribution.sum(), 1.0, rtol=1e-12)


@given(st.integers(2, 200), st.integers(0, 600))
def test_mean_obeys_the_master_equation(size, num_rotations):
    k = np.arange(size + 1)
    now = theory.nonzeros_distribution(size, num_rotations)
    after = theory.nonzeros_distribution(size, num_rotations + 1)
    # Of the ordered planes (i, j), 2 k (N - k) join a zero and a non-zero coordinate.
    births = now @ (2 * k * (size - k)) / (size * (size - 1))
    np.testing.assert_allclose((after - now) @ k, births, atol=1e-11)


def test_distribution_is_that_of_simulated_supports():
    size, num_rotations, repeats = 20, 30, 20_000
    rng = np.random.default_rng(20240601)
    support = np.zeros((repeats, size), dtype=bool)
    support[:, 0] = True
    row = np.arange(repeats)
    for _ in range(num_rotations):
        i = rng.integers(size, size=repeats)
        j = (i + rng.integers(1, size, size=repeats)) % size
        support[row, i] = support[row, j] = support[row, i] | support[row, j]
    nonzeros = support.sum(axis=1)
    standard_error = nonzeros.std() / math.sqrt(repeats)
    mean = theory.expected_density(size, num_rotations) * size
    assert abs(nonzeros.mean() - mean) < 4 * standard_error

    distribution = theory.nonzeros_distribution(size, num_rotations)
    frequency = np.bincount(nonzeros, minlength=size + 1) / repeats
    standard_errors = np.sqrt(distribution * (1 - distribution) / repeats)
    assert (np.abs(frequency - distribution) <= 4 * standard_errors + 1e-12).all()


def test_absorbed_chain_stays_full():
    distribution = theory.nonzeros_distribution(50, 10**7)
    assert distribution[:-1].sum() < 1e-16
    assert theory.expected_density(50, 10**7) == 1.0


# --- the expected density ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 17, 100, 784])
def test_expected_density_is_the_mean_of_the_distribution(size):
    for num_rotations in (0, 1, size // 2, 2 * size):
        mean = theory.nonzeros_distribution(size, num_rotations) @ np.arange(size + 1)
        exact = theory.expected_density(size, num_rotations, method="exact")
        assert exact == pytest.approx(mean / size, rel=1e-12)
        assert theory.expected_density(size, num_rotations) == exact


def test_exact_method_holds_above_the_cached_sizes():
    size, num_rotations = 1500, 3000
    mean = theory.nonzeros_distribution(size, num_rotations) @ np.arange(size + 1)
    exact = theory.expected_density(size, num_rotations, method="exact")
    assert exact == pytest.approx(mean / size, rel=1e-12)
    auto = theory.expected_density(size, num_rotations)
    assert auto == theory.expected_density(size, num_rotations, method="closed_form")
    assert auto != exact


# The values of exp(z) E2(z) = 1 - z exp(z) E1(z) come from mpmath, with 60 digits.
@pytest.mark.parametrize(
    ("z", "expected"),
    [
        (0.0, 1.0),
        (1e-12, 0.9999999999729461945),
        (1e-6, 0.999986761690868635),
        (0.01, 0.9592148855654357409),
        (1.0, 0.4036526376768059257),
        (30.0, 0.03130783723059624352),
        (500.0, 0.00199204761979455498),
        (501.0, 0.001988087224249094995),
        (1e6, 9.99998000005999976e-7),
    ],
)
def test_saturation_of_an_exponential_size(z, expected):
    assert theory._saturation(z) == pytest.approx(expected, rel=2e-15, abs=0)


@pytest.mark.parametrize("z", [1e-3, 0.3, 7.0, 200.0, 800.0])
def test_saturation_is_the_mean_of_a_saturating_exponential_size(z):
    mean, _ = integrate.quad(lambda x: math.exp(-x) * x / (x + z), 0, 60, epsabs=0, limit=200)
    assert theory._saturation(z) == pytest.approx(mean, rel=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_closed_form_is_within_its_bound_of_the_exact_chain(size):
    steps = range(0, 16 * size, max(1, size // 64))
    exact = np.array([theory.expected_density(size, t, method="exact") for t in steps])
    closed = np.array([theory.expected_density(size, t, method="closed_form") for t in steps])
    assert exact[0] == pytest.approx(1 / size)
    assert exact[-1] > 1 - 1e-6
    assert np.abs(closed - exact).max() < 0.0125 / size


@pytest.mark.parametrize(("size", "bound"), [(32, 2.6e-4), (16, 1.6e-3), (8, 8.5e-3)])
def test_closed_form_of_small_sizes_has_the_stated_error(size, bound):
    closed = [theory.expected_density(size, t, method="closed_form") for t in range(16 * size)]
    error = np.abs(closed - exact_curve(size, 16 * size)).max()
    assert 0.9 * bound < error < bound


def test_logistic_mean_field_is_biased():
    size = 784
    t = np.arange(8 * size)
    logistic = 1 / (1 + (size - 1) * np.exp(-2 * t / (size - 1)))
    bias = np.abs(logistic - exact_curve(size, len(t))).max()
    assert 0.13 < bias < 0.14


@pytest.mark.parametrize("size", [1, 2, 5, 100, 1024, 1025, 65_536])
def test_expected_density_never_falls_and_ends_full(size):
    steps = np.unique(np.linspace(0, 40 * size, 2000).astype(int))
    density = np.array([theory.expected_density(size, int(t)) for t in steps])
    assert density[0] == pytest.approx(1 / size, rel=1e-5)
    assert np.diff(density).min() >= -1e-15
    assert density[-1] == pytest.approx(1.0, abs=1e-15)
    assert density.max() <= 1.0


# --- the number of rotations ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "density", "first", "closest"),
    [
        (100, 0.05, 84, 84),
        (100, 0.14, 144, 144),
        (100, 0.5, 252, 251),
        (100, 0.99, 542, 541),
        (784, 0.1, 1786, 1786),
    ],
)
def test_known_rotation_counts(size, density, first, closest):
    curve = exact_curve(size, 2 * first)
    assert int(np.argmax(curve >= density)) == first
    assert int(np.argmin(np.abs(curve - density))) == closest
    assert theory.num_rotations(size, density) == closest


@given(st.integers(2, 300), st.floats(0, 1, exclude_max=True))
def test_no_other_number_of_rotations_is_closer(size, fraction):
    density = 1 / size + fraction * (1 - 1 / size)
    if density < 1.0:
        t = theory.num_rotations(size, density)
        error = abs(theory.expected_density(size, t) - density)
        for other in {max(t - 1, 0), t + 1}:
            assert error <= abs(theory.expected_density(size, other) - density)


@pytest.mark.parametrize("size", [2, 3, 64, 784, 1024, 2048, 65_536, 10**7])
def test_inverse_undoes_forward(size):
    for per_coordinate in (0, 0.001, 0.3, 1.0, 2.5, 4.0):
        t = round(per_coordinate * size)
        density = theory.expected_density(size, t)
        if density < 1.0:
            assert theory.num_rotations(size, density) == t


@pytest.mark.parametrize("size", SIZES)
def test_closed_form_inverse_differs_from_the_exact_one_at_near_ties_only(size):
    curve = exact_curve(size, 8 * size)
    for density in np.linspace(1 / size, 0.99, 200):
        exact = theory.num_rotations(size, density)
        closed = theory.num_rotations(size, density, method="closed_form")
        # Where the wanted density falls among the exact ones, in rotations.
        position = np.interp(density, curve, np.arange(len(curve)))
        assert abs(closed - position) < 0.57
        assert exact == closed or 0.43 < abs(exact - position) < 0.5 + 0.5 / size


@given(st.sampled_from([2, 10, 784, 4096]), st.floats(0, 0.98), st.floats(0, 0.98))
def test_denser_needs_no_fewer_rotations(size, one, other):
    low, high = (1 / size + f * (1 - 1 / size) for f in sorted((one, other)))
    assert theory.num_rotations(size, low) <= theory.num_rotations(size, high)


@pytest.mark.parametrize("size", [2, 3, 100, 5000])
def test_full_density_takes_the_mean_time_of_absorption(size):
    # The sum of the mean waiting times 1 / P(k -> k + 1).
    waiting = sum(size * (size - 1) / (2 * k * (size - k)) for k in range(1, size))
    assert theory.num_rotations(size, 1.0) == round(waiting)
    assert waiting == pytest.approx((size - 1) * (special.digamma(size) + np.euler_gamma))


def test_mean_density_at_the_time_of_absorption_is_below_one():
    density = theory.expected_density(100, theory.num_rotations(100, 1.0))
    assert 0.98 < density < 0.99
    assert theory.num_rotations(100, 0.999) > theory.num_rotations(100, 1.0)


@pytest.mark.parametrize("size", [100, 4096])
def test_densities_next_to_the_ends_are_inverted(size):
    assert theory.num_rotations(size, 1 / size) == 0
    assert theory.num_rotations(size, np.float32(1 / size)) == 0
    last = theory.num_rotations(size, np.nextafter(1.0, 0.0))
    assert theory.expected_density(size, last) == pytest.approx(1.0, abs=1e-15)


def test_one_coordinate_has_no_plane():
    assert theory.expected_density(1, 0) == theory.expected_density(1, 5) == 1.0
    assert theory.expected_density(1, 5, method="closed_form") == 1.0
    assert theory.num_rotations(1, 1.0) == 0
    np.testing.assert_array_equal(theory.nonzeros_distribution(1, 5), [0.0, 1.0])


# --- the smallest density ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (3, 3, 16, 64), (2, 5, 4), (1, 9)])
@pytest.mark.parametrize("column_axis", [-1, 0])
def test_min_density_is_one_nonzero_for_each_vector(shape, column_axis):
    matrix = np.moveaxis(np.empty(shape), column_axis, -1).reshape(-1, shape[column_axis])
    partial_identity = np.eye(*matrix.shape)
    assert theory.min_density(shape, column_axis=column_axis) == partial_identity.mean()


def test_min_density_is_accepted_and_less_is_not():
    smallest = theory.min_density((30, 70))
    assert theory.num_rotations(70, smallest) == 0
    with refuses("density=0.01", "[0.0142857, 1]"):
        theory.num_rotations(70, 0.7 * smallest + 1e-9)


def test_min_density_of_an_empty_matrix_is_one():
    assert theory.min_density((0, 5)) == theory.min_density((5, 0)) == 1.0


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: theory.num_rotations(0, 0.5), ["size=0"]),
        (lambda: theory.num_rotations(10, 0.0), ["density=0.0"]),
        (lambda: theory.num_rotations(10, 1.5), ["density=1.5"]),
        (lambda: theory.num_rotations(10, math.nan), ["density=nan"]),
        (lambda: theory.num_rotations(10, 0.05), ["density=0.05", "[0.1, 1]"]),
        (lambda: theory.num_rotations(10, 0.5, method="simple"), ["method='simple'"]),
        (lambda: theory.expected_density(10, -1), ["num_rotations=-1"]),
        (lambda: theory.expected_density(10, 2.5), ["num_rotations=2.5"]),
        (lambda: theory.expected_density(10, 2, method="fast"), ["method='fast'"]),
        (lambda: theory.nonzeros_distribution(0, 3), ["size=0"]),
        (
            lambda: theory.nonzeros_distribution(65_536, 10**6),
            ["num_rotations=1000000", "size=65536", "method='closed_form'"],
        ),
        (
            lambda: theory.expected_density(65_536, 10**6, method="exact"),
            ["num_rotations=1000000", "method='closed_form'"],
        ),
        (lambda: theory.num_rotations(100_000, 0.1, method="exact"), ["size=100000"]),
        (lambda: theory.min_density((5,)), ["shape=(5,)"]),
        (lambda: theory.min_density((5, 4), column_axis=2), ["column_axis=2"]),
        (lambda: jax.jit(lambda d: theory.num_rotations(10, d))(0.5), ["density=", "traced"]),
    ],
)
def test_what_has_no_meaning_is_refused(call, named):
    with refuses(*named):
        call()


@pytest.mark.parametrize("size", [64, 300, 1024])
def test_both_methods_invert_alike(size):
    for density in (2 / size, 0.1, 0.5, 0.95):
        exact = theory.num_rotations(size, density, method="exact")
        assert abs(theory.num_rotations(size, density, method="closed_form") - exact) <= 1


def test_a_distribution_of_more_entries_than_it_returns_is_refused():
    with refuses("size", 2**25 + 1):
        theory.nonzeros_distribution(2**25 + 1, 0)
