r"""Masks: which weights of a parameter tree may be non-zero.

A mask is a pytree of the structure of the parameters that it belongs to:

* for a **sparse kernel** a boolean array of the kernel's own shape, ``True`` where a weight may
  be non-zero;
* for **every other leaf** (biases, norms, embeddings) the scalar ``True``: the leaf stays dense.

Each leaf of a mask is an array, the scalars too, so a mask passes through :func:`jax.jit`,
:func:`jax.lax.scan`, :func:`jax.vmap` and serialization as any other tree of arrays does. Build
the mask from the tree that it will be used with: for Flax NNX that is
``nnx.state(model, nnx.Param)``, and its mask is an ``nnx.State`` as well; for Equinox it is
``eqx.filter(model, eqx.is_inexact_array)``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import _checks
from eoi_jax.typing import Array, Densities, Mask, Params, Where

__all__ = ["apply", "densities", "density", "fill", "is_kernel", "support"]

_KERNEL_NAMES = ("kernel", "weight", "w")


def is_kernel(path: tuple[Any, ...], leaf: Any) -> bool:
    """Tell whether a leaf of a parameter tree is a kernel, judged by its name.

    A kernel is a floating leaf with at least two axes whose last name is ``kernel`` (Flax),
    ``weight`` (Equinox) or ``w`` (Haiku). The ``value`` attribute in which NNX variables and
    Linen's partitioned boxes keep their array does not count as a name. Biases have other names,
    so they are never selected, stacked by a scan over layers or not.

    A name says no more than that: Equinox calls the table of an ``Embedding`` and the scale of
    a norm ``weight`` too, and a stack of such scales has two axes. Pass your own ``where=`` to
    functions over trees if yours should stay dense.

    Args:
        path: The key path of the leaf, as :func:`jax.tree_util.tree_map_with_path` gives it.
        leaf: The leaf; anything with a shape and a dtype, other leaves are no kernels.

    Returns:
        Whether the leaf is a kernel.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.tree_util import DictKey
        >>> is_kernel((DictKey("dense"), DictKey("kernel")), jnp.ones((3, 2)))
        True
        >>> is_kernel((DictKey("dense"), DictKey("bias")), jnp.ones((8, 2)))
        False
    """
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    if not path or not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return False
    name = getattr(path[-1], "key", getattr(path[-1], "name", None))
    return (
        name in _KERNEL_NAMES and len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def support(params: Params, *, where: Where = is_kernel) -> Mask:
    r"""Return the mask of the weights that are not zero.

    :math:`M_{ij} = [W_{ij} \neq 0]` for every kernel :math:`W`, and the scalar ``True`` for every
    other leaf. A NaN counts as non-zero.

    Args:
        params: A pytree of arrays.
        where: ``(path, leaf) -> bool``, which leaves are kernels. Give it for a tree without
            names, a bare array for example: ``where=lambda path, leaf: True``.

    Returns:
        The mask: boolean arrays of the kernels' shapes, scalar ``True`` elsewhere.

    Raises:
        ValueError: If the default ``where`` selects no leaf: such a mask would mask nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[0.0, 2.0], [1.0, 0.0]]), "bias": jnp.zeros(2)}
        >>> mask = support(params)
        >>> mask["kernel"].tolist(), mask["bias"].tolist()
        ([[False, True], [True, False]], True)
    """
    selected = 0

    def leaf_support(path: tuple[Any, ...], leaf: Any) -> Array:
        nonlocal selected
        if not where(path, leaf):
            # A new array each time: one buffer shared by two leaves could not be donated.
            return jnp.array(True)
        selected += 1
        return jnp.asarray(leaf) != 0

    mask = jax.tree_util.tree_map_with_path(leaf_support, params)
    if selected == 0 and where is is_kernel:
        leaves = [
            _checks.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        raise _checks.fail(
            "params",
            leaves,
            f"has no floating leaf of 2 or more axes named {', '.join(_KERNEL_NAMES)}",
            "Say which leaves are kernels: where=lambda path, leaf: leaf.ndim >= 2.",
        )
    return mask


def apply(mask: Mask, tree: Params) -> Params:
    r"""Set every masked entry of a tree to exactly zero.

    :math:`(M \odot W)_{ij} = W_{ij}` where :math:`M_{ij}` is true, and 0 elsewhere, also where
    :math:`W_{ij}` is infinite or NaN.

    Args:
        mask: A mask of the structure of ``tree``.
        tree: Parameters, gradients or updates.

    Returns:
        A tree of the same structure, shapes and dtypes. A leaf whose mask is a scalar is the very
        object that was passed.

    Raises:
        ValueError: If the mask does not fit the tree.

    Example:
        >>> import jax.numpy as jnp
        >>> mask = {"kernel": jnp.array([[True, False]]), "bias": jnp.array(True)}
        >>> tree = {"kernel": jnp.array([[3.0, jnp.nan]]), "bias": jnp.ones(2)}
        >>> apply(mask, tree)["kernel"].tolist()
        [[3.0, 0.0]]
    """
    _checks.mask_fits(mask, tree, tree_name="tree")
    _checks.mask_leaves(mask)

    def leaf_apply(leaf_mask: Any, leaf: Any) -> Any:
        if np.ndim(leaf_mask) == 0:
            return leaf
        return jnp.where(leaf_mask, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(leaf_apply, mask, tree)


def fill(key: Array, mask: Mask, densities: Densities) -> Mask:
    r"""Unmask uniformly random further weights until every kernel meets its budget exactly.

    A kernel of :math:`n` weights and density :math:`d` has the budget
    :math:`b = \lfloor d n + 1/2 \rfloor`. If :math:`k` of its weights are unmasked, each of the
    :math:`\binom{n-k}{b-k}` sets of further weights is equally likely. Where the kernel's masked
    weights are zero, unmasking changes no output: a convolution that starts as an orthogonal
    center tap stays orthogonal, and the new weights may learn.

    Args:
        key: A random key.
        mask: The mask to start from; its ``True`` entries all stay.
        densities: A number in (0, 1] for every kernel, or a tree of the structure of ``mask``
            with one number in [0, 1] a leaf, ignored where the mask is a scalar. A leaf may hold
            one density for each slice of the kernel's first axis, shape ``(L,)`` for a stack
            ``(L, n, m)`` of layers: then each slice meets a budget of its own. Without it the
            whole leaf has one budget.

    Returns:
        A mask of the same structure. The budget is exact for a density that is static when the
        function is traced; a traced density is multiplied in its own precision, which is exact
        for :func:`densities` of up to about four million unmasked weights a leaf.

    Raises:
        ValueError: If a density is out of range or of the wrong shape, or if a kernel has more
            unmasked weights than its budget. A mask or density that is being traced cannot be
            checked, and a kernel above its budget is then left as it is.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mask = {"kernel": jnp.eye(10, dtype=bool), "bias": jnp.array(True)}
        >>> filled = fill(jax.random.key(0), mask, 0.25)
        >>> int(filled["kernel"].sum()), bool(filled["kernel"].diagonal().all())
        (25, True)

    Reference:
        Nowak et al., `Sparser, Better, Deeper, Stronger: Improving Static Sparse Training with
        Exact Orthogonal Initialization <https://arxiv.org/abs/2406.01755>`_, 2024
    """
    _checks.mask_leaves(mask)
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(mask)
    if jax.tree_util.all_leaves([densities]) and np.ndim(densities) == 0:
        leaf_densities = [_checks.density(densities, name="densities")] * len(paths_and_leaves)
    else:
        _checks.same_structure(densities, mask, name="densities", other_name="mask")
        leaf_densities = jax.tree.leaves(densities)

    filled = []
    for index, (path, leaf) in enumerate(paths_and_leaves):
        if np.ndim(leaf) == 0 or leaf.size == 0:
            filled.append(leaf)
            continue
        leaf_name = _checks.path_name(path)
        leaf_density = _checks.leaf_density(
            leaf_densities[index], np.shape(leaf), name=f"densities[{leaf_name}]"
        )
        num_rows = leaf.shape[0] if np.ndim(leaf_density) == 1 else 1
        size = leaf.size // num_rows
        budget = _budget(leaf_density, size)
        if not _checks.is_traced(leaf) and not _checks.is_traced(budget):
            counts = np.count_nonzero(np.asarray(leaf).reshape(num_rows, size), axis=1)
            _checks.budget_holds(counts, budget, size, name=f"mask[{leaf_name}]")
        rows = jnp.reshape(leaf, (num_rows, size))
        keys = jax.random.split(jax.random.fold_in(key, index), num_rows)
        budgets = jnp.broadcast_to(jnp.asarray(budget, jnp.int32), (num_rows,))
        filled.append(_fill_rows(keys, rows, budgets).reshape(leaf.shape))
    return jax.tree.unflatten(treedef, filled)


def density(mask: Mask) -> float | Array:
    r"""Return the density of all kernels together: the fraction of their weights that is unmasked.

    :math:`d = \sum_l k_l / \sum_l n_l` over the kernels; leaves whose mask is a scalar do not
    count.

    Args:
        mask: A mask.

    Returns:
        The fraction as a float in [0, 1], or as a float32 scalar if the mask is being traced. A
        mask without kernels has density 1.

    Example:
        >>> import jax.numpy as jnp
        >>> density({"kernel": jnp.eye(4, dtype=bool), "bias": jnp.array(True)})
        0.25
    """
    _checks.mask_leaves(mask)
    kernels = [leaf for leaf in jax.tree.leaves(mask) if np.ndim(leaf) > 0]
    size = sum(leaf.size for leaf in kernels)
    if size == 0:
        return 1.0
    total: float | Array = _fraction([_count(leaf) for leaf in kernels], size)
    return total


def densities(mask: Mask) -> Densities:
    """Return the density of each leaf: the fraction of its weights that is unmasked.

    Args:
        mask: A mask.

    Returns:
        A tree of the structure of ``mask`` of float32 scalars in [0, 1]; 1 for a leaf whose mask
        is a scalar and for a leaf without entries. ``fill(key, mask, densities(mask))`` returns
        ``mask`` as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> found = densities({"kernel": jnp.eye(4, dtype=bool), "bias": jnp.array(True)})
        >>> float(found["kernel"]), float(found["bias"])
        (0.25, 1.0)
    """
    _checks.mask_leaves(mask)

    def leaf_density(leaf: Any) -> Array:
        if np.ndim(leaf) == 0 or leaf.size == 0:
            return jnp.ones((), jnp.float32)
        return jnp.asarray(_fraction([_count(leaf)], leaf.size), jnp.float32)

    return jax.tree.map(leaf_density, mask)


def _count(leaf: Any) -> Any:
    """Count the True entries: exactly, on the host unless the leaf is being traced."""
    if _checks.is_traced(leaf):
        return jnp.sum(leaf, dtype=jnp.int32)
    return int(np.count_nonzero(leaf))


def _fraction(counts: list[Any], size: int) -> Any:
    """Divide a sum of counts by a size: in float64 unless a count is being traced."""
    if not any(_checks.is_traced(count) for count in counts):
        return sum(counts) / size
    # Counts add up as floats: the total of a large network overflows 32-bit integers.
    return sum(jnp.asarray(count, jnp.float32) for count in counts) / jnp.float32(size)


def _budget(density: Any, size: int) -> Any:
    """Round ``density * size`` half up: in float64 on the host unless the density is traced."""
    if _checks.is_traced(density):
        # ``size`` itself caps the product: float32 has no 2^24 + 1.
        product = jnp.floor(density * size + 0.5)
        return jnp.minimum(product.astype(jnp.int32), size)
    return np.floor(np.asarray(density, np.float64) * size + 0.5).astype(np.int64)


@jax.jit
@jax.vmap
def _fill_rows(key: Array, row: Array, budget: Array) -> Array:
    """Unmask random masked entries of each row until its budget is met."""
    missing = budget - jnp.sum(row, dtype=jnp.int32)
    return row | _smallest(jax.random.bits(key, row.shape, jnp.uint32), ~row, missing)


def _smallest(values: Array, eligible: Array, count: Array) -> Array:
    """Select exactly ``count`` of the eligible uint32 values, the smallest; ties by index.

    The largest selected value is found bit by bit, with one count over the array for each of 32
    bits. Sorting 16 million values takes 20 times as long.
    """

    def bit_by_bit(step: Array, low: Array) -> Array:
        half = jnp.uint32(1) << (31 - step).astype(jnp.uint32)
        below = jnp.sum(eligible & (values <= low + (half - 1)), dtype=jnp.int32)
        return jnp.where(below < count, low + half, low)

    threshold = jax.lax.fori_loop(0, 32, bit_by_bit, jnp.uint32(0))
    chosen = eligible & (values < threshold)
    ties = eligible & (values == threshold)
    left = count - jnp.sum(chosen, dtype=jnp.int32)
    return chosen | (ties & (jnp.cumsum(ties, dtype=jnp.int32) <= left))
