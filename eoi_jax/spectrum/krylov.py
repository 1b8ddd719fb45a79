"""Singular values of a Jacobian that is never formed, from its products with vectors.

Use it where the Jacobian of one example is too large to hold or to factorize.

Let ``B`` map the smaller side of the Jacobian to the larger one: ``J``, or its transpose where
``fn`` has fewer outputs than inputs. Golub–Kahan bidiagonalization finds orthonormal bases ``V``
of the smaller side and ``U`` of the larger one, one vector of each in a step, for which
``B V = U R`` with a small upper triangular ``R``. Singular values are then computed from ``R``.

The code avoids two traps. First, the subspace that a start can reach may be exhausted early, for
an isometry after one step: what is left then is rounding, or 0 / 0. Second, the product with the
transpose is a separate program, and equals the transpose only up to rounding, which a thousand
layers amplify. So this product is used only to find directions, and ``R`` is computed from ``B V``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks, spectra, vmap
from eoi_jax._internal.derivatives import linearized
from eoi_jax._internal.keys import threefry_key
from eoi_jax.typing import Array

__all__ = [
    "ExtremeSingularValues",
    "SpectralDensity",
    "extreme_singular_values",
    "spectral_density",
]

# A remainder of fewer units of rounding than this has no direction.
_ROUNDING = 10

_Product: TypeAlias = Callable[[Array], Array]


class ExtremeSingularValues(NamedTuple):
    """The ends of the spectrum of each example's Jacobian, from :func:`extreme_singular_values`.

    All four are arrays of shape ``(batch,)``.

    Attributes:
        largest: A lower bound of the largest singular value.
        smallest: An upper bound of the smallest singular value.
        largest_residual: There is a singular value within this distance of ``largest``.
        smallest_residual: There is a singular value within this distance of ``smallest``.
    """

    largest: Array
    smallest: Array
    largest_residual: Array
    smallest_residual: Array


class SpectralDensity(NamedTuple):
    """A discrete measure that estimates the distribution of each example's singular values.

    :func:`spectral_density` returns it.

    Attributes:
        nodes: Estimated singular values, shape ``(batch, num_probes, steps)``, descending along
            the last axis.
        weights: The weights of the nodes, of the same shape, non-negative. The weights of one
            example sum to 1, those of one of its probes to ``1 / num_probes``.
    """

    nodes: Array
    weights: Array


def extreme_singular_values(
    key: Array,
    fn: Callable[[Array], Array],
    x: Array,
    *,
    num_steps: int = 50,
    batch_size: int = 1,
) -> ExtremeSingularValues:
    r"""Largest and smallest singular value of the Jacobian of ``fn``, which is never formed.

    With :math:`B` the Jacobian or its transpose, so that it maps the smaller side, and
    :math:`V_k` an orthonormal basis of the space that :math:`k` Golub–Kahan steps reach from a
    random start,

    .. math:: \sigma_{\min}(B) \le \sigma_{\min}(B V_k), \qquad
              \sigma_{\max}(B V_k) \le \sigma_{\max}(B).

    The middle terms are returned, so the range of the spectrum is never overstated. Both are exact
    up to rounding once there are as many steps as the smaller side has entries. The largest value
    converges in far fewer steps. The smallest value converges fast only if it is well separated
    from the next ones, and near 0 it never is: take its estimate as an upper bound.

    With :math:`u, v` the unit vectors of an estimate :math:`\sigma`, :math:`B v = \sigma u`, and
    some singular value is within :math:`\|B^\top u - \sigma v\|` of :math:`\sigma`. This residual
    shows that an estimate has converged, but not that no singular value lies beyond it.

    When the subspace is exhausted, a new random direction replaces the missing one, so repeated
    values, isometries, rank-deficient and zero maps need no special treatment.

    Each step takes one product with the Jacobian and one with its transpose, both about as
    expensive as ``fn``, which is linearized once for each example. The memory is that of one
    backward pass and of ``num_steps * (inputs + outputs)`` numbers.

    Args:
        key: A random key. Each example starts from another random vector.
        fn: Maps an array of shape ``x.shape[1:]`` to one floating array of any shape. It must be
            differentiable in reverse mode; the backward pass of a ``custom_vjp`` must be linear.
        x: Floating array of shape ``(batch, *example)``; a dtype narrower than float32 is
            converted to float32.
        num_steps: How many steps to take, 1 or more. At most ``min(outputs, inputs)`` steps are
            taken.
        batch_size: How many examples are processed at a time, 1 or more.

    Returns:
        A named tuple ``ExtremeSingularValues(largest, smallest, largest_residual,
        smallest_residual)`` of arrays of shape ``(batch,)``, in float32 or wider. All four are
        NaN for an example whose Jacobian is not finite.

    Raises:
        ValueError: For anything but one key; if ``x`` has no batch axis, is empty or is not
            floating; if ``fn`` returns anything but one floating array; for a number of steps or
            a batch size below 1.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from eoi_jax import spectrum
        >>> fn = lambda x: jnp.array([3 * x[1], 2 * x[0]])
        >>> ends = spectrum.extreme_singular_values(jax.random.key(0), fn, jnp.ones((1, 5)))
        >>> jnp.round(ends.largest, 4), jnp.round(ends.smallest, 4)
        (Array([3.], dtype=float32), Array([2.], dtype=float32))

    Reference:
        Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix", SIAM
        Journal on Numerical Analysis 2(2), 1965.
    """
    return _ends(
        _map_examples(key, fn, x, num_probes=1, num_steps=num_steps, batch_size=batch_size)
    )


def spectral_density(
    key: Array,
    fn: Callable[[Array], Array],
    x: Array,
    *,
    num_probes: int = 10,
    num_steps: int = 50,
    batch_size: int = 1,
) -> SpectralDensity:
    r"""Distribution of the singular values of the Jacobian of ``fn``, which is never formed.

    The method is stochastic Lanczos quadrature. Let :math:`B` be the Jacobian or its transpose, so
    that it maps the smaller side of :math:`n` entries, and :math:`v` a random unit vector. The
    eigenvalues of :math:`B^\top B`, weighted by the squared components of :math:`v` along the
    eigenvectors, are a measure whose mean over :math:`v` is the spectrum. :math:`k` Golub–Kahan
    steps from :math:`v` give the Gauss quadrature of this measure: :math:`k` nodes
    :math:`\sigma_i` with weights :math:`w_i`, for which

    .. math:: \sum_i w_i \sigma_i^{2p} = v^\top (B^\top B)^p\, v, \qquad 0 \le p \le 2k - 1.

    The mean over the probes :math:`v` is therefore an unbiased estimate of the moments
    :math:`\operatorname{tr} (B^\top B)^p / n`. Its standard error is
    :math:`s \sqrt{2 / ((n + 2)\, \mathrm{probes})}`, with :math:`s` the standard deviation of
    :math:`\sigma^{2p}` in the spectrum. So a wider map needs fewer probes, and an isometry needs
    one. The number of steps sets the resolution.

    Each step takes, for each probe, one product with the Jacobian and one with its transpose, both
    about as expensive as ``fn``. ``fn`` is linearized once for each example, and the probes of an
    example are processed together.

    Args:
        key: A random key. Each example starts from another random vector.
        fn: Maps an array of shape ``x.shape[1:]`` to one floating array of any shape. It must be
            differentiable in reverse mode; the backward pass of a ``custom_vjp`` must be linear.
        x: Floating array of shape ``(batch, *example)``; a dtype narrower than float32 is
            converted to float32.
        num_probes: How many random vectors to average over, 1 or more.
        num_steps: How many steps to take from each probe, 1 or more. At most
            ``min(outputs, inputs)`` steps are taken.
        batch_size: How many examples are processed at a time, 1 or more.

    Returns:
        A named tuple ``SpectralDensity(nodes, weights)`` of arrays of shape ``(batch, num_probes,
        min(num_steps, outputs, inputs))``, in float32 or wider. Both are NaN for an example whose
        Jacobian is not finite.

    Raises:
        ValueError: For anything but one key; if ``x`` has no batch axis, is empty or is not
            floating; if ``fn`` returns anything but one floating array; for a number of probes or
            steps or a batch size below 1.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from eoi_jax import spectrum
        >>> fn = lambda x: jnp.array([1.0, 3.0, 1.0, 3.0]) * x
        >>> nodes, weights = spectrum.spectral_density(
        ...     jax.random.key(0), fn, jnp.ones((1, 4)), num_probes=1000
        ... )
        >>> shares, _ = jnp.histogram(nodes, jnp.array([0.0, 2.0, 4.0]), weights=weights)
        >>> jnp.round(shares, 1)
        Array([0.5, 0.5], dtype=float32)

    Reference:
        Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature",
        SIAM Journal on Matrix Analysis and Applications 38(4), 2017.
    """
    num_probes = checks.integer(
        num_probes, low=1, name="num_probes", remedy="Average over at least one random vector."
    )
    return _quadrature(
        _map_examples(key, fn, x, num_probes=num_probes, num_steps=num_steps, batch_size=batch_size)
    )


class _Factors(NamedTuple):
    """What is kept of ``B V = U R``, for each example and each of its probes."""

    triangle: Array  # R, of one row and column a step
    leaving: Array  # the norm of the part of the last BᵀU column that is outside of V


@jax.jit
def _ends(factors: _Factors) -> ExtremeSingularValues:
    """Read the ends of the spectrum off the first probe of each example."""
    left, values, _ = _singular_value_decomposition(factors)
    residuals = factors.leaving[..., None] * jnp.abs(left[..., -1, :])
    residuals = jnp.where(jnp.isnan(values), jnp.nan, residuals)
    values, residuals = values[:, 0], residuals[:, 0]
    return ExtremeSingularValues(values[:, 0], values[:, -1], residuals[:, 0], residuals[:, -1])


@jax.jit
def _quadrature(factors: _Factors) -> SpectralDensity:
    """Average the Gauss quadratures of each example's probes."""
    _, values, right = _singular_value_decomposition(factors)
    # A restart is orthogonal to all that the probe reaches, so its nodes weigh nothing.
    weights = right[..., 0] ** 2 / values.shape[1]
    return SpectralDensity(values, jnp.where(jnp.isnan(values), jnp.nan, weights))


def _map_examples(
    key: Array,
    fn: Callable[[Array], Array],
    x: Array,
    *,
    num_probes: int,
    num_steps: int,
    batch_size: int,
) -> _Factors:
    """Factorize the Jacobian at each example from each of its probes, axes 0 and 1 of a result."""
    key = threefry_key(key)
    x = spectra.batch_of(x)
    num_steps = checks.integer(num_steps, low=1, name="num_steps", remedy="Take at least one step.")
    batch_size = checks.integer(
        batch_size, low=1, name="batch_size", remedy="Leave it out for one example at a time."
    )
    example = x.shape[1:]
    # All of fn is traced in here, its transpose included: each product takes the precision.
    with jax.default_matmul_precision("highest"):
        output = spectra.one_output(fn, x)
        dtype = jnp.result_type(*map(checks.compute_dtype, (x.dtype, output.dtype)))
        inputs, outputs = math.prod(example), math.prod(output.shape)
        smaller, larger = min(inputs, outputs), max(inputs, outputs)
        num_steps = min(num_steps, smaller)

        def flat_fn(flat: Array) -> Array:
            return jnp.ravel(fn(flat.reshape(example))).astype(dtype)

        def one(data: tuple[Array, Array]) -> _Factors:
            flat, starts = data
            value, push, pull = linearized(flat_fn, flat)
            products = (push, pull) if inputs == smaller else (pull, push)
            return jax.vmap(lambda start: _factorize(products, start, fresh, value))(starts)

        start_key, fresh_key = jax.random.split(key)
        # Restarts need not be independent of one another, and so take the memory of one probe.
        fresh = jax.random.normal(fresh_key, (num_steps, smaller + larger), dtype)
        data = (
            x.reshape(len(x), -1).astype(dtype),
            _starts(start_key, len(x), (num_probes, smaller), dtype),
        )
        # Mapped even if there is one: a loop takes the arrays that fn closes over as arguments,
        # where a compiled function would hold a copy.
        return jax.lax.map(one, data, batch_size=None if batch_size == 1 else batch_size)


def _starts(key: Array, count: int, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draw vectors of which every direction is equally likely, whatever the ``count``."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


class _State(NamedTuple):
    """What the steps of a bidiagonalization carry on."""

    left: Array  # the rows of U so far, then zeros
    right: Array  # the rows of V so far, then zeros
    triangle: Array  # R
    leaving: Array  # the norm of the part of the last BᵀU column that is outside of V
    largest_norm: Array  # of all products so far


class _Extension(NamedTuple):
    """How a vector extends an orthonormal basis."""

    coefficients: Array  # along the basis
    remainder: Array  # the norm of the rest, 0 if it is no more than rounding
    unit: Array  # orthogonal to the basis: the direction of the rest, or a fresh one
    largest_norm: Array


def _factorize(
    products: tuple[_Product, _Product], start: Array, fresh: Array, like: Any
) -> _Factors:
    """Bidiagonalize ``B``, which is given by its products with vectors and its transpose's.

    It starts from ``start``, of the smaller side. Each step has a row of ``fresh``, a vector of
    the smaller side and one of the larger side to restart from. ``like`` varies as products do.
    """
    forward, adjoint = products
    num_steps, dtype = len(fresh), start.dtype
    right_fresh, left_fresh = fresh[:, : start.size], fresh[:, start.size :]

    def step(j: Array, state: _State) -> _State:
        left, right, triangle, _, largest_norm = state
        image = _extend(left, forward(right[j]), left_fresh[j], largest_norm)
        left = left.at[j].set(image.unit)
        triangle = triangle.at[:, j].set(image.coefficients.at[j].set(image.remainder))

        back = _extend(right, adjoint(image.unit), right_fresh[j], image.largest_norm)
        # After the last step there is no room for it, and in a full basis no such vector.
        right = right.at[j + 1].set(back.unit, mode="drop")
        return _State(left, right, triangle, back.remainder, back.largest_norm)

    zero = jnp.zeros((), dtype)
    state = _State(
        left=jnp.zeros_like(left_fresh),
        right=jnp.zeros_like(right_fresh).at[0].set(start / jnp.linalg.norm(start)),
        triangle=jnp.zeros((num_steps, num_steps), dtype),
        leaving=zero,
        largest_norm=zero,
    )
    state = vmap.varying_as(state, start, fresh, like)
    state = jax.lax.fori_loop(0, num_steps, step, state)
    # A norm that overflows would take everything else for rounding.
    is_finite = jnp.isfinite(state.largest_norm)
    return _Factors(state.triangle, jnp.where(is_finite, state.leaving, jnp.nan))


def _extend(basis: Array, vector: Array, fresh: Array, largest_norm: Array) -> _Extension:
    """Split a vector into its parts along and across the rows of a basis, some of them zero.

    If nothing but rounding is across, the basis goes on with the direction of ``fresh``.
    """
    # Squares of what a deep network multiplies by would leave float32.
    unit_size = _nonzero(jnp.max(jnp.abs(vector)))
    vector = vector / unit_size
    largest_norm = jnp.maximum(largest_norm, unit_size * jnp.linalg.norm(vector))
    coefficients, rest = _orthogonalize(basis, vector)
    remainder = jnp.linalg.norm(rest)
    rounding = _ROUNDING * jnp.finfo(vector.dtype).eps * largest_norm
    is_rounding = unit_size * remainder <= rounding
    # Once more, since a fresh vector is not orthogonal yet and a short rest not quite.
    _, unit = _orthogonalize(basis, jnp.where(is_rounding, fresh, rest / _nonzero(remainder)))
    return _Extension(
        unit_size * coefficients,
        jnp.where(is_rounding, 0, unit_size * remainder),
        unit / _nonzero(jnp.linalg.norm(unit)),
        largest_norm,
    )


def _orthogonalize(basis: Array, vector: Array) -> tuple[Array, Array]:
    """Return the coefficients of a vector along orthonormal rows, and the rest of it."""
    first = basis @ vector
    vector = vector - first @ basis
    # The second pass removes what rounding has left in the first.
    second = basis @ vector
    return first + second, vector - second @ basis


def _nonzero(norm: Array) -> Array:
    """Return the divisor for a norm: 1 where it is 0."""
    return jnp.where(norm == 0, 1, norm)


def _singular_value_decomposition(factors: _Factors) -> tuple[Array, Array, Array]:
    """Decompose each ``R``; its singular values are NaN if it is not finite."""
    matrix = factors.triangle
    is_finite = jnp.isfinite(matrix).all(axis=(-2, -1)) & jnp.isfinite(factors.leaving)
    # No factorization ever sees inf or NaN, nor numbers whose squares leave the dtype: what it
    # would do with them differs by platform.
    matrix = jnp.where(is_finite[..., None, None], matrix, 0)
    unit_size = _nonzero(jnp.max(jnp.abs(matrix), axis=(-2, -1)))
    left, values, right = jnp.linalg.svd(matrix / unit_size[..., None, None])
    return left, jnp.where(is_finite[..., None], unit_size[..., None] * values, jnp.nan), right
