"""Sparse networks that train from scratch: exact orthogonal initialization in JAX.

A weight matrix that is sparse *and* exactly orthogonal is a product of random Givens rotations.
Networks that start from such matrices keep dynamical isometry, so they train at depths where
dense weights under a mask do not. Start with ``dense`` and ``conv`` where layers take an
initializer, with ``exact_orthogonal`` for a whole network, and with ``orthogonal`` for one matrix.

====================== =========================================================================
``initializers``       ``dense``, ``conv``, and dense baselines: initializers as those of JAX
``sparse_orthogonal``  ``orthogonal``
``networks``           ``exact_orthogonal``, ``masked``, ``rescaled``, ``approximate_isometry``,
                       ``sparsity_aware_orthogonal``: they turn a tree into a ``SparseInit``
``optim``              ``static_sparse``, ``mask_updates``: masks that hold while a network trains;
                       ``scale_by_density``: learning rates for sparse kernels
``dynamic``            ``sparse_evolutionary_training``, ``rigl``: masks that change in training
``layouts``            which axes of a kernel are layers, inputs, outputs and heads
``masks``, ``budgets`` masks as trees; one density shared among layers
``criteria``           scores to prune by: magnitude, SNIP, GraSP, SynFlow
``serialization``      ``save``, ``load``: safetensors files; ``load`` gives a ``SavedNetwork``
``spectrum``           Jacobians, their singular values, and distances from orthogonality
``mean_field``         critical gains, and the spectra that theory predicts
``theory``             the density for a number of rotations, and the number for a density
``givens``             sequences of Givens rotations; ``rotation`` applies them
``planes``             laws of their planes: independent, matchings in rounds, inside a pattern
``blocks``             block-sparse orthogonal matrices, whose products skip the zeros
``condensed``          unstructured sparse matrices, stored as the weights of each output
``n_to_m``             exactly orthogonal matrices with N:M sparsity, such as 2:4, and N:M masks
``isometry``, ``sao``  one matrix with approximated isometry, one with SAO
``typing``             the types of the signatures
====================== =========================================================================
"""

from eoi_jax import (
    blocks,
    budgets,
    condensed,
    criteria,
    dynamic,
    givens,
    initializers,
    isometry,
    layouts,
    masks,
    mean_field,
    n_to_m,
    networks,
    optim,
    planes,
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
    rescaled,
    sparsity_aware_orthogonal,
)
from eoi_jax.optim import mask_updates, scale_by_density, static_sparse
from eoi_jax.serialization import SavedNetwork, load, save
from eoi_jax.sparse_orthogonal import orthogonal

__all__ = [
    "SavedNetwork",
    "SparseInit",
    "__version__",
    "approximate_isometry",
    "blocks",
    "budgets",
    "condensed",
    "conv",
    "criteria",
    "dense",
    "dynamic",
    "exact_orthogonal",
    "givens",
    "initializers",
    "isometry",
    "layouts",
    "load",
    "mask_updates",
    "masked",
    "masks",
    "mean_field",
    "n_to_m",
    "networks",
    "optim",
    "orthogonal",
    "planes",
    "rescaled",
    "rigl",
    "rotation",
    "sao",
    "save",
    "scale_by_density",
    "serialization",
    "sparse_evolutionary_training",
    "sparse_orthogonal",
    "sparsity_aware_orthogonal",
    "spectrum",
    "static_sparse",
    "theory",
    "typing",
]
