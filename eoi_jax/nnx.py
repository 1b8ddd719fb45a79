"""Layers of Flax NNX that store, train and multiply only the blocks of a sparse kernel.

Import it by name, ``import eoi_jax.nnx``: of the library only this module and ``eoi_jax.linen``
need Flax.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from eoi_jax.blocks import BlockSparse, matmul, orthogonal
from eoi_jax.typing import Array

__all__ = ["BlockSparseLinear", "Pattern"]


_zeros = nnx.initializers.zeros_init()


class Pattern(nnx.Variable[Any]):
    """Which blocks a layer stores: indices, that no optimizer sees."""


class BlockSparseLinear(nnx.Module):
    """``nnx.Linear`` with a block-sparse kernel that starts exactly orthogonal.

    The parameter ``kernel`` has the stored blocks alone, as :class:`~eoi_jax.blocks.BlockSparse`
    does in its ``values``, so gradients
    and the state of any optimizer are as small, and no mask is needed. ``rows`` and ``slots`` are
    the :class:`Pattern`. Where rows of blocks have different numbers of blocks, the missing ones
    are stored as zeros, and stay so.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        density: Fraction of the blocks that are stored, as for :func:`eoi_jax.blocks.orthogonal`.
        block_size: Rows, and columns, of a block; a divisor of the inputs and of the outputs.
        use_bias: Whether to add a bias.
        dtype: Dtype to compute in. Default: that to which inputs and parameters promote.
        param_dtype: Dtype of the parameters.
        precision: As that of :func:`jax.numpy.matmul`.
        scale: The singular value of the kernel at the start.
        bias_init: Initializer of the bias.
        rngs: Keys, of which it takes those named ``params``.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from eoi_jax.nnx import BlockSparseLinear
        >>> layer = BlockSparseLinear(256, 256, density=1 / 8, block_size=32, rngs=nnx.Rngs(0))
        >>> layer.kernel.shape, layer(jnp.ones((5, 256))).shape
        ((8, 1, 32, 32), (5, 256))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        density: float,
        block_size: int,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        scale: float = 1.0,
        bias_init: Any = _zeros,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_features, out_features)
        drawn = orthogonal(
            rngs.params(), shape, density, block_size=block_size, scale=scale, dtype=param_dtype
        )
        self.kernel = nnx.Param(drawn.values)
        self.rows = Pattern(drawn.rows)
        self.slots = Pattern(drawn.slots)
        bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        )
        self.bias = nnx.data(bias)
        self.dtype = dtype
        self.precision = precision

    def matrix(self) -> BlockSparse:
        """Return the kernel with its pattern."""
        return BlockSparse(self.kernel[...], self.rows[...], self.slots[...])

    def __call__(self, inputs: Array) -> Array:
        """Return ``inputs @ kernel + bias``, over the last axis."""
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        matrix = BlockSparse(kernel, self.rows[...], self.slots[...])
        y = matmul(inputs, matrix, precision=self.precision)
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
