"""The types that the library's signatures use."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

__all__ = [
    "Array",
    "DType",
    "Densities",
    "Initializer",
    "Layout",
    "LayoutOf",
    "Mask",
    "MaskOf",
    "Params",
    "Scores",
    "Shape",
    "Where",
]

Array: TypeAlias = jax.Array
"""A :class:`jax.Array`."""

Shape: TypeAlias = Sequence[int]
"""A sequence of non-negative ints."""

DType: TypeAlias = Any
"""Anything that :func:`jax.numpy.dtype` accepts."""

Params: TypeAlias = Any
"""A pytree of arrays, such as a Linen dict, an ``nnx.State``, an Equinox or Haiku tree."""

Mask: TypeAlias = Any
"""A pytree of the structure of ``Params``.

It has a boolean array of the leaf's shape for a sparse kernel, and a scalar ``True`` for a leaf
that stays dense.
"""

Densities: TypeAlias = Any
"""A pytree of the structure of ``Params``.

It has a fraction of non-zeros in (0, 1] for a sparse kernel, ``1.0`` for a leaf that stays dense.
"""

Scores: TypeAlias = Any
"""A pytree of the structure of ``Params``: weights with larger scores are kept."""

MaskOf: TypeAlias = Callable[[Params], Mask]
"""``params -> Mask``, such as :func:`eoi_jax.masks.support`."""

Where: TypeAlias = Callable[[tuple[Any, ...], Any], bool]
"""``(path, leaf) -> bool``, whether a leaf is a kernel to be made sparse.

The default is :func:`eoi_jax.masks.is_kernel`, which decides by names; a warning lists the matrices
that stay dense.
"""


class Layout(NamedTuple):
    """How to read the axes of a kernel, which cannot be known from its shape.

    A scan over ``L`` dense layers stores one kernel ``(L, n, m)``. A 1-D convolution has a kernel
    of the same form; the kernel of the scan needs ``batch_axes=1``. The other axes are those of
    one layer's kernel, as its initializer gets it. There, ``in_axis``, ``out_axis`` and
    ``batch_axis`` have the same meaning as in :func:`jax.nn.initializers.variance_scaling`, and
    axes that none of them names are the taps of a convolution. Several axes together are one fan,
    in the order given.

    ====================================== =====================================================
    kernel                                 layout
    ====================================== =====================================================
    dense, or convolution of Flax, Haiku   ``Layout()``
    convolution of Equinox or PyTorch      ``Layout(in_axis=1, out_axis=0)``
    depthwise, ``c`` channels              ``Layout(groups=c)``
    scanned layers ``(L, n, m)``           ``Layout(batch_axes=1)``
    experts ``(experts, d, ff)``, critics  ``Layout(batch_axes=1)``, or ``batch_axis=0`` if all
    ``(critics, n, m)``                    share one density
    query, key, value ``(d, heads, k)``    ``Layout(in_axis=0, out_axis=(1, 2))``;
                                           per head ``Layout(in_axis=0, out_axis=2, batch_axis=1)``
    output of attention ``(heads, k, d)``  ``Layout(in_axis=(0, 1), out_axis=2)``;
                                           per head ``Layout(in_axis=1, out_axis=2, batch_axis=0)``
    q, k and v in one ``(d, 3 * d)``       ``Layout(groups=3)``
    q, k and v in one ``(d, 3, heads, k)`` ``Layout(in_axis=0, out_axis=(2, 3), batch_axis=1)``
    each of them scanned, ``(L, ...)``     the same with ``batch_axes=1``
    ====================================== =====================================================

    Attributes:
        batch_axes: How many leading axes stack layers, 0 or more. Each layer has a density, and so
            a number of weights, of its own.
        groups: Into how many groups the outputs of each layer are divided, 1 or more.
        transposed: Whether the kernel is that of a transposed convolution, whose center tap is
            ``k // 2`` and not ``(k - 1) // 2``.
        in_axis: The axis or axes of inputs of one layer's kernel.
        out_axis: The axis or axes of outputs.
        batch_axis: The axis or axes along which one layer holds several matrices, each an isometry
            by itself, such as the heads of attention. They share the layer's density, as groups do.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> from eoi_jax.typing import Layout
        >>> params = {"kernel": jnp.zeros((3, 16, 24))}  # three critics
        >>> start = eoi.exact_orthogonal(
        ...     jax.random.key(0), params, 0.2, layout=lambda path, leaf: Layout(batch_axes=1)
        ... )
        >>> start.mask["kernel"].sum(axis=(1, 2)).tolist()
        [77, 77, 76]
    """

    batch_axes: int = 0
    groups: int = 1
    transposed: bool = False
    in_axis: int | Sequence[int] = -2
    out_axis: int | Sequence[int] = -1
    batch_axis: int | Sequence[int] = ()


LayoutOf: TypeAlias = Callable[[tuple[Any, ...], Any], Layout]
"""``(path, leaf) -> Layout``, how to read each kernel."""


class Initializer(Protocol):
    """A function ``(key, shape, dtype) -> array`` that Flax and JAX call to fill one parameter."""

    def __call__(
        self, key: Array, shape: Shape, dtype: DType = ..., out_sharding: Any = None
    ) -> Array:
        """Return an array of ``shape`` and ``dtype`` drawn from ``key``."""
