"""Loops: where they start inside :func:`jax.shard_map`, and how ``vmap`` runs them on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

__all__ = ["map_on_cpu", "varying_as"]

Array = jax.Array
_Tree = TypeVar("_Tree")


def varying_as(start: _Tree, *data: Any) -> _Tree:
    """Return ``start``, typed as what a loop computes from ``data``.

    Inside :func:`jax.shard_map` an array's type says over which mesh axes it varies. A constant
    varies over none, so a loop that starts from it and goes on with data would change the type of
    its carry, which is an error. Outside this does nothing, and the compiler removes it.
    """
    leaves = [leaf for leaf in jax.tree.leaves(data) if isinstance(leaf, jax.Array)]
    false = jnp.array(False)
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        false |= jnp.zeros_like(leaf, dtype=bool, shape=())
    return jax.tree.map(lambda leaf: jnp.where(false, leaf, leaf), start)


def map_on_cpu(function: Callable[..., Array]) -> Callable[..., Array]:
    """Let ``vmap`` run a function one by one on a CPU, and batched on an accelerator.

    A batched loop runs every matrix to the length of the longest and selects the whole state at
    each step. An accelerator gains more from the batch than that costs; a core is three times
    faster one by one.
    """
    # Traced once for both.
    function = jax.jit(function)
    one_by_one = jax.custom_batching.sequential_vmap(function)
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(axis_size: int, in_batched: Sequence[bool], *arguments: Array) -> tuple[Array, bool]:
        del axis_size
        axes = [0 if batched else None for batched in in_batched]
        result = jax.lax.platform_dependent(
            *arguments,
            cpu=jax.vmap(one_by_one, in_axes=axes),
            default=jax.vmap(function, in_axes=axes),
        )
        return result, True

    return mapped
