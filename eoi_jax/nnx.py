"""Layers of Flax NNX that store, train and multiply only the blocks of a sparse kernel.

Import it by name, ``import eoi_jax.nnx``, since it needs Flax, as only ``eoi_jax.linen`` does
besides. :func:`from_dense` and :func:`to_dense` convert a layer from and to ``nnx.Linear`` under a
mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from eoi_jax import blocks
from eoi_jax._internal import checks, conv
from eoi_jax.blocks import BlockSparse, matmul, orthogonal
from eoi_jax.typing import Array

__all__ = [
    "BlockSparseConv",
    "BlockSparseLinear",
    "BlockSparseMlp",
    "Pattern",
    "from_dense",
    "to_dense",
]

_no_metadata: Mapping[str, Any] = MappingProxyType({})
_zeros = nnx.initializers.zeros_init()


class Pattern(nnx.Variable[Any]):
    """The type of the variables with the indices of a layer's blocks, which are not optimized."""


class BlockSparseLinear(nnx.Module):
    """``nnx.Linear`` with a block-sparse kernel that starts exactly orthogonal.

    The parameter ``kernel`` has only the stored blocks, as the ``values`` of a
    :class:`~eoi_jax.blocks.BlockSparse`. So gradients and the state of any optimizer are equally
    small, and no mask is needed. ``rows`` and ``slots`` are the :class:`Pattern`. Where rows of
    blocks have different numbers of blocks, the missing blocks are stored as zeros, and remain
    zero.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        density: Fraction of the blocks that are stored, as for :func:`eoi_jax.blocks.orthogonal`.
        block_size: Rows, and columns, of a block; a divisor of the inputs and of the outputs.
        use_bias: Whether to add a bias.
        dtype: Dtype to compute in. Default: that to which inputs and parameters promote.
        param_dtype: Dtype of the parameters.
        precision: As that of :func:`jax.numpy.matmul`.
        implementation: As that of :func:`eoi_jax.blocks.matmul`.
        scale: The singular value of the kernel at the start.
        bias_init: Initializer of the bias.
        kernel_metadata: Metadata of the stored kernel's variable, as ``nnx.Linear`` takes it. Names
            of mesh axes are for its four axes: ``{"out_sharding": ("model", None, None, None)}``.
        bias_metadata: Metadata of the bias's variable.
        rngs: Random keys; those named ``params`` are used.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from eoi_jax.nnx import BlockSparseLinear
        >>> layer = BlockSparseLinear(256, 256, density=1 / 8, block_size=32, rngs=nnx.Rngs(0))
        >>> layer.kernel.shape, layer(jnp.ones((5, 256))).shape
        ((8, 1, 32, 32), (5, 256))

    Raises:
        ValueError: For a block size, density, ``scale`` or dtype that
            :func:`eoi_jax.blocks.orthogonal` refuses.
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
        implementation: str | None = None,
        scale: float = 1.0,
        bias_init: Any = _zeros,
        kernel_metadata: Mapping[str, Any] = _no_metadata,
        bias_metadata: Mapping[str, Any] = _no_metadata,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_features, out_features)
        matrix = orthogonal(
            rngs.params(), shape, density, block_size=block_size, scale=scale, dtype=param_dtype
        )
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        metadata = (kernel_metadata, bias_metadata)
        self._store(matrix, bias, dtype, precision, *metadata, implementation=implementation)

    def _store(
        self,
        matrix: BlockSparse,
        bias: Array | None,
        dtype: Any,
        precision: Any,
        kernel_metadata: Mapping[str, Any] = _no_metadata,
        bias_metadata: Mapping[str, Any] = _no_metadata,
        implementation: str | None = None,
    ) -> None:
        self.kernel = nnx.Param(matrix.values, **kernel_metadata)
        self.rows = Pattern(matrix.rows)
        self.slots = Pattern(matrix.slots)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias, **bias_metadata))
        self.dtype = dtype
        self.precision = precision
        self.implementation = implementation

    def matrix(self) -> BlockSparse:
        """Return the kernel with its pattern."""
        return BlockSparse(self.kernel[...], self.rows[...], self.slots[...])

    def set_matrix(self, matrix: BlockSparse) -> None:
        """Store another matrix in place of this one: other values, other blocks.

        Args:
            matrix: A matrix of the same shape, such as the result of
                :func:`eoi_jax.blocks.rigl_step`.

        Raises:
            ValueError: If the shape differs.
        """
        shape = self.matrix().shape
        if matrix.shape != shape:
            problem = f"is not that of the layer's, {shape}"
            raise checks.value_error("matrix.shape", matrix.shape, problem, "Make another layer.")
        # In place, arrays would have to be of the same shapes.
        arrays = {"kernel": matrix.values, "rows": matrix.rows, "slots": matrix.slots}
        for name, array in arrays.items():
            setattr(self, name, getattr(self, name).replace(array))

    def __call__(self, inputs: Array) -> Array:
        """Return ``inputs @ kernel + bias``, over the last axis."""
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        matrix = BlockSparse(kernel, self.rows[...], self.slots[...])
        y = matmul(inputs, matrix, precision=self.precision, implementation=self.implementation)
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


class BlockSparseConv(BlockSparseLinear):
    """``nnx.Conv`` of one tap, with block-sparse channels that start exactly orthogonal.

    This is the 1 × 1 convolution: :class:`BlockSparseLinear` over the channels of each pixel. With
    strides, it uses the first pixel of each cell. A larger kernel with only the center tap non-zero
    (a delta kernel, as :func:`eoi_jax.initializers.conv` draws by default) is the same function at
    stride 1, with circular or ``SAME`` padding, so there is no argument for the size.

    Args:
        in_features: Number of input channels.
        out_features: Number of output channels.
        strides: One for each spatial axis, at least 1; the length is the number of spatial axes.
        **options: All other arguments of :class:`BlockSparseLinear`: ``density``, ``block_size``
            and ``rngs`` are required.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from eoi_jax.nnx import BlockSparseConv
        >>> options = {"density": 1 / 4, "block_size": 8, "rngs": nnx.Rngs(0)}
        >>> layer = BlockSparseConv(32, 64, strides=(2, 2), **options)
        >>> layer(jnp.ones((5, 9, 9, 32))).shape
        (5, 5, 5, 64)

    Raises:
        ValueError: As for :class:`BlockSparseLinear`; in the call, for strides that are not
            integers of at least 1, or more of them than the inputs have spatial axes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: Sequence[int] = (1, 1),
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, **options)
        self.strides = tuple(strides) if isinstance(strides, Sequence) else strides

    def __call__(self, inputs: Array) -> Array:
        """Return the convolution of ``(..., *spatial, channels)``."""
        return super().__call__(conv.strided(inputs, self.strides))


class BlockSparseMlp(nnx.Module):
    """The MLP of a transformer's block, of two :class:`BlockSparseLinear`.

    It has a layer ``hidden``, an activation, dropout and a layer ``output``.

    Args:
        in_features: Number of inputs, and of outputs.
        hidden_features: Number of outputs of the first layer.
        activation: The activation function between the layers.
        dropout_rate: The probability, in [0, 1], that an activation is set to zero in training
            mode (set by ``nnx.Module.train`` and ``eval``, or in the call).
        rngs: Random keys: those named ``params`` are used, and ``dropout`` if there is dropout.
        **options: All other arguments of :class:`BlockSparseLinear`, for both layers, except the
            features and ``rngs``: ``density`` and ``block_size`` are required.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from eoi_jax.nnx import BlockSparseMlp
        >>> options = {"density": 1 / 2, "block_size": 32}
        >>> mlp = BlockSparseMlp(64, 256, dropout_rate=0.1, rngs=nnx.Rngs(0), **options)
        >>> mlp.hidden.kernel.shape, mlp(jnp.ones((5, 10, 64))).shape
        ((8, 1, 32, 32), (5, 10, 64))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        activation: Callable[[Array], Array] = nnx.gelu,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        rate = checks.number(dropout_rate, "dropout_rate", interval="[0, 1]")
        self.hidden = BlockSparseLinear(in_features, hidden_features, rngs=rngs, **options)
        self.output = BlockSparseLinear(hidden_features, in_features, rngs=rngs, **options)
        self.dropout = nnx.Dropout(rate, rngs=rngs if rate > 0 else None)
        self.activation = activation

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None
    ) -> Array:
        """Return what the two layers make of the last axis.

        Args:
            inputs: ``(..., in_features)``.
            deterministic: Whether there is no dropout. Default: as ``train`` and ``eval`` left it.
            rngs: Keys for the dropout in place of those of the module.

        Returns:
            ``(..., in_features)``.
        """
        x = self.activation(self.hidden(inputs))
        return self.output(self.dropout(x, deterministic=deterministic, rngs=rngs))


class _FromMatrix(BlockSparseLinear):
    """A layer of a matrix at hand, where the constructor of its class draws one."""

    def __init__(self, *stored: Any) -> None:
        self._store(*stored)


def from_dense(
    layer: nnx.Linear, mask: Array, *, block_size: int | tuple[int, int]
) -> BlockSparseLinear:
    """Convert a masked ``nnx.Linear`` to a layer that stores only the blocks of the mask.

    The outputs are the same, and :func:`to_dense` restores layer and mask exactly. Metadata of the
    kernel's variable is dropped, since it names the axes of a dense kernel.

    Args:
        layer: A layer whose kernel ``(inputs, outputs)`` is zero outside the mask.
        mask: Booleans of the kernel's shape, each block all true or all false.
        block_size: Inputs and outputs of a block, one number if they are equal.

    Returns:
        A block-sparse layer with the bias, ``dtype`` and ``precision`` of ``layer``.

    Raises:
        ValueError: If the mask does not fit, if a block of the mask has both values, or if the
            kernel is not zero outside the mask.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from eoi_jax.nnx import from_dense, to_dense
        >>> layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> mask = jnp.kron(jnp.eye(2), jnp.ones((2, 2))) != 0
        >>> layer.kernel[...] = jnp.where(mask, layer.kernel[...], 0)
        >>> sparse = from_dense(layer, mask, block_size=2)
        >>> sparse.kernel.shape
        (2, 1, 2, 2)
        >>> bool((to_dense(sparse)[0].kernel[...] == layer.kernel[...]).all())
        True
    """
    matrix = blocks.from_dense(layer.kernel[...], block_size, mask)
    bias = None if layer.bias is None else layer.bias[...]
    return _FromMatrix(matrix, bias, layer.dtype, layer.precision)


def to_dense(layer: BlockSparseLinear) -> tuple[nnx.Linear, Array]:
    """Convert a block-sparse layer to ``nnx.Linear``, and a mask of its kernel.

    Args:
        layer: One layer, not a stack of them, and no convolution.

    Returns:
        ``(linear, mask)``: a layer with the same outputs, ``dtype`` and ``precision`` as ``layer``,
        and booleans of its kernel's shape, true in the stored blocks.

    Raises:
        ValueError: If the layer is a stack or a convolution.

    Example:
        >>> from flax import nnx
        >>> from eoi_jax.nnx import BlockSparseLinear, to_dense
        >>> options = {"density": 1 / 2, "block_size": 4, "rngs": nnx.Rngs(0)}
        >>> linear, mask = to_dense(BlockSparseLinear(16, 16, **options))
        >>> linear.kernel.shape, float(mask.mean())
        ((16, 16), 0.5)
    """
    matrix = layer.matrix()
    if isinstance(layer, BlockSparseConv) or len(matrix.shape) != 2:
        found = f"{type(layer).__name__}{matrix.shape}"
        remedy = "Use layer.matrix().to_dense() and layer.matrix().mask()."
        raise checks.value_error("layer", found, "is not one linear layer", remedy)
    inputs, outputs = matrix.shape
    linear = nnx.Linear(
        inputs,
        outputs,
        use_bias=layer.bias is not None,
        dtype=layer.dtype,
        param_dtype=matrix.dtype,
        precision=layer.precision,
        kernel_init=_zeros,
        rngs=nnx.Rngs(0),
    )
    linear.kernel[...] = matrix.to_dense()
    if layer.bias is not None and linear.bias is not None:
        linear.bias[...] = layer.bias[...]
    return linear, matrix.mask()
