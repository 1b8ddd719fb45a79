"""Linear layers that may be block-sparse, and functions that read networks with such layers.

A network takes :class:`Blocks` and builds its pruned layers with :func:`linear`. Their kernels then
have only the stored blocks, and the places of these are in the collection ``pattern``: see
:class:`eoi_jax.linen.BlockSparseDense`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax import traverse_util

from eoi_jax.blocks import BlockSparse
from eoi_jax.linen import BlockSparseDense
from eoi_jax.typing import Initializer

__all__ = ["Blocks", "linear", "matrices", "module", "sizes"]


class Blocks(NamedTuple):
    """Settings of block-sparse layers.

    Attributes:
        density: Fraction of the blocks of each kernel that are stored.
        size: Rows, and columns, of a block.
        scale: The singular value of the kernels at the start.
    """

    density: float
    size: int
    scale: float = 1.0


def linear(
    blocks: Blocks | None,
    features: int,
    *,
    name: str,
    kernel_init: Initializer,
    bias_init: Initializer,
) -> nn.Module:
    """Build a layer of the module whose compact method calls.

    Args:
        blocks: Of a block-sparse layer, which starts exactly orthogonal; None for a dense one.
        features: Number of outputs.
        name: Name of the layer.
        kernel_init: Initializer of a dense layer's kernel.
        bias_init: Initializer of the bias.
    """
    if blocks is None:
        return nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init, name=name)
    density, size, scale = blocks
    options: Any = {"density": density, "block_size": size, "scale": scale}
    return BlockSparseDense(features, **options, bias_init=bias_init, name=name)


def matrices(variables: Mapping[str, Any]) -> dict[tuple[str, ...], BlockSparse]:
    """Return the block-sparse kernels of a network, those of scanned layers as stacks.

    Args:
        variables: ``params``, and ``pattern`` if there are any.

    Returns:
        The matrices by the names on the way to their layers, such as ``("hidden", "linear")``.
    """
    params = traverse_util.flatten_dict(variables["params"])
    pattern = traverse_util.flatten_dict(variables.get("pattern", {}))
    return {
        path[:-1]: BlockSparse(params[*path[:-1], "kernel"], rows, pattern[*path[:-1], "slots"])
        for path, rows in pattern.items()
        if path[-1] == "rows"
    }


def module(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the names on the way to the layer of a leaf, as keys of :func:`matrices`.

    Args:
        path: The key path of the leaf, as :func:`jax.tree_util.tree_map_with_path` gives it.
    """
    return tuple(getattr(key, "key", None) for key in path[:-1])


def sizes(matrix: BlockSparse) -> tuple[int, int]:
    """Return how many weights a matrix, or a stack of them, stores, and how many a dense one has.

    Blocks that stand for none are not counted.
    """
    dense = int(np.prod(matrix.shape))
    return round(matrix.density * dense), dense
