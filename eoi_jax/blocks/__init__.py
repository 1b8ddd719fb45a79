"""Block-sparse matrices that are exactly orthogonal, and products that skip their zeros."""

from eoi_jax.blocks.drawing import orthogonal
from eoi_jax.blocks.dynamic import (
    Rewired,
    all_blocks,
    gradient_norms,
    growable,
    rigl_step,
    set_step,
)
from eoi_jax.blocks.format import BlockSparse, from_dense
from eoi_jax.blocks.product import matmul

__all__ = [
    "BlockSparse",
    "Rewired",
    "all_blocks",
    "from_dense",
    "gradient_norms",
    "growable",
    "matmul",
    "orthogonal",
    "rigl_step",
    "set_step",
]
