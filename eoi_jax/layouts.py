"""How the kernels of a tree are read: which axes are layers, inputs, outputs and heads.

A :class:`eoi_jax.typing.Layout` describes one kernel. :func:`by_name` finds the layouts of kernels
by the names that frameworks give them. It is the default ``layout=`` of functions over trees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eoi_jax._internal import names
from eoi_jax.typing import LayoutOf, Params

__all__ = ["by_name"]


def by_name(
    params: Params,
    *,
    per_head: bool = False,
    batch_axes: int | Callable[[tuple[Any, ...]], int] = 0,
) -> LayoutOf:
    """Read the kernels of a tree by the names that frameworks give them.

    ============================================ ===============================================
    kernel                                       how it is read
    ============================================ ===============================================
    ``query``, ``key``, ``value`` of shape       attention of Flax (Linen and NNX), where all
    ``(d, heads, k)`` beside ``out`` of shape    four are in one module and their shapes fit: each
    ``(heads, k, d)``, stacked or not            one ``d x heads * k`` matrix, or one for each head
    attribute ``weight`` of two axes             ``(outputs, inputs)``, of Equinox
    ``c_attn/kernel``, three times as long       ``q``, ``k`` and ``v``, a matrix each, of GPT-2;
    along one axis                               if the outputs are the first axis here, they are so
                                                 in ``c_fc`` and ``c_proj`` too, and in ``c_attn``
                                                 beside ``q_attn``, which is ``k`` and ``v``
    ``in_proj_weight``                           the same three of PyTorch, outputs first
    ``weight_ih``, ``weight_hh``, ``weight_hr``, ``(outputs, inputs)``, of PyTorch, and of Equinox's
    ``q_proj_weight`` and the like               recurrent layers
    any other of 2 or of 4 axes                  ``(*taps, inputs, outputs)``
    ============================================ ===============================================

    Attention with fewer heads of keys and values than of queries is read in the same way, each
    kernel with its own number of heads.

    Args:
        params: The whole tree, of arrays or shapes. The other kernels of the same module help to
            recognize a kernel.
        per_head: Whether each head of attention has a matrix of its own, instead of one matrix for
            all heads together. The heads share the kernel's density.
        batch_axes: How many leading axes stack layers, or ``path -> number``. Not used for the
            attention of Flax, where the number of axes decides.

    Returns:
        ``(path, leaf) -> Layout``, for ``layout=`` of the functions over trees. A layout function
        of your own may call it for the kernels that it does not handle. It raises ``ValueError``
        for a kernel whose name and shape may mean several things: a kernel of three axes that is
        not attention, one of five or more, a ``c_attn`` of other widths, a depthwise convolution,
        or a convolution of Equinox.

    Raises:
        ValueError: If ``batch_axes`` is no number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import eoi_jax as eoi
        >>> layer = nn.MultiHeadDotProductAttention(num_heads=4)
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 3, 32)))["params"]
        >>> params["query"]["kernel"].shape, params["out"]["kernel"].shape
        ((32, 4, 8), (4, 8, 32))
        >>> layout = eoi.layouts.by_name(params, per_head=True)
        >>> start = eoi.exact_orthogonal(jax.random.key(1), params, 0.2, layout=layout)
        >>> head = start.params["query"]["kernel"][:, 0]
        >>> bool(jnp.allclose(head.T @ head, jnp.eye(8), atol=1e-5))
        True
    """
    return names.by_name(params, per_head=per_head, batch_axes=batch_axes)
