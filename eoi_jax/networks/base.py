"""The start that every pruning method is compared with: dense weights under a mask."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import masks
from eoi_jax._internal import checks, fan_axes, layouts, names, shardings, trees
from eoi_jax._internal.keys import threefry_key
from eoi_jax.typing import Array, Initializer, LayoutOf, Mask, Params, Shape, Where

__all__ = ["SparseInit", "masked", "redraw", "rescaled"]

_REDRAW = 0x72656472  # sets the weights' stream apart from that of a mask of the same key


class SparseInit(NamedTuple):
    """A sparse start of a network.

    Attributes:
        params: The parameters, exactly zero outside the mask.
        mask: Which weights may be non-zero; a weight on the mask may still start at zero.

    Example:
        >>> import jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> dense = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
        >>> params, mask = eoi.masked(dense, {"kernel": jnp.eye(2, dtype=bool)})
        >>> params["kernel"].tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """

    params: Params
    mask: Mask


def masked(params: Params, mask: Mask) -> SparseInit:
    r"""Keep the weights of a dense start on a mask: the baseline of every pruning method.

    :math:`W_l \leftarrow M_l \odot W_l`.

    Args:
        params: A pytree of arrays, drawn as for a dense network.
        mask: A mask of its structure.

    Returns:
        The masked parameters, and the mask.

    Raises:
        ValueError: If the mask does not fit the parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> params = {"kernel": jnp.ones((20, 10)), "bias": jnp.zeros(10)}
        >>> start = eoi.masked(params, eoi.masks.random(jax.random.key(0), params, 0.25))
        >>> float(start.params["kernel"].sum())
        50.0
    """
    params = trees.arrays(params)
    trees.mask_fits(mask, params)
    mask = layouts.place_mask(mask, params)
    return SparseInit(*layouts.place(masks.apply(mask, params), mask, params))


def rescaled(
    params: Params,
    mask: Mask,
    *,
    per: Literal["layer", "unit"] = "layer",
    layout: LayoutOf | None = None,
) -> SparseInit:
    r"""Keep the weights of a dense start on a mask, rescaled to the mask's fan-in.

    A dense start has weights of variance :math:`c / n` for a fan-in of :math:`n`. A mask leaves
    only :math:`k` of the :math:`n` weights of a unit, with the same variance, so the squared norm
    of signals shrinks by :math:`k / n` at each layer. This function corrects that:

    .. math:: W \leftarrow M \odot W \sqrt{n / k}.

    The result is the sparse variant of He's, LeCun's and Glorot's starts. With ``per="layer"``,
    :math:`k` is the mean over the units, so the factor is :math:`1 / \sqrt{d}` for the layer's
    density :math:`d`; with ``per="unit"`` each unit has a :math:`k` of its own. Use it as the
    baseline for orthogonal sparse starts. :func:`masked` does not rescale the weights.

    Args:
        params: A pytree of arrays, drawn as for a dense network.
        mask: A mask of its structure.
        per: ``"layer"`` or ``"unit"``; a unit is one index along the axes of outputs.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers, each with a density
            of its own, and which axes are outputs; by default
            :func:`eoi_jax.layouts.by_name`.

    Returns:
        The parameters, and the mask. A unit or a layer without weights stays zero.

    Raises:
        ValueError: If the mask does not fit the parameters, if it masks integers, if a name and a
            shape do not tell a layout, or for another ``per``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (400, 100)) / 20}
        >>> mask = eoi.masks.random(jax.random.key(1), params, 0.1)
        >>> start = eoi.rescaled(params, mask)
        >>> x = jax.random.normal(jax.random.key(2), (50, 400))
        >>> float(jnp.std(x @ start.params["kernel"])).__round__(1)
        1.0

    Reference:
        Evci, Ioannou, Keskin and Dauphin, "Gradient Flow in Sparse Neural Networks and How Lottery
        Tickets Win", AAAI 2022.
    """
    remedy = "'layer' is one factor a layer, 'unit' one for each output."
    checks.one_of(per, ("layer", "unit"), name="per", remedy=remedy)
    start = masked(params, mask)
    layout_of = names.known(layout, start.params)

    def rescale(path: Any, leaf: Any, leaf_mask: Any) -> Any:
        if np.ndim(leaf_mask) == 0:
            return leaf
        trees.floating(path, leaf, remedy="Give the scalar True as the mask of this leaf.")
        view = trees.view(trees.layout(layout_of, path, leaf), path, leaf)
        of_unit = (*view.axes.taps, *view.axes.inputs)
        axes = tuple(range(view.stacked, leaf.ndim))
        if per == "unit":
            axes = tuple(view.stacked + axis for axis in of_unit)
        dtype = checks.compute_dtype(leaf.dtype)
        density = jnp.mean(leaf_mask, axis=axes, keepdims=True, dtype=dtype)
        factor = jnp.where(density > 0, density, 1) ** -0.5
        return shardings.like((leaf * factor).astype(leaf.dtype), leaf)

    params = jax.tree_util.tree_map_with_path(
        rescale, start.params, trees.boxed_as(mask, start.params)
    )
    return SparseInit(params, start.mask)


def redraw(
    key: Array,
    params: Params,
    kernel_init: Initializer,
    *,
    where: Where = masks.is_kernel,
    layout: LayoutOf | None = None,
) -> Params:
    """Draw new values for every kernel, for each layer of a stack and each matrix separately.

    Use it as a control for pruning methods: if a mask does as well with newly drawn weights, the
    mask matters and not the original weights.

    Args:
        key: A random key.
        params: A pytree of arrays; of a kernel a :class:`jax.ShapeDtypeStruct` is enough.
        kernel_init: ``(key, shape, dtype) -> array``, such as
            ``jax.nn.initializers.lecun_normal()``.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers, and which axes are
            inputs and outputs: ``kernel_init`` gets the shape ``(*taps, inputs, outputs)``, that of
            one matrix where a linear kernel holds several (``groups``), and that of the whole
            kernel of a grouped convolution. By default :func:`eoi_jax.layouts.by_name`.

    Returns:
        A tree of the structure, shapes and dtypes of ``params``.

    Raises:
        ValueError: If ``where`` selects no leaf or an integer one, if a layout does not fit its
            leaf, if a name and a shape do not tell a layout, or if a leaf that is no kernel is a
            shape without values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.zeros((20, 10)), "bias": jnp.ones(10)}
        >>> drawn = redraw(jax.random.key(0), params, jax.nn.initializers.orthogonal())
        >>> bool(drawn["kernel"].any()), bool(drawn["bias"].all())
        (True, True)

    Reference:
        Frankle, Dziugaite, Roy and Carbin, "Pruning Neural Networks at Initialization: Why Are We
        Missing the Mark?", ICLR 2021.
    """
    key = threefry_key(key)
    treedef: Any
    selected = trees.kernels(params, where)
    params = trees.arrays(params, shapes_of=selected)
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    is_kernel = jax.tree.leaves(selected)
    layout = names.known(layout, params)
    leaves = [leaf for _, leaf in paths_and_leaves]
    for index, (path, leaf) in enumerate(paths_and_leaves):
        if not is_kernel[index] or leaf.size == 0:
            continue
        trees.floating(path, leaf, remedy="Let where= select kernels only.")
        found = trees.layout(layout, path, leaf)
        leaf_key = jax.random.fold_in(jax.random.fold_in(key, _REDRAW), index)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if len(leaf.shape) - found.batch_axes < 2:  # biases, say: they have no fans
            draw = functools.partial(_vectors, kernel_init, leaf.shape, found.batch_axes, dtype)
        else:
            view = trees.view(found, path, leaf)
            fused = 1 if view.taps else found.groups
            draw = functools.partial(_leaf, kernel_init, view, fused, dtype)
        [kernel] = shardings.drawn(draw, leaf_key, [shardings.asked(leaf)])
        leaves[index] = shardings.like(kernel, leaf)
    return treedef.unflatten(leaves)


def _vectors(
    kernel_init: Initializer, shape: Shape, batch_axes: int, dtype: Any, key: Array
) -> list[Array]:
    """Draw the vectors of a leaf, one for each layer of a stack."""
    stack, one = shape[:batch_axes], shape[batch_axes:]
    compute_dtype = checks.compute_dtype(dtype)
    keys = jax.random.split(key, math.prod(stack))
    drawn = jax.vmap(lambda key: kernel_init(key, one, compute_dtype))(keys)
    return [drawn.reshape(shape).astype(dtype)]


def _leaf(
    kernel_init: Initializer, view: fan_axes.View, fused: int, dtype: Any, key: Array
) -> list[Array]:
    """Draw the matrices of a leaf, each of ``fused`` ones beside one another."""
    shape = (*view.taps, view.inputs, view.outputs // fused)
    # QR knows no narrow dtypes.
    compute_dtype = checks.compute_dtype(dtype)

    def init(key: Array) -> Array:
        return kernel_init(key, shape, compute_dtype)

    draw = init if fused == 1 else fan_axes.side_by_side(init, fused)
    keys = jax.random.split(key, math.prod(view.stack) * view.matrices)
    return [view.from_matrices(jax.vmap(draw)(keys)).astype(dtype)]
