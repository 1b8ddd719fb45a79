"""Block-sparse matrices that are exactly orthogonal, and products that skip their zeros."""

from eoi_jax.blocks.drawing import orthogonal
from eoi_jax.blocks.format import BlockSparse, from_dense
from eoi_jax.blocks.product import matmul

__all__ = ["BlockSparse", "from_dense", "matmul", "orthogonal"]
