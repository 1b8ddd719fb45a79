"""Layers of Flax Linen that store, train and multiply only the blocks of a sparse kernel.

Import it by name, ``import eoi_jax.linen``: of the library only this module and ``eoi_jax.nnx``
need Flax.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from eoi_jax.blocks import BlockSparse, matmul, orthogonal
from eoi_jax.typing import Array

__all__ = ["BlockSparseDense"]


class BlockSparseDense(nn.Module):
    """``nn.Dense`` with a block-sparse kernel that starts exactly orthogonal.

    The parameter ``kernel`` has the stored blocks alone, as :class:`~eoi_jax.blocks.BlockSparse`
    does in its ``values``, so gradients
    and the state of any optimizer are as small, and no mask is needed. The pattern is drawn with
    it and stands in the collection ``pattern``, which no optimizer sees: pass it to ``apply`` with
    the parameters, and name it in ``variable_axes`` of ``nn.scan`` and ``nn.vmap``. Where rows of
    blocks have different numbers of blocks, the missing ones are stored as zeros, and stay so.

    Attributes:
        features: Number of outputs.
        density: Fraction of the blocks that are stored, as for :func:`eoi_jax.blocks.orthogonal`.
        block_size: Rows, and columns, of a block; a divisor of the inputs and of ``features``.
        use_bias: Whether to add a bias.
        dtype: Dtype to compute in. Default: that to which inputs and parameters promote.
        param_dtype: Dtype of the parameters.
        precision: As that of :func:`jax.numpy.matmul`.
        scale: The singular value of the kernel at the start.
        bias_init: Initializer of the bias.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax.linen import BlockSparseDense
        >>> layer = BlockSparseDense(256, density=1 / 8, block_size=32)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 256)))
        >>> variables["params"]["kernel"].shape
        (8, 1, 32, 32)
        >>> layer.apply(variables, jnp.ones((5, 256))).shape
        (5, 256)
    """

    features: int
    density: float
    block_size: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    scale: float = 1.0
    bias_init: Any = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Return ``inputs @ kernel + bias``, over the last axis."""
        if self.is_initializing() and not self.has_variable("pattern", "rows"):
            shape = (jnp.shape(inputs)[-1], self.features)
            drawn = orthogonal(
                self.make_rng("params"),
                shape,
                self.density,
                block_size=self.block_size,
                scale=self.scale,
                dtype=self.param_dtype,
            )
            rows = self.variable("pattern", "rows", lambda: drawn.rows).value
            slots = self.variable("pattern", "slots", lambda: drawn.slots).value
            kernel = self.param("kernel", lambda _: drawn.values)
        elif not self.has_variable("pattern", "rows"):
            raise ValueError(
                f"variables['pattern'] has nothing of {'/'.join(self.path)!r}. "
                "Pass the collection to apply: {'params': params, 'pattern': pattern}."
            )
        else:
            rows = self.get_variable("pattern", "rows")
            slots = self.get_variable("pattern", "slots")
            # Only the shape counts: the parameter is there.
            high, wide = jnp.shape(inputs)[-1] // len(slots), self.features // len(rows)
            zeros = nn.initializers.zeros_init()
            kernel = self.param("kernel", zeros, (*rows.shape, high, wide), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = matmul(inputs, BlockSparse(kernel, rows, slots), precision=self.precision)
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
