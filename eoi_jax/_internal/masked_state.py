"""Masked weights and their optimizer state: updates that lead to zero, entries of new weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eoi_jax.typing import Mask, Params


def zero_masked_params(mask: Mask, updates: optax.Updates, params: Params) -> optax.Updates:
    """Replace the updates of masked weights by those that lead to zero."""

    def leaf_updates(leaf_mask: Any, update: Any, param: Any) -> Any:
        if np.ndim(leaf_mask) == 0:
            return update
        # The wider dtype of the two: -w rounded to fewer bits would not cancel w.
        return jnp.where(leaf_mask, update, -param)

    return jax.tree.map(leaf_updates, mask, updates, params)


def reset_masked_state(
    mask: Mask, params: Params, state: optax.OptState, fresh: optax.OptState
) -> optax.OptState:
    """Give the masked entries of each copy of the parameters' tree their value in ``fresh``."""

    def is_copy(node: Any) -> bool:
        treedef: Any
        leaves, treedef = jax.tree.flatten(node, is_leaf=_is_absent)
        try:
            parts = treedef.flatten_up_to(params)
        except ValueError:
            return False
        # A single array is a prefix of every tree, so its counterpart has to be an array too.
        return all(
            _is_absent(leaf) or jax.tree_util.all_leaves([part])
            for leaf, part in zip(leaves, parts, strict=True)
        )

    def reset_leaf(leaf: Any, fresh_leaf: Any, leaf_mask: Any, param: Any) -> Any:
        if _is_absent(leaf) or np.ndim(leaf_mask) == 0:
            return leaf
        if np.shape(leaf)[-np.ndim(param) :] != np.shape(param):
            return leaf
        return jnp.where(leaf_mask, leaf, fresh_leaf.astype(leaf.dtype))

    def reset(node: Any, fresh_node: Any) -> Any:
        if not is_copy(node):
            return node
        return jax.tree.map(reset_leaf, node, fresh_node, mask, params, is_leaf=_is_absent)

    return jax.tree.map(reset, state, fresh, is_leaf=is_copy)


def _is_absent(node: Any) -> bool:
    """Whether a node is what Optax puts where a transformation has no business."""
    return isinstance(node, optax.MaskedNode)
