r"""Sparse starts of whole networks: a parameter tree in, parameters and mask out.

=================================== ===============================================================
:func:`masked`                      weights of a dense start on a given mask, the usual baseline
:func:`redraw`                      kernels drawn anew from an initializer, for :func:`masked`
:func:`approximate_isometry`        values on a given mask brought close to orthogonal (AI)
:func:`exact_orthogonal`            mask and values, exactly orthogonal, from layer densities (EOI)
:func:`sparsity_aware_orthogonal`   block-diagonal masks of Haar blocks (SAO)
=================================== ===============================================================

Each start returns a :class:`SparseInit`, of which the mask goes to
:func:`eoi_jax.optim.static_sparse`; :func:`redraw` returns parameters alone. The new
parameters have the structure, shapes and dtypes of those given. Only kernels change; biases, norms
and all other leaves are copied, so that one start may be donated without the others.

A kernel of two axes, ``(inputs, outputs)``, is linear; one of more, ``(*taps, inputs, outputs)``,
is a convolution. Stacks of layers, as a scan stores them, groups of channels and transposed
convolutions cannot be told from a shape: ``layout=`` names them, ``(path, leaf) ->
Layout(batch_axes, groups, transposed)``. Shapes that may mean several things are refused without
it. Kernels in another order of axes, such as Equinox's ``(outputs, inputs, *taps)`` or the heads of
attention, are to be brought to this one first.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import _checks, _drawing, _layers, _tree_checks, givens, isometry, masks
from eoi_jax.givens import AngleLaw
from eoi_jax.typing import Array, Densities, Initializer, LayoutOf, Mask, Params, Where

__all__ = [
    "SparseInit",
    "approximate_isometry",
    "exact_orthogonal",
    "masked",
    "redraw",
    "sparsity_aware_orthogonal",
]


_REDRAW = 0x72656472


class SparseInit(NamedTuple):
    """A sparse start of a network.

    Attributes:
        params: The parameters, exactly zero off the mask.
        mask: Which weights may be non-zero; a weight on the mask may still start at zero.
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
    _tree_checks.arrays(params)
    return SparseInit(_drawing.copy_dense(mask, masks.apply(mask, params)), mask)


def redraw(
    key: Array,
    params: Params,
    kernel_init: Initializer,
    *,
    where: Where = masks.is_kernel,
    layout: LayoutOf | None = None,
) -> Params:
    """Draw every kernel anew, each layer of a stack by itself.

    As a sanity control: a method whose masks do as well with other weights has found a mask, and
    not weights that win (Frankle et al., "Pruning Neural Networks at Initialization", 2021).

    Args:
        key: A random key.
        params: A pytree of arrays.
        kernel_init: ``(key, shape, dtype) -> array``, such as
            ``jax.nn.initializers.lecun_normal()``.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers.

    Returns:
        A tree of the structure, shapes and dtypes of ``params``.

    Raises:
        ValueError: If the default ``where`` selects no leaf, or if a layout does not fit its leaf.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.zeros((20, 10)), "bias": jnp.ones(10)}
        >>> drawn = redraw(jax.random.key(0), params, jax.nn.initializers.orthogonal())
        >>> bool(drawn["kernel"].any()), bool(drawn["bias"].all())
        (True, True)
    """

    def draw(index: int, path: Any, leaf: Any) -> Any:
        own = _tree_checks.layout(layout, path, leaf)
        stack, shape = leaf.shape[: own.batch_axes], leaf.shape[own.batch_axes :]
        # Salted: a mask drawn from the same key must not know the weights.
        own_key = jax.random.fold_in(jax.random.fold_in(key, _REDRAW), index)
        keys = jax.random.split(own_key, math.prod(stack))
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        # QR knows no narrow dtypes.
        drawn = jax.vmap(lambda key: kernel_init(key, shape, _checks.wide(dtype)))(keys)
        return drawn.reshape(leaf.shape).astype(dtype)

    return _drawing.map_kernels(draw, params, _selected(params, where))


def approximate_isometry(
    params: Params,
    mask: Mask,
    *,
    scale: float = 1.0,
    objective: Literal["frobenius", "log_det"] = "frobenius",
    num_steps: int = 10_000,
    learning_rate: float | None = None,
    tolerance: float | None = None,
    layout: LayoutOf | None = None,
) -> SparseInit:
    r"""Bring the values on a mask close to orthogonal, layer by layer: approximated isometry (AI).

    The paper minimizes :math:`\sum_l \lVert W_l W_l^\top - \text{scale}^2 I\rVert_F` over the
    unmasked weights, where a convolution counts as the matrix of all its taps and inputs against
    its outputs. The layers do not share weights, so each is solved by itself; see
    :func:`eoi_jax.isometry.approximate_isometry` for the objectives and what they reach.

    Args:
        params: A pytree of arrays, drawn as for a dense network: where the descent starts.
        mask: A mask of its structure.
        scale: The singular value aimed at.
        objective: ``"frobenius"``, the paper's, or ``"log_det"``.
        num_steps: Steps of descent, the most for ``"log_det"``. The paper takes 10 000, and 1000
            for its networks of 1000 layers.
        learning_rate: The step size; default by objective.
        tolerance: When ``"log_det"`` stops; default by objective.
        layout: ``(path, leaf) -> Layout``: each layer of a stack and each group is a matrix of
            its own, and an ambiguous shape is explained.

    Returns:
        The parameters, and the mask.

    Raises:
        ValueError: If the mask does not fit, or if an option is out of its range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> key = jax.random.key(0)
        >>> params = {"kernel": jax.random.normal(key, (20, 20)), "bias": jnp.zeros(20)}
        >>> mask = eoi.masks.random(key, params, 0.5)
        >>> start = eoi.approximate_isometry(params, mask, num_steps=1000)
        >>> bool(eoi.spectrum.orthogonality_error(start.params["kernel"]) < 0.3)
        True

    Reference:
        Lee, Ajanthan, Gould and Torr, "A Signal Propagation Perspective for Pruning Neural
        Networks at Initialization", ICLR 2020.
    """
    _tree_checks.mask_fits(mask, params)
    _tree_checks.mask_leaves(mask)

    def solve(path: Any, leaf_mask: Any, leaf: Any) -> Any:
        if np.ndim(leaf_mask) == 0 or np.size(leaf) == 0:
            return leaf
        _layers.read(path, leaf, layout)
        own = _tree_checks.layout(layout, path, leaf)
        kernel, back = _drawing.blocks(leaf, own)
        solved = isometry.approximate_isometry(
            kernel,
            _drawing.blocks(leaf_mask, own)[0],
            scale=scale,
            objective=objective,
            num_steps=num_steps,
            learning_rate=learning_rate,
            tolerance=tolerance,
            batch_axes=1,
        )
        return back(solved)

    solved = jax.tree_util.tree_map_with_path(solve, mask, params)
    return SparseInit(_drawing.copy_dense(mask, solved), mask)


def exact_orthogonal(
    key: Array,
    params: Params,
    densities: Densities,
    *,
    scale: float | Array = 1.0,
    center_density: float | Literal["density"] | None = None,
    infeasible: Literal["raise", "redistribute"] = "raise",
    form: Literal["eoi", "eis"] = "eoi",
    angles: AngleLaw = givens.uniform_angle,
    permute: bool = False,
    where: Where = masks.is_kernel,
    layout: LayoutOf | None = None,
) -> SparseInit:
    r"""Draw mask and weights of a network at once, every layer exactly orthogonal (EOI).

    A layer of :math:`s` weights and density :math:`d` has the budget
    :math:`b = \lfloor d s + 1/2 \rfloor`, and its mask unmasks exactly :math:`b` weights.

    * A linear layer is the matrix of :func:`eoi_jax.sparse_orthogonal.orthogonal`, stopped before
      the first rotation that would exceed the budget. Uniformly random further weights, zero at
      the start, are unmasked up to it.
    * A convolution of :math:`k` taps has such a matrix of density
      :math:`d_H = \min(d k, \sqrt{d}, 1)` at its center tap and zeros elsewhere; random weights of
      the whole kernel are unmasked up to the budget. Each group has a matrix of its own.

    So the weights are orthogonal whatever the method that chose the densities, and the count is
    that method's to the last weight.

    Args:
        key: A random key.
        params: A pytree of arrays: the shapes and dtypes of the kernels, and all other leaves.
        densities: A number for every kernel, or a tree of the structure of ``params``: the
            densities of any method's mask (:func:`eoi_jax.masks.densities`, with ``layout=`` for
            stacks) or of :mod:`eoi_jax.budgets`. A single number for a stack of layers is shared
            among them evenly. Static: budgets are computed on the host.
        scale: The singular value of every layer.
        center_density: Density of a convolution's center tap, in [1/max(inputs, outputs), 1], or
            ``"density"``, each layer's own, the paper's choice for its network of 1000 layers;
            default by the rule above. A layer whose budget it exceeds gets what the budget allows.
        infeasible: What to do where a budget is below the :math:`\min(n, m)` non-zeros that each
            matrix of a layer needs: ``"raise"``, or ``"redistribute"``: such layers get what they
            need, and the others give it, each in proportion to what it has above its own need. The
            count of the whole network stays the same.
        form: ``"eoi"``, or ``"eis"``, a variant of the authors: :math:`d_H = d`, and all taps
            are unmasked wherever :math:`H` is not zero (the few weights that then are left of
            the budget anywhere). It needs :math:`k` times the non-zeros.
        angles: Law of the rotation angles.
        permute: Permute channels at random and draw signs.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or grouped.

    Returns:
        The parameters, and a mask with exactly as many unmasked weights as the budgets sum to.

    Raises:
        ValueError: If the default ``where`` selects no leaf, if a density is out of range or
            traced, if a layout does not fit its leaf, or if budgets are below what orthogonal
            matrices need: the message lists the layers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> params = {"kernel": jnp.zeros((40, 100)), "bias": jnp.zeros(100)}
        >>> start = eoi.exact_orthogonal(jax.random.key(0), params, 0.1)
        >>> int(start.mask["kernel"].sum())
        400
        >>> bool(eoi.spectrum.orthogonality_error(start.params["kernel"]) < 1e-5)
        True

    Reference:
        Nowak et al., *Sparser, Better, Deeper, Stronger* (ICML 2024), section 4.
    """
    scale = _checks.finite_scalar(scale, "scale")
    _tree_checks.arrays(params)
    if center_density is not None and form == "eis":
        remedy = "That form has d_H = d: leave center_density out."
        raise _checks.fail("center_density", center_density, 'does not go with form="eis"', remedy)
    if center_density is not None and center_density != "density":
        center_density = _checks.density(center_density, name="center_density")
    _checks.one_of(
        infeasible,
        ("raise", "redistribute"),
        name="infeasible",
        remedy="Raise an error, or take the excess from the other layers.",
    )
    _checks.one_of(form, ("eoi", "eis"), name="form", remedy="Use 'eoi', or the variant 'eis'.")
    all_taps = form == "eis"
    selected = _selected(params, where)
    kernels = _layers.kernels(params, densities, selected, layout)
    budgets = _layers.feasible(
        kernels,
        lambda geometry: geometry.minimum * (geometry.num_taps if all_taps else 1),
        redistribute=infeasible == "redistribute",
    )
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    drawn = _drawing.exact(
        key,
        leaves,
        kernels,
        budgets,
        scale=scale,
        center_density=center_density,
        all_taps=all_taps,
        angles=angles,
        permute=permute,
    )
    new_params, mask = (treedef.unflatten(part) for part in drawn)
    return SparseInit(_drawing.copy_dense(mask, new_params), mask)


def sparsity_aware_orthogonal(
    key: Array,
    params: Params,
    densities: Densities,
    *,
    form: Literal["tanh", "relu"] = "tanh",
    scale: float | Array = 1.0,
    where: Where = masks.is_kernel,
    layout: LayoutOf | None = None,
) -> SparseInit:
    r"""Draw block-diagonal masks of Haar blocks with permuted channels (SAO).

    Every unit of a square layer of width :math:`n` has the same number of connections
    :math:`\text{degree} = d n`. A linear layer is :func:`eoi_jax.sao.orthogonal`; a convolution
    has such a matrix at its center tap, and all taps of its connected channels are unmasked. The
    method does not define layers that are not square, or grouped: they are dense, orthogonal at
    the start and counted in the mask.

    Args:
        key: A random key.
        params: A pytree of arrays: the shapes and dtypes of the kernels, and all other leaves.
        densities: A number for every square kernel, or a tree of the structure of ``params``;
            the numbers of other kernels are ignored. Static.
        form: ``"tanh"``, or ``"relu"`` for networks of paired units; see
            :func:`eoi_jax.sao.orthogonal`.
        scale: Factor of every kernel.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or grouped.

    Returns:
        The parameters, and a mask of the densities ``degree / n`` of square layers and 1 of others.

    Raises:
        ValueError: If the default ``where`` selects no leaf, if a density is no degree over the
            width that the method can do (the nearest that are: in the message), if it differs
            within a stack, or is traced.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> params = {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}
        >>> start = eoi.sparsity_aware_orthogonal(jax.random.key(0), params, 0.125)
        >>> int(start.mask["kernel"].sum(axis=0).min()), int(start.mask["kernel"].sum(axis=0).max())
        (8, 8)

    Reference:
        Esguerra et al., "Sparsity-Aware Orthogonal Initialization of Deep Neural Networks", IEEE
        Access 2023.
    """
    scale = _checks.finite_scalar(scale, "scale")
    _tree_checks.arrays(params)
    selected = jax.tree.leaves(_selected(params, where))
    checked = _tree_checks.densities(densities, params, name="densities", tree_name="params")
    treedef: Any
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    new_params, new_mask = [], []
    rows = zip(paths_and_leaves, selected, checked, strict=True)
    for index, ((path, leaf), is_kernel, density) in enumerate(rows):
        if not is_kernel or leaf.size == 0:
            new_params.append(leaf)
            new_mask.append(jnp.array(True))
            continue
        stack, geometry = _layers.read(path, leaf, layout)
        draw = _drawing.sao_layer(
            geometry, density, form, scale, leaf.dtype, _tree_checks.path_name(path)
        )
        keys = jax.random.split(jax.random.fold_in(key, index), math.prod(stack))
        kernel, mask = jax.vmap(draw)(keys)
        new_params.append(kernel.reshape(leaf.shape))
        new_mask.append(mask.reshape(leaf.shape))
    whole_mask = treedef.unflatten(new_mask)
    return SparseInit(_drawing.copy_dense(whole_mask, treedef.unflatten(new_params)), whole_mask)


def _selected(params: Params, where: Where) -> Any:
    return _tree_checks.kernels(params, where, required=where is masks.is_kernel)
