"""A start whose mask and weights are drawn at once, every layer exactly orthogonal (EOI)."""

from __future__ import annotations

from typing import Any, Literal

import jax

from eoi_jax import givens, masks
from eoi_jax._internal import checks, drawing, layouts, trees
from eoi_jax.givens import AngleLaw
from eoi_jax.networks.base import SparseInit
from eoi_jax.typing import Array, Densities, LayoutOf, Params, Where

__all__ = ["exact_orthogonal"]


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
    scale = checks.finite_scalar(scale, "scale")
    trees.arrays(params)
    if center_density is not None and form == "eis":
        remedy = "That form has d_H = d: leave center_density out."
        raise checks.value_error(
            "center_density", center_density, 'does not go with form="eis"', remedy
        )
    if center_density is not None and center_density != "density":
        center_density = checks.density(center_density, name="center_density")
    checks.one_of(
        infeasible,
        ("raise", "redistribute"),
        name="infeasible",
        remedy="Raise an error, or take the excess from the other layers.",
    )
    checks.one_of(form, ("eoi", "eis"), name="form", remedy="Use 'eoi', or the variant 'eis'.")
    all_taps = form == "eis"
    selected = trees.kernels(params, where)
    kernels = layouts.kernels(params, densities, selected, layout)
    budgets = layouts.feasible(
        kernels,
        lambda geometry: geometry.minimum * (geometry.num_taps if all_taps else 1),
        redistribute=infeasible == "redistribute",
    )
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    drawn = drawing.exact(
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
    return SparseInit(drawing.copy_dense(mask, new_params), mask)
