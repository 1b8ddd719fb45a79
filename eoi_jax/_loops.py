"""Where a loop starts, for code that may run inside :func:`jax.shard_map`."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

__all__ = ["varying_as"]

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
