"""The types that the library's signatures use.

=============== =====================================================================
``Array``       a :class:`jax.Array`
``Shape``       a sequence of non-negative ints
``DType``       anything that :func:`jax.numpy.dtype` accepts
``Params``      a pytree of arrays: a Linen dict, an ``nnx.State``, an Equinox or Haiku tree
``Mask``        a pytree of the structure of ``Params``: a boolean array of the leaf's shape for
                a sparse kernel, a scalar ``True`` for a leaf that stays dense
``MaskOf``      ``params -> Mask``, such as :func:`eoi_jax.masks.support`
``Densities``   a pytree of the structure of ``Params``: a fraction of non-zeros in (0, 1] for a
                sparse kernel, ``1.0`` for a leaf that stays dense
``Scores``      a pytree of the structure of ``Params``: larger means keep
``Where``       ``(path, leaf) -> bool``: whether a leaf is a kernel to be made sparse; by default
                :func:`eoi_jax.masks.is_kernel`, which judges by names, and a warning tells which
                matrices stay dense
``Layout``      how a kernel is a stack of layers, and each layer one of groups
``LayoutOf``    ``(path, leaf) -> Layout``
``Initializer`` ``(key, shape, dtype, out_sharding) -> Array``, the protocol of
                :mod:`jax.nn.initializers`
=============== =====================================================================
"""

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
Shape: TypeAlias = Sequence[int]
DType: TypeAlias = Any
Params: TypeAlias = Any
Mask: TypeAlias = Any
Densities: TypeAlias = Any
Scores: TypeAlias = Any
MaskOf: TypeAlias = Callable[[Params], Mask]
Where: TypeAlias = Callable[[tuple[Any, ...], Any], bool]


class Layout(NamedTuple):
    """How to read the axes of a kernel, which its shape alone does not tell.

    A scan over ``L`` dense layers stores one kernel ``(L, n, m)``, as a 1-D convolution does: the
    scan's has ``batch_axes=1``. A depthwise kernel of ``c`` channels has ``groups=c``. What is left
    of the axes are ``(*taps, inputs, outputs)``, as Flax and Haiku store them.

    Attributes:
        batch_axes: How many leading axes stack layers, 0 or more.
        groups: Into how many groups the channels of each layer are divided, 1 or more.
        transposed: Whether the kernel is that of a transposed convolution, whose center tap is
            ``k // 2`` and not ``(k - 1) // 2``.
    """

    batch_axes: int = 0
    groups: int = 1
    transposed: bool = False


LayoutOf: TypeAlias = Callable[[tuple[Any, ...], Any], Layout]


class Initializer(Protocol):
    """What Flax and JAX call to fill one parameter."""

    def __call__(
        self, key: Array, shape: Shape, dtype: DType = ..., out_sharding: Any = None
    ) -> Array:
        """Return an array of ``shape`` and ``dtype`` drawn from ``key``."""
