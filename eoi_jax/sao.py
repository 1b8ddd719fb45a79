"""The SAO baseline: orthogonal matrices that are sparse because they fall into small blocks.

Sparsity-aware orthogonal initialization takes a bipartite graph in which every input and every
output has the same number of neighbors, its degree, and lets each connected part of it hold an
orthogonal matrix. Such a matrix is block-diagonal up to the order of its rows and columns, and that
is how it is drawn here: Haar blocks, then two random permutations. A search among random regular
graphs for one that can hold an orthogonal matrix, which code for this method may do, has no bound
on its length and may never end; the construction takes a fixed number of steps.

The method knows square matrices whose width the degree divides, so only the densities
``degree / width``; what it cannot do is refused.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks
from eoi_jax._internal.haar import haar
from eoi_jax.typing import Array, DType

__all__ = ["degree", "orthogonal"]

Form: TypeAlias = Literal["tanh", "relu"]
_MIN_DEGREE = {"tanh": 2, "relu": 4}
_STEP = {"tanh": 1, "relu": 2}


def orthogonal(
    key: Array,
    size: int,
    degree: int,
    *,
    form: Form = "tanh",
    scale: float | Array = 1.0,
    dtype: DType = jnp.float32,
) -> Array:
    r"""Draw a sparse orthogonal matrix with ``degree`` non-zeros in every row and column.

    With :math:`n` = ``size``, :math:`d` = ``degree`` and uniform permutations :math:`R, C`, the
    form ``"tanh"`` is

    .. math:: W = \text{scale} \cdot R \, \operatorname{diag}(Q_1, \dots, Q_{n/d}) \, C, \qquad
              W W^\top = W^\top W = \text{scale}^2 I

    with independent Haar orthogonal :math:`d \times d` blocks :math:`Q_b`.

    The form ``"relu"`` takes such a :math:`W` of half the size and half the degree, with its
    scale, to

    .. math:: M = \begin{pmatrix} W & -W \\ -W & W \end{pmatrix}

    which is no orthogonal matrix: half of its singular values are ``2 * scale``, the others 0. It
    makes a ReLU layer :math:`h \mapsto \max(hM, 0)` linear on paired signals. If
    :math:`h = (u^+, u^-)` holds the positive and the negative part of :math:`u`, then
    :math:`u = u^+ - u^-` gives

    .. math:: \max(hM, 0) = ((uW)^+, (uW)^-), \qquad \|\max(hM, 0)\| = \text{scale} \, \|h\|

    up to rounding, layer after layer: with ``scale=1`` a ReLU network of any depth is an isometry
    in :math:`u`. A signal :math:`(a, b)` that is no pair becomes that of :math:`(a - b)W` in the
    first layer, so the Jacobian of all outputs by all inputs has the singular values
    :math:`\sqrt 2` and 0, half of each, at every depth.

    Every entry of a block is nonzero before the cast to ``dtype``: the few below the rounding
    error of an entry of size 1 are raised to it.

    Args:
        key: a PRNG key; one key makes one matrix, whether the call is eager, jitted or vmapped.
        size: number of rows and of columns; even for ``form="relu"``.
        degree: number of non-zeros in each row and column: a divisor of ``size`` of at least 2, for
            ``form="relu"`` an even one of at least 4. The density is ``degree / size``.
        form: ``"tanh"`` for activations that are odd and have slope 1 at 0, and for linear
            networks; ``"relu"`` for ReLU.
        scale: factor of the result; may be traced and differentiated.
        dtype: real floating dtype of the result. float32 or wider is computed in itself, a narrower
            dtype in float32 and cast last.

    Returns:
        An array of shape ``(size, size)`` and ``dtype``; its support is the mask.

    Raises:
        ValueError: for a degree that does not divide the size or is below the least of the form
            (the nearest feasible ones are named), a size that has none, an unknown form, a
            ``scale`` that is not finite, or a dtype that is not real floating.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax import sao
        >>> w = sao.orthogonal(jax.random.key(0), 128, 16)
        >>> bool(jnp.allclose(w @ w.T, jnp.eye(128), atol=1e-5)), float((w != 0).mean())
        (True, 0.125)
        >>> m = sao.orthogonal(jax.random.key(0), 128, 16, form="relu")
        >>> u = jax.random.normal(jax.random.key(1), (64,))
        >>> h = jax.nn.relu(jnp.concatenate([u, -u]))
        >>> bool(jnp.allclose(jnp.linalg.norm(jax.nn.relu(h @ m)), jnp.linalg.norm(h), rtol=1e-5))
        True

    Reference:
        Esguerra et al., *Sparsity-Aware Orthogonal Initialization of Deep Neural Networks* (IEEE
        Access 2023); for the ReLU form also Burkholz and Dubatovka, *Initialization of ReLUs for
        Dynamical Isometry* (NeurIPS 2019).
    """
    size = checks.integer(size, low=1, name="size")
    degree = checks.integer(degree, low=1, name="degree")
    degree = _feasible(degree, size, check_form(form))
    scale = checks.finite_scalar(scale, "scale")
    dtype = checks.float_dtype(dtype)
    wide = checks.compute_dtype(dtype)
    half = form == "relu"
    matrix = _draw(
        key,
        jnp.asarray(scale, wide),
        size=size // 2 if half else size,
        degree=degree // 2 if half else degree,
    )
    if half:
        matrix = jnp.block([[matrix, -matrix], [-matrix, matrix]])
    return matrix.astype(dtype)


def degree(size: int, density: float, *, form: Form = "tanh") -> int:
    r"""Return the degree of a density: ``density * size``, where that is feasible.

    Args:
        size: width of the square matrix.
        density: fraction of non-zeros in (0, 1], static. ``density * size`` is compared with
            the degrees to a relative 1e-6, so that ``1 / 3`` rounded to float32 is one third.
        form: ``"tanh"``, whose degrees are the divisors of ``size`` from 2 on, or ``"relu"``,
            whose degrees are the even ones from 4 on.

    Returns:
        The degree.

    Raises:
        ValueError: for any other density, naming the nearest feasible ones; a size that has none;
            a traced density; or an unknown form.

    Example:
        >>> from eoi_jax import sao
        >>> sao.degree(128, 0.125)
        16
        >>> sao.degree(512, 0.1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: density=0.1 is outside ... The nearest are 32/512 = 0.0625 and 64/512 = 0.125.

    Reference:
        Esguerra et al. (IEEE Access 2023).
    """
    size = checks.integer(size, low=1, name="size")
    form = check_form(form)
    density = check_density(density)
    return _feasible(density * size, size, form, density)


def check_density(density: Any) -> float:
    """Accept a static fraction of non-zeros in (0, 1]."""
    if checks.is_traced(density):
        raise checks.value_error(
            "density",
            density,
            "is traced, outside the static numbers in (0, 1]",
            "The number of non-zeros in a row is a shape: make density a static argument.",
        )
    return float(checks.density(density))


def check_form(form: Any) -> Form:
    """Accept one of the forms."""
    remedy = "'relu' pairs signals with their negatives; 'tanh' is for all other activations."
    checks.one_of(form, tuple(_MIN_DEGREE), name="form", remedy=remedy)
    return form


def _feasible(value: float, size: int, form: Form, density: float | None = None) -> int:
    """Accept a degree; one that was computed from a density may be off by rounding."""
    minimum, step = _MIN_DEGREE[form], _STEP[form]
    nearest = round(value)
    divides = nearest >= minimum and nearest % step == 0 and size % nearest == 0
    if divides and abs(value - nearest) <= 1e-6 * nearest:
        return nearest
    kind = f"its {'' if step == 1 else 'even '}divisors from {minimum} on"
    degrees = [d for d in range(minimum, size + 1, step) if size % d == 0]
    if not degrees:
        problem = f"is outside the sizes that have degrees, {kind}"
        raise checks.value_error(
            "size", size, problem, "Change the width, or keep the layer dense."
        )
    around = [d for d in degrees if d < value][-1:] + [d for d in degrees if d > value][:1]
    nearby = "The nearest is" if len(around) == 1 else "The nearest are"
    problem = f"is outside the degrees of size {size}, {kind}"
    if density is None:
        options = " and ".join(str(d) for d in around)
        raise checks.value_error("degree", nearest, problem, f"{nearby} {options}.")
    options = " and ".join(f"{d}/{size} = {d / size:.6g}" for d in around)
    raise checks.value_error(
        "density", density, f"{problem}, divided by {size}", f"{nearby} {options}."
    )


@functools.partial(jax.jit, static_argnames=("size", "degree"))
def _draw(key: Array, scale: Array, *, size: int, degree: int) -> Array:
    for_blocks, for_rows, for_columns = jax.random.split(key, 3)
    dtype = scale.dtype
    num_blocks = size // degree
    blocks = haar(for_blocks, (num_blocks, degree, degree), dtype)
    # Rounding may make an entry zero, and the support is the mask: a connection would be lost.
    least = jnp.finfo(dtype).eps
    blocks = jnp.where(jnp.abs(blocks) < least, jnp.copysign(least, blocks), blocks)
    rows = jax.random.permutation(for_rows, size).reshape(num_blocks, degree, 1)
    columns = jax.random.permutation(for_columns, size).reshape(num_blocks, 1, degree)
    return jnp.zeros((size, size), dtype).at[rows, columns].set(blocks * scale, unique_indices=True)


def kernel_matrix(
    key: Array, inputs: int, outputs: int, density: float, form: Form, scale: Any, dtype: Any
) -> Array:
    """Draw the matrix of a layer, empty for one without channels; refuse other than square."""
    if inputs != outputs:
        raise checks.value_error(
            "shape",
            (inputs, outputs),
            "is outside the square matrices of inputs by outputs",
            "SAO leaves other layers dense: use jax.nn.initializers.orthogonal() for this one, or "
            "initializers.delta_orthogonal() if it is a convolution.",
        )
    if inputs == 0:
        return jnp.zeros((0, 0), checks.float_dtype(dtype))
    own = degree(inputs, density, form=form)
    return orthogonal(key, inputs, own, form=form, scale=scale, dtype=dtype)
