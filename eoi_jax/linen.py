"""Layers of Flax Linen that store, train and multiply only the blocks of a sparse kernel.

Import it by name, ``import eoi_jax.linen``, since it needs Flax, as only ``eoi_jax.nnx`` does
besides. :func:`from_dense` and :func:`to_dense` convert variables from and to those of ``nn.Dense``
under a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict

from eoi_jax import blocks
from eoi_jax._internal import checks, conv, trees
from eoi_jax.blocks import BlockSparse, matmul, orthogonal
from eoi_jax.typing import Array, Mask, Params

__all__ = ["BlockSparseConv", "BlockSparseDense", "BlockSparseMlp", "from_dense", "to_dense"]

_zeros = nn.initializers.zeros_init()
# What both layers of an MLP take from it.
_SHARED = (
    *("density", "block_size", "use_bias", "dtype", "param_dtype"),
    *("precision", "scale", "bias_init", "kernel_axes", "implementation"),
)


class BlockSparseDense(nn.Module):
    """``nn.Dense`` with a block-sparse kernel that starts exactly orthogonal.

    The parameter ``kernel`` has only the stored blocks, as the ``values`` of a
    :class:`~eoi_jax.blocks.BlockSparse`. So gradients and the state of any optimizer are equally
    small, and no mask is needed. The pattern is drawn with the kernel, and is in the collection
    ``pattern``, which is not optimized. Pass this collection to ``apply`` with the parameters, and
    name it in ``variable_axes`` of ``nn.scan`` and ``nn.vmap``. Where rows of blocks have different
    numbers of blocks, the missing blocks are stored as zeros, and remain zero.

    Attributes:
        features: Number of outputs.
        density: Fraction of the blocks that are stored, as for :func:`eoi_jax.blocks.orthogonal`.
        block_size: Rows, and columns, of a block; a divisor of the inputs and of ``features``.
        use_bias: Whether to add a bias.
        dtype: Dtype to compute in. Default: that to which inputs and parameters promote.
        param_dtype: Dtype of the parameters.
        precision: As that of :func:`jax.numpy.matmul`.
        implementation: As that of :func:`eoi_jax.blocks.matmul`.
        scale: The singular value of the kernel at the start.
        bias_init: Initializer of the bias.
        kernel_axes: Names of mesh axes for the four axes of the stored kernel, None for an axis
            that is not divided. With them the kernel is an ``nn.Partitioned``, as from
            ``nn.with_partitioning``. For the bias, wrap ``bias_init`` in ``nn.with_partitioning``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax.linen import BlockSparseDense
        >>> layer = BlockSparseDense(256, density=1 / 8, block_size=32)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 256)))
        >>> variables["params"]["kernel"].shape
        (8, 1, 32, 32)
        >>> layer.apply(variables, jnp.ones((5, 256))).shape
        (5, 256)

    Raises:
        ValueError: From ``init`` for a block size, density, ``scale`` or dtype that
            :func:`eoi_jax.blocks.orthogonal` refuses, or ``kernel_axes`` of another length than 4;
            from ``apply`` if the collection ``pattern`` is missing.
    """

    features: int
    density: float
    block_size: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    scale: float = 1.0
    bias_init: Any = _zeros
    kernel_axes: tuple[str | None, ...] | None = None
    implementation: str | None = None

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
            kernel = self._kernel(lambda _: drawn.values)
        elif not self.has_variable("pattern", "rows"):
            raise ValueError(
                f"variables['pattern'] has no entry for {'/'.join(self.path)!r}. "
                "Pass the collection to apply: {'params': params, 'pattern': pattern}."
            )
        else:
            rows = self.get_variable("pattern", "rows")
            slots = self.get_variable("pattern", "slots")
            # Only the shape counts: the parameter is there.
            high, wide = jnp.shape(inputs)[-1] // len(slots), self.features // len(rows)
            values = (*rows.shape, high, wide)
            kernel = self._kernel(lambda key: _zeros(key, values, self.param_dtype))
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        matrix = BlockSparse(kernel, rows, slots)
        y = matmul(inputs, matrix, precision=self.precision, implementation=self.implementation)
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))

    def _kernel(self, init: Callable[[Array], Array]) -> Array:
        """Return the parameter, of ``init(key)`` at the start."""
        names = self.kernel_axes
        if names is None:
            return self.param("kernel", init)
        if len(names) != 4:
            problem = f"has {len(names)} names, not 4"
            remedy = "Give one, or None, for each axis of the stored blocks, (R, k, b, c)."
            raise checks.value_error("kernel_axes", names, problem, remedy)
        boxed: Any = nn.with_partitioning(init, names)
        return self.param("kernel", boxed)


class BlockSparseConv(BlockSparseDense):
    """``nn.Conv`` of one tap, with block-sparse channels that start exactly orthogonal.

    This is the 1 × 1 convolution: :class:`BlockSparseDense` over the channels of each pixel. With
    strides, it uses the first pixel of each cell. A larger kernel with only the center tap non-zero
    (a delta kernel, as :func:`eoi_jax.initializers.conv` draws by default) is the same function at
    stride 1, with circular or ``SAME`` padding, so there is no argument for the size.

    Attributes:
        features: Number of output channels.
        density: Fraction of the blocks of channels that are stored.
        block_size: Rows, and columns, of a block; a divisor of both numbers of channels.
        use_bias: Whether to add a bias.
        dtype: Dtype to compute in. Default: that to which inputs and parameters promote.
        param_dtype: Dtype of the parameters.
        precision: As that of :func:`jax.numpy.matmul`.
        implementation: As that of :func:`eoi_jax.blocks.matmul`.
        scale: The singular value of the kernel at the start.
        bias_init: Initializer of the bias.
        kernel_axes: Names of mesh axes for the four axes of the stored kernel.
        strides: One for each spatial axis, at least 1; the length is the number of spatial axes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax.linen import BlockSparseConv
        >>> layer = BlockSparseConv(64, density=1 / 4, block_size=8, strides=(2, 2))
        >>> images = jnp.ones((5, 9, 9, 32))
        >>> layer.init_with_output(jax.random.key(0), images)[0].shape
        (5, 5, 5, 64)

    Raises:
        ValueError: As for :class:`BlockSparseDense`, and for strides that are not integers of at
            least 1, or more of them than the inputs have spatial axes.
    """

    strides: Sequence[int] = (1, 1)

    def __call__(self, inputs: Array) -> Array:
        """Return the convolution of ``(..., *spatial, channels)``."""
        return super().__call__(conv.strided(inputs, self.strides))


class BlockSparseMlp(nn.Module):
    """The MLP of a transformer's block, of two :class:`BlockSparseDense`.

    It has a layer ``hidden``, an activation, dropout and a layer ``output``. The parameters and the
    pattern of each layer are under its name.

    Attributes:
        hidden_features: Number of outputs of the first layer.
        density: Fraction of the blocks that are stored, in either kernel.
        block_size: Rows, and columns, of a block; a divisor of all three numbers of features.
        features: Number of outputs of the second layer. Default: that of the inputs.
        activation: The activation function between the layers.
        dropout_rate: The probability, in [0, 1], that an activation is set to zero.
        deterministic: Whether to disable dropout. Pass it here or in the call, as for
            ``nn.Dropout``; it is not needed where ``dropout_rate`` is 0.
        use_bias: Whether the layers add biases.
        dtype: Dtype to compute in. Default: that to which inputs and parameters promote.
        param_dtype: Dtype of the parameters.
        precision: As that of :func:`jax.numpy.matmul`.
        implementation: As that of :func:`eoi_jax.blocks.matmul`.
        scale: The singular value of both kernels at the start.
        bias_init: Initializer of the biases.
        kernel_axes: Names of mesh axes for the four axes of either stored kernel.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax.linen import BlockSparseMlp
        >>> mlp = BlockSparseMlp(256, density=1 / 2, block_size=32, dropout_rate=0.1)
        >>> x = jnp.ones((5, 10, 64))
        >>> variables = mlp.init(jax.random.key(0), x, deterministic=True)
        >>> variables["params"]["hidden"]["kernel"].shape
        (8, 1, 32, 32)
        >>> keys = {"dropout": jax.random.key(1)}
        >>> mlp.apply(variables, x, deterministic=False, rngs=keys).shape
        (5, 10, 64)
    """

    hidden_features: int
    density: float
    block_size: int
    features: int | None = None
    activation: Callable[[Array], Array] = nn.gelu
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    scale: float = 1.0
    bias_init: Any = _zeros
    kernel_axes: tuple[str | None, ...] | None = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """Return what the two layers make of the last axis."""
        rate = checks.number(self.dropout_rate, "dropout_rate", interval="[0, 1]")
        options = {name: getattr(self, name) for name in _SHARED}
        features = jnp.shape(inputs)[-1] if self.features is None else self.features
        x = BlockSparseDense(self.hidden_features, name="hidden", **options)(inputs)
        x = self.activation(x)
        if rate > 0:
            deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
            x = nn.Dropout(rate)(x, deterministic=deterministic)
        return BlockSparseDense(features, name="output", **options)(x)


def from_dense(
    params: Params,
    mask: Mask,
    *,
    block_size: int | tuple[int, int] | Callable[[tuple[str, ...]], int | tuple[int, int]],
) -> dict[str, Any]:
    """Convert masked kernels of ``nn.Dense`` to the variables of :class:`BlockSparseDense`.

    Replace the masked layers of a network by block-sparse layers of the same names: with these
    variables the outputs are the same. :func:`to_dense` restores parameters and mask exactly.

    Args:
        params: Parameters of Linen: nested dictionaries. ``nn.Partitioned`` and other boxes are
            removed, since they name the axes of dense kernels.
        mask: A mask of the structure of ``params``. A leaf whose mask is a scalar ``True`` does not
            change. A kernel ``(inputs, outputs)`` with a mask of its shape is converted. It has to
            be zero outside the mask, and each block of the mask all true or all false.
        block_size: Inputs and outputs of a block, one number if they are equal. Or a function that
            returns them for the path of a kernel, such as ``("first", "kernel")``.

    Returns:
        The variables ``{"params": ..., "pattern": ...}``.

    Raises:
        ValueError: If the mask does not fit; if a masked leaf is not named ``kernel`` or does not
            have two axes; if a block of a mask has both values, or a kernel is not zero outside its
            mask.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax import linen
        >>> kernel = jnp.diag(jnp.arange(1.0, 9.0))
        >>> params = {"first": {"kernel": kernel, "bias": jnp.zeros(8)}}
        >>> blocks = jnp.kron(jnp.eye(4), jnp.ones((2, 2))) != 0
        >>> mask = {"first": {"kernel": blocks, "bias": jnp.array(True)}}
        >>> variables = linen.from_dense(params, mask, block_size=2)
        >>> variables["params"]["first"]["kernel"].shape
        (4, 1, 2, 2)
        >>> back, back_mask = linen.to_dense(variables)
        >>> bool((back["first"]["kernel"] == kernel).all())
        True
    """
    params, mask = nn.unbox(params), nn.unbox(mask)
    trees.mask_fits(mask, params)
    leaves = flatten_dict(params, keep_empty_nodes=True)
    pattern = {}
    for path, leaf_mask in flatten_dict(mask).items():
        if np.ndim(leaf_mask) == 0:
            continue
        name = f"params[{'/'.join(path)}]"
        if path[-1] != "kernel" or np.ndim(leaf_mask) != 2:
            raise ValueError(
                f"{name} of shape {np.shape(leaf_mask)} is masked, and is no kernel of two axes. "
                "Mark it as dense by a scalar True; convert each layer of a stack by itself."
            )
        size = block_size(path) if callable(block_size) else block_size
        try:
            matrix = blocks.from_dense(leaves[path], size, leaf_mask)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        leaves[path] = matrix.values
        pattern[*path[:-1], "rows"] = matrix.rows
        pattern[*path[:-1], "slots"] = matrix.slots
    return {"params": unflatten_dict(leaves), "pattern": unflatten_dict(pattern)}


def to_dense(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the variables of block-sparse layers to kernels of ``nn.Dense`` and a mask.

    Args:
        variables: Variables with the collections ``params`` and ``pattern``. Stacks of layers, as
            ``nn.scan`` makes them along their first axis, become stacks of kernels. Boxes are
            removed.

    Returns:
        ``(params, mask)``: kernels ``(..., inputs, outputs)`` and the masks of their stored blocks.
        Other leaves do not change, and have a scalar ``True`` in the mask.

    Raises:
        ValueError: If a layer has a pattern and no kernel.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax import linen
        >>> layer = linen.BlockSparseDense(16, density=1 / 2, block_size=4)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 16)))
        >>> params, mask = linen.to_dense(variables)
        >>> params["kernel"].shape, float(mask["kernel"].mean()), bool(mask["bias"])
        ((16, 16), 0.5, True)
    """
    leaves = flatten_dict(nn.unbox(variables["params"]), keep_empty_nodes=True)
    mask = {
        path: jnp.array(True) if hasattr(leaf, "shape") else leaf for path, leaf in leaves.items()
    }
    pattern = flatten_dict(nn.unbox(variables.get("pattern", {})))
    for *layer, name in pattern:
        if name != "rows":
            continue
        path = (*layer, "kernel")
        if path not in leaves:
            raise ValueError(
                f"variables['params'] has no {'/'.join(path)!r}, but variables['pattern'] has its "
                "pattern. Give both collections of the same network."
            )
        rows, slots = pattern[*layer, "rows"], pattern[*layer, "slots"]
        matrix = BlockSparse(leaves[path], rows, slots)
        leaves[path], mask[path] = matrix.to_dense(), matrix.mask()
    return unflatten_dict(leaves), unflatten_dict(mask)
