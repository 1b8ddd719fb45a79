"""Masked weights and their optimizer state: zero the weights, and reset their state."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eoi_jax._internal import trees
from eoi_jax.typing import Mask, Params

_Init: TypeAlias = Callable[[Params], optax.OptState]
_PROBING = contextvars.ContextVar("probing", default=False)


class _Probe(NamedTuple):
    """Shapes of parameters with other lengths of the kernels' axes, and those of their state."""

    params: Params
    state: optax.OptState


def zero_masked_params(mask: Mask, updates: optax.Updates, params: Params) -> optax.Updates:
    """Replace the updates of masked weights by those that lead to zero."""

    def leaf_updates(leaf_mask: Any, update: Any, param: Any) -> Any:
        if np.ndim(leaf_mask) == 0:
            return update
        # The wider dtype of the two: -w rounded to fewer bits would not cancel w.
        return jnp.where(leaf_mask, update, -param)

    return jax.tree.map(leaf_updates, trees.boxed_as(mask, params), updates, params)


def masked_state_resetter(
    init: _Init,
) -> Callable[[Mask, Params, optax.OptState, optax.OptState], optax.OptState]:
    """Return ``reset(mask, params, state, fresh)`` for the states that ``init`` makes.

    It gives the masked entries of each copy of the parameters' tree their value in ``fresh``. A
    leaf is the copy of its parameter if it has the parameter's shape, and had it for parameters of
    other shapes: a projection or a Kronecker factor may happen to have the shape of a kernel, but
    its axes are others.
    """
    probes = functools.lru_cache(maxsize=16)(functools.partial(_probes, init))

    def reset(
        mask: Mask, params: Params, state: optax.OptState, fresh: optax.OptState
    ) -> optax.OptState:
        leaves, treedef = jax.tree.flatten(params)
        is_sparse = [np.ndim(leaf) > 0 for leaf in jax.tree.leaves(mask)]
        shapes = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        found = probes(treedef, shapes, tuple(is_sparse), jax.tree.structure(state))
        return _reset(trees.boxed_as(mask, params), params, state, fresh, found)

    return reset


def mask_copies(mask: Mask, params: Params, tree: Any) -> Any:
    """Set the masked entries of each copy of the parameters' tree within a tree to zero."""
    mask = trees.boxed_as(mask, params)

    def zero_leaf(leaf: Any, leaf_mask: Any, param: Any) -> Any:
        if _is_absent(leaf) or np.ndim(leaf_mask) == 0 or np.shape(leaf) != np.shape(param):
            return leaf
        return jnp.where(leaf_mask, leaf, jnp.zeros((), jnp.result_type(leaf)))

    def zero(node: Any) -> Any:
        if not _is_copy(node, params):
            return node
        return jax.tree.map(zero_leaf, node, mask, params, is_leaf=_is_absent)

    return jax.tree.map(zero, tree, is_leaf=lambda node: _is_copy(node, params))


def with_masked_arguments(mask: Mask, params: Params, function: Callable[..., Any]) -> Any:
    """Let a function see masked parameters and return masked gradients.

    Its signature stays: Optax's line searches read which arguments it takes.
    """

    @functools.wraps(function)
    def masked(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = mask_copies(mask, params, (args, kwargs))
        return mask_copies(mask, params, function(*args, **kwargs))

    return masked


def _reset(
    mask: Mask,
    params: Params,
    state: optax.OptState,
    fresh: optax.OptState,
    probes: tuple[_Probe, ...],
) -> optax.OptState:
    all_params = (params, *(probe.params for probe in probes))

    def reset_leaf(leaf: Any, fresh_leaf: Any, leaf_mask: Any, *shapes: Any) -> Any:
        if _is_absent(leaf) or np.ndim(leaf_mask) == 0:
            return leaf
        like, probed = shapes[: len(all_params)], shapes[len(all_params) :]
        for array, param in zip((leaf, *probed), like, strict=True):
            if np.shape(array)[-np.ndim(param) :] != np.shape(param):
                return leaf
        return jnp.where(leaf_mask, leaf, fresh_leaf.astype(leaf.dtype))

    def reset(node: Any, fresh_node: Any, *probed: Any) -> Any:
        if not _is_copy(node, params):
            return node
        return jax.tree.map(
            reset_leaf, node, fresh_node, mask, *all_params, *probed, is_leaf=_is_absent
        )

    states = (fresh, *(probe.state for probe in probes))
    return jax.tree.map(reset, state, *states, is_leaf=lambda node: _is_copy(node, params))


def _probes(
    init: _Init, treedef: Any, shapes: Any, is_sparse: tuple[bool, ...], state_treedef: Any
) -> tuple[_Probe, ...]:
    """See what ``init`` makes of kernels whose axes have other lengths, without computing it.

    Their lengths ascend once and descend once, from the shortest of the kernel's axes, so that no
    optimizer that treats large kernels otherwise (Adafactor) sees one in place of a small.
    """
    probes = []
    for order in (1, -1):
        leaves = [
            jax.ShapeDtypeStruct(_other_lengths(shape)[::order] if sparse else shape, dtype)
            for (shape, dtype), sparse in zip(shapes, is_sparse, strict=True)
        ]
        params = treedef.unflatten(leaves)
        token = _PROBING.set(True)
        try:
            state = jax.eval_shape(init, params)
        except Exception:  # anything may come of shapes that the optimizer was not written for
            return ()
        finally:
            _PROBING.reset(token)
        if jax.tree.structure(state) != state_treedef:
            return ()
        probes.append(_Probe(params, state))
    return tuple(probes)


def _other_lengths(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = max(min(shape) - len(shape) + 1, 2)
    return tuple(range(first, first + len(shape)))


def _is_copy(node: Any, params: Params) -> bool:
    """Whether a node has the structure of the parameters, with arrays in place of arrays."""
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


def _is_absent(node: Any) -> bool:
    """Whether a node is what Optax puts where a transformation has no business."""
    return isinstance(node, optax.MaskedNode)


def is_probe() -> bool:
    """Whether ``init`` is called with kernels of other shapes, to see what it makes of them.

    A mask of the kernels does not fit them then.
    """
    return _PROBING.get()


def is_placeholder(params: Params) -> bool:
    """Whether ``init`` is called by optax.tree.map_params, to see what it makes of parameters.

    The mask is then no copy of the parameters: map_params leaves it as it is.
    """
    return type(params).__name__ == "_ParamsPlaceholder"
