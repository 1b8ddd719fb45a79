r"""Masks: which weights of a parameter tree may be non-zero. Functions to make and compare them.

A mask is a pytree with the structure of its parameters:

* for a **sparse kernel** a boolean array of the kernel's shape, ``True`` where a weight may
  be non-zero;
* for **every other leaf** (biases, norms, embeddings) the scalar ``True``: the leaf stays dense.

Each leaf of a mask is an array, also the scalars, so a mask passes through :func:`jax.jit`,
:func:`jax.lax.scan`, :func:`jax.vmap` and serialization as any other tree of arrays does. Build
the mask from the tree that it will be used with: for Flax NNX that is
``nnx.state(model, nnx.Param)``, and its mask is an ``nnx.State`` as well; for Equinox it is
``eqx.filter(model, eqx.is_inexact_array)``.

Masks come from weights (:func:`support`), scores (:func:`top_k`) or a key (:func:`random`,
:func:`fill`), always with exact counts, or from another library (:func:`adopt`). :func:`shuffle`
keeps only the counts of a mask. Use it as a control: if a pruning method does no better than its
shuffled masks, only its layer densities matter, and not which weights it chose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks, selection, shardings, trees
from eoi_jax._internal.arrays import native, nonzero
from eoi_jax._internal.keys import threefry_key
from eoi_jax._internal.trees import is_kernel
from eoi_jax.typing import Array, Densities, LayoutOf, Mask, Params, Scores, Where

__all__ = [
    "adopt",
    "apply",
    "densities",
    "density",
    "fill",
    "is_kernel",
    "overlap",
    "random",
    "shuffle",
    "support",
    "top_k",
]

_NAMED = 5  # so many names a message lists
_SHUFFLE = 0x73687566  # sets the stream of shuffle apart: its mask is not that of random again


def support(params: Params, *, where: Where = is_kernel) -> Mask:
    r"""Return the mask of the weights that are not zero.

    :math:`M_{ij} = [W_{ij} \neq 0]` for every kernel :math:`W`, and the scalar ``True`` for every
    other leaf. NaN and subnormal numbers count as non-zero, on every device.

    Args:
        params: A pytree of arrays.
        where: ``(path, leaf) -> bool``, which leaves are kernels; for a tree without names, for
            example, ``lambda path, leaf: True``.

    Returns:
        The mask: boolean arrays of the kernels' shapes, scalar ``True`` elsewhere.

    Raises:
        ValueError: If ``where`` selects no leaf, so that nothing would be masked, or if it selects
            a kernel that is all zero, which would never train.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[0.0, 2.0], [1.0, 0.0]]), "bias": jnp.zeros(2)}
        >>> mask = support(params)
        >>> mask["kernel"].tolist(), mask["bias"].tolist()
        ([[False, True], [True, False]], True)
    """
    params = trees.arrays(params)
    kernels = trees.kernels(params, where)
    trees.some_weights(params, kernels)
    # A new scalar each time: one buffer shared by two leaves could not be donated.
    mask = jax.tree.map(
        lambda kernel, leaf: jnp.asarray(nonzero(leaf)) if kernel else jnp.array(True),
        kernels,
        params,
    )
    return trees.without_axis_names(mask)


def apply(mask: Mask, tree: Params) -> Params:
    r"""Set every masked entry of a tree to exactly zero.

    :math:`(M \odot W)_{ij} = W_{ij}` where :math:`M_{ij}` is true, and 0 elsewhere, even if
    :math:`W_{ij}` is infinite or NaN.

    Args:
        mask: A mask of the structure of ``tree``.
        tree: Parameters, gradients or updates.

    Returns:
        A tree of the same structure. A leaf whose mask is a scalar is returned without a copy.

    Raises:
        ValueError: If the mask does not fit the tree.

    Example:
        >>> import jax.numpy as jnp
        >>> mask = {"kernel": jnp.array([[True, False]]), "bias": jnp.array(True)}
        >>> tree = {"kernel": jnp.array([[3.0, jnp.nan]]), "bias": jnp.ones(2)}
        >>> apply(mask, tree)["kernel"].tolist()
        [[3.0, 0.0]]
    """
    trees.mask_fits(mask, tree, tree_name="tree")
    tree = trees.arrays(tree, name="tree")

    def leaf_apply(leaf_mask: Any, leaf: Any) -> Any:
        if np.ndim(leaf_mask) == 0:
            return leaf
        return jnp.where(leaf_mask, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(leaf_apply, trees.boxed_as(mask, tree), tree)


def random(key: Array, params: Params, densities: Densities, *, where: Where = is_kernel) -> Mask:
    r"""Draw a uniformly random mask with an exact count for every kernel.

    A kernel of :math:`n` weights and density :math:`d` has the count
    :math:`b = \lfloor d n + 1/2 \rfloor`, and each of the :math:`\binom{n}{b}` masks of this count
    is equally likely.

    Args:
        key: A random key.
        params: A pytree of arrays or of :class:`jax.ShapeDtypeStruct`.
        densities: A number in (0, 1] for every kernel, or a tree of the structure of ``params``
            with one number in [0, 1] for each leaf, or for each slice of the leaf's leading axes;
            :mod:`eoi_jax.budgets` makes such a tree from a density of the whole network.
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The mask.

    Raises:
        ValueError: If ``where`` selects no leaf, or if a density is out of range or of the wrong
            shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((20, 10)), "bias": jnp.zeros(10)}
        >>> int(random(jax.random.key(0), params, 0.25)["kernel"].sum())
        50

    Reference:
        Liu et al., "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive
        Baseline for Sparse Training", ICLR 2022.
    """
    empty = jax.tree.map(
        lambda kernel, leaf: (
            shardings.like(jnp.zeros(leaf.shape, bool), leaf) if kernel else jnp.array(True)
        ),
        trees.kernels(params, where),
        params,
    )
    return fill(key, trees.without_axis_names(empty), densities)


def top_k(
    scores: Scores, density: Densities, *, scope: Literal["global", "layer"] = "global"
) -> Mask:
    r"""Keep the weights with the largest scores, with an exact count.

    Of :math:`n` scores, :math:`\lfloor d n + 1/2 \rfloor` are kept, of all kernels together or of
    each kernel. Equal scores are kept in order: earlier leaves first, then lower indices. The cost
    is one pass for each bit of a score; nothing is sorted, and the scores are not copied into one
    array.

    Args:
        scores: A pytree of float16, bfloat16, float32 or float64 arrays; larger scores are kept.
            A leaf without axes is dense, whatever its value (criteria put ``inf`` there).
        density: The fraction to keep, in (0, 1]. With ``scope="layer"`` also a tree of the
            structure of ``scores`` with one number in [0, 1] for each leaf, or for each slice of
            its leading axes. So one method may choose the layer densities and another the weights.
        scope: ``"global"`` compares the scores of all kernels; ``"layer"`` compares the scores
            within each kernel.

    Returns:
        The mask: boolean arrays of the scores' shapes, scalar ``True`` where a score is a scalar.
        Its count is exact if the density is static; a traced density is multiplied in its own
        precision, and traced NaN scores are below every number.

    Raises:
        ValueError: If an argument is out of range, if a score is NaN or not a float, or if more
            than 2^31 - 1 scores are to be compared.

    Example:
        >>> import jax.numpy as jnp
        >>> scores = {"kernel": jnp.array([[3.0, 1.0], [2.0, 2.0]]), "bias": jnp.inf}
        >>> top_k(scores, 0.5)["kernel"].tolist()
        [[True, False], [True, False]]
    """
    checks.one_of(scope, ("global", "layer"), name="scope", remedy="Give one of the two.")
    scores = trees.scores(scores)
    if scope == "layer":
        checked = trees.densities(density, scores, name="density", tree_name="scores")
        mask = selection.map_layers(
            lambda _, *layers: selection.largest_of_layers(*layers), scores, checked
        )
        return trees.without_axis_names(mask)
    density = checks.density(density)
    size = sum(leaf.size for leaf in jax.tree.leaves(scores) if np.ndim(leaf) > 0)
    high = selection.MAX_SIZE
    checks.integer(size, low=0, high=high, name="scores.size", remedy="Use scope='layer'.")
    mask = selection.largest_of_tree(scores, selection.target_count(density, size))
    return trees.without_axis_names(mask)


def fill(key: Array, mask: Mask, densities: Densities) -> Mask:
    r"""Unmask further weights, uniformly at random, until every kernel has exactly its count.

    A kernel of :math:`n` weights and density :math:`d` has the count
    :math:`b = \lfloor d n + 1/2 \rfloor`. If :math:`k` of its weights are unmasked, each of the
    :math:`\binom{n-k}{b-k}` sets of further weights is equally likely. Where the kernel's masked
    weights are zero, unmasking changes no output: a convolution that starts as an orthogonal
    center tap stays orthogonal, and the new weights may learn.

    Args:
        key: A random key.
        mask: The mask to start from; its ``True`` entries all stay.
        densities: A number in (0, 1] for every kernel, or a tree of the structure of ``mask``
            with one number in [0, 1] for each leaf, ignored where the mask is a scalar. A leaf may
            hold one number for each slice of the kernel's leading axes, in shape ``(L,)`` for a
            stack ``(L, n, m)`` of layers: then each slice has its own count.

    Returns:
        A mask of the same structure. The count is exact for a density that is static when the
        function is traced; a traced density is multiplied in float32, or wider if it is, which is
        exact for :func:`densities` of up to about four million unmasked weights a leaf.

    Raises:
        ValueError: If a density is out of range or of the wrong shape, or if a kernel has more
            unmasked weights than its count. A traced mask or density cannot be checked; then a
            kernel above its count does not change.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mask = {"kernel": jnp.eye(10, dtype=bool), "bias": jnp.array(True)}
        >>> filled = fill(jax.random.key(0), mask, 0.25)
        >>> int(filled["kernel"].sum()), bool(filled["kernel"].diagonal().all())
        (25, True)

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024.
    """
    key = threefry_key(key)
    trees.mask_leaves(mask)
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(mask)

    def fill_layers(index: int, leaf: Array, counts: Any) -> Array:
        path, given = paths_and_leaves[index]  # while jit traces, even constant leaves are traced
        if not checks.is_traced(given) and not checks.is_traced(counts):
            axes = tuple(range(counts.ndim, leaf.ndim))
            unmasked = np.count_nonzero(np.asarray(given), axis=axes)
            size = math.prod(leaf.shape[counts.ndim :])
            name = f"mask[{trees.path_name(path)}]"
            trees.counts_at_most(unmasked, counts, size, name=name)
        return selection.unmask_layers(_layer_keys(key, index, counts.shape), leaf, counts)

    checked = trees.densities(densities, mask, name="densities", tree_name="mask")
    return selection.map_layers(fill_layers, mask, checked)


def shuffle(key: Array, mask: Mask, *, layout: LayoutOf | None = None) -> Mask:
    """Permute the entries of each kernel's mask uniformly.

    Args:
        key: A random key.
        mask: A mask.
        layout: ``(path, leaf) -> Layout``: each layer of a stack is shuffled separately, so it
            keeps its count. Without ``layout`` a stack is one kernel.

    Returns:
        A mask of the same structure and counts.

    Raises:
        ValueError: If a leaf is no mask, or if a layout stacks more axes than a leaf has.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mask = {"kernel": jnp.eye(10, dtype=bool), "bias": jnp.array(True)}
        >>> shuffled = shuffle(jax.random.key(0), mask)
        >>> int(shuffled["kernel"].sum()), bool((shuffled["kernel"] == mask["kernel"]).all())
        (10, False)

    Reference:
        Frankle, Dziugaite, Roy and Carbin, "Pruning Neural Networks at Initialization: Why Are We
        Missing the Mark?", ICLR 2021.
    """
    key = jax.random.fold_in(threefry_key(key), _SHUFFLE)
    trees.mask_leaves(mask)

    def shuffle_layers(index: int, leaf: Array, counts: Any) -> Array:
        axes = tuple(range(counts.ndim, leaf.ndim))
        unmasked = jnp.sum(leaf, axis=axes, dtype=jnp.int32)
        keys = _layer_keys(key, index, counts.shape)
        shuffled = selection.unmask_layers(keys, jnp.zeros_like(leaf), unmasked)
        return shardings.like(shuffled, leaf)

    layers = jax.tree.leaves(densities(mask, layout=layout))
    return selection.map_layers(shuffle_layers, mask, layers)


def _layer_keys(key: Array, index: int, stack: tuple[int, ...]) -> Array:
    """Return a key for each layer of the leaf of an index, in the axes that stack layers."""
    keys = jax.random.split(jax.random.fold_in(key, index), math.prod(stack))
    return keys.reshape(*stack, *keys.shape[1:])


def density(mask: Mask) -> float | Array:
    r"""Return the density of all kernels together: the fraction of their weights that is unmasked.

    :math:`d = \sum_l k_l / \sum_l n_l` over the kernels :math:`l` (the leaves whose mask is not a
    scalar), with :math:`k_l` unmasked of :math:`n_l` weights.

    Args:
        mask: A mask.

    Returns:
        The fraction in [0, 1], a float or, of a traced mask, a float32 scalar; 1 for a mask
        without kernels.

    Raises:
        ValueError: If a leaf is no mask.

    Example:
        >>> import jax.numpy as jnp
        >>> density({"kernel": jnp.eye(4, dtype=bool), "bias": jnp.array(True)})
        0.25
    """
    trees.mask_leaves(mask)
    kernels = [leaf for leaf in jax.tree.leaves(mask) if np.ndim(leaf) > 0]
    counts = [selection.count(leaf) for leaf in kernels]
    return selection.fraction(counts, [leaf.size for leaf in kernels])


def densities(mask: Mask, *, layout: LayoutOf | None = None) -> Densities:
    """Return the density of each layer: the fraction of its weights that is unmasked.

    Args:
        mask: A mask.
        layout: ``(path, leaf) -> Layout``: a stack of ``L`` layers gets ``(L,)`` densities.

    Returns:
        A tree of the structure of ``mask`` with arrays in [0, 1]: scalars, or ``(L,)`` for stacks.
        They are NumPy arrays in float64 or, of a traced mask, in float32. The density is 1 for a
        leaf whose mask is a scalar and for a layer without entries.
        ``fill(key, mask, densities(mask))`` returns ``mask`` unchanged.

    Raises:
        ValueError: If a leaf is no mask, or if a layout stacks more axes than a leaf has.

    Example:
        >>> import jax.numpy as jnp
        >>> found = densities({"kernel": jnp.eye(4, dtype=bool), "bias": jnp.array(True)})
        >>> float(found["kernel"]), float(found["bias"])
        (0.25, 1.0)
    """
    trees.mask_leaves(mask)

    def leaf_density(path: Any, leaf: Any) -> Any:
        if np.ndim(leaf) == 0:
            return np.ones(())
        stacked = trees.layout(layout, path, leaf).batch_axes
        if leaf.size == 0:
            return np.ones(leaf.shape[:stacked])
        axes = range(stacked, leaf.ndim)
        if checks.is_traced(leaf):
            return jnp.mean(leaf, axis=tuple(axes), dtype=jnp.float32)
        return np.asarray(np.mean(np.asarray(leaf), axis=tuple(axes), dtype=np.float64))

    return trees.without_axis_names(jax.tree_util.tree_map_with_path(leaf_density, mask))


def overlap(mask: Mask, other: Mask) -> float | Array:
    r"""Return the Jaccard index of two masks: 1 if they are equal, 0 if they share no weight.

    :math:`|A \cap B| / |A \cup B|`, where :math:`A` and :math:`B` are the sets of unmasked weights
    of all kernels together. Two random masks of density :math:`d` overlap by about
    :math:`d / (2 - d)`.

    Args:
        mask: A mask.
        other: A mask of the same structure and shapes.

    Returns:
        The fraction in [0, 1], a float or, of a traced mask, a float32 scalar; 1 for two masks
        that unmask nothing.

    Raises:
        ValueError: If the masks differ in structure or shape.

    Example:
        >>> import jax.numpy as jnp
        >>> overlap({"w": jnp.array([True, True, False])}, {"w": jnp.array([False, True, True])})
        0.3333333333333333
    """
    # Both ways, so the shapes are equal.
    trees.mask_fits(other, mask, name="other", tree_name="mask")
    trees.mask_fits(mask, other, name="mask", tree_name="other")
    pairs = zip(jax.tree.leaves(mask), jax.tree.leaves(other), strict=True)
    kernels = [(left, right) for left, right in pairs if np.ndim(left) > 0]
    both = [selection.count(left & right) for left, right in kernels]
    either = [selection.count(left | right) for left, right in kernels]
    return selection.fraction(both, either)


def adopt(
    tree: Any,
    params: Params,
    *,
    order: Literal["jax", "torch"] = "jax",
    where: Where = is_kernel,
) -> Mask:
    """Convert a mask of another library to a mask of this one.

    Leaves are matched by name, in any containers: names are joined by ``/``, a ``.`` counts as
    ``/``, the last names ``kernel``, ``weight`` and ``w`` are equivalent, and a final ``_mask``
    (``torch.nn.utils.prune``) is dropped. So the flat ``{"fc1.weight_mask": ...}`` of PyTorch is
    for ``params["fc1"]["kernel"]``. Where modules have other names, rename the keys first. For
    Linen's variables pass ``variables["params"]``.

    A square mask in the wrong order still has the right shape, so no error can be raised: make sure
    that ``order`` is right. PyTorch flattens images with channels first: reorder the inputs of a
    linear layer that follows such a flattening.

    Args:
        tree: A pytree, such as a flat or nested dict, of boolean or 0/1 arrays that NumPy can
            read, or tensors of PyTorch of any dtype and device: one for each kernel, or a scalar
            ``True`` for a kernel that stays dense. Other leaves may be left out or be all ones.
        params: The parameters, or their shapes, that the mask is for.
        order: ``"jax"`` for axes as those of ``params``; ``"torch"`` for ``(outputs, inputs,
            *taps)`` where ``params`` has ``(*taps, inputs, outputs)``, in linear layers and
            convolutions, grouped or not, but not in transposed ones. Equinox stores kernels as
            PyTorch does, so for parameters of Equinox use ``"jax"``.
        where: ``(path, leaf) -> bool``, which leaves of ``params`` are kernels.

    Returns:
        The mask: boolean arrays of the kernels' shapes, scalar ``True`` elsewhere.

    Raises:
        ValueError: If a kernel has no mask, or a mask has no leaf; if a shape does not fit; if a
            value is neither 0 nor 1; or if something other than a kernel is masked.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> import eoi_jax as eoi
        >>> params = {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
        >>> outside = {"fc.weight": np.array([[1, 0, 1], [0, 1, 1]])}  # or a torch.Tensor
        >>> mask = eoi.masks.adopt(outside, params, order="torch")
        >>> mask["fc"]["kernel"].astype(int).tolist()
        [[1, 0], [0, 1], [1, 1]]

        Keep the mask as it is, or take only its densities for an orthogonal start:

        >>> kept = eoi.masked(params, mask)
        >>> drawn = eoi.exact_orthogonal(jax.random.key(0), params, eoi.masks.densities(mask))
        >>> int(kept.mask["fc"]["kernel"].sum()), int(drawn.mask["fc"]["kernel"].sum())
        (4, 4)
    """
    remedy = "Name the library that orders the axes in this way."
    checks.one_of(order, ("jax", "torch"), name="order", remedy=remedy)
    kernels = trees.kernels(params, where)
    given = _by_name(tree, "tree")
    known = _by_name(params, "params")
    needed = [name for name, kernel in _by_name(kernels, "params").items() if kernel]
    unknown = [name for name in given if name not in known]
    missing = [name for name in needed if name not in given]
    if unknown or missing:
        raise ValueError(
            f"tree has {_listed(unknown)} that params lacks, and lacks {_listed(missing)}; the "
            f"names in params are {_listed(list(known))}. Rename the keys: "
            "{rename(name): mask for name, mask in tree.items()}, or leave out those that params "
            "lacks; a kernel that stays dense takes a scalar True, and leaves that are no "
            "kernels may be left out."
        )

    def leaf_mask(path: Any, leaf: Any, kernel: bool) -> Any:
        name = _name(path)
        if name not in given:
            return jnp.array(True)
        found, shape = _zero_or_one(given[name], name), np.shape(leaf)
        expected = _torch_shape(shape) if order == "torch" else shape
        if found.shape not in ((), expected):
            raise ValueError(
                f"tree[{name}] has shape {found.shape}, neither () nor {expected}: that of the "
                f"weights is {shape}, order={order!r}. {_remedy(found.shape, shape, order)}"
            )
        if not found.all() and (found.ndim == 0 or not kernel):
            raise ValueError(
                f"tree[{name}] has {np.sum(~found)} zeros, but the leaf stays dense: its mask is a "
                "scalar, or it is no kernel. Give an array of the weights' shape, or select the "
                "leaf with where=."
            )
        if found.ndim == 0 or not kernel:
            return jnp.array(True)
        if order == "torch" and found.ndim > 1:
            found = np.moveaxis(found, (1, 0), (-2, -1))
        return shardings.like(jnp.asarray(found), leaf)

    mask = jax.tree_util.tree_map_with_path(leaf_mask, params, kernels)
    return trees.without_axis_names(mask)


def _name(path: Sequence[Any]) -> str:
    """Name a leaf so that frameworks agree."""
    # The value of an NNX variable or of Linen's boxes is an attribute, in a flat dict a word.
    name = trees.path_name(path).replace(".", "/").removesuffix("/value")
    *modules, last = name.split("/")
    last = last.removesuffix("_mask")
    return "/".join([*modules, "kernel" if last in trees.KERNEL_NAMES else last])


def _by_name(tree: Any, argument: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = _name(path)
        if name in found:
            raise ValueError(
                f"{argument}[{checks.printable(trees.path_name(path))}] is a second {name!r}. "
                "Rename one of the two, or leave it out."
            )
        found[name] = leaf
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{{{', '.join(map(checks.printable, names[:_NAMED]))}}}{more}"


def _zero_or_one(leaf: Any, name: str) -> Any:
    """Read a mask of any library as booleans."""
    try:
        values = _on_host(leaf)
    except Exception as error:  # each library raises another for devices, layouts, tracing
        raise ValueError(
            f"tree[{name}] of type {type(leaf).__name__} is outside what NumPy can read: {error} "
            "Bring it to the host first, from PyTorch with "
            "tensor.detach().cpu().to_dense().float().numpy()."
        ) from error
    if not (values.dtype == bool or jnp.issubdtype(values.dtype, jnp.number)):
        raise ValueError(
            f"tree[{name}] of type {type(leaf).__name__} and dtype {values.dtype} is outside the "
            "arrays of booleans or numbers. Convert it with np.asarray(mask, bool)."
        )
    good = ~nonzero(values) | (values == 1)
    if not np.all(good):
        raise checks.value_error(
            f"tree[{name}]",
            values[~good].flat[0].item() if np.ndim(values) else values.item(),
            "is outside {0, 1}",
            "Scores become masks through masks.top_k, weights with `weights != 0`.",
        )
    return np.asarray(values == 1)


def _on_host(leaf: Any) -> Any:
    """Read an array of any library; those of PyTorch, which is not imported, have a ``detach``."""
    if hasattr(leaf, "detach"):
        leaf = leaf.detach().cpu()
        try:
            return np.asarray(leaf)
        except TypeError:  # NumPy has no bfloat16; 0 and 1 are the same in float32
            return np.asarray(leaf.float())
    return native(np.asarray(leaf))


def _torch_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Reorder the axes ``(*taps, inputs, outputs)`` of a kernel as PyTorch does."""
    return (*shape[-1:], *shape[-2:-1], *shape[:-2])


def _remedy(shape: tuple[int, ...], expected: tuple[int, ...], order: str) -> str:
    """Say what to do about a shape: that of the other order, perhaps."""
    if order == "torch" and shape == expected:
        return 'It fits as it is: order="jax".'
    if order == "jax" and len(shape) >= 2 and shape == _torch_shape(expected):
        return 'Transposed it fits: order="torch".'
    return "Give a mask of the weights' shape; split or stack those of several layers."
