"""A start whose mask and weights are drawn at once, every layer exactly orthogonal (EOI)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import givens
from eoi_jax._internal import checks, drawing, layouts, selection, trees
from eoi_jax._internal.arrays import nonzero
from eoi_jax._internal.conv import Taps, center_density, check_taps, place
from eoi_jax._internal.keys import threefry_key
from eoi_jax._internal.vmap import map_on_cpu
from eoi_jax.givens import AngleLaw
from eoi_jax.networks.base import SparseInit
from eoi_jax.planes import PlaneLaw, check, independent
from eoi_jax.typing import Array, Densities, LayoutOf, Params, Where

__all__ = ["exact_orthogonal"]

# Smaller matrices are drawn in this shape: padding costs them microseconds, and a program a second.
_SMALL = 64

_ScaleOf: TypeAlias = Callable[[tuple[Any, ...], tuple[int, ...], float], float]


def exact_orthogonal(
    key: Array,
    params: Params,
    densities: Densities,
    *,
    scale: float | Array | Literal["he"] | _ScaleOf = 1.0,
    taps: Taps = "center",
    center_density: float | Literal["density"] | None = None,
    infeasible: Literal["raise", "redistribute"] = "raise",
    variant: Literal["eoi", "eis"] = "eoi",
    angles: AngleLaw = givens.uniform_angle,
    planes: PlaneLaw = independent,
    permute: bool = False,
    where: Where = trees.is_kernel,
    layout: LayoutOf | None = None,
) -> SparseInit:
    r"""Draw mask and weights of a network at once, every layer exactly orthogonal (EOI).

    A layer of :math:`s` weights and density :math:`d` has the budget
    :math:`b = \lfloor d s + 1/2 \rfloor`, and its mask unmasks exactly :math:`b` weights.

    * A linear layer is the matrix of :func:`eoi_jax.sparse_orthogonal.orthogonal`, stopped before
      the first rotation that would exceed the budget. Uniformly random further weights, zero at
      the start, are unmasked up to it.
    * A convolution of :math:`k` taps has such a matrix of density
      :math:`d_H = \min(d k, \sqrt{d}, 1)`, each entry at one tap (``taps``), and zeros elsewhere;
      random weights of the whole kernel are unmasked up to the budget. Each group has a matrix of
      its own.

    So the weights are orthogonal whatever the method that chose the densities, and the count is
    that method's to the last weight.

    Args:
        key: A random key.
        params: A pytree of arrays: the shapes and dtypes of the kernels, and all other leaves.
        densities: A number for every kernel, or a tree of the structure of ``params``: the
            densities of any method's mask (:func:`eoi_jax.masks.densities`, with ``layout=`` for
            stacks) or of :mod:`eoi_jax.budgets`. A single number for a stack of layers is shared
            among them evenly. Static: budgets are computed on the host.
        scale: The singular value of every layer; or ``"he"``, for layers before a normalization:
            each kernel's :math:`\lVert W \rVert_F^2` is :math:`2 d\, c_\text{out}`, as that of
            masked He weights, of which the normalization divides the learning rate; or a function
            ``(path, kernel shape, density) -> number``, called on the host for each layer of each
            kernel with the shape of one layer and the density of its mask.
        taps: Where the entries of a convolution's matrix stand: ``"center"`` (the paper's),
            ``"spread"`` or ``"spread_both"``, all exactly isometric under circular padding; see
            :func:`eoi_jax.initializers.conv`.
        center_density: Density of a convolution's center tap, in [1/max(inputs, outputs), 1], or
            ``"density"``, each layer's own, the paper's choice for its network of 1000 layers;
            default by the rule above. A layer whose budget it exceeds gets what the budget allows.
        infeasible: What to do where a budget is below the :math:`\min(n, m)` non-zeros that each
            matrix of a layer needs: ``"raise"``, or ``"redistribute"``: such layers get what they
            need, and the others give it, each in proportion to what it has above its need. The
            count of the whole network stays the same.
        variant: ``"eoi"``, or ``"eis"``, a variant of the authors: :math:`d_H = d`, and all taps
            are unmasked wherever :math:`H` is not zero (the few weights that then are left of
            the budget anywhere). It needs :math:`k` times the non-zeros.
        angles: Law of the rotation angles.
        planes: Law of the rotations' planes, of :mod:`eoi_jax.planes`.
        permute: Permute channels at random and draw signs.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or grouped.

    Returns:
        The parameters, and a mask with exactly as many unmasked weights as the budgets sum to.

    Raises:
        ValueError: If ``where`` selects no leaf, if a density is out of range or
            traced, if a layout does not fit its leaf, if ``planes`` is no law of planes,
            or if budgets are below what orthogonal matrices need: the message lists the layers.

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
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, section 4. Spread taps and the
        scale ``"he"`` are of this library.
    """
    key = threefry_key(key)
    check_taps(taps)
    check(planes)
    params = trees.arrays(params)
    checks.one_of(
        infeasible,
        ("raise", "redistribute"),
        name="infeasible",
        remedy="Raise an error, or take the excess from the other layers.",
    )
    checks.one_of(
        variant, ("eoi", "eis"), name="variant", remedy="Use 'eoi', or the variant 'eis'."
    )
    if center_density is not None and variant == "eis":
        raise checks.value_error(
            "center_density",
            center_density,
            'does not go with variant="eis"',
            "The density at the center of that variant is the layer's: leave center_density out.",
        )
    if taps != "center" and variant == "eis":
        remedy = "That variant unmasks all taps of a connection at the center: leave taps out."
        raise checks.value_error("taps", taps, 'does not go with variant="eis"', remedy)
    if center_density is not None and center_density != "density":
        center_density = checks.density(center_density, name="center_density")
    rule = _CenterRule(center_density, every_tap=variant == "eis")
    kernels = layouts.feasible(
        layouts.kernels(params, densities, trees.kernels(params, where), layout),
        lambda geometry: geometry.minimum * (geometry.num_taps if rule.every_tap else 1),
        redistribute=infeasible == "redistribute",
    )
    treedef: Any
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in paths_and_leaves]
    groups = _group(key, leaves, kernels, rule, _scales(scale, paths_and_leaves, kernels))
    masks = [jnp.array(True) for _ in leaves]
    drawn = _draw(groups, drawing.check_angles(angles), planes)
    for group, matrices in zip(groups, drawn, strict=True):
        placed = _place(
            group.keys,
            matrices,
            group.mask_keys,
            jnp.asarray(group.counts, jnp.int32),
            group.scales,
            geometry=group.geometry,
            shapes=tuple(leaves[index].shape for index in group.indices),
            permute=permute,
            every_tap=rule.every_tap,
            taps=taps if group.geometry.taps else "center",
        )
        for index, kernel, mask in zip(group.indices, *placed, strict=True):
            dtype = jax.dtypes.canonicalize_dtype(leaves[index].dtype)
            leaves[index], masks[index] = kernel.astype(dtype), mask
    mask_tree = treedef.unflatten(masks)
    return SparseInit(*layouts.place(treedef.unflatten(leaves), mask_tree, params))


def _scales(
    scale: Any, paths_and_leaves: Sequence[Any], kernels: Sequence[layouts.Kernel | None]
) -> list[Any]:
    """Return the factor of each layer of each kernel; None for dense leaves."""
    if not callable(scale) and scale != "he":
        remedy = "Give a number, 'he', or a function (path, kernel shape, density) -> number."
        scale = checks.number(scale, "scale", remedy=remedy)
    found: list[Any] = []
    for (path, leaf), kernel in zip(paths_and_leaves, kernels, strict=True):
        if kernel is None:
            found.append(None)
            continue
        geometry, layers = kernel.geometry, len(kernel.counts)
        densities, name = kernel.counts / geometry.size, "scale"
        values: Any = [scale] * layers
        if callable(scale):
            name = f"scale({kernel.name})"
            values = [scale(tuple(path), geometry.shape, float(density)) for density in densities]
        elif isinstance(scale, str):
            # At scale 1 the squared norm is the number of rows or columns that are orthonormal.
            values = np.sqrt(2 * densities * geometry.shape[-1] / geometry.minimum)
        values = [checks.scale(value, leaf.dtype, name=name) for value in values]
        dtype = checks.compute_dtype(jax.dtypes.canonicalize_dtype(leaf.dtype))
        if checks.is_traced(scale):
            found.append(jnp.broadcast_to(jnp.asarray(scale, dtype), (layers,)))
        else:
            found.append(jnp.asarray(np.array(values, dtype)))
    return found


class _CenterRule(NamedTuple):
    """How dense the center tap of a convolution is: its density, or None for the default rule."""

    density: float | Literal["density"] | None
    every_tap: bool  # whether all taps are unmasked wherever the matrix is not zero

    def check(self, kernel: layouts.Kernel) -> None:
        """Refuse a density that no orthogonal matrix of a convolution can have."""
        if isinstance(self.density, float) and kernel.geometry.num_taps > 1 and not self.every_tap:
            minimum = 1 / max(kernel.geometry.inputs, kernel.geometry.outputs)
            why = f"An orthogonal matrix at the center of {kernel.name} has no fewer non-zeros."
            checks.density(self.density, name="center_density", minimum=minimum, why=why)

    def counts(self, geometry: layouts.Geometry, layer_counts: layouts.Counts) -> layouts.Counts:
        """Count the non-zeros that each matrix of each layer may have."""
        size = geometry.inputs * geometry.outputs
        counts = layer_counts // (geometry.groups * (geometry.num_taps if self.every_tap else 1))
        if geometry.num_taps > 1 and not self.every_tap:
            density = layer_counts / geometry.size
            if self.density is None:
                tap_density = center_density(density, geometry.num_taps)
            else:
                tap_density = density if self.density == "density" else self.density
            counts = np.minimum(counts, np.floor(tap_density * size + 0.5).astype(np.int64))
        return np.clip(counts, geometry.minimum // geometry.groups, size)


class _Group(NamedTuple):
    """The kernels of one geometry: they are drawn and placed by one program."""

    geometry: layouts.Geometry
    dtype: Any
    indices: list[int]  # among the leaves of the tree
    counts: layouts.Counts  # of unmasked weights, one for each layer
    matrix_counts: layouts.Counts  # of non-zeros, one for each matrix
    keys: Array  # one for each matrix
    mask_keys: Array  # one for each layer
    scales: Array  # one for each layer


def _group(
    key: Array,
    leaves: Sequence[Any],
    kernels: Sequence[layouts.Kernel | None],
    rule: _CenterRule,
    scales: Sequence[Any],
) -> list[_Group]:
    """Put the kernels of one geometry and dtype together."""
    alike: dict[tuple[layouts.Geometry, Any], list[int]] = {}
    for index, kernel in enumerate(kernels):
        if kernel is not None:
            dtype = checks.compute_dtype(jax.dtypes.canonicalize_dtype(leaves[index].dtype))
            alike.setdefault((kernel.geometry, dtype), []).append(index)
            rule.check(kernel)
    groups = []
    for (geometry, dtype), indices in alike.items():
        layer_counts = [kernel.counts for i in indices if (kernel := kernels[i]) is not None]
        pairs = zip(indices, layer_counts, strict=True)
        keys = [jax.random.split(jax.random.fold_in(key, i), len(counts)) for i, counts in pairs]
        matrix_keys, mask_keys = _split(jnp.concatenate(keys), geometry.groups)
        counts = np.concatenate(layer_counts)
        matrix_counts = np.repeat(rule.counts(geometry, counts), geometry.groups)
        of_layers = jnp.concatenate([scales[index] for index in indices])
        groups.append(
            _Group(
                geometry, dtype, indices, counts, matrix_counts, matrix_keys, mask_keys, of_layers
            )
        )
    return groups


@functools.partial(jax.jit, static_argnames="groups")
def _split(keys: Array, groups: int) -> tuple[Array, Array]:
    """Split the key of each layer into one for each of its matrices, and one for its mask."""
    for_weights, for_masks = jax.vmap(jax.random.split, out_axes=1)(keys)
    for_matrices = jax.vmap(lambda key: jax.random.split(key, groups))(for_weights)
    return for_matrices.reshape(-1, *for_matrices.shape[2:]), for_masks


def _draw(groups: Sequence[_Group], angles: AngleLaw, planes: PlaneLaw) -> list[Array]:
    """Draw the matrices ``(number, rows, columns)``, tall or square, of each group.

    Small ones of whatever shape are drawn by one program.
    """
    together: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        rows, columns = group.geometry.tall
        padded = (_SMALL, _SMALL) if 1 < rows <= _SMALL else (rows, columns)
        together.setdefault((padded, group.dtype), []).append(index)
    drawn: dict[int, Array] = {}
    for (padded, dtype), indices in together.items():
        lengths = [len(groups[index].matrix_counts) for index in indices]
        keys = jnp.concatenate([groups[index].keys for index in indices])
        shapes = np.repeat([groups[index].geometry.tall for index in indices], lengths, axis=0)
        counts = np.concatenate([groups[index].matrix_counts for index in indices])
        numbers = np.stack([counts, *shapes.T])
        if padded == (_SMALL, _SMALL):
            # A power of two of them, so that networks share programs; those of 1 x 1 cost nothing.
            more = (1 << (len(keys) - 1).bit_length()) - len(keys)
            keys = keys[np.minimum(np.arange(len(keys) + more), len(keys) - 1)]
            numbers = np.pad(numbers, ((0, 0), (0, more)), constant_values=1)
        # The segment is the same for all densities, so that they share a program.
        law = drawing.Law(padded, 2 * max(padded[0], 32), angles, at_most=True, planes=planes)
        each = jnp.asarray(numbers, jnp.int32)  # count, rows, columns
        matrices = drawing.draw_padded(keys, each[0], each[1], each[2], law, dtype)
        ends = np.cumsum(lengths)
        for index, end, length in zip(indices, ends, lengths, strict=True):
            start, stop = (int(end - length), 0, 0), (int(end), *groups[index].geometry.tall)
            drawn[index] = jax.lax.slice(matrices, start, stop)
    return [drawn[index] for index in range(len(groups))]


@functools.partial(jax.jit, static_argnames=("geometry", "shapes", "permute", "every_tap", "taps"))
def _place(
    keys: Array,
    matrices: Array,
    mask_keys: Array,
    counts: Array,
    scales: Array,
    *,
    geometry: layouts.Geometry,
    shapes: tuple[tuple[int, ...], ...],
    permute: bool,
    every_tap: bool,
    taps: Taps,
) -> tuple[list[Array], list[Array]]:
    """Make the leaves and masks of layers of one geometry from their matrices."""
    window, inputs, outputs, groups, _ = geometry
    layers = len(counts)
    if permute:
        permuted = map_on_cpu(drawing.permuted)
        matrices = jax.vmap(permuted)(keys, matrices)
    if inputs < outputs:
        matrices = matrices.swapaxes(1, 2)
    matrices = matrices.reshape(layers, groups, inputs, outputs) * scales[:, None, None, None]
    tap = jnp.moveaxis(matrices, 1, 2).reshape(layers, inputs, groups * outputs)
    if taps == "center":
        kernels = jnp.zeros((layers, *geometry.shape), tap.dtype).at[:, *geometry.center].set(tap)
    else:
        of_group = functools.partial(place, shape=(*window, inputs, outputs), taps=taps)
        group_keys = keys.reshape(layers, groups, *keys.shape[1:])
        placed = jax.vmap(jax.vmap(of_group))(group_keys, matrices)
        kernels = jnp.moveaxis(placed, 1, -2).reshape(layers, *geometry.shape)
    # The support of what is drawn: a cast to fewer bits may round entries to zero.
    spread = tap.reshape(layers, *(1 for _ in window), inputs, groups * outputs)
    support = jnp.broadcast_to(nonzero(spread), kernels.shape) if every_tap else nonzero(kernels)
    masks = selection.unmask_layers(mask_keys, support, counts)
    ends = np.cumsum([math.prod(shape) // geometry.size for shape in shapes])[:-1]

    def leaves(whole: Array) -> list[Array]:
        parts = zip(jnp.split(whole, ends), shapes, strict=True)
        return [part.reshape(shape) for part, shape in parts]

    return leaves(kernels), leaves(masks)
