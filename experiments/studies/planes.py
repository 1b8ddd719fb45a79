"""The laws of planes by name, and the patterns among them.

============= =====================================================================================
pattern       planes
============= =====================================================================================
``banded``    coordinates at a distance of at most 8, on the line
``butterfly`` coordinates that differ in one bit, as in the fast Fourier transform
============= =====================================================================================
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import eoi_jax as eoi

__all__ = ["LAWS", "banded", "butterfly"]

_BAND = 8


def banded(size: int) -> NDArray[np.bool_]:
    """Mark the pairs of so many coordinates that are at most 8 apart."""
    i, j = np.indices((size, size))
    near: NDArray[np.bool_] = abs(i - j) <= _BAND
    return near


def butterfly(size: int) -> NDArray[np.bool_]:
    """Mark the pairs of so many coordinates that differ in one bit."""
    i, j = np.indices((size, size))
    one_bit: NDArray[np.bool_] = np.bitwise_count(i ^ j) == 1
    return one_bit


LAWS = {
    "independent": eoi.planes.independent,
    "matching": eoi.planes.matching,
    "banded": eoi.planes.within(banded),
    "butterfly": eoi.planes.within(butterfly),
}
"""The law of each name."""
