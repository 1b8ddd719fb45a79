"""Random keys by purpose: the draws of one seed for different purposes are independent."""

from __future__ import annotations

import enum

import jax

from eoi_jax.typing import Array

__all__ = ["Purpose", "key_of"]


class Purpose(enum.IntEnum):
    """What a key is for."""

    WEIGHTS = 0
    """Dense weights, and biases."""
    MASK = 1
    """Masks drawn at random."""
    START = 2
    """Masks and weights of EOI, EIS and SAO."""
    EXAMPLES = 3
    """Which images a criterion sees."""
    ORDER = 4
    """The order of the training images; an epoch's key is folded in."""
    AUGMENTATION = 5
    """Augmentation and dropout; a step's key is folded in."""
    GROWTH = 6
    """Weights that SET grows."""


def key_of(key: Array, purpose: Purpose) -> Array:
    """Return the key for one purpose."""
    return jax.random.fold_in(key, int(purpose))
