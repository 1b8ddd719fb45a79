"""Arrays of users: convert them for JAX, and find their zeros."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["native", "nonzero"]


def native(array: Any) -> Any:
    """Return an array of NumPy in the byte order of the machine; JAX reads no other.

    Files of FITS, NetCDF or HDF5 have big-endian arrays. All else is returned as it is.
    """
    if isinstance(array, np.ndarray | np.generic) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def nonzero(array: Any) -> Any:
    """Tell which entries of an array are not zero, judged by their bits.

    Zeros of both signs are zero, and nothing else: no subnormal number, and no NaN. ``array != 0``
    says so on some backends only: on CPUs XLA takes subnormal numbers for zero, and NumPy does not.

    Args:
        array: An array of JAX, which may be traced, or what NumPy makes one of.

    Returns:
        Booleans of the shape of ``array``, of JAX if it is an array of JAX, else of NumPy.
    """
    is_jax = isinstance(array, jax.Array)
    array = array if is_jax else native(np.asarray(array))
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return nonzero(array.real) | nonzero(array.imag)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array != 0
    if array.dtype.itemsize == 1:  # Not all of these have a sign bit for zero; wider they do.
        array = array.astype(np.float32)
    elif array.dtype.itemsize > 8:  # long doubles, which have bits without a meaning
        return array != 0
    unsigned = np.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, unsigned) if is_jax else array.view(unsigned)
    return (bits << 1) != 0  # without the sign
