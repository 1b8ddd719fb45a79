"""Mean-field theory of deep random networks: critical gains and the spectra that they give.

A wide layer ``h' = W φ(h) + b``, ``W`` of variance ``σ_w² / fan_in`` and ``b ~ N(0, σ_b²)``, has
Gaussian preactivations of variance ``q' = σ_w² E[φ(√q z)²] + σ_b²``, ``z ~ N(0, 1)``. Its Jacobian
has the mean squared singular value ``χ = σ_w² E[φ'(√q z)²]``: gradients vanish with depth below 1
and explode above. Nothing is traced: numbers in and out are float64, expectations good to 1e-12.

Poole et al., NeurIPS 2016, arXiv 1606.05340; Schoenholz et al., ICLR 2017, 1611.01232;
Pennington, Schoenholz and Ganguli, NeurIPS 2017, 1711.04735, and AISTATS 2018, 1802.09979.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from eoi_jax._internal import checks, free_power

__all__ = ["Activation", "PredictedSpectrum", "chi", "critical_gain", "critical_line"]
__all__ += ["fixed_point", "predicted_moments", "predicted_singular_values"]

Floats: TypeAlias = NDArray[np.float64]
Function: TypeAlias = Callable[[Any], Any]


class Activation(NamedTuple):
    """An activation function that has no name here.

    Attributes:
        function: maps a float64 array to one of its shape, elementwise.
        derivative: its derivative; None takes differences, to 1e-10 for smooth functions.
        kinks: where the function or its derivative jumps.
    """

    function: Function
    derivative: Function | None = None
    kinks: tuple[float, ...] = ()


class PredictedSpectrum(NamedTuple):
    """A law of singular values: a density on a grid, and atoms.

    The density can be infinite at an end: integrate with ``mass_below``. Wasserstein-1 distance of
    ``n`` sorted values: ``abs(values - quantile((arange(n) + 0.5) / n)).mean()``.

    Attributes:
        grid: increasing singular values, ``(n,)``; a lone 0 of no mass if there are only atoms.
        density: density at each, ``(n,)``; its integral is one minus the mass of the atoms.
        mass_below: mass of the density, atoms left out, below each, ``(n,)``.
        atoms: increasing singular values that have a mass of their own, ``(k,)``.
        atom_masses: these masses, ``(k,)``.
    """

    grid: Floats
    density: Floats
    mass_below: Floats
    atoms: Floats
    atom_masses: Floats

    def cdf(self, values: float | Floats) -> Floats:
        """Fraction of singular values that are at most ``values``."""
        values = np.asarray(values, np.float64)
        atoms = (self.atom_masses * (self.atoms <= values[..., None])).sum(-1)
        return np.minimum(atoms + np.interp(values, self.grid, self.mass_below, left=0.0), 1.0)

    def quantile(self, fractions: float | Floats) -> Floats:
        """Singular value that this fraction of them, in [0, 1], is at most."""
        return np.asarray(np.interp(fractions, *self._corners()))

    def moments(self, count: int = 2) -> Floats:
        """Means of the squared singular values and of their powers up to ``count``."""
        mass, ends = self._corners()
        powers = 2 * np.arange(1, count + 1)[:, None]
        middles = (ends[1:] + ends[:-1]) / 2
        simpson = (ends[1:] ** powers + 4 * middles**powers + ends[:-1] ** powers) / 6
        return np.asarray(simpson @ np.diff(mass))

    def _corners(self) -> tuple[Floats, Floats]:
        """Masses and values at the corners of the distribution function, both in order."""
        below = (self.atom_masses * (self.atoms < self.grid[:, None])).sum(-1)
        after = self.cdf(self.atoms)
        mass = np.concatenate([self.mass_below + below, after - self.atom_masses, after])
        values = np.concatenate([self.grid, self.atoms, self.atoms])
        order = np.lexsort((mass, values))
        return np.maximum.accumulate(mass[order]), values[order]


ActivationLike: TypeAlias = str | Activation | Function


def fixed_point(activation: ActivationLike, sigma_w: float, sigma_b: float) -> float:
    r"""Variance of the preactivations that deep layers settle at.

    The largest stable fixed point of :math:`q \mapsto \sigma_w^2 \mathbb{E}[\varphi(\sqrt{q}
    z)^2] + \sigma_b^2`; 0 where all signals die.

    Args:
        activation: ``"identity"``, ``"linear"``, ``"tanh"``, ``"hard_tanh"``, ``"relu"``,
            ``"leaky_relu"`` (slope 0.01), ``"selu"``, ``"gelu"`` (with erf), an
            :class:`Activation`, or a smooth function of NumPy arrays.
        sigma_w: ``σ_w``, positive; the ``scale`` of the initializers.
        sigma_b: ``σ_b``, the standard deviation of the biases, at least 0.

    Returns:
        ``q*``: 0, or in [1e-14, 1e12]; to 1e-11 relative.

    Raises:
        ValueError: for an argument outside its range, where no finite fixed point is stable
            (ReLU above ``σ_w = √2``), or where every ``q`` is fixed (ReLU at ``√2``, no biases).

    Example:
        >>> from eoi_jax import mean_field
        >>> round(mean_field.fixed_point("relu", 1.0, 0.5), 6)
        0.5

    Reference:
        Poole et al., NeurIPS 2016: the length map.
    """
    act = _activation(activation)
    sigma_w, sigma_b = _number(sigma_w, "sigma_w"), _number(sigma_b, "sigma_b", zero=True)

    def growth(log_q: float) -> float:
        x, weights = _quadrature(act, math.exp(log_q))
        square = (act.function(x) ** 2 * weights).sum()
        return float(sigma_w**2 * square + sigma_b**2) / math.exp(log_q) - 1.0

    scan = np.linspace(math.log(max(sigma_b**2, 1e-14)), math.log(1e12), 230)
    rates = np.array([growth(log_q) for log_q in scan])
    # Rounding gives a neutral map both signs.
    scan, rates = scan[np.abs(rates) > 1e-12], rates[np.abs(rates) > 1e-12]
    stable = np.flatnonzero((rates[:-1] > 0) & (rates[1:] < 0))
    if stable.size:
        low, high = scan[stable[-1]], scan[stable[-1] + 1]
        return math.exp(optimize.brentq(growth, low, high, xtol=1e-14, rtol=1e-14))
    if rates.size and rates[0] < 0:
        return sigma_b**2
    problem = "lets q grow beyond 1e12" if rates.size else "has every q as a fixed point"
    problem += f" with {activation!r}, outside the values of a finite stable one"
    raise checks.value_error("sigma_w", sigma_w, problem, "Give a smaller value.")


def chi(activation: ActivationLike, sigma_w: float, q: float) -> float:
    r"""Mean squared singular value of one layer's Jacobian.

    Args:
        activation: as in :func:`fixed_point`.
        sigma_w: ``σ_w``, positive.
        q: variance of the preactivations, at least 0; 0 is the limit from above.

    Returns:
        ``χ = σ_w² E[φ'(√q z)²]``; squared gradients grow by this factor a layer.

    Raises:
        ValueError: for an argument outside its range, or an activation of no slope there.

    Example:
        >>> from eoi_jax import mean_field
        >>> round(mean_field.chi("relu", 1.0, 3.0), 6)
        0.5

    Reference:
        Schoenholz et al., ICLR 2017: χ₁.
    """
    slopes, weights = _slopes(activation, q)
    return _number(sigma_w, "sigma_w") ** 2 * float((slopes * weights).sum())


def critical_gain(activation: ActivationLike, q: float = 0.0) -> float:
    r"""Gain at which gradients neither vanish nor explode: χ = 1.

    Args:
        activation: as in :func:`fixed_point`.
        q: variance of the preactivations, at least 0; 0 is the limit from above.

    Returns:
        ``σ_w = E[φ'(√q z)²]^(-1/2)``. :func:`critical_line` adds the biases that hold ``q``.

    Raises:
        ValueError: for an argument outside its range, or an activation of no slope there.

    Example:
        >>> from eoi_jax import mean_field
        >>> round(mean_field.critical_gain("relu"), 6)
        1.414214

    Reference:
        Schoenholz et al., ICLR 2017: χ₁ = 1.
    """
    return 1.0 / math.sqrt(chi(activation, 1.0, q))


def critical_line(activation: ActivationLike, q: float) -> tuple[float, float]:
    r"""Critical standard deviations of weights and biases that have ``q`` as their fixed point.

    .. math:: \sigma_w^2 = 1 / \mathbb{E}[\varphi'(\sqrt{q} z)^2], \qquad
        \sigma_b^2 = q - \sigma_w^2\, \mathbb{E}[\varphi(\sqrt{q} z)^2].

    Args:
        activation: as in :func:`fixed_point`.
        q: variance of the preactivations, positive.

    Returns:
        ``(σ_w, σ_b)``, standard deviations; ``(√2, 0)`` for ReLU at every ``q``.

    Raises:
        ValueError: for an argument outside its range, or where ``σ_b²`` would be negative.

    Example:
        >>> from eoi_jax import mean_field
        >>> "σ_w = {:.4f}, σ_b = {:.5f}".format(*mean_field.critical_line("tanh", 0.0259))
        'σ_w = 1.0247, σ_b = 0.00448'

    Reference:
        Pennington, Schoenholz and Ganguli, NeurIPS 2017: the line (σ_w(q*), σ_b(q*)).
    """
    act, sigma_w, q = _activation(activation), critical_gain(activation, q), _number(q, "q")
    x, weights = _quadrature(act, q)
    rest = q - sigma_w**2 * float((act.function(x) ** 2 * weights).sum())
    if rest < -1e-12 * q:
        problem = f"is outside the variances that {activation!r} can be critical at"
        raise checks.value_error("q", q, problem, f"Biases of variance {rest:.3g} would be needed.")
    # What rounding leaves of a homogeneous activation's 0 is no bias.
    return sigma_w, math.sqrt(rest) if rest > 1e-12 * q else 0.0


def predicted_moments(
    activation: ActivationLike, depth: int, sigma_w: float, q: float, count: int = 2
) -> Floats:
    r"""Moments of the squared singular values of a deep Jacobian, by series of S-transforms.

    The first two, with :math:`\mu_k = \mathbb{E}[\varphi'(\sqrt{q} z)^{2k}]`, are :math:`m_1 =
    (\sigma_w^2 \mu_1)^L` and :math:`m_2 = m_1^2 (1 + L (\mu_2 / \mu_1^2 - 1))`.

    Args:
        activation: as in :func:`fixed_point`.
        depth: ``L``, the number of layers, at least 1.
        sigma_w: ``σ_w``, positive.
        q: variance of the preactivations, at least 0; 0 is the limit from above.
        count: how many moments, in [1, 12].

    Returns:
        ``(count,)``: the means of the eigenvalues of ``J Jᵀ`` and of their powers.

    Raises:
        ValueError: for an argument outside its range, or an activation of no slope there.

    Example:
        >>> from eoi_jax import mean_field
        >>> mean_field.predicted_moments("relu", 3, 2**0.5, 1.0).round(9)
        array([1., 4.])

    Reference:
        Pennington, Schoenholz and Ganguli, AISTATS 2018: σ²_{JJᵀ}, with s₁ = 0.
    """
    (slopes, weights), sigma_w = _slopes(activation, q), _number(sigma_w, "sigma_w")
    depth = checks.integer(depth, low=1, name="depth")
    orders = range(1, checks.integer(count, low=1, high=12, name="count") + 1)
    mean = float((slopes * weights).sum())
    series = np.array([((slopes / mean) ** n * weights).sum() for n in orders])
    # Lagrange inverts ψ(t) = t · series to χ(m), and S = (1 + m) χ(m) / m.
    inverse = np.array([_power(series, -n)[n - 1] / n for n in orders])
    s = inverse + np.append(0.0, inverse[:-1])
    powers = [special.comb(n, np.arange(n)[::-1]) @ _power(s, -n * depth)[:n] / n for n in orders]
    return np.array(powers) * (sigma_w**2 * mean) ** (depth * np.array(orders))


def predicted_singular_values(
    activation: ActivationLike, depth: int, sigma_w: float, q: float
) -> PredictedSpectrum:
    r"""Singular values that theory predicts for a deep Jacobian with Haar orthogonal weights.

    ``J`` is the product of ``D_l W_l`` with ``W_l / σ_w`` orthogonal and ``D_l`` the diagonal of
    ``φ'(√q z)``. For infinite width :math:`S_{JJ^T} = (S_{D^2} / \sigma_w^2)^L`, that is

    .. math:: x\, G_{JJ^T}(x) = w\, G_{D^2}(w), \qquad
        x = \sigma_w^{2L} w\, f^{L-1}, \qquad f = w - 1 / G_{D^2}(w).

    One angle on each half circle of ``w``, root of a monotone function, makes ``x`` real. The mass
    above is :math:`(L\, \mathbb{E} \arg(1 - D^2 / w) + (L - 1) \arg(w\, G_{D^2}(w))) / \pi`. An
    atom ``a`` of ``|φ'|`` of mass ``p`` leaves ``1 - L (1 - p)`` at ``(σ_w a)^L``; ``p`` if 0.
    Quantiles err by about 1e-4 relative; a slope below 1e-50 of the largest counts as 0.

    Args:
        activation: as in :func:`fixed_point`.
        depth: ``L``, the number of layers, at least 1.
        sigma_w: ``σ_w``, positive.
        q: variance of the preactivations, at least 0; 0 is the limit from above.

    Returns:
        A :class:`PredictedSpectrum`.

    Raises:
        ValueError: for an argument outside its range, no slope there, or values beyond float64.

    Example:
        >>> from eoi_jax import mean_field
        >>> spectrum = mean_field.predicted_singular_values("relu", 4, 2**0.5, 1.0)
        >>> spectrum.atoms, spectrum.atom_masses.round(6), round(float(spectrum.quantile(1)), 3)
        (array([0.]), array([0.5]), 3.079)

    Reference:
        Pennington, Schoenholz and Ganguli, NeurIPS 2017 and AISTATS 2018: S-transforms.
    """
    (slopes, weights), sigma_w = _slopes(activation, q), _number(sigma_w, "sigma_w")
    depth = checks.integer(depth, low=1, name="depth")
    # A uniform piece for each panel, of its mean and variance, so that both are exact for the law.
    mass, mean = weights.sum(1), float((slopes * weights).sum())
    slopes = np.where(slopes > 1e-100 * mean, slopes, 0.0)
    log_scale = depth / 2 * math.log(sigma_w**2 * mean)
    if abs(log_scale) > 600:
        problem = f"puts singular values at exp({log_scale:.0f}), outside the range of float64"
        raise checks.value_error("sigma_w", sigma_w, problem, "Give one nearer to critical_gain.")
    flat = np.ptp(slopes, axis=1) == 0
    center = np.where(flat, slopes[:, 0], (slopes * weights).sum(1) / mass) / mean
    variance = ((slopes / mean - center[:, None]) ** 2 * weights).sum(1) / mass
    half = np.where(flat, 0.0, np.minimum(np.sqrt(3 * variance), center))
    (log_x, density, below), atoms, masses = free_power.power(
        center, half, mass / mass.sum(), depth
    )
    log_s, atoms = log_scale + log_x / 2, math.exp(log_scale) * np.sqrt(atoms)
    kept = log_s > -600.0
    if not kept.any():
        return PredictedSpectrum(np.zeros(1), np.zeros(1), np.zeros(1), atoms, masses)
    grid = np.exp(log_s[kept])
    return PredictedSpectrum(grid, 2 * density[kept] / grid, below[kept], atoms, masses)


def _quadrature(activation: Activation, q: float) -> tuple[Floats, Floats]:
    """Nodes √q z and their weights, in panels within which the activation does not bend much."""
    scale = math.sqrt(max(q, 1e-300))  # at q = 0 each side of 0 keeps its sign
    bends = 2.0 ** np.arange(-2, 7)
    cuts = np.concatenate([bends, -bends, np.asarray(activation.kinks, float)]) / scale
    cuts = np.unique(np.append(cuts[np.abs(cuts) < 8.5], np.linspace(-8.5, 8.5, 257)))
    nodes, weights = np.polynomial.legendre.leggauss(8)
    half = np.diff(cuts)[:, None] / 2
    z = cuts[:-1, None] + half * (1 + nodes)
    return scale * z, half * weights * _normal(z)


def _normal(z: Floats) -> Floats:
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _slopes(activation: ActivationLike, q: float) -> tuple[Floats, Floats]:
    """Squared derivatives and weights, an axis of panels and one of nodes within each."""
    f, derivative, _ = act = _activation(activation)
    x, weights = _quadrature(act, _number(q, "q", zero=True))
    if derivative is None:
        slopes = (f(x - 0.002) - 8 * f(x - 0.001) + 8 * f(x + 0.001) - f(x + 0.002)) / 0.012
    else:
        slopes = derivative(x)
    if not slopes.any():
        raise checks.value_error(
            "q", q, f"is outside where {activation!r} has a slope", "Change it."
        )
    return slopes**2, weights


def _activation(value: ActivationLike) -> Activation:
    if isinstance(value, str):
        checks.one_of(value, tuple(_NAMED), name="activation", remedy="Or give a function.")
        return Activation(*_NAMED[value])
    return value if isinstance(value, Activation) else Activation(value)


def _number(value: float, name: str, *, zero: bool = False) -> float:
    number = checks.finite_scalar(value, name)
    if checks.is_traced(number) or number < 0 or (number == 0 and not zero):
        problem = f"is outside the static numbers in {'[' if zero else '('}0, inf)"
        raise checks.value_error(name, value, problem, "Give a float.")
    return float(number)


def _power(series: Floats, exponent: int) -> Floats:
    """Power of a series that starts with 1, to as many terms."""
    power = np.ones(series.size)
    for n in range(1, series.size):
        k = np.arange(1, n + 1)
        power[n] = (k * (exponent + 1) - n) * series[1 : n + 1] @ power[n - k] / n
    return power


_ALPHA = 1.6732632423543772
_NAMED: dict[str, tuple[Any, ...]] = {
    "identity": (lambda x: x, np.ones_like),
    "linear": (lambda x: x, np.ones_like),
    "tanh": (np.tanh, lambda x: np.cosh(x.clip(-350, 350)) ** -2.0),
    "hard_tanh": (lambda x: x.clip(-1, 1), lambda x: 1.0 * (np.abs(x) < 1), (-1.0, 1.0)),
    "relu": (lambda x: x.clip(0), lambda x: 1.0 * (x > 0), (0.0,)),
    "leaky_relu": (lambda x: np.maximum(x, x / 100), lambda x: np.where(x > 0, 1, 0.01), (0.0,)),
    "selu": (
        lambda x: 1.0507009873554805 * np.where(x > 0, x, _ALPHA * np.expm1(x.clip(max=0))),
        lambda x: 1.0507009873554805 * np.where(x > 0, 1, _ALPHA * np.exp(x.clip(max=0))),
        (0.0,),
    ),
    "gelu": (lambda x: x * special.ndtr(x), lambda x: special.ndtr(x) + x * _normal(x)),
}
