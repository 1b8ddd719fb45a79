"""The product of a dense array and a block-sparse matrix, and its derivatives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks
from eoi_jax.blocks.format import BlockSparse
from eoi_jax.typing import Array

__all__ = ["matmul"]


def matmul(x: Array, w: BlockSparse, *, precision: Any = None) -> Array:
    r"""Multiply by a block-sparse matrix: ``x @ w``, at the cost of the stored blocks.

    :math:`y_r = \sum_s x_{\text{rows}[r, s]} W_{r, s}` over blocks of features: a gather of the
    inputs that each block of outputs sees, and one batched matrix product. The gradients are one
    batched product each, that of the inputs with a sum over the blocks which saw an input, so they
    cost the stored blocks too. It has reverse mode, and all derivatives of that; no forward mode.

    Args:
        x: ``(..., inputs)`` floating.
        w: One matrix, ``(inputs, outputs)``.
        precision: As that of :func:`jax.numpy.matmul`.

    Returns:
        ``(..., outputs)``, of the dtype to which those of ``x`` and ``w`` promote. Products of
        narrow dtypes are summed in float32.

    Raises:
        ValueError: If the last axis of ``x`` is not that of the inputs, one of both is not
            floating, or ``w`` is a stack (use :func:`jax.vmap`).

    Example:
        >>> import jax
        >>> import eoi_jax as eoi
        >>> w = eoi.blocks.orthogonal(jax.random.key(0), (256, 256), 1 / 8, block_size=32)
        >>> x = jax.random.normal(jax.random.key(1), (10, 256))
        >>> y = eoi.blocks.matmul(x, w)
        >>> bool(abs((y**2).sum(-1) / (x**2).sum(-1) - 1).max() < 1e-5)
        True
    """
    x = checks.array(x, "x")
    _check_type(w)
    checks.float_dtype(x.dtype, "x.dtype")
    checks.float_dtype(w.dtype, "w.dtype")
    if w.values.ndim != 4:
        raise checks.value_error("w", w.shape, "is a stack of matrices", "Use jax.vmap.")
    inputs, outputs = w.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise checks.value_error(
            "x.shape", x.shape, f"does not end in {inputs}, the inputs of w", "Give such an array."
        )
    dtype = jnp.promote_types(x.dtype, w.dtype)
    by_block = _split(x.astype(dtype).reshape(-1, inputs), w.slots.shape[0])
    y = _multiply(by_block, w.values.astype(dtype), w.rows, w.slots, precision)
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], outputs)


def _split(x: Array, blocks: int) -> Array:
    """Split features ``(batch, n)``: ``(blocks, batch, n / blocks)``.

    With blocks first the batch of the products is the leading axis everywhere.
    """
    batch, features = x.shape
    return x.reshape(batch, blocks, features // blocks).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _multiply(x: Array, values: Array, rows: Array, slots: Array, precision: Any = None) -> Array:
    """Multiply in the order of blocks: ``(P, batch, b)`` to ``(R, batch, c)``."""
    del slots
    return _product(x, values, rows, precision)


# Both without _multiply: of what has no rule of its own JAX finds all derivatives and transposes,
# as functions of the spectrum and Hessian-vector products need them.
def _forward(x: Array, values: Array, rows: Array, slots: Array, precision: Any) -> Any:
    return _product(x, values, rows, precision), (x, values, rows, slots)


def _backward(precision: Any, saved: Any, dy: Array) -> Any:
    x, values, rows, slots = saved
    dw = _dot(_gathered(x, rows), dy, (1, 1), precision)
    seen = _dot(dy, _joined(values), (2, 2), precision, narrow=False)  # (R, batch, k * b)
    (outputs, per, high, _), batch = values.shape, dy.shape[1]
    seen = seen.reshape(outputs, batch, per, high).swapaxes(1, 2)
    by_place = seen.reshape(outputs * per, batch, high)
    dx = by_place.at[slots].get(mode="fill", fill_value=0).sum(1).astype(x.dtype)
    # Integers have no gradient.
    return dx, dw.reshape(values.shape), None, None


_multiply.defvjp(_forward, _backward)


def _product(x: Array, values: Array, rows: Array, precision: Any) -> Array:
    return _dot(_gathered(x, rows), _joined(values), (2, 1), precision)


def _joined(values: Array) -> Array:
    """Return all that a block of outputs is made of, one below the other: ``(R, k * b, c)``."""
    outputs, per, high, wide = values.shape
    return values.reshape(outputs, per * high, wide)


def _gathered(x: Array, rows: Array) -> Array:
    """Return what each block of outputs sees, side by side: ``(R, batch, k * b)``."""
    seen = x.at[rows].get(mode="fill", fill_value=0)  # (R, k, batch, b)
    outputs, per, batch, size = seen.shape
    return seen.swapaxes(1, 2).reshape(outputs, batch, per * size)


def _dot(a: Array, b: Array, axes: tuple[int, int], precision: Any, narrow: bool = True) -> Array:
    """Contract one axis of both, batched over the first, and accumulate in float32 or wider."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    numbers = (((axes[0],), (axes[1],)), ((0,), (0,)))
    product = jax.lax.dot_general(a, b, numbers, precision, preferred_element_type=wide)
    return product.astype(a.dtype) if narrow else product


def _check_type(w: Any) -> None:
    if not isinstance(w, BlockSparse):
        remedy = "Use jnp.matmul, or blocks.from_dense for w."
        raise checks.value_error("w", type(w).__name__, "is no BlockSparse", remedy)
