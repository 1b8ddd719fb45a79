"""PRNG keys: every public function that draws passes its key through :func:`threefry_key` first.

The random bits of the generators rbg and unsafe_rbg change under :func:`jax.vmap`, which draws a
whole batch from the first of its keys, and ``fold_in`` of unsafe_rbg does not mind the order of
what is folded in. Threefry has neither fault, so one key gives one result only with Threefry.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax.typing import Array

__all__ = ["one_key", "threefry_key", "words", "wrapped"]

_THREEFRY = "threefry2x32"


def one_key(key: Any, name: str = "key") -> Any:
    """Accept one PRNG key, new style or old; inside ``vmap`` that is one key of the batch."""
    if isinstance(key, (jax.Array, np.ndarray)):
        try:
            # An old key is the integers of one key of the default generator.
            data, impl = jax.random.key_data(key), jax.random.key_impl(key)
            if jax.random.wrap_key_data(data, impl=impl).shape == ():
                return key
        except (TypeError, ValueError):
            pass  # neither a key nor such integers
        found = f"{key.dtype}{key.shape}"
    else:
        found = repr(key)
    raise ValueError(
        f"{name}={found} is not one PRNG key, such as jax.random.key(0). "
        "Use jax.vmap over an array of keys."
    )


def threefry_key(key: Any, name: str = "key") -> Array:
    """Accept one PRNG key of any generator, and return a key of Threefry.

    A key of Threefry is returned as it is. Of any other all words are hashed, in their order.
    """
    key = one_key(key, name)
    if jax.random.key_impl(key) == _THREEFRY:
        return key
    words = jnp.ravel(jax.random.key_data(key))
    # Zeros that vary as the words do inside jax.shard_map.
    start = jnp.zeros_like(words, shape=(2,))
    hashed = jax.random.wrap_key_data(start, impl=_THREEFRY)
    for word in words:
        hashed = jax.random.fold_in(hashed, word)
    return hashed


def words(keys: Array) -> Array:
    """Return the words of keys of Threefry, which NumPy may hold."""
    return jax.random.key_data(keys)


def wrapped(keys: Any) -> Array:
    """Return keys of Threefry that may be given as their words."""
    is_wrapped = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    return keys if is_wrapped else jax.random.wrap_key_data(keys, impl=_THREEFRY)
