"""The product of a dense array and a block-sparse matrix, and its derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks
from eoi_jax.blocks.format import BlockSparse
from eoi_jax.typing import Array

__all__ = ["matmul"]


def matmul(
    x: Array, w: BlockSparse, *, precision: Any = None, implementation: str | None = None
) -> Array:
    r"""Multiply by a block-sparse matrix: ``x @ w``, at the cost of the stored blocks.

    :math:`y_r = \sum_s x_{\text{rows}[r, s]} W_{r, s}` over blocks of features: a gather of the
    inputs that each block of outputs uses, and one batched matrix product. Each of the two
    gradients is one batched product; that of the inputs also sums over the blocks of each input. So
    the gradients cost only the stored blocks too. The function has reverse mode, with all
    derivatives of it, but no forward mode.

    The two implementations give the same result:

    * ``"xla"`` gathers the inputs that each block of outputs uses. This takes ``R * k / P`` copies
      of ``x`` in memory, for ``P`` blocks of inputs, and ``R`` blocks of outputs with ``k`` blocks
      each.
    * ``"pallas"`` computes the product and both gradients in kernels that read these inputs without
      copies: Mosaic on TPUs, Triton on GPUs, according to the platform that the program is compiled
      for. Second derivatives are those of ``"xla"``. JAX cannot transpose the gradients, so in
      :mod:`eoi_jax.spectrum` only the functions that take ``mode="reverse"`` can use it.

    The kernels have not been run on a TPU or GPU. They are tested in interpret mode and compiled by
    the compilers of a TPU v5e and an H100; their speed has not been measured. So ``None`` means
    ``"xla"`` on every platform. If the copies of ``x`` take too much memory or time on a TPU or
    GPU, try ``"pallas"`` with blocks of 128 or more, and time both. On other platforms ``"pallas"``
    runs the kernel for TPUs in interpret mode, which is slow and meant for tests. JAX 0.12
    announces the end of Pallas for Triton.

    Args:
        x: ``(..., inputs)`` floating.
        w: One matrix, ``(inputs, outputs)``.
        precision: As that of :func:`jax.numpy.matmul`. ``"pallas"`` takes one
            ``jax.lax.Precision`` or its name for both arrays; on TPUs ``HIGH`` is ``HIGHEST``.
        implementation: ``"xla"``, ``"pallas"``, or ``None`` for the default, ``"xla"``.
            ``"pallas"`` takes blocks whose sides are multiples of 16, and on TPUs of 128.

    Returns:
        ``(..., outputs)``, of the dtype to which those of ``x`` and ``w`` promote. Products of
        narrow dtypes are summed in float32.

    Raises:
        ValueError: If the last axis of ``x`` has not as many entries as ``w`` has inputs, ``x`` or
            ``w`` is not floating, ``w`` is a stack (use :func:`jax.vmap`), the implementation is
            unknown, or it is ``"pallas"`` and cannot take the block size or the precision.

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
    inputs, outputs = checks.factors(x, w)
    if implementation is not None:
        remedy = "Give one of the two, or None for the default."
        checks.one_of(implementation, ("xla", "pallas"), name="implementation", remedy=remedy)
    dtype = jnp.promote_types(x.dtype, w.dtype)
    flat = x.astype(dtype).reshape(-1, inputs)
    arrays = (flat, w.values.astype(dtype), w.rows, w.slots)
    if implementation == "pallas":
        _check_kernels(w.block_shape)
        precision = _check_precision(precision)
        # Kernels take at least one row.
        y = _multiply_by_kernels(*arrays, (precision, "mosaic")) if x.size else _by_xla(*arrays)
    else:
        y = _by_xla(*arrays, precision)
    return y.reshape(*x.shape[:-1], outputs)


def _by_xla(x: Array, values: Array, rows: Array, slots: Array, precision: Any = None) -> Array:
    """Multiply ``(batch, inputs)`` by operations of XLA."""
    return _side_by_side(_multiply(_split(x, slots.shape[0]), values, rows, slots, precision))


def _split(x: Array, blocks: int) -> Array:
    """Split features ``(batch, n)``: ``(blocks, batch, n / blocks)``.

    With blocks first the batch of the products is the leading axis everywhere.
    """
    batch, features = x.shape
    return x.reshape(batch, blocks, features // blocks).swapaxes(0, 1)


def _side_by_side(y: Array) -> Array:
    """Undo the split: ``(blocks, batch, c)`` to ``(batch, blocks * c)``."""
    blocks, batch, wide = y.shape
    return y.swapaxes(0, 1).reshape(batch, blocks * wide)


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
    dx = _transposed_product(dy, values, slots, precision)
    dw = _outer(x, dy, rows, precision)
    # Integers have no gradient.
    return dx, dw, None, None


_multiply.defvjp(_forward, _backward)


def _product(x: Array, values: Array, rows: Array, precision: Any) -> Array:
    return _dot(_gathered(x, rows), _joined(values), (2, 1), precision)


def _joined(values: Array) -> Array:
    """Return all that a block of outputs is made of, one below the other: ``(R, k * b, c)``."""
    outputs, per, high, wide = values.shape
    return values.reshape(outputs, per * high, wide)


def _transposed_product(dy: Array, values: Array, slots: Array, precision: Any) -> Array:
    seen = _dot(dy, _joined(values), (2, 2), precision, narrow=False)  # (R, batch, k * b)
    (outputs, per, high, _), batch = values.shape, dy.shape[1]
    seen = seen.reshape(outputs, batch, per, high).swapaxes(1, 2)
    by_place = seen.reshape(outputs * per, batch, high)
    return by_place.at[slots].get(mode="fill", fill_value=0).sum(1).astype(dy.dtype)


def _outer(x: Array, dy: Array, rows: Array, precision: Any) -> Array:
    dw = _dot(_gathered(x, rows), dy, (1, 1), precision)
    return dw.reshape(*rows.shape, x.shape[-1], dy.shape[-1])


def _gathered(x: Array, rows: Array) -> Array:
    """Return what each block of outputs sees, side by side: ``(R, batch, k * b)``."""
    seen = x.at[rows].get(mode="fill", fill_value=0)  # (R, k, batch, b)
    outputs, per, batch, size = seen.shape
    return seen.swapaxes(1, 2).reshape(outputs, batch, per * size)


def _dot(a: Array, b: Array, axes: tuple[int, int], precision: Any, narrow: bool = True) -> Array:
    """Contract one axis of both, batched over the first, and accumulate in float32 or wider."""
    wide = checks.compute_dtype(a.dtype)
    numbers = (((axes[0],), (axes[1],)), ((0,), (0,)))
    product = jax.lax.dot_general(a, b, numbers, precision, preferred_element_type=wide)
    return product.astype(a.dtype) if narrow else product


# The same by kernels: a precision and the name of the kernel to interpret are the options. Pallas
# takes long to import and few need it, so it is imported where a kernel is called.


def _y_by_kernel(x: Array, values: Array, rows: Array, slots: Array, options: Any) -> Array:
    from eoi_jax.blocks import kernels

    places = jnp.arange(rows.size, dtype=jnp.int32).reshape(rows.shape)
    flat = values.reshape(-1, *values.shape[2:])
    return kernels.product(x, flat, rows, places, False, kernels.Options(*options))


def _dx_by_kernel(dy: Array, values: Array, rows: Array, slots: Array, options: Any) -> Array:
    from eoi_jax.blocks import kernels

    # A missing block has the slot R * k, so its source is R, which is missing in dy as well.
    sources = slots // rows.shape[1]
    flat = values.reshape(-1, *values.shape[2:])
    return kernels.product(dy, flat, sources, slots, True, kernels.Options(*options))


def _dw_by_kernel(x: Array, dy: Array, rows: Array, slots: Array, options: Any) -> Array:
    from eoi_jax.blocks import kernels

    return kernels.outer(x, dy, rows, slots.shape[0], kernels.Options(*options))


def _y_by_xla(x: Array, values: Array, rows: Array, slots: Array, options: Any) -> Array:
    return _side_by_side(_product(_split(x, slots.shape[0]), values, rows, options[0]))


def _dx_by_xla(dy: Array, values: Array, rows: Array, slots: Array, options: Any) -> Array:
    by_block = _split(dy, rows.shape[0])
    return _side_by_side(_transposed_product(by_block, values, slots, options[0]))


def _dw_by_xla(x: Array, dy: Array, rows: Array, slots: Array, options: Any) -> Array:
    return _outer(_split(x, slots.shape[0]), _split(dy, rows.shape[0]), rows, options[0])


def _with_tangents(by_kernel: Callable[..., Array], by_xla: Callable[..., Array]) -> Any:
    """Give a kernel, a product of two arrays, the derivatives of the same product by XLA."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
    def product(a: Array, b: Array, rows: Array, slots: Array, options: Any) -> Array:
        return by_kernel(a, b, rows, slots, options)

    @product.defjvp
    def tangents(options: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
        a, b, rows, slots = primals
        _, tangent = jax.jvp(lambda a, b: by_xla(a, b, rows, slots, options), (a, b), tangents[:2])
        return product(a, b, rows, slots, options), tangent

    return product


# Derivatives of the first order are kernels too, by _multiply_by_kernels; these are of the second.
_y = _with_tangents(_y_by_kernel, _y_by_xla)
_dx = _with_tangents(_dx_by_kernel, _dx_by_xla)
_dw = _with_tangents(_dw_by_kernel, _dw_by_xla)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _multiply_by_kernels(
    x: Array, values: Array, rows: Array, slots: Array, options: tuple[Any, str]
) -> Array:
    """Multiply ``(batch, inputs)`` to ``(batch, outputs)``."""
    return _y(x, values, rows, slots, options)


def _forward_by_kernels(
    x: Array, values: Array, rows: Array, slots: Array, options: tuple[Any, str]
) -> Any:
    return _y(x, values, rows, slots, options), (x, values, rows, slots)


def _backward_by_kernels(options: tuple[Any, str], saved: Any, dy: Array) -> Any:
    x, values, rows, slots = saved
    dx = _dx(dy, values, rows, slots, options)
    return dx, _dw(x, dy, rows, slots, options), None, None


_multiply_by_kernels.defvjp(_forward_by_kernels, _backward_by_kernels)


def _check_kernels(block_shape: tuple[int, int]) -> None:
    """Require blocks of which the hardware can make tiles."""
    multiple = 128 if jax.default_backend() == "tpu" else 16
    if any(size % multiple for size in block_shape):
        raise checks.value_error(
            "block_size",
            block_shape,
            f"is outside the multiples of {multiple}, which implementation='pallas' takes here",
            "Draw w with such a block_size, or give implementation='xla'.",
        )


def _check_precision(precision: Any) -> Any:
    """Accept one precision by its name or as it is, or None for that of JAX's settings."""
    settings: Any = jax.config
    if precision is None:
        precision = settings.jax_default_matmul_precision
    try:
        return None if precision is None else jax.lax.Precision(precision)
    except ValueError:
        raise checks.value_error(
            "precision",
            precision,
            "is outside {None, 'default', 'high', 'highest'}, which implementation='pallas' takes",
            "Give one of these, or implementation='xla'.",
        ) from None


def _check_type(w: Any) -> None:
    if not isinstance(w, BlockSparse):
        remedy = "Use jnp.matmul, or blocks.from_dense for w."
        raise checks.value_error("w", type(w).__name__, "is no BlockSparse", remedy)
