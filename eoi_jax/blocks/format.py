"""A matrix whose non-zeros fill whole blocks: its storage, and conversion from and to dense."""

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

__all__ = ["BlockSparse", "from_dense"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSparse:
    r"""A matrix ``(inputs, outputs)`` of which only some ``b × c`` blocks are stored.

    It is a pytree of three arrays. Their shapes are static and the pattern is not: one compiled
    program serves all patterns. With ``R = outputs / c`` blocks of outputs, ``P = inputs / b``
    blocks of inputs and at most ``k`` blocks for each block of outputs:

    Attributes:
        values: ``(R, k, b, c)`` floating. ``values[r, s]`` is the block between the inputs
            ``rows[r, s]`` and the outputs ``r``; its first axis is that of the inputs.
        rows: ``(R, k)`` int32: for each block of outputs the blocks of inputs that it uses, each
            once; ``P`` where there is none, and the values are zero. Increasing, until a step of
            SET or RigL changes the pattern.
        slots: ``(P, k')`` int32, the inverse of ``rows``: for each block of inputs the places
            ``r * k + s`` of its blocks; ``R * k`` where there is none.

    Stacks of matrices have the same leading axes in all three arrays. In a tree of parameters
    :func:`eoi_jax.serialization.save` stores the three arrays, with a mask that is ``True`` for
    each.

    Example:
        >>> import jax
        >>> import eoi_jax as eoi
        >>> w = eoi.blocks.orthogonal(jax.random.key(0), (64, 128), 0.25, block_size=16)
        >>> w.shape, w.values.shape, w.density
        ((64, 128), (8, 1, 16, 16), 0.25)
        >>> x = jax.random.normal(jax.random.key(1), (3, 64))
        >>> bool(abs(x @ w - x @ w.to_dense()).max() < 1e-5)
        True
    """

    values: Array
    rows: Array
    slots: Array
    __array_ufunc__ = None  # an array of NumPy leaves ``x @ w`` to this class

    @property
    def block_shape(self) -> tuple[int, int]:
        """Inputs and outputs of a block, ``(b, c)``."""
        high, wide = self.values.shape[-2:]
        return high, wide

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense matrix, ``(..., inputs, outputs)``."""
        high, wide = self.block_shape
        return (*self.values.shape[:-4], self.slots.shape[-2] * high, self.rows.shape[-2] * wide)

    @property
    def dtype(self) -> Any:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def density(self) -> Any:
        """Fraction of the entries that are stored, without those of missing blocks.

        It is a float where the pattern is known, and traced where the pattern is traced.
        """
        present = self.rows < self.slots.shape[-2]
        total = present.size * self.slots.shape[-2] / self.rows.shape[-1]
        if checks.is_traced(self.rows):
            return present.sum() / total
        return float(np.asarray(present).sum() / total)

    @property
    def T(self) -> BlockSparse:
        """The transpose, ``(outputs, inputs)``."""
        if self.values.ndim > 4:
            return jax.vmap(lambda matrix: matrix.T)(self)
        blocks = self.rows.size
        flat = self.values.reshape(blocks, *self.block_shape)
        values = jnp.swapaxes(flat.at[self.slots].get(mode="fill", fill_value=0), -1, -2)
        # The place of each block among the transpose's, found where the block is.
        places = jnp.full((blocks,), self.slots.size, jnp.int32)
        counted = jnp.arange(self.slots.size, dtype=jnp.int32).reshape(self.slots.shape)
        places = places.at[self.slots].set(counted, mode="drop")
        outputs, per = self.rows.shape
        rows = jnp.where(self.slots < blocks, self.slots // per, outputs)
        return BlockSparse(values, rows, places.reshape(outputs, per))

    def mask(self) -> Array:
        """Return which entries are stored, as booleans of :attr:`shape`."""
        return dataclasses.replace(self, values=jnp.ones_like(self.values)).to_dense() != 0

    def to_dense(self) -> Array:
        """Return the matrix with its zeros, of :attr:`shape`."""
        if self.values.ndim > 4:
            return jax.vmap(BlockSparse.to_dense)(self)
        inputs, outputs = self.slots.shape[0], self.rows.shape[0]
        blocks = jnp.zeros((inputs, outputs, *self.block_shape), self.dtype)
        columns = jnp.arange(outputs)[:, None]
        blocks = blocks.at[self.rows, columns].add(self.values, mode="drop")
        return blocks.transpose(0, 2, 1, 3).reshape(self.shape)

    def __rmatmul__(self, x: Any) -> Array:
        from eoi_jax.blocks.product import matmul

        return matmul(x, self)


def _invert(rows: Array, inputs: int, most: int) -> Array:
    """Return the slots of a pattern: where the blocks of each block of inputs are.

    Args:
        rows: ``(R, k)`` blocks of inputs, ``inputs`` or more where there is none.
        inputs: Number of blocks of inputs.
        most: The largest number of blocks of one of them.

    Returns:
        ``(inputs, most)`` int32, increasing; ``R * k`` where there is none.
    """
    flat = rows.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    found = flat[order]
    first = jnp.searchsorted(found, found, side="left").astype(jnp.int32)
    rank = jnp.arange(flat.size, dtype=jnp.int32) - first
    slots = jnp.full((inputs, most), flat.size, jnp.int32)
    return slots.at[found, rank].set(order, mode="drop")


def from_dense(
    matrix: Array, block_size: int | tuple[int, int], mask: Array | None = None
) -> BlockSparse:
    """Store a matrix by its blocks.

    Args:
        matrix: ``(inputs, outputs)`` floating, not traced: the pattern decides shapes.
        block_size: Inputs and outputs of a block, one number if they are equal; they divide the
            matrix's inputs and outputs.
        mask: Booleans of the matrix's shape, each block all true or all false: the blocks to keep,
            zeros included. Default: the blocks that have a non-zero entry.

    Returns:
        A :class:`BlockSparse`, in which every row of blocks has as many places as the fullest row
        has blocks.

    Raises:
        ValueError: If the block size does not divide the shape, if a block of the mask has both
            values, if an entry outside the mask is not zero, if no block is kept, if the matrix is
            not floating, or if the matrix or the mask is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> w = jnp.zeros((4, 4)).at[0, 3].set(5.0)
        >>> found = eoi.blocks.from_dense(w, block_size=2)
        >>> found.values.shape, found.density, bool((found.to_dense() == w).all())
        ((2, 1, 2, 2), 0.25, True)
    """
    if checks.is_traced(matrix) or checks.is_traced(mask):
        raise ValueError("matrix or mask is traced, and decides shapes. Call this outside of jit.")
    matrix = checks.array(matrix, "matrix")
    checks.float_dtype(matrix.dtype, "matrix.dtype")
    sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    inputs, outputs = _check_shape(matrix.shape, *sizes)

    def blocks(array: Any) -> np.ndarray:
        shaped = np.asarray(array).reshape(inputs, sizes[0], outputs, sizes[1])
        return shaped.transpose(2, 0, 1, 3)

    support = blocks(nonzero(matrix))
    kept = support.any((2, 3))
    if mask is not None:
        if np.shape(mask) != matrix.shape:
            problem = f"is not the shape of the matrix, {matrix.shape}"
            raise checks.value_error("mask.shape", np.shape(mask), problem, "Give a mask of it.")
        wanted = blocks(np.asarray(mask, bool))
        kept = wanted.any((2, 3))
        cut = np.argwhere(wanted.all((2, 3)) != kept)
        if cut.size:
            raise ValueError(
                f"mask has both values in {_place(cut[0], sizes)}, one of {len(cut)} such. "
                "Give a block_size that the mask's blocks are made of."
            )
        off = np.argwhere((support & ~wanted).any((2, 3)))
        if off.size:
            raise ValueError(
                f"matrix is not zero off the mask, in {_place(off[0], sizes)}. "
                "Apply the mask first: jnp.where(mask, matrix, 0)."
            )
    if not kept.any():
        raise ValueError("matrix has no block to keep. Give a mask with one, zeros included.")
    most = int(kept.sum(1).max())
    # Blocks that are kept come first, in their order.
    rows = np.argsort(~kept, axis=1, kind="stable")[:, :most]
    there = np.take_along_axis(kept, rows, 1)
    values = blocks(matrix)[np.arange(outputs)[:, None], rows] * there[..., None, None]
    index = jnp.asarray(np.where(there, rows, inputs), jnp.int32)
    slots = _invert(index, inputs, int(kept.sum(0).max()))
    return BlockSparse(jnp.asarray(values, matrix.dtype), index, slots)


def _place(block: Any, sizes: tuple[int, int]) -> str:
    """Name a block, given as (outputs, inputs), by its entries in the matrix."""
    pairs = zip(reversed(block), sizes, strict=True)
    return "[" + ", ".join(f"{size * at}:{size * (at + 1)}" for at, size in pairs) + "]"


def _check_shape(shape: Any, *block_size: Any) -> tuple[int, int]:
    """Return the numbers of blocks of both sides of a matrix, for one block size or two."""
    dims = checks.shape(shape)
    if len(dims) != 2 or 0 in dims:
        problem = "is outside (inputs, outputs), both at least 1"
        raise checks.value_error("shape", dims, problem, "Use jax.vmap for a stack of matrices.")
    if len(block_size) != 2:
        problem = "is outside (inputs, outputs) of a block, or one number for both"
        raise checks.value_error("block_size", block_size, problem, "Give one of these.")
    sizes = tuple(checks.integer(size, low=1, name="block_size") for size in block_size)
    for side, size in zip(dims, sizes, strict=True):
        if side % size:
            common = math.gcd(*dims) if sizes[0] == sizes[1] else side
            raise checks.value_error(
                "block_size",
                size,
                f"is outside the divisors of the sides of shape={dims}",
                f"Give a divisor of {common}, or pad the layer to multiples of {size}.",
            )
    return dims[0] // sizes[0], dims[1] // sizes[1]
