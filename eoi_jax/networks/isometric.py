"""A start whose values on a given mask are brought close to orthogonal (AI)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import isometry
from eoi_jax._internal import fan_axes, layouts, names, shardings, trees
from eoi_jax.networks.base import SparseInit
from eoi_jax.typing import Array, LayoutOf, Mask, Params

__all__ = ["approximate_isometry"]


def approximate_isometry(
    params: Params,
    mask: Mask,
    *,
    scale: float = 1.0,
    objective: Literal["frobenius", "log_det"] = "frobenius",
    num_steps: int = 10_000,
    learning_rate: float | None = None,
    tolerance: float | None = None,
    layout: LayoutOf | None = None,
) -> SparseInit:
    r"""Bring the values on a mask close to orthogonal, layer by layer: approximated isometry (AI).

    The paper minimizes :math:`\sum_l \lVert W_l W_l^\top - \text{scale}^2 I\rVert_F` over the
    unmasked weights, where a convolution counts as the matrix of all its taps and inputs against
    its outputs. The layers do not share weights, so each is solved separately; see
    :func:`eoi_jax.isometry.approximate_isometry` for the objectives and what they reach.

    Args:
        params: A pytree of arrays, drawn as for a dense network. The descent starts from them.
        mask: A mask of its structure.
        scale: The target of the singular values.
        objective: ``"frobenius"``, the paper's, or ``"log_det"``.
        num_steps: Number of steps of descent; for ``"log_det"`` the largest number. The paper takes
            10 000, and 1000 for its networks of 1000 layers.
        learning_rate: The step size; default by objective.
        tolerance: When ``"log_det"`` stops; default by objective.
        layout: ``(path, leaf) -> Layout``: each layer of a stack and each group is a matrix of
            its own. Needed for ambiguous shapes.

    Returns:
        The parameters, and the mask.

    Raises:
        ValueError: If the mask does not fit, or if an option is out of its range.
        FloatingPointError: Outside of :func:`jax.jit`, if the descent of a kernel diverges; traced,
            its values are NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> key = jax.random.key(0)
        >>> params = {"kernel": jax.random.normal(key, (20, 20)), "bias": jnp.zeros(20)}
        >>> mask = eoi.masks.random(key, params, 0.5)
        >>> start = eoi.approximate_isometry(params, mask, num_steps=1000)
        >>> bool(eoi.spectrum.orthogonality_error(start.params["kernel"]) < 0.3)
        True

    Reference:
        Lee, Ajanthan, Gould and Torr, "A Signal Propagation Perspective for Pruning Neural
        Networks at Initialization", ICLR 2020.
    """
    params = trees.arrays(params)
    trees.mask_fits(mask, params)
    mask = layouts.place_mask(mask, params)
    layout_of = names.known(layout, params)

    def solve(path: Any, leaf_mask: Any, leaf: Any) -> Any:
        if np.ndim(leaf_mask) == 0 or np.size(leaf) == 0:
            return leaf
        remedy = "Give the scalar True as the mask of this leaf."
        view, geometry = layouts.read(path, leaf, layout_of, remedy)
        kernel, unstack = _stack_matrices(shardings.unsharded(leaf), view, geometry.groups)
        try:
            solved = isometry.approximate_isometry(
                kernel,
                _stack_matrices(shardings.unsharded(leaf_mask), view, geometry.groups)[0],
                scale=scale,
                objective=objective,
                num_steps=num_steps,
                learning_rate=learning_rate,
                tolerance=tolerance,
                batch_axes=1,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"params[{trees.path_name(path)}]: {error}") from None
        return unstack(solved)

    solved = jax.tree_util.tree_map_with_path(solve, trees.boxed_as(mask, params), params)
    return SparseInit(*layouts.place(solved, mask, params))


def _stack_matrices(
    leaf: Array, view: fan_axes.View, groups: int
) -> tuple[Array, Callable[[Array], Array]]:
    """Put the matrices of a kernel in one stack ``(matrices, rows, columns)``, and undo it."""
    layered = jnp.asarray(view.layers(leaf))
    layers, outputs = len(layered), layered.shape[-1]
    grouped = layered.reshape(layers, -1, groups, outputs // groups)
    stacked = jnp.moveaxis(grouped, 2, 1).reshape(layers * groups, -1, outputs // groups)

    def unstack(matrices: Array) -> Array:
        split = matrices.reshape(layers, groups, -1, outputs // groups)
        unstacked: Array = view.from_layers(jnp.moveaxis(split, 1, 2).reshape(layered.shape))
        return unstacked

    return stacked, unstack
