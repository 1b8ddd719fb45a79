"""The SAO baseline: sparse orthogonal matrices of small dense blocks in random order.

Sparsity-aware orthogonal initialization (SAO) takes a bipartite graph in which every input and
every output has the same number of neighbors, its degree. Each connected part of the graph has an
orthogonal matrix. The whole matrix is block-diagonal up to the order of its rows and columns. So
this module draws Haar blocks and then two random permutations, in a fixed number of steps. (Other
code for this method may search random regular graphs for one that admits an orthogonal matrix;
such a search has no bound on its length and may never end.)

The method is defined for square matrices whose width is a multiple of the degree, so only for the
densities ``degree / width``. Everything else is refused.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from eoi_jax._internal import block_diagonal, checks
from eoi_jax._internal.keys import threefry_key
from eoi_jax.typing import Array, DType

__all__ = ["degree", "orthogonal"]


def orthogonal(
    key: Array,
    size: int,
    degree: int,
    *,
    activation: Literal["tanh", "relu"] = "tanh",
    scale: float | Array = 1.0,
    dtype: DType = jnp.float32,
) -> Array:
    r"""Draw a sparse orthogonal matrix with ``degree`` non-zeros in every row and column.

    With :math:`n` = ``size``, :math:`d` = ``degree`` and uniform permutations :math:`R, C`, the
    matrix for ``activation="tanh"`` is

    .. math:: W = \text{scale} \cdot R \, \operatorname{diag}(Q_1, \dots, Q_{n/d}) \, C, \qquad
              W W^\top = W^\top W = \text{scale}^2 I

    with independent Haar orthogonal :math:`d \times d` blocks :math:`Q_b`.

    For ``activation="relu"`` such a :math:`W` of half the size and half the degree, with its
    scale, becomes

    .. math:: M = \begin{pmatrix} W & -W \\ -W & W \end{pmatrix}

    which is not orthogonal: half of its singular values are ``2 * scale``, the others 0. It
    makes a ReLU layer :math:`h \mapsto \max(hM, 0)` linear on paired signals. If
    :math:`h = (u^+, u^-)` holds the positive and the negative part of :math:`u`, then
    :math:`u = u^+ - u^-` gives

    .. math:: \max(hM, 0) = ((uW)^+, (uW)^-), \qquad \|\max(hM, 0)\| = \text{scale} \, \|h\|

    up to rounding, layer after layer: with ``scale=1`` a ReLU network of any depth is an isometry
    in :math:`u`. A signal :math:`(a, b)` that is not such a pair becomes the pair of
    :math:`(a - b)W` in the first layer. So at every depth half of the singular values of the
    Jacobian of all outputs with respect to all inputs are :math:`\sqrt 2` and half are 0.

    Every entry of a block is non-zero before the cast to ``dtype``: the few entries below the
    rounding error of 1 are set to that size.

    Args:
        key: A random key; one key makes one matrix, whether the call is eager, jitted or vmapped.
        size: Number of rows and of columns, below 2**31; even for ``activation="relu"``.
        degree: Number of non-zeros in each row and column: a divisor of ``size`` of at least 2, for
            ``activation="relu"`` an even one of at least 4. The density is ``degree / size``.
        activation: ``"tanh"`` for activations that are odd and have slope 1 at 0, and for linear
            networks; ``"relu"`` for ReLU.
        scale: Factor of the result; may be traced and differentiated.
        dtype: Real floating dtype of the result. The matrix is computed in float64 for float64, and
            otherwise in float32 and cast last.

    Returns:
        An array of shape ``(size, size)`` and ``dtype``; its support is the mask.

    Raises:
        ValueError: If the degree does not divide the size or is below the least of the activation
            (the nearest feasible ones are named), if the size has no degree, for an unknown
            activation, a ``scale`` that ``dtype`` cannot hold, or a dtype that is not real
            floating; for anything but one key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax import sao
        >>> w = sao.orthogonal(jax.random.key(0), 128, 16)
        >>> bool(jnp.allclose(w @ w.T, jnp.eye(128), atol=1e-5)), float((w != 0).mean())
        (True, 0.125)
        >>> m = sao.orthogonal(jax.random.key(0), 128, 16, activation="relu")
        >>> u = jax.random.normal(jax.random.key(1), (64,))
        >>> h = jax.nn.relu(jnp.concatenate([u, -u]))
        >>> bool(jnp.allclose(jnp.linalg.norm(jax.nn.relu(h @ m)), jnp.linalg.norm(h), rtol=1e-5))
        True

    Reference:
        Esguerra et al., "Sparsity-Aware Orthogonal Initialization of Deep Neural Networks", IEEE
        Access 2023; for ReLU also Burkholz and Dubatovka, "Initialization of ReLUs for Dynamical
        Isometry", NeurIPS 2019.
    """
    key = threefry_key(key)
    size = checks.integer(size, low=1, high=2**31 - 1, name="size")
    degree = checks.integer(degree, low=1, name="degree")
    activation = block_diagonal.check_activation(activation)
    degree = block_diagonal.feasible_degree(degree, size, activation)
    dtype = checks.float_dtype(dtype)
    scale = checks.scale(scale, dtype)
    return block_diagonal.draw(key, size, degree, activation=activation, scale=scale, dtype=dtype)


def degree(size: int, density: float, *, activation: Literal["tanh", "relu"] = "tanh") -> int:
    r"""Return the degree of a density: ``density * size``, where that is feasible.

    Args:
        size: Width of the square matrix, below 2**31.
        density: Fraction of non-zeros in (0, 1], static. ``density * size`` is compared with
            the degrees to a relative 1e-6, so that ``1 / 3`` rounded to float32 is one third.
        activation: ``"tanh"``, whose degrees are the divisors of ``size`` from 2 on, or ``"relu"``,
            whose degrees are the even ones from 4 on.

    Returns:
        The degree.

    Raises:
        ValueError: For any other density, naming the nearest feasible ones; a size that has none;
            a traced density; or an unknown activation.

    Example:
        >>> from eoi_jax import sao
        >>> sao.degree(128, 0.125)
        16
        >>> sao.degree(512, 0.1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: density=0.1 is outside ... The nearest are 32/512 = 0.0625 and 64/512 = 0.125.

    Reference:
        Esguerra et al., "Sparsity-Aware Orthogonal Initialization of Deep Neural Networks", IEEE
        Access 2023.
    """
    size = checks.integer(size, low=1, high=2**31 - 1, name="size")
    activation = block_diagonal.check_activation(activation)
    density = block_diagonal.check_density(density)
    return block_diagonal.feasible_degree(density * size, size, activation, density=density)
