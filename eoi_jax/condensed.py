"""The condensed form of an unstructured sparse matrix: for each output its inputs and weights.

Use it for inference with few examples at a time, or to save memory, where a pattern has no blocks.
With a large batch a dense product is often faster, and even more so for gradients: measure, as
``python -m experiments.benchmarks sparse_layers`` does. To train faster than with dense layers, use
:mod:`eoi_jax.blocks`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks
from eoi_jax._internal.arrays import nonzero
from eoi_jax.typing import Array

__all__ = ["Condensed", "from_dense", "matmul"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condensed:
    r"""A sparse matrix ``(inputs, outputs)``, stored as the weights of each output.

    It is a pytree of two arrays of the shape ``(outputs, k)``, where ``k`` is the largest number of
    non-zeros of an output. No memory is wasted if all outputs have the same number (constant
    fan-in). For example, the outputs of a 512 × 512 matrix of density 1/8 have 64 non-zeros on
    average; the largest number is 72 if it is drawn with ``planes=eoi.planes.matching``, and 245
    with independent planes.

    Attributes:
        values: ``(outputs, k)`` floating: the weights.
        rows: ``(outputs, k)`` int32: the input of each weight, increasing; ``inputs`` where there
            is none, and the value is zero.
        inputs: Number of inputs, static.

    Stacks of matrices have the same leading axes in both arrays.

    Example:
        >>> import jax
        >>> import eoi_jax as eoi
        >>> dense = eoi.orthogonal(jax.random.key(0), (64, 32), 1 / 8, planes=eoi.planes.matching)
        >>> w = eoi.condensed.from_dense(dense)
        >>> w.shape, w.values.shape == w.rows.shape, bool((w.to_dense() == dense).all())
        ((64, 32), True, True)
        >>> x = jax.random.normal(jax.random.key(1), (3, 64))
        >>> bool(abs(x @ w - x @ dense).max() < 1e-5)
        True

    Reference:
        Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024: the constant
        fan-in, and its condensed representation.
    """

    values: Array
    rows: Array
    inputs: int = dataclasses.field(metadata={"static": True})
    __array_ufunc__ = None  # an array of NumPy leaves ``x @ w`` to this class

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense matrix, ``(..., inputs, outputs)``."""
        return (*self.values.shape[:-2], self.inputs, self.values.shape[-2])

    @property
    def dtype(self) -> Any:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def density(self) -> Any:
        """Fraction of the entries that are stored, padding excluded; traced where the rows are."""
        present = self.rows < self.inputs
        total = self.inputs * math.prod(self.rows.shape[:-1])
        if checks.is_traced(present):
            return present.sum() / total
        return float(np.asarray(present).sum() / total)

    def mask(self) -> Array:
        """Return which entries are stored, as booleans of :attr:`shape`."""
        return dataclasses.replace(self, values=jnp.ones_like(self.values)).to_dense() != 0

    def to_dense(self) -> Array:
        """Return the matrix with its zeros, of :attr:`shape`."""
        if self.values.ndim > 2:
            return jax.vmap(Condensed.to_dense)(self)
        outputs = jnp.arange(self.values.shape[0])[:, None]
        dense = jnp.zeros(self.shape, self.dtype)
        return dense.at[self.rows, outputs].set(self.values, mode="drop")

    def __rmatmul__(self, x: Any) -> Array:
        return matmul(x, self)


def from_dense(matrix: Array, mask: Array | None = None) -> Condensed:
    """Store a matrix by the weights of each output.

    Args:
        matrix: ``(inputs, outputs)`` floating, not traced: the pattern decides shapes.
        mask: Booleans of the matrix's shape: the entries to keep, zeros included. Default: those
            that are not zero.

    Returns:
        A :class:`Condensed`, in which every output has as many places as the fullest output has
        weights.

    Raises:
        ValueError: If the matrix is no floating matrix, if the mask has another shape, if an entry
            outside the mask is not zero, or if the matrix or the mask is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> w = eoi.condensed.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]))
        >>> w.values.tolist(), w.rows.tolist()
        ([[1.0, 3.0], [2.0, 0.0]], [[1, 2], [0, 3]])
    """
    if checks.is_traced(matrix) or checks.is_traced(mask):
        raise ValueError("matrix or mask is traced, and decides shapes. Call this outside of jit.")
    matrix = checks.array(matrix, "matrix")
    checks.float_dtype(matrix.dtype, "matrix.dtype")
    if matrix.ndim != 2 or 0 in matrix.shape:
        problem = "is outside (inputs, outputs), both at least 1"
        raise checks.value_error("matrix.shape", matrix.shape, problem, "Give one matrix.")
    kept = np.asarray(nonzero(matrix))
    if mask is not None:
        if np.shape(mask) != matrix.shape:
            problem = f"is not the shape of the matrix, {matrix.shape}"
            raise checks.value_error("mask.shape", np.shape(mask), problem, "Give a mask of it.")
        off = np.argwhere(kept & ~np.asarray(mask, bool))
        if off.size:
            raise ValueError(
                f"matrix is not zero off the mask, at {tuple(off[0].tolist())}. "
                "Apply the mask first: jnp.where(mask, matrix, 0)."
            )
        kept = np.asarray(mask, bool)
    inputs, outputs = matrix.shape
    output, row = np.nonzero(kept.T)  # output by output
    counts = np.bincount(output, minlength=outputs)
    place = np.arange(output.size) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.full((outputs, counts.max()), inputs, np.int32)
    index[output, place] = row
    values = np.zeros(index.shape, matrix.dtype)
    values[output, place] = np.asarray(matrix)[row, output]
    return Condensed(jnp.asarray(values), jnp.asarray(index), inputs)


def matmul(x: Array, w: Condensed) -> Array:
    r"""Multiply by a condensed matrix: ``x @ w``.

    :math:`y_o = \sum_s x_{\text{rows}[o, s]} W_{o, s}`: for each of the ``k`` places one gather and
    one sum, one place after the other. So no array of all weights by all examples is formed, also
    not in gradients. At density :math:`d` this takes :math:`d` times the operations of a dense
    product, but every operation reads and writes memory, and none uses a matrix unit: with
    hundreds of examples a dense product is often faster, and even more so in the backward pass. The
    loop has :math:`k` steps, which suits CPUs. JAX differentiates it, in both modes.

    Args:
        x: ``(..., inputs)`` floating.
        w: One matrix, ``(inputs, outputs)``.

    Returns:
        ``(..., outputs)``, of the dtype to which those of ``x`` and ``w`` promote, summed in
        float32 or wider.

    Raises:
        ValueError: If the last axis of ``x`` has not as many entries as ``w`` has inputs, ``x`` or
            ``w`` is not floating, or ``w`` is a stack (use :func:`jax.vmap`).

    Example:
        >>> import jax
        >>> import eoi_jax as eoi
        >>> dense = eoi.orthogonal(jax.random.key(0), (64, 64), 1 / 8)
        >>> w = eoi.condensed.from_dense(dense)
        >>> x = jax.random.normal(jax.random.key(1), (3, 64))
        >>> bool(abs(eoi.condensed.matmul(x, w) - x @ dense).max() < 1e-5)
        True

    Reference:
        Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024.
    """
    x = checks.array(x, "x")
    _check_type(w)
    inputs, outputs = checks.factors(x, w)
    dtype = jnp.promote_types(x.dtype, w.dtype)
    wide = checks.compute_dtype(dtype)
    # Features first: a gather copies whole rows, one for all examples.
    by_input = x.astype(wide).reshape(-1, inputs).T

    @jax.checkpoint  # the gathered inputs are gathered again for gradients, and never kept
    def add(total: Array, place: tuple[Array, Array]) -> tuple[Array, None]:
        rows, values = place
        seen = by_input.at[rows].get(mode="fill", fill_value=0)
        return total + values[:, None] * seen, None

    start = jnp.zeros((outputs, by_input.shape[1]), wide)
    total, _ = jax.lax.scan(add, start, (w.rows.T, w.values.astype(wide).T))
    return total.T.astype(dtype).reshape(*x.shape[:-1], outputs)


def _check_type(w: Any) -> None:
    if not isinstance(w, Condensed):
        remedy = "Use jnp.matmul, or condensed.from_dense for w."
        raise checks.value_error("w", type(w).__name__, "is no Condensed", remedy)
