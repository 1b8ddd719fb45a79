"""Sparse networks that train from scratch: exact orthogonal initialization in JAX.

A weight matrix that is sparse *and* exactly orthogonal is a product of random Givens rotations.
Networks that start from such matrices keep dynamical isometry, so they train at depths where
dense weights under a mask do not.

======================================= ============================================================
``dense``, ``conv``                     initializers for Flax or anything that takes those of JAX
``orthogonal``                          one sparse, exactly orthogonal matrix
``exact_orthogonal``                    mask and weights of a whole network, exactly orthogonal
``masked``, ``approximate_isometry``,   the other starts: a dense start masked, AI, SAO; they all
``sparsity_aware_orthogonal``           return a ``SparseInit`` of parameters and mask
``static_sparse``, ``mask_updates``     optax: weights off the mask stay exactly zero
``sparse_evolutionary_training``,       optax: masks that change while the network trains, SET and
``rigl``                                RigL
``masks``                               mask pytrees: support, random, top_k, fill, adopt, densities
``save``, ``load``                      sparse networks in safetensors files; ``load`` verifies the
                                        file and returns a ``SavedNetwork``
``budgets``                             one density shared among layers: uniform, ER, ERK
``criteria``                            scores to prune by: magnitude, SNIP, GraSP, SynFlow
``spectrum``                            Jacobians and their singular values
``mean_field``                          critical gains, and the spectra that theory predicts
``theory``                              density and number of rotations, one from the other
``givens``, ``rotation``                sequences of Givens rotations, and applying them
``isometry``, ``sao``                   one matrix with AI, one with SAO
``initializers``, ``networks``,         the modules of the functions above
``optim``, ``dynamic``,
``serialization``,
``sparse_orthogonal``
``typing``                              the types of the signatures
======================================= ============================================================

A module imports only from lower floors::

    5  networks
    4  initializers  (_drawing)
    3  sparse_orthogonal  sao  dynamic  spectrum  serialization
    2  rotation  optim  budgets  criteria  (_delta  _kernel_error  _kernel_spectrum)
    1  givens  theory  masks  isometry  mean_field
       (_flow  _krylov  _layers  _layerwise  _pruning  _sparse_file)
    0  typing  (_checks  _free_power  _loops  _names  _schedule  _selection  _tree_checks)
"""

from eoi_jax import (
    budgets,
    criteria,
    dynamic,
    givens,
    initializers,
    isometry,
    masks,
    mean_field,
    networks,
    optim,
    rotation,
    sao,
    serialization,
    sparse_orthogonal,
    spectrum,
    theory,
    typing,
)
from eoi_jax._internal.version import __version__
from eoi_jax.dynamic import rigl, sparse_evolutionary_training
from eoi_jax.initializers import conv, dense
from eoi_jax.networks import (
    SparseInit,
    approximate_isometry,
    exact_orthogonal,
    masked,
    sparsity_aware_orthogonal,
)
from eoi_jax.optim import mask_updates, static_sparse
from eoi_jax.serialization import SavedNetwork, load, save
from eoi_jax.sparse_orthogonal import orthogonal

__all__ = [
    "SavedNetwork",
    "SparseInit",
    "__version__",
    "approximate_isometry",
    "budgets",
    "conv",
    "criteria",
    "dense",
    "dynamic",
    "exact_orthogonal",
    "givens",
    "initializers",
    "isometry",
    "load",
    "mask_updates",
    "masked",
    "masks",
    "mean_field",
    "networks",
    "optim",
    "orthogonal",
    "rigl",
    "rotation",
    "sao",
    "save",
    "serialization",
    "sparse_evolutionary_training",
    "sparse_orthogonal",
    "sparsity_aware_orthogonal",
    "spectrum",
    "static_sparse",
    "theory",
    "typing",
]
