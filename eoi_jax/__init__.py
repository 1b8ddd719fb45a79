"""Sparse networks that train from scratch: exact orthogonal initialization in JAX.

A weight matrix that is sparse *and* exactly orthogonal is a product of random Givens rotations.
Networks that start from such matrices keep dynamical isometry, so they train at depths where the
usual sparse starts do not.

======================================= ============================================================
``dense``, ``conv``                     initializers for Flax or anything that takes those of JAX
``orthogonal``                          one sparse, exactly orthogonal matrix
``static_sparse``, ``mask_updates``     optax: weights off the mask stay exactly zero
``masks``                               mask pytrees: support, random, top_k, fill, apply, densities
``budgets``                             one density shared among layers: uniform, ER, ERK
``criteria``                            scores to prune by: magnitude, SNIP, GraSP, SynFlow
``spectrum``                            Jacobians and their singular values
``theory``                              density and number of rotations, one from the other
``givens``, ``rotation``                sequences of Givens rotations, and applying them
``initializers``, ``optim``,            the modules of the functions above
``sparse_orthogonal``
``typing``                              the types of the signatures
======================================= ============================================================

A module imports only from lower floors::

    4  initializers
    3  sparse_orthogonal
    2  rotation  optim  budgets  criteria
    1  givens  theory  masks  spectrum  (_flow  _pruning)
    0  typing  (_checks  _schedule  _selection)
"""

from eoi_jax import (
    budgets,
    criteria,
    givens,
    initializers,
    masks,
    optim,
    rotation,
    sparse_orthogonal,
    spectrum,
    theory,
    typing,
)
from eoi_jax._version import __version__
from eoi_jax.initializers import conv, dense
from eoi_jax.optim import mask_updates, static_sparse
from eoi_jax.sparse_orthogonal import orthogonal

__all__ = [
    "__version__",
    "budgets",
    "conv",
    "criteria",
    "dense",
    "givens",
    "initializers",
    "mask_updates",
    "masks",
    "optim",
    "orthogonal",
    "rotation",
    "sparse_orthogonal",
    "spectrum",
    "static_sparse",
    "theory",
    "typing",
]
