"""Jacobians of functions of one example, and the singular values of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks, spectra
from eoi_jax._internal.derivatives import has_forward_mode
from eoi_jax.typing import Array

__all__ = [
    "SpectrumSummary",
    "jacobian",
    "orthogonality_error",
    "singular_values",
    "summarize",
]


class SpectrumSummary(NamedTuple):
    """Statistics of a set of singular values, from :func:`summarize`; each is a scalar array.

    Attributes:
        mean: Arithmetic mean.
        std: Population standard deviation.
        min: Smallest value.
        max: Largest value.
        condition_number: ``max / min``; infinite where ``min`` is 0.
        near_one: Fraction of values in [1 − 1e-3, 1 + 1e-3].

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax import spectrum
        >>> float(spectrum.summarize(jnp.array([1.0, 3.0])).variance)
        1.0
    """

    mean: Array
    std: Array
    min: Array
    max: Array
    condition_number: Array
    near_one: Array

    @property
    def variance(self) -> Array:
        """Population variance, the square of ``std``."""
        return self.std**2


def jacobian(
    fn: Callable[[Array], Array],
    x: Array,
    *,
    mode: Literal["auto", "forward", "reverse"] = "auto",
    batch_size: int | None = None,
) -> Array:
    r"""Jacobian of ``fn`` at each example of a batch, flattened to matrices.

    .. math:: J_{b,ij} = \partial\, \mathrm{fn}(x_b)_i \,/\, \partial\, (x_b)_j.

    Forward mode pushes one tangent per input through ``fn``, reverse mode pulls one cotangent
    per output back; both give the same matrix.

    Args:
        fn: Maps an array of shape ``x.shape[1:]`` to one floating array of any shape.
        x: Floating array of shape ``(batch, *example)``.
        mode: ``"forward"``, ``"reverse"``, or ``"auto"``: reverse where ``fn`` has fewer outputs
            than inputs, or has no forward mode, as a function with a ``custom_vjp``.
        batch_size: How many examples are differentiated at a time; all by default. A smaller
            number bounds the memory and takes longer.

    Returns:
        An array of shape ``(batch, outputs, inputs)``, in the dtype that ``fn`` computes in.
        Values that are not finite are returned unchanged.

    Raises:
        ValueError: If ``x`` has no batch axis, is empty or is not floating; if ``fn`` returns
            anything but one floating array; for an unknown mode, one that ``fn`` does not have,
            or a batch size below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax import spectrum
        >>> spectrum.jacobian(lambda x: x[:2] ** 2, jnp.array([[1.0, 2.0, 3.0]]))
        Array([[[2., 0., 0.],
                [0., 4., 0.]]], dtype=float32)

    Reference:
        Griewank and Walther, "Evaluating Derivatives", second edition, SIAM 2008, chapter 3.
    """
    return _map_jacobian(lambda matrix: matrix, fn, x, mode=mode, batch_size=batch_size)


def singular_values(
    fn: Callable[[Array], Array],
    x: Array,
    *,
    mode: Literal["auto", "forward", "reverse"] = "auto",
    batch_size: int | None = None,
) -> Array:
    r"""Singular values of the Jacobian of ``fn`` at each example of a batch.

    A Jacobian that is not square is reduced by a QR factorization of its tall orientation,
    :math:`J` or :math:`J^\top = QR`: :math:`R` is as small as the smaller side and has the same
    singular values. Small singular values have an absolute error of about
    :math:`10^{-7} \sigma_{\max}`. With the Gram matrix :math:`JJ^\top` this error would be about
    :math:`\sqrt{10^{-7}} \sigma_{\max}`.

    Args:
        fn: Maps an array of shape ``x.shape[1:]`` to one floating array of any shape.
        x: Floating array of shape ``(batch, *example)``.
        mode: ``"forward"``, ``"reverse"``, or ``"auto"``: reverse where ``fn`` has fewer outputs
            than inputs, or has no forward mode, as a function with a ``custom_vjp``.
        batch_size: How many examples are processed at a time; all by default. Of earlier examples
            only the singular values are kept, so a smaller number bounds the memory.

    Returns:
        An array of shape ``(batch, min(outputs, inputs))``, descending along the last axis, in
        float32 or wider. Inside :func:`jax.jit` an example whose Jacobian is not finite has NaN
        for all of its values.

    Raises:
        ValueError: If ``x`` has no batch axis, is empty or is not floating; if ``fn`` returns
            anything but one floating array; for an unknown mode, one that ``fn`` does not have,
            or a batch size below 1.
        FloatingPointError: Outside of :func:`jax.jit`, if a Jacobian is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax import spectrum
        >>> spectrum.singular_values(lambda x: jnp.array([3 * x[1], 2 * x[0]]), jnp.ones((1, 5)))
        Array([[3., 2.]], dtype=float32)

    Reference:
        Pennington, Schoenholz and Ganguli, "Resurrecting the sigmoid in deep learning through
        dynamical isometry: theory and practice", NeurIPS 2017.
    """
    values = _map_jacobian(_matrix_singular_values, fn, x, mode=mode, batch_size=batch_size)
    if not checks.is_traced(values):
        failed = int(jnp.isnan(values).any(axis=-1).sum())
        if failed:
            raise FloatingPointError(
                f"The Jacobian of fn is not finite for {failed} of {len(values)} examples of x. "
                "Look for inf or NaN in x and in the parameters of fn, and for a derivative that "
                "overflows (jax_debug_nans stops where it appears)."
            )
    return values


def summarize(values: Array) -> SpectrumSummary:
    """Summarize singular values, pooled over all axes.

    The summary has the mean, the standard deviation, the extremes, their ratio, and the fraction
    near 1 of all values together. For the values of a batch of examples, this is the statistic by
    which the reference compares initializations.

    Args:
        values: Non-empty real array of any shape.

    Returns:
        A :class:`SpectrumSummary` of scalars, in float32 or wider. If a value is NaN, so is
        every field but ``near_one``, for which NaN is not near 1.

    Raises:
        ValueError: If there are no values, or complex ones.

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax import spectrum
        >>> summary = spectrum.summarize(jnp.array([[2.0, 1.0], [1.0, 0.5]]))
        >>> float(summary.condition_number), float(summary.near_one)
        (4.0, 0.5)

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, section 4.
    """
    values = checks.real_array(values, "values")
    if values.size == 0:
        raise ValueError(
            f"values.shape={values.shape} is outside the non-empty shapes. "
            "Pass the singular values of at least one matrix."
        )
    mean = jnp.mean(values)
    low, high = jnp.min(values), jnp.max(values)
    # Centered first: the mean of squares minus the squared mean would cancel near isometry.
    std = jnp.sqrt(jnp.mean((values - mean) ** 2))
    condition = jnp.where(low == 0, jnp.inf, high / jnp.where(low == 0, 1, low))
    near_one = jnp.mean(jnp.abs(values - 1) <= 1e-3, dtype=values.dtype)
    return SpectrumSummary(mean, std, low, high, condition, near_one)


def orthogonality_error(matrix: Array, *, scale: Any = 1.0) -> Array:
    r"""Distance of a matrix from orthonormal rows or columns: the largest entry of the difference.

    .. math:: \max_{ij} \left| (W W^\top / s^2 - I)_{ij} \right| \quad (n \le m),

    with :math:`W^\top W` for :math:`n > m`: the Gram matrix of the smaller side.

    Args:
        matrix: Real array of shape ``(..., n, m)``; leading axes are a batch of matrices. Or an
            object with a method ``to_dense``, such as a :class:`eoi_jax.blocks.BlockSparse`.
        scale: ``s``, a non-zero number by which the matrix is divided first.

    Returns:
        An array of shape ``(...)``, in float32 or wider: one error for each matrix, 0 for an
        empty one.

    Raises:
        ValueError: For fewer than two axes, a complex matrix, or a scale that is 0 or
            beyond the matrix's dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax import spectrum
        >>> float(spectrum.orthogonality_error(2 * jnp.eye(3, 5), scale=2.0))
        0.0

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, for the definition of exact
        orthogonality.
    """
    if hasattr(matrix, "to_dense"):
        matrix = matrix.to_dense()
    matrix = checks.real_array(matrix, "matrix")
    if matrix.ndim < 2:
        raise ValueError(
            f"matrix.ndim={matrix.ndim} is outside [2, ...). "
            "Give a matrix, or reshape a kernel to one, as kernel.reshape(-1, kernel.shape[-1])."
        )
    scale = checks.scale(scale, matrix.dtype)
    if not checks.is_traced(scale) and scale == 0.0:
        raise checks.value_error(
            "scale", scale, "is outside the non-zero numbers", "Give the scale of the initializer."
        )
    matrix = matrix / jnp.asarray(scale, matrix.dtype)
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = jnp.swapaxes(matrix, -1, -2)
    gram = jnp.matmul(matrix, jnp.swapaxes(matrix, -1, -2), precision=jax.lax.Precision.HIGHEST)
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return jnp.max(jnp.abs(gram - identity), axis=(-2, -1), initial=0.0)


def _map_jacobian(
    use: Callable[[Array], Array],
    fn: Callable[[Array], Array],
    x: Array,
    *,
    mode: str,
    batch_size: int | None,
) -> Array:
    """Apply ``use`` to the Jacobian of ``fn`` at each example, ``batch_size`` at a time."""
    x = spectra.batch_of(x)
    remedy = "Leave the default 'auto': the mode with fewer passes."
    checks.one_of(mode, ("auto", "forward", "reverse"), name="mode", remedy=remedy)
    batch_size = spectra.batch_size(batch_size, x)
    example = x.shape[1:]
    # All of fn is traced in here, its transpose included: each product takes the precision.
    with jax.default_matmul_precision("highest"):
        outputs = math.prod(spectra.one_output(fn, x).shape)
        flat = x.reshape(len(x), -1)

        def flat_fn(flat: Array) -> Array:
            return jnp.ravel(fn(flat.reshape(example)))

        is_reverse = mode == "reverse" or (mode == "auto" and outputs < math.prod(example))
        if not is_reverse and not has_forward_mode(flat_fn, flat[0]):
            if mode == "forward":
                problem = "is outside the modes of fn, which has a custom_vjp"
                raise checks.value_error("mode", mode, problem, "Leave the default 'auto'.")
            is_reverse = True
        matrix = (jax.jacrev if is_reverse else jax.jacfwd)(flat_fn)

        def one(flat: Array) -> Array:
            return use(matrix(flat))

        if batch_size >= len(x):
            return jax.vmap(one)(flat)
        mapped: Array = jax.lax.map(one, flat, batch_size=batch_size)
        return mapped


def _matrix_singular_values(matrix: Array) -> Array:
    """Singular values of one matrix, or NaN for all of them if it is not finite."""

    def factorize(matrix: Array) -> Array:
        rows, columns = matrix.shape
        if rows < columns:
            matrix = matrix.T
        if rows != columns:
            matrix = jnp.linalg.qr(matrix, mode="r")
        return jnp.linalg.svd(matrix, compute_uv=False)

    return spectra.where_finite(factorize, checks.real_array(matrix, "matrix"))
