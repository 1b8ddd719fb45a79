r"""Sparse starts of whole networks: from a parameter tree to parameters and a mask.

=================================== ===============================================================
:func:`masked`                      weights of a dense start on a given mask, the usual baseline
:func:`rescaled`                    the same weights, rescaled to the mask's fan-in
:func:`redraw`                      new kernels drawn from an initializer, for :func:`masked`
:func:`approximate_isometry`        values on a given mask brought close to orthogonal (AI)
:func:`exact_orthogonal`            mask and values, exactly orthogonal, from layer densities (EOI)
:func:`sparsity_aware_orthogonal`   block-diagonal masks of Haar blocks (SAO)
=================================== ===============================================================

Each start returns a :class:`SparseInit`. Pass its mask to :func:`eoi_jax.optim.static_sparse`.
:func:`redraw` returns only parameters. The new parameters have the structure, shapes and dtypes of
the given ones. Only kernels change; biases, norms and all other leaves are copied, so that one
start may be donated without the others.

Each new kernel and its mask have the sharding of the kernel that was given, eagerly and under
:func:`jax.jit`, along auto and explicit axes of a mesh. For the kernels that
:func:`exact_orthogonal`, :func:`sparsity_aware_orthogonal` or :func:`redraw` draws, shapes are
enough: a :class:`jax.ShapeDtypeStruct` of :func:`jax.eval_shape` or ``nnx.eval_shape``, with or
without a sharding. All other leaves need values. :func:`exact_orthogonal` draws large kernels into
their shards, and every mesh gives the same bits:

* If a kernel, or its shape, has a sharding that the function can see, no device holds the whole
  kernel. Devices exchange counts, and once their parts of the matrix; nothing is gathered.
* Under ``jax.jit(..., out_shardings=...)`` the function cannot see the shardings. Enter the mesh
  with :func:`jax.set_mesh`, so that columns are divided among its devices. Along two or more axes
  of a mesh the compiler may gather a kernel to reorder it; a sharding on its shape avoids this.
* For balanced outputs, each device draws the whole matrix.

A kernel of two axes, ``(inputs, outputs)``, is linear; one of more, ``(*taps, inputs, outputs)``,
is a convolution. Stacks of layers, as a scan stores them, groups of channels and transposed
convolutions cannot be told from a shape: ``layout=`` describes them, ``(path, leaf) -> Layout``.
Attention and linear layers of the common frameworks are recognized by their names
(:func:`eoi_jax.layouts.by_name`). Other shapes that may mean several things are refused without
``layout=``. Convolutions with taps last, as those of Equinox, have to be brought to this order
first.
"""

from eoi_jax.networks.base import SparseInit, masked, redraw, rescaled
from eoi_jax.networks.block_diagonal import sparsity_aware_orthogonal
from eoi_jax.networks.exact import exact_orthogonal
from eoi_jax.networks.isometric import approximate_isometry

__all__ = [
    "SparseInit",
    "approximate_isometry",
    "exact_orthogonal",
    "masked",
    "redraw",
    "rescaled",
    "sparsity_aware_orthogonal",
]
