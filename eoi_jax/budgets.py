r"""Budgets: turn one density of a whole network into a density for each layer.

Each rule gives layer :math:`l` of :math:`n_l` weights a density
:math:`d_l = \min(1, \varepsilon r_l)`:

============================ ====================================================================
:func:`uniform`              :math:`r_l = 1`
:func:`erdos_renyi`          :math:`r_l = (n_{in} + n_{out}) / (n_{in} n_{out})`, from the two
                             channel axes of the kernel
:func:`erdos_renyi_kernel`   the sum of all the kernel's axes over their product
============================ ====================================================================

and :math:`\varepsilon` solves :math:`\sum_l d_l n_l = b` for the count of the whole network,
:math:`b = \lfloor d \sum_l n_l + 1/2 \rfloor`: layers that would exceed 1 are dense, and the
others share the rest. The products :math:`d_l n_l` are rounded to integers that sum to :math:`b`:
each one down, then the largest remainders up, equal ones in the order of the tree. ``RULES`` has
the three functions by name.

The returned densities are these integers over :math:`n_l`, so :func:`eoi_jax.masks.random` and
:func:`eoi_jax.masks.fill` turn them back into exactly the same counts. The rules compute on the
host in float64 and read only shapes: ``params`` may hold :class:`jax.ShapeDtypeStruct`, as
:func:`jax.eval_shape` returns them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import numpy as np
from numpy.typing import NDArray

from eoi_jax import masks
from eoi_jax._internal import checks, names, selection, trees
from eoi_jax.typing import Densities, LayoutOf, Params, Where

__all__ = ["RULES", "erdos_renyi", "erdos_renyi_kernel", "uniform"]

_Ints: TypeAlias = NDArray[np.int64]
_Floats: TypeAlias = NDArray[np.float64]


def uniform(
    params: Params,
    density: float,
    *,
    where: Where = masks.is_kernel,
    layout: LayoutOf | None = None,
) -> Densities:
    r"""Give every layer the same density, up to the rounding to an exact total.

    :math:`d_l = d`; the counts :math:`d n_l`, rounded, sum to
    :math:`\lfloor d \sum_l n_l + 1/2 \rfloor`, so each is within 1 of :math:`d n_l`.

    Args:
        params: A pytree of arrays or of :class:`jax.ShapeDtypeStruct`.
        density: The fraction of the weights of all kernels together, in (0, 1].
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``: a stack with ``batch_axes=1``, a kernel of a scan over
            layers, counts as that many layers. By default :func:`eoi_jax.layouts.by_name`, which
            knows stacked attention of Flax; any other kernel is one layer.

    Returns:
        A tree of the structure of ``params``: a float for a kernel, a float64 NumPy array ``(L,)``
        for a stack of ``L`` layers, and 1.0 for a leaf that stays dense. A layer whose share is
        below one weight may get 0.

    Raises:
        ValueError: If the density leaves no weight at all or is out of range or traced, if
            ``where`` selects no leaf, or if a layout does not fit its leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> uniform({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, 0.5)
        {'bias': 1.0, 'kernel': 0.5}
    """
    return _share(params, density, where, layout, lambda shape: 1.0)


def erdos_renyi(
    params: Params,
    density: float,
    *,
    where: Where = masks.is_kernel,
    layout: LayoutOf | None = None,
) -> Densities:
    r"""Give layers with fewer channels a higher density: Erdős-Rényi.

    The number of weights of a linear layer is proportional to its number of channels.
    :math:`d_l = \min(1, \varepsilon (n_{in} + n_{out}) / (n_{in} n_{out}))`, where
    :math:`n_{in}` and :math:`n_{out}` are the inputs and outputs that the layout names, by default
    mostly the last two axes: channels, in Flax and Haiku. For kernels stored as
    ``(out, in, height, width)`` use :func:`erdos_renyi_kernel`, which reads the axes in any order.

    Args:
        params: A pytree of arrays or of :class:`jax.ShapeDtypeStruct`.
        density: The fraction of the weights of all kernels together, in (0, 1].
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``: a stack with ``batch_axes=1``, a kernel of a scan over
            layers, counts as that many layers. By default :func:`eoi_jax.layouts.by_name`, which
            knows stacked attention of Flax; any other kernel is one layer.

    Returns:
        A tree of the structure of ``params``: a float for a kernel, a float64 NumPy array ``(L,)``
        for a stack of ``L`` layers, and 1.0 for a leaf that stays dense. A layer whose share is
        below one weight may get 0.

    Raises:
        ValueError: If the density leaves no weight at all or is out of range or traced, if
            ``where`` selects no leaf, or if a layout does not fit its leaf.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sizes = [784, 100, 100, 10]
        >>> params = [{"kernel": jnp.ones(shape)} for shape in zip(sizes[:-1], sizes[1:])]
        >>> [round(layer["kernel"], 4) for layer in erdos_renyi(params, 0.1)]
        [0.0844, 0.1497, 0.824]

    Reference:
        Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
        connectivity inspired by network science", Nature Communications 9 (2018).
    """
    return _share(params, density, where, layout, lambda shape: _sum_over_product(shape[-2:]))


def erdos_renyi_kernel(
    params: Params,
    density: float,
    *,
    where: Where = masks.is_kernel,
    layout: LayoutOf | None = None,
) -> Densities:
    r"""Give smaller layers a higher density, counting the window of a convolution too: ERK.

    :math:`d_l = \min(1, \varepsilon \sum_a s_{la} / \prod_a s_{la})` over all axes :math:`a` of
    the kernel, of shape :math:`s_l`. A grouped kernel counts with the shape in which it is stored.
    For dense layers the result is that of :func:`erdos_renyi`.

    Args:
        params: A pytree of arrays or of :class:`jax.ShapeDtypeStruct`.
        density: The fraction of the weights of all kernels together, in (0, 1].
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``: a stack with ``batch_axes=1``, a kernel of a scan over
            layers, counts as that many layers. By default :func:`eoi_jax.layouts.by_name`, which
            knows stacked attention of Flax; any other kernel is one layer.

    Returns:
        A tree of the structure of ``params``: a float for a kernel, a float64 NumPy array ``(L,)``
        for a stack of ``L`` layers, and 1.0 for a leaf that stays dense. A layer whose share is
        below one weight may get 0.

    Raises:
        ValueError: If the density leaves no weight at all or is out of range or traced, if
            ``where`` selects no leaf, or if a layout does not fit its leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> shapes = [(3, 3, 3, 16), (3, 3, 16, 64)]
        >>> params = [{"kernel": jnp.ones(shape)} for shape in shapes]
        >>> [round(layer["kernel"], 3) for layer in erdos_renyi_kernel(params, 0.2)]
        [1.0, 0.163]

    Reference:
        Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets Winners",
        ICML 2020.
    """
    return _share(params, density, where, layout, _sum_over_product)


RULES: Mapping[str, Callable[..., Densities]] = MappingProxyType(
    {"uniform": uniform, "erdos_renyi": erdos_renyi, "erdos_renyi_kernel": erdos_renyi_kernel}
)
"""The three functions by their names."""


def _sum_over_product(shape: tuple[int, ...]) -> float:
    return sum(shape) / math.prod(shape)


def _share(
    params: Params,
    density: float,
    where: Where,
    layout: LayoutOf | None,
    ratio: Callable[[tuple[int, ...]], float],
) -> Densities:
    """Share the count of a tree among its layers, with ``r = ratio(shape)`` for each layer."""
    if checks.is_traced(density):
        remedy = "Budgets are computed on the host: make the density a static argument."
        raise checks.value_error("density", density, "is being traced", remedy)
    density = checks.density(density)
    kernels = jax.tree.leaves(trees.kernels(params, where))
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    layout = names.known(layout, params, strict=False)
    # Of each kernel: the axes that count its layers, those of a matrix, and the size of a layer.
    stacks, shapes, layer_sizes = [], [], []
    for (path, leaf), kernel in zip(paths_and_leaves, kernels, strict=True):
        if kernel:
            view = trees.view(trees.layout(layout, path, leaf), path, leaf)
            stacks.append(view.stack)
            shapes.append((*view.taps, view.inputs, view.outputs))
            layer_sizes.append(math.prod(shapes[-1]) * view.matrices)

    repeats = [math.prod(stack) for stack in stacks]
    sizes = np.repeat(np.array(layer_sizes, np.int64), repeats)
    ratios = np.repeat([ratio(shape) if math.prod(shape) else 0.0 for shape in shapes], repeats)
    total = int(sizes.sum())
    target = int(selection.target_count(density, total))
    if total > 0 and target == 0:
        problem = f"leaves none of {total} weights, outside [{0.5 / total:.6g}, 1]"
        raise checks.value_error("density", density, problem, "Give a density that keeps a weight.")
    counts = selection.round_to_total(_quotas(sizes, ratios, target), sizes, target)

    fractions = np.where(sizes > 0, counts / np.maximum(sizes, 1), 1.0)
    parts = iter(np.split(fractions, np.cumsum(repeats)[:-1]))
    stack_shapes = iter(stacks)
    leaves: list[Any] = []
    for kernel in kernels:
        part = next(parts).reshape(next(stack_shapes)) if kernel else np.ones(())
        leaves.append(part if part.ndim else float(part))
    return jax.tree.unflatten(treedef, leaves)


def _quotas(sizes: _Ints, ratios: _Floats, target: int) -> _Floats:
    """Solve ``sum(min(1, epsilon * ratios) * sizes) = target``; return the summands."""
    dense = sizes == 0
    while not dense.all():
        # Layers that exceed 1 give their excess to the others, so epsilon only grows and a layer
        # found dense stays so: at most one round for each layer.
        epsilon = (target - sizes[dense].sum()) / (ratios * sizes)[~dense].sum()
        over = ~dense & (epsilon * ratios > 1.0)
        if not over.any():
            return np.where(dense, sizes, epsilon * ratios * sizes)
        dense |= over
    return sizes.astype(np.float64)
