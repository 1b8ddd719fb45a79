"""Laws of the mean-field theory; oracles: closed forms, adaptive quadrature, random matrices."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from eoi_jax import mean_field
from eoi_jax.mean_field import Activation

SQRT2 = math.sqrt(2)
# Independent of the module's table: (function, derivative, kinks).
ORACLES = {
    "linear": (lambda x: x, lambda x: 1.0, []),
    "tanh": (math.tanh, lambda x: 1 - math.tanh(x) ** 2, []),
    "hard_tanh": (lambda x: max(-1.0, min(1.0, x)), lambda x: float(-1 < x < 1), [-1, 1]),
    "relu": (lambda x: max(x, 0.0), lambda x: float(x > 0), [0]),
    "leaky_relu": (lambda x: x if x > 0 else 0.01 * x, lambda x: 1.0 if x > 0 else 0.01, [0]),
    "selu": (
        lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * (math.exp(x) - 1)),
        lambda x: 1.0507009873554805 * (1 if x > 0 else 1.6732632423543772 * math.exp(x)),
        [0],
    ),
    "gelu": (
        lambda x: x * (1 + math.erf(x / SQRT2)) / 2,
        lambda x: (
            (1 + math.erf(x / SQRT2)) / 2 + x * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        ),
        [],
    ),
}
# Every kind of law: atoms only, an atom at zero, a density only, a density and an atom inside it.
CASES = [("relu", 1.0), ("hard_tanh", 0.5), ("tanh", 0.0259), ("tanh", 1.0)]
CASES += [("leaky_relu", 1.0), ("selu", 1.0), ("gelu", 1.0)]


def mean_square(function, kinks, q):
    """Expectation of the square by adaptive quadrature between kinks."""
    scale = math.sqrt(q)
    ends = sorted({-9.0, 0.0, 9.0, *[k / scale for k in kinks if abs(k) < 9 * scale]})
    weight = lambda z: math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    integrand = lambda z: function(scale * z) ** 2 * weight(z)  # noqa: E731
    return sum(
        integrate.quad(integrand, *piece, epsabs=1e-15, epsrel=1e-13, limit=500)[0]
        for piece in itertools.pairwise(ends)
    )


def haar(rng, size):
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return q * np.sign(np.diag(r))


@functools.cache
def random_layers(depth, size, seed):
    """An order of the slopes and a Haar matrix for each layer, the same for all activations."""
    rng = np.random.default_rng(seed)
    return [(rng.permutation(size), haar(rng, size)) for _ in range(depth)]


def model_singular_values(name, depth, gain, q, size, seed):
    """Singular values of a product of diagonal and Haar matrices: the law of the theory itself.

    The preactivations are the Gaussian's quantiles in random order, which is the same law in the
    limit and fluctuates less.
    """
    z = special.ndtri((np.arange(size) + 0.5) / size)
    slopes = np.array([ORACLES[name][1](math.sqrt(q) * value) for value in z])
    jacobian = np.eye(size)
    for order, weight in random_layers(depth, size, seed):
        jacobian = slopes[order][:, None] * gain * (weight @ jacobian)
    return np.sort(np.linalg.svd(jacobian, compute_uv=False))


def wasserstein(values, spectrum):
    fractions = (np.arange(values.size) + 0.5) / values.size
    return np.abs(np.sort(values) - spectrum.quantile(fractions)).mean()


def critical(name, q):
    return mean_field.critical_gain(name, q)


# --- fixed points and criticality -------------------------------------------------------------


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("q", [1e-6, 0.0259, 1.0, 30.0])
def test_expectations_are_those_of_adaptive_quadrature(name, q):
    function, derivative, kinks = ORACLES[name]
    chi = 1.3**2 * mean_square(derivative, kinks, q)
    assert mean_field.chi(name, 1.3, q) == pytest.approx(chi, rel=1e-11)
    gain = mean_field.critical_gain(name, q)
    assert mean_field.chi(name, gain, q) == pytest.approx(1.0, rel=1e-14)
    rest = q - gain**2 * mean_square(function, kinks, q)
    if rest > -1e-12 * q:
        sigma_w, sigma_b = mean_field.critical_line(name, q)
        assert sigma_w == gain
        assert sigma_b**2 == pytest.approx(rest, abs=3e-12 * q)


@pytest.mark.parametrize("q", [0.02, 0.5, 4.0, 1e4])
def test_hard_tanh_has_the_closed_forms_of_the_error_function(q):
    inside = math.erf(1 / math.sqrt(2 * q))
    square = q * inside - math.sqrt(2 * q / math.pi) * math.exp(-1 / (2 * q)) + 1 - inside
    sigma_w, sigma_b = mean_field.critical_line("hard_tanh", q)
    assert sigma_w == pytest.approx(inside**-0.5, rel=1e-12)
    assert sigma_b**2 == pytest.approx(q - square / inside, rel=1e-9, abs=1e-12 * q)


@pytest.mark.parametrize(
    ("slope", "name"), [(1.0, "identity"), (0.5, "relu"), (0.50005, "leaky_relu")]
)
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
def test_homogeneous_activations_have_a_linear_length_map(slope, name, fraction):
    sigma_w = math.sqrt(fraction / slope)
    q = mean_field.fixed_point(name, sigma_w, 0.3)
    assert q == pytest.approx(0.09 / (1 - fraction), rel=1e-9)
    assert mean_field.fixed_point(name, sigma_w, 0.0) == 0.0
    for variance in (0.0, 1e-3, 7.0):
        assert mean_field.chi(name, sigma_w, variance) == pytest.approx(fraction, rel=1e-12)


def test_tanh_is_critical_at_the_published_deviations():
    # The 1000-layer tanh networks use (1.0247, 0.00448): both are standard deviations.
    sigma_w, sigma_b = mean_field.critical_line("tanh", 0.0259)
    assert sigma_w == pytest.approx(1.024676, abs=1e-6)
    assert sigma_b == pytest.approx(0.0044787, abs=1e-7)
    q = mean_field.fixed_point("tanh", 1.0247, 0.00448)
    assert q == pytest.approx(0.02593, abs=1e-5)
    assert abs(mean_field.chi("tanh", 1.0247, q) - 1) < 2e-6
    # Read as variances, either or both, they are not critical.
    for pair in [(1.0247, 0.00448**0.5), (1.0247**0.5, 0.00448), (1.0247**0.5, 0.00448**0.5)]:
        variance = mean_field.fixed_point("tanh", *pair)
        assert abs(mean_field.chi("tanh", pair[0], variance) - 1) > 1e-3


@settings(max_examples=10)
@given(st.sampled_from(["tanh", "hard_tanh"]), st.floats(-1.3, 0.7))
def test_critical_line_has_its_variance_as_the_fixed_point(name, exponent):
    q = 10.0**exponent
    assert mean_field.fixed_point(name, *mean_field.critical_line(name, q)) == pytest.approx(
        q, rel=1e-7
    )


@pytest.mark.parametrize("pair", [(0.9, 0.0), (1.5, 0.1), (3.0, 0.0), (1.0, 1.0)])
def test_deep_layers_settle_at_the_fixed_point(pair):
    q = 10.0
    for _ in range(400):
        q = pair[0] ** 2 * mean_square(math.tanh, [], max(q, 1e-12)) + pair[1] ** 2
    assert mean_field.fixed_point("tanh", *pair) == pytest.approx(q, rel=1e-8, abs=1e-10)


def test_selu_keeps_unit_variance():
    assert mean_field.fixed_point("selu", 1.0, 0.0) == pytest.approx(1.0, rel=1e-12)


def test_small_signals_see_the_slope_at_zero_from_both_sides():
    assert mean_field.critical_gain("tanh") == mean_field.critical_gain("hard_tanh") == 1.0
    assert mean_field.critical_gain("gelu") == pytest.approx(2.0, rel=1e-14)
    assert mean_field.critical_gain("relu") == pytest.approx(SQRT2, rel=1e-14)


def test_functions_are_taken_for_what_they_are():
    q = 0.7
    for function in (np.tanh, Activation(np.tanh, lambda x: 1 / np.cosh(x) ** 2)):
        assert mean_field.chi(function, 1.0, q) == pytest.approx(
            mean_field.chi("tanh", 1.0, q), rel=1e-10
        )
    kinked = Activation(lambda x: np.clip(x, -1, 1), lambda x: 1.0 * (abs(x) < 1), (-1.0, 1.0))
    assert mean_field.critical_line(kinked, q) == mean_field.critical_line("hard_tanh", q)


# --- moments ----------------------------------------------------------------------------------


# Functions without a derivative: (function of arrays, derivative of a number, kinks).
UNDECLARED = {
    "hard_tanh": (jax.nn.hard_tanh, lambda x: float(-1 < x < 1), [-1, 1]),
    "hard_swish": (
        jax.nn.hard_swish,
        lambda x: (
            np.clip((2 * x + 3) / 6, *((0, 0), (1, 1))[x > 0]) if abs(x) > 3 else (2 * x + 3) / 6
        ),
        [-3, 3],
    ),
    "celu": (lambda x: jax.nn.celu(x, 0.5), lambda x: 1.0 if x > 0 else math.exp(2 * x), [0]),
    "elu": (lambda x: jax.nn.elu(x, 3.0), lambda x: 1.0 if x > 0 else 3 * math.exp(x), [0]),
    "softshrink": (
        lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0),
        lambda x: float(abs(x) > 0.5),
        [-0.5, 0.5],
    ),
    "off_grid": (lambda x: np.maximum(x, 0.3137) + x / 5, lambda x: 0.2 + (x > 0.3137), [0.3137]),
    "slight": (lambda x: x + 0.02 * np.maximum(x, 0.7), lambda x: 1 + 0.02 * (x > 0.7), [0.7]),
    "hat": (
        lambda x: np.maximum(0.01 - np.abs(x - 0.2), 0),
        lambda x: float(abs(x - 0.2) < 0.01),
        [0.19, 0.21],
    ),
    "two_close": (
        lambda x: np.abs(x - 0.1) + 2 * np.abs(x - 0.1001),
        lambda x: np.sign(x - 0.1) + 2 * np.sign(x - 0.1001),
        [0.1, 0.1001],
    ),
    "steep": (
        lambda x: np.tanh(1000 * x),
        lambda x: 1000 / math.cosh(min(abs(1000 * x), 300)) ** 2,
        [-0.02, -0.001, 0.001, 0.02],
    ),
    "infinite_curvature": (lambda x: np.abs(x) ** 1.5, lambda x: 1.5 * abs(x) ** 0.5, [0]),
    "cancelling": (
        lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
        lambda x: 1.0 if x > 0 else math.exp(x),
        [0],
    ),
}


@pytest.mark.parametrize("q", [0.3, 9.0])
@pytest.mark.parametrize("name", UNDECLARED)
def test_kinks_that_are_not_declared_are_found(name, q):
    function, derivative, kinks = UNDECLARED[name]
    expected = mean_square(derivative, kinks, q) ** -0.5
    assert mean_field.critical_gain(function, q) == pytest.approx(expected, rel=1e-7)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(1e-2, 10))
@settings(max_examples=30)
def test_a_kink_is_found_wherever_it_is(kink, jump, q):
    """E[φ'²] of x + jump * max(x - kink, 0) has a closed form."""
    above = special.ndtr(-kink / math.sqrt(q))
    expected = 1 - above + above * (1 + jump) ** 2
    assume(expected > 1e-6)  # all but flat
    found = mean_field.chi(lambda x: x + jump * np.maximum(x - kink, 0), 1.0, q)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softplus", "mish", "silu", "gelu"])
@pytest.mark.parametrize("q", [0.0, 1.0, 1e4])
def test_smooth_functions_of_jax_have_the_gain_of_their_gradient(name, q):
    function = getattr(jax.nn, name)
    derivative = jax.vmap(jax.vmap(jax.grad(function)))
    declared = mean_field.critical_gain(Activation(function, derivative), q)
    assert mean_field.critical_gain(function, q) == pytest.approx(declared, rel=1e-6)


@pytest.mark.slow
def test_a_function_without_a_derivative_has_the_laws_of_its_name():
    for name in ("relu", "hard_tanh"):
        function = getattr(jax.nn, name)
        for call in (
            lambda f: mean_field.fixed_point(f, 1.1, 0.3),
            lambda f: mean_field.critical_line(f, 0.7),
            lambda f: mean_field.predicted_moments(f, 3, 1.2, 0.7),
            lambda f: mean_field.predicted_singular_values(f, 2, 1.2, 0.7).moments(),
            lambda f: mean_field.predicted_singular_values(f, 2, 1.2, 0.7).atom_masses,
        ):
            np.testing.assert_allclose(call(function), call(name), rtol=1e-6)


def test_a_gain_is_a_constant_of_a_compiled_function():
    gain = jax.jit(lambda x: x * mean_field.critical_gain(jax.nn.hard_tanh, 0.7))(1.0)
    assert gain == pytest.approx(mean_field.critical_gain("hard_tanh", 0.7), rel=1e-6)


def test_the_fixed_point_of_a_function_whose_kinks_are_far_apart():
    kinked = Activation(lambda x: np.clip(x, -0.3137, 2.71), lambda x: 0 * x, (-0.3137, 2.71))
    found = mean_field.fixed_point(kinked.function, 1.3, 0.4)
    assert found == pytest.approx(mean_field.fixed_point(kinked, 1.3, 0.4), rel=1e-8)


@pytest.mark.parametrize(
    "function",
    [
        np.round,
        np.sign,
        lambda x: x + np.sign(x),
        lambda x: x + 1e-3 * (x > 0.3137),
        lambda x: np.sqrt(np.abs(x)),
        lambda x: np.cbrt(x) ** 2,
        lambda x: np.log(np.abs(x) + 1e-300),
    ],
)
def test_what_has_no_bounded_slope_is_refused(function):
    for q in (0.3, 9.0):
        with refuses("activation=", "jumps", "kinks"):
            mean_field.critical_gain(function, q)


def test_a_declared_jump_leaves_the_slopes_beside_it():
    for function in (lambda x: 2 * x + np.sign(x), lambda x: 2 * x + (x > 0.3137)):
        activation = Activation(function, kinks=(0.0, 0.3137))
        assert mean_field.critical_gain(activation, 1.0) == pytest.approx(0.5, rel=1e-9)


def test_a_function_that_computes_in_float32_has_its_gain_to_a_thousandth():
    for name in ("relu", "tanh", "selu"):
        function = getattr(jax.nn, name)
        narrow = lambda x, f=function: f(jnp.asarray(x, jnp.float32))  # noqa: E731
        expected = mean_field.critical_gain(name, 1.0)
        assert mean_field.critical_gain(narrow, 1.0) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("activation", "named"),
    [
        (5, ["activation=5", "function"]),
        (None, ["activation=None"]),
        (["relu"], ["activation=['relu']"]),
        (Activation(np.tanh, 1.0), ["activation=1.0"]),
        (Activation(np.tanh, kinks=("a",)), ["activation.kinks='a'"]),
        (math.tanh, ["activation=", "arrays"]),
        (np.sum, ["activation=", "shape ()"]),
        (jax.nn.softmax, ["activation=", "elementwise"]),
        (lambda x: 1j * x, ["activation=", "complex128"]),
        (lambda x: jnp.asarray(x, jnp.bfloat16), ["activation=", "bfloat16"]),
        (lambda x: np.where(np.abs(x) > 3, np.nan, x), ["activation=", "finite"]),
        (lambda x: np.sin(1e6 * x), ["activation=", "bends"]),
        (lambda x: np.exp(9 * x), ["q=1.0", "deviations"]),
    ],
)
def test_what_is_no_activation_is_refused(activation, named):
    with refuses(*named):
        mean_field.critical_gain(activation, 1.0)


def test_slopes_that_change_at_every_scale_have_no_limit_at_zero():
    with refuses("activation="):
        mean_field.critical_gain(lambda x: np.abs(x) ** 1.5, 0.0)
    with refuses("q=0.0", "slope"):
        mean_field.critical_gain(lambda x: np.maximum(x, 0.3137), 0.0)


@pytest.mark.parametrize(("name", "q"), CASES)
@pytest.mark.parametrize("depth", [1, 3, 200])
def test_first_moments_are_those_of_the_published_formula(name, q, depth):
    _, derivative, kinks = ORACLES[name]
    mu = [mean_square(lambda x, k=k: derivative(x) ** k, kinks, q) for k in (1, 2)]
    first = (1.1**2 * mu[0] / 1.21) ** depth
    moments = mean_field.predicted_moments(name, depth, 1.0, q)
    assert moments[0] == pytest.approx(first, rel=1e-9)
    assert moments[1] == pytest.approx(first**2 * (1 + depth * (mu[1] / mu[0] ** 2 - 1)), rel=1e-9)


def test_moments_of_one_layer_are_those_of_its_slopes():
    _, derivative, _ = ORACLES["tanh"]
    exact = [
        1.2 ** (2 * k) * mean_square(lambda x, k=k: derivative(x) ** k, [], 0.8)
        for k in range(1, 13)
    ]
    moments = mean_field.predicted_moments("tanh", 1, 1.2, 0.8, count=12)
    np.testing.assert_allclose(moments, exact, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "q", "p"), [("relu", 1.0, 0.5), ("hard_tanh", 0.5, math.erf(1.0))]
)
@pytest.mark.parametrize("depth", [2, 5, 50])
def test_moments_of_projections_have_a_closed_form(name, q, p, depth):
    # Lagrange inversion of x = p^(L-1) w^L / (w - 1 + p)^(L-1), with binomials alone.
    def binomial(top, k):
        return math.comb(top, k) if top >= 0 else (-1) ** k * math.comb(k - top - 1, k)

    exact = [
        sum(
            binomial(n * depth, j) * p ** (n * depth - j) * binomial(n - n * depth, n - 1 - j)
            for j in range(n)
        )
        / n
        / p ** (n * depth)
        for n in range(1, 7)
    ]
    moments = mean_field.predicted_moments(name, depth, critical(name, q), q, count=6)
    np.testing.assert_allclose(moments, exact, rtol=1e-9)


# --- spectra ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "q"), CASES)
@pytest.mark.parametrize("depth", [1, 5])
def test_spectrum_is_a_law_with_the_exact_moments(name, q, depth):
    spectrum = mean_field.predicted_singular_values(name, depth, critical(name, q), q)
    grid, density, below, _, masses = spectrum
    assert (np.diff(grid) > 0).all()
    assert (density >= 0).all()
    assert (np.diff(below) >= 0).all()
    assert (masses > 0).all()
    assert below[-1] + masses.sum() == pytest.approx(1.0, abs=1e-6)
    u = np.linspace(0, 1, 2001)
    quantiles = spectrum.quantile(u)
    assert (np.diff(quantiles) >= 0).all()
    assert (spectrum.cdf(quantiles) >= u - 1e-6).all()
    assert (np.diff(spectrum.cdf(np.linspace(0, 1.1 * quantiles[-1], 999))) >= 0).all()
    exact = mean_field.predicted_moments(name, depth, critical(name, q), q)
    np.testing.assert_allclose(spectrum.moments(), exact, rtol=1e-3)
    if depth > 1:
        mass = np.trapezoid(grid * density, np.log(grid))
        assert mass + masses.sum() == pytest.approx(1.0, abs=3e-4)


def test_density_is_the_slope_of_the_distribution_function():
    grid, density, below, _, _ = mean_field.predicted_singular_values("gelu", 5, 1.3, 0.4)
    inner = (below > 0.01) & (below < 0.99)
    cells = np.diff(below[inner]) / np.diff(grid[inner])
    middle = (density[inner][1:] + density[inner][:-1]) / 2
    np.testing.assert_allclose(cells, middle, rtol=1e-2)


def test_two_relu_layers_have_the_arcsine_law():
    grid, density, below, atoms, masses = mean_field.predicted_singular_values(
        "relu", 2, SQRT2, 3.0
    )
    np.testing.assert_allclose(below, np.arcsin(grid / 2) / math.pi, atol=1e-7)
    inner = grid < 1.99
    exact = 1 / (math.pi * np.sqrt(4 - grid[inner] ** 2))
    np.testing.assert_allclose(density[inner], exact, rtol=1e-6)
    np.testing.assert_allclose((atoms, masses), ([0.0], [0.5]))


@pytest.mark.parametrize("depth", [3, 10, 100])
def test_largest_singular_value_of_relu_layers(depth):
    edge = math.sqrt(depth**depth / (depth - 1) ** (depth - 1))
    spectrum = mean_field.predicted_singular_values("relu", depth, SQRT2, 1.0)
    assert spectrum.quantile(1.0) == pytest.approx(edge, rel=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 5, 7])
def test_hard_tanh_keeps_an_atom_until_its_depth(depth):
    q, p = 0.5, math.erf(1.0)
    spectrum = mean_field.predicted_singular_values("hard_tanh", depth, 1.1, q)
    kept = 1 - depth * (1 - p)
    expected = ([0.0, 1.1**depth], [1 - p, kept]) if kept > 0 else ([0.0], [1 - p])
    np.testing.assert_allclose((spectrum.atoms, spectrum.atom_masses), expected, rtol=1e-9)
    assert spectrum.cdf(0.0) == pytest.approx(1 - p)
    assert (spectrum.mass_below.max() == 0) == (depth == 1)


@pytest.mark.parametrize(("name", "gain", "q"), [("linear", 0.7, 2.0), ("tanh", 0.7, 0.0)])
@pytest.mark.parametrize("depth", [1, 40])
def test_linear_layers_have_one_singular_value(name, gain, q, depth):
    spectrum = mean_field.predicted_singular_values(name, depth, gain, q)
    np.testing.assert_allclose(spectrum.atoms, [gain**depth])
    np.testing.assert_allclose(spectrum.atom_masses, [1.0])
    np.testing.assert_allclose(spectrum.quantile([0.0, 0.3, 1.0]), gain**depth)
    np.testing.assert_allclose(spectrum.cdf([0.9 * gain**depth, 1.1 * gain**depth]), [0.0, 1.0])


def test_gain_scales_the_spectrum():
    one = mean_field.predicted_singular_values("tanh", 6, 1.0, 0.3)
    other = mean_field.predicted_singular_values("tanh", 6, 1.3, 0.3)
    np.testing.assert_allclose(other.grid, 1.3**6 * one.grid, rtol=1e-10)
    np.testing.assert_allclose(other.density * 1.3**6, one.density, rtol=1e-10)


@pytest.mark.parametrize(("name", "q"), [("tanh", 0.0259), ("tanh", 1e-4), ("hard_tanh", 0.1)])
def test_a_thousand_layers(name, q):
    gain = critical(name, q)
    spectrum = mean_field.predicted_singular_values(name, 1000, gain, q)
    exact = mean_field.predicted_moments(name, 1000, gain, q)
    np.testing.assert_allclose(exact[0], 1.0, rtol=1e-9)
    np.testing.assert_allclose(spectrum.moments(), exact, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "q", "depth"),
    [
        ("tanh", 1e-12, 50),
        ("tanh", 1e-9, 2),
        ("tanh", 1e4, 2),
        ("gelu", 100.0, 20),
        ("hard_tanh", 0.02, 50),
        ("hard_tanh", 100.0, 5),
        ("selu", 1e-6, 4),
    ],
)
def test_extreme_variances_are_laws_too(name, q, depth):
    gain = critical(name, q)
    spectrum = mean_field.predicted_singular_values(name, depth, gain, q)
    assert spectrum.mass_below[-1] + spectrum.atom_masses.sum() == pytest.approx(1.0, abs=2e-6)
    exact = mean_field.predicted_moments(name, depth, gain, q)
    np.testing.assert_allclose(spectrum.moments(), exact, rtol=5e-3)


def test_spectrum_concentrates_as_signals_shrink():
    spreads = [
        np.ptp(
            mean_field.predicted_singular_values("tanh", 100, critical("tanh", q), q).quantile(
                [0.0, 1.0]
            )
        )
        for q in (1e-1, 1e-3, 1e-5, 1e-7)
    ]
    # The deviation of J Jᵀ is about sqrt(8 L) q.
    assert (np.diff(np.log10(spreads)) < -1).all()
    assert spreads[-1] < 1e-4


# --- random networks --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "q", "depth", "bound"),
    [
        ("tanh", 0.0259, 1, 5e-4),
        ("hard_tanh", 0.5, 1, 4e-3),
        *[(name, q, 4, 8e-3) for name, q in CASES],
        ("tanh", 0.0259, 10, 2e-3),
        ("hard_tanh", 0.5, 10, 2.5e-2),
        ("relu", 1.0, 10, 1.5e-2),
    ],
)
def test_random_matrices_have_the_predicted_singular_values(name, q, depth, bound):
    gain = critical(name, q)
    values = model_singular_values(name, depth, gain, q, 400, seed=depth)
    spectrum = mean_field.predicted_singular_values(name, depth, gain, q)
    assert wasserstein(values, spectrum) < bound


@pytest.mark.slow
def test_tanh_network_has_the_predicted_singular_values():
    size, depth = 400, 20
    sigma_w, sigma_b = mean_field.critical_line("tanh", 0.0259)
    rng = np.random.default_rng(7)
    preactivation = rng.standard_normal(size)
    preactivation *= math.sqrt(0.0259 / (preactivation**2).mean())
    jacobian, variances = sigma_w * np.diag(1 - np.tanh(preactivation) ** 2), [0.0259]
    for _ in range(depth - 1):
        weight = sigma_w * haar(rng, size)
        preactivation = weight @ np.tanh(preactivation) + sigma_b * rng.standard_normal(size)
        variances.append((preactivation**2).mean())
        jacobian = (1 - np.tanh(preactivation) ** 2)[:, None] * (weight @ jacobian)
    values = np.linalg.svd(jacobian, compute_uv=False)
    # Nothing but the law of large numbers holds the variance of a finite layer.
    assert np.ptp(variances) < 0.25 * 0.0259
    q = float(np.mean(variances))
    spectrum = mean_field.predicted_singular_values("tanh", depth, sigma_w, q)
    assert wasserstein(values, spectrum) < 4e-3


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: mean_field.fixed_point("tanh", 0.0, 0.1), ["sigma_w=0.0", "(0, inf)"]),
        (lambda: mean_field.fixed_point("tanh", 1.0, -0.1), ["sigma_b=-0.1", "[0, inf)"]),
        (lambda: mean_field.fixed_point("swish", 1.0, 0.1), ["activation='swish'"]),
        (lambda: mean_field.fixed_point("relu", 1.5, 0.1), ["sigma_w=1.5", "relu", "grow"]),
        (lambda: mean_field.fixed_point("relu", SQRT2, 0.1), ["sigma_w=1.41", "relu", "grow"]),
        (lambda: mean_field.fixed_point("relu", SQRT2, 0.0), ["sigma_w=1.41", "every q"]),
        (lambda: mean_field.fixed_point("linear", 1.0, 0.0), ["sigma_w=1.0", "every q"]),
        (lambda: mean_field.chi("tanh", 1.0, -1.0), ["q=-1.0"]),
        (lambda: mean_field.chi(np.zeros_like, 1.0, 1.0), ["q=1.0", "slope"]),
        (lambda: mean_field.critical_line("tanh", 0.0), ["q=0.0", "(0, inf)"]),
        (lambda: mean_field.critical_line(lambda x: x + 2, 1.0), ["q=1.0", "critical"]),
        (lambda: mean_field.predicted_moments("tanh", 0, 1.0, 1.0), ["depth=0"]),
        (lambda: mean_field.predicted_moments("tanh", 1, 1.0, 1.0, 13), ["count=13"]),
        (lambda: mean_field.predicted_singular_values("tanh", 2.5, 1.0, 1.0), ["depth=2.5"]),
        (lambda: mean_field.predicted_singular_values("tanh", 2, math.nan, 1.0), ["sigma_w=nan"]),
        (lambda: mean_field.predicted_singular_values("tanh", 999, 9.0, 1.0), ["sigma_w=9.0"]),
        (lambda: jax.jit(lambda q: mean_field.chi("tanh", 1.0, q))(0.5), ["q=", "static"]),
    ],
)
def test_what_has_no_meaning_is_refused(call, named):
    with refuses(*named):
        call()
