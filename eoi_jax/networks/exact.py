"""A start whose mask and weights are drawn at once, every layer exactly orthogonal (EOI)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from eoi_jax import givens
from eoi_jax._internal import checks, drawing, fan_axes, layouts, selection, trees
from eoi_jax._internal.arrays import nonzero
from eoi_jax._internal.conv import Taps, center_density, check_strides, check_taps, place
from eoi_jax._internal.keys import threefry_key
from eoi_jax._internal.vmap import map_on_cpu
from eoi_jax.givens import AngleLaw
from eoi_jax.networks.base import SparseInit
from eoi_jax.planes import PlaneLaw, check, independent
from eoi_jax.typing import Array, Densities, LayoutOf, Params, Shape, Where

__all__ = ["exact_orthogonal"]

# Smaller matrices are drawn in this shape: padding costs them microseconds, and a program a second.
_SMALL = 64

_ScaleOf: TypeAlias = Callable[[tuple[Any, ...], tuple[int, ...], float], float]
_StridesOf: TypeAlias = Callable[[tuple[Any, ...], Any], int | Shape]


def exact_orthogonal(
    key: Array,
    params: Params,
    densities: Densities,
    *,
    scale: float | Array | Literal["he"] | _ScaleOf = 1.0,
    taps: Taps = "center",
    strides: _StridesOf | None = None,
    balance_outputs: bool | None = None,
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
            kernel with the shape of one layer, ``(*taps, inputs, outputs)`` with each fan in one
            axis, and the density of its mask.
        taps: Where the entries of a convolution's matrix stand: ``"center"`` (the paper's),
            ``"spread"`` or ``"spread_both"``, all exactly isometric under circular padding; with
            zeros around 32 x 32 pixels a spread 3 x 3 layer loses about 4 % of the energy. See
            :func:`eoi_jax.initializers.conv`.
        strides: ``(path, leaf) -> int or one for each axis of the window``, the strides of a
            convolution, and 1 for all other kernels. A strided kernel is then an exact isometry or
            co-isometry from all pixels, with one matrix under each group's inputs of all phases,
            where :math:`k` is the number of taps for each phase. Without, it subsamples: at stride
            2 a layer that does not lose channels keeps a quarter of the energy of white noise.
        balance_outputs: Whether, in layers with more outputs than inputs, no output's norm is below
            half of its fair share, so that no filter is dead before a normalization; see
            :func:`eoi_jax.initializers.conv`. Default: in convolutions with spread taps, where the
            budget has a non-zero for each output (and so has ``center_density``, if given). With
            ``True`` every wide layer, linear ones too, needs a budget of so many: what has less is
            ``infeasible``. ``False`` reproduces the paper.
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
        planes: Law of the rotations' planes, of :mod:`eoi_jax.planes`; for layers of several sizes
            :func:`eoi_jax.planes.within` takes a function of the size.
        permute: Permute channels at random and draw signs.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or grouped, and which
            axes are inputs and outputs; by default :func:`eoi_jax.layouts.by_name`, which knows
            the attention of Flax, Equinox and GPT-2, each kernel one isometry, or one for each of
            q, k and v where they are fused.

    Returns:
        The parameters, and a mask with exactly as many unmasked weights as the budgets sum to.

    Raises:
        ValueError: If ``where`` selects no leaf, if a density is out of range, above that of
            ``planes`` or traced, if a layout does not fit its leaf, if ``planes`` is no law of
            planes or one of another size, if strides do not fit a kernel's window, or if budgets
            are below what orthogonal matrices or ``balance_outputs=True`` need: the message lists
            the layers.

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
    balance_outputs = checks.balance(balance_outputs, planes, optional=True)
    if strides is not None and variant == "eis":
        remedy = "That variant is defined for one tap: leave strides out."
        raise checks.value_error("strides", strides, 'does not go with variant="eis"', remedy)
    rule = _CenterRule(center_density, variant == "eis", balance_outputs, taps)
    treedef: Any
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    kernels = layouts.kernels(params, densities, trees.kernels(params, where), layout)
    if strides is not None:
        kernels = _strided(strides, paths_and_leaves, kernels)
    kernels = layouts.feasible(
        kernels,
        rule.needs,
        redistribute=infeasible == "redistribute",
        what="orthogonal matrices" + " with balanced outputs" * (balance_outputs is True),
    )
    leaves = [leaf for _, leaf in paths_and_leaves]
    groups = _group(key, leaves, kernels, rule, _scales(scale, paths_and_leaves, kernels))
    for group in groups:
        _check_reachable(group, kernels, planes)
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
            views=group.views,
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


def _strided(
    strides: _StridesOf, paths_and_leaves: Sequence[Any], kernels: Sequence[layouts.Kernel | None]
) -> list[layouts.Kernel | None]:
    """Give the kernels of strided convolutions a geometry with their strides."""
    found: list[layouts.Kernel | None] = []
    for (path, leaf), kernel in zip(paths_and_leaves, kernels, strict=True):
        if kernel is not None:
            geometry, name = kernel.geometry, f"strides({kernel.name})"
            given = strides(tuple(path), leaf)
            if not geometry.taps and given != 1:
                remedy = "A layer without a window has no strides: give 1."
                raise checks.value_error(name, given, "is outside {1}", remedy)
            transposed = geometry.transposed
            steps = check_strides(given, geometry.taps, transposed=transposed, name=name)
            kernel = kernel._replace(geometry=geometry._replace(strides=steps))
        found.append(kernel)
    return found


class _CenterRule(NamedTuple):
    """How many non-zeros the matrices of a layer have, and whether their outputs are balanced."""

    density: float | Literal["density"] | None  # of the center tap, or None for the default rule
    every_tap: bool  # whether all taps are unmasked wherever the matrix is not zero
    balance: bool | None  # whether outputs are balanced: None where taps are spread and it is met
    taps: Taps

    def needs(self, geometry: layouts.Geometry) -> int:
        """Count the weights that a layer cannot do without."""
        is_wide = geometry.rows < geometry.outputs
        least = geometry.groups * geometry.outputs if self.balance and is_wide else geometry.minimum
        return least * (geometry.num_taps if self.every_tap else 1)

    def check(self, kernel: layouts.Kernel) -> None:
        """Refuse a density that no orthogonal matrix of a convolution can have."""
        geometry = kernel.geometry
        if isinstance(self.density, float) and geometry.num_taps > 1 and not self.every_tap:
            minimum = self.needs(geometry) / (geometry.groups * geometry.rows * geometry.outputs)
            balanced = " with balance_outputs=True" * bool(self.balance)
            why = f"An orthogonal matrix of {kernel.name}{balanced} has no fewer non-zeros."
            checks.density(self.density, name="center_density", minimum=minimum, why=why)

    def counts(
        self, geometry: layouts.Geometry, layer_counts: layouts.Counts
    ) -> tuple[layouts.Counts, NDArray[np.bool_]]:
        """Count the non-zeros that each matrix of a layer may have; tell which are balanced."""
        size = geometry.rows * geometry.outputs
        counts = layer_counts // (geometry.groups * (geometry.num_taps if self.every_tap else 1))
        has_rule = geometry.num_taps > 1 and not self.every_tap
        density = layer_counts / geometry.size

        def of_density(tap_density: Any) -> Any:
            return np.minimum(counts, np.floor(tap_density * size + 0.5).astype(np.int64))

        if has_rule and self.density is not None:
            counts = of_density(density if self.density == "density" else self.density)
        is_wide = geometry.rows < geometry.outputs
        if self.balance is None:
            is_spread = bool(geometry.taps) and self.taps != "center"
            balanced = is_wide & is_spread & (counts >= geometry.outputs)
        else:
            balanced = np.full(len(counts), is_wide and self.balance)
        if has_rule and self.density is None:
            counts = of_density(center_density(density, geometry.matrices_per_kernel))
        least = np.where(balanced, geometry.outputs, geometry.minimum // geometry.groups)
        return np.clip(counts, least, size), balanced


class _Group(NamedTuple):
    """The kernels of one geometry: they are drawn and placed by one program."""

    geometry: layouts.Geometry
    dtype: Any
    indices: list[int]  # among the leaves of the tree
    views: tuple[fan_axes.View, ...]  # of these leaves
    counts: layouts.Counts  # of unmasked weights, one for each layer
    matrix_counts: layouts.Counts  # of non-zeros, one for each matrix
    balanced: NDArray[np.bool_]  # whether each matrix has outputs of balanced norms
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
        present = [kernel for i in indices if (kernel := kernels[i]) is not None]
        layer_counts = [kernel.counts for kernel in present]
        pairs = zip(indices, layer_counts, strict=True)
        keys = [jax.random.split(jax.random.fold_in(key, i), len(counts)) for i, counts in pairs]
        matrix_keys, mask_keys = _split(jnp.concatenate(keys), geometry.groups)
        counts = np.concatenate(layer_counts)
        per_matrix, is_balanced = rule.counts(geometry, counts)
        matrix_counts = np.repeat(per_matrix, geometry.groups)
        balanced = np.repeat(is_balanced, geometry.groups)
        of_layers = jnp.concatenate([scales[index] for index in indices])
        groups.append(
            _Group(
                geometry,
                dtype,
                indices,
                tuple(kernel.view for kernel in present),
                counts,
                matrix_counts,
                balanced,
                matrix_keys,
                mask_keys,
                of_layers,
            )
        )
    return groups


def _check_reachable(
    group: _Group, kernels: Sequence[layouts.Kernel | None], planes: PlaneLaw
) -> None:
    """Refuse more non-zeros of a matrix than the planes reach."""
    shape = group.geometry.tall
    most = planes.of_size(shape[0]).max_nonzeros(*shape)
    over = np.flatnonzero(group.matrix_counts > most)
    if len(over):
        names: list[str] = []
        for kernel in (kernels[index] for index in group.indices):
            assert kernel is not None
            names += [kernel.name] * (len(kernel.counts) * group.geometry.groups)
        density = int(group.matrix_counts[over[0]]) / math.prod(shape)
        checks.reachable(density, most, shape, name=f"density of the matrix in {names[over[0]]}")


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
        of_size = planes.of_size(rows)
        padded = (
            (_SMALL, _SMALL) if of_size.size is None and 1 < rows <= _SMALL else (rows, columns)
        )
        together.setdefault((padded, of_size, group.dtype), []).append(index)
    drawn: dict[int, Array] = {}
    for (padded, of_size, dtype), indices in together.items():
        lengths = [len(groups[index].matrix_counts) for index in indices]
        keys = jnp.concatenate([groups[index].keys for index in indices])
        shapes = np.repeat([groups[index].geometry.tall for index in indices], lengths, axis=0)
        counts = np.concatenate([groups[index].matrix_counts for index in indices])
        balanced = np.concatenate([groups[index].balanced for index in indices])
        numbers = np.stack([counts, *shapes.T, balanced])
        is_padded = of_size.size is None and padded == (_SMALL, _SMALL)
        if is_padded:
            # A power of two of them, so that networks share programs; those of 1 x 1 cost nothing.
            more = (1 << (len(keys) - 1).bit_length()) - len(keys)
            keys = keys[np.minimum(np.arange(len(keys) + more), len(keys) - 1)]
            numbers = np.pad(numbers, ((0, 0), (0, more)), constant_values=1)
        # The segment is the same for all densities, so that they share a program.
        segment = 2 * max(padded[0], 32)
        rounds = 0 if is_padded else drawing.rounds_at_once(padded, of_size)
        law = drawing.Law(padded, segment, angles, at_most=True, planes=of_size, rounds=rounds)
        each = jnp.asarray(numbers, jnp.int32)  # count, rows, columns, whether balanced
        flags = each[3] > 0 if balanced.any() else None
        matrices = drawing.draw_padded(keys, each[0], each[1], each[2], law, dtype, flags)
        ends = np.cumsum(lengths)
        for index, end, length in zip(indices, ends, lengths, strict=True):
            start, stop = (int(end - length), 0, 0), (int(end), *groups[index].geometry.tall)
            drawn[index] = jax.lax.slice(matrices, start, stop)
    return [drawn[index] for index in range(len(groups))]


@functools.partial(jax.jit, static_argnames=("geometry", "views", "permute", "every_tap", "taps"))
def _place(
    keys: Array,
    matrices: Array,
    mask_keys: Array,
    counts: Array,
    scales: Array,
    *,
    geometry: layouts.Geometry,
    views: tuple[fan_axes.View, ...],
    permute: bool,
    every_tap: bool,
    taps: Taps,
) -> tuple[list[Array], list[Array]]:
    """Make the leaves and masks of layers of one geometry from their matrices."""
    window, inputs, outputs, groups, _, strides = geometry
    layers = len(counts)
    if permute:
        permuted = map_on_cpu(drawing.permuted)
        matrices = jax.vmap(permuted)(keys, matrices)
    if geometry.rows < outputs:
        matrices = matrices.swapaxes(1, 2)
    matrices = (
        matrices.reshape(layers, groups, geometry.rows, outputs) * scales[:, None, None, None]
    )
    if taps == "center" and strides is None:
        tap = jnp.moveaxis(matrices, 1, 2).reshape(layers, inputs, groups * outputs)
        kernels = jnp.zeros((layers, *geometry.shape), tap.dtype).at[:, *geometry.center].set(tap)
    else:
        shape = (*window, inputs, outputs)
        of_group = functools.partial(place, shape=shape, taps=taps, strides=strides)
        group_keys = keys.reshape(layers, groups, *keys.shape[1:])
        placed = jax.vmap(jax.vmap(of_group))(group_keys, matrices)
        kernels = jnp.moveaxis(placed, 1, -2).reshape(layers, *geometry.shape)
    # The support of what is drawn: a cast to fewer bits may round entries to zero.
    support = nonzero(kernels)
    if every_tap:
        window_axes = tuple(range(1, len(window) + 1))
        support = jnp.broadcast_to(support.any(window_axes, keepdims=True), kernels.shape)
    masks = selection.unmask_layers(mask_keys, support, counts)
    ends = np.cumsum([math.prod(view.stack) for view in views])[:-1]

    def leaves(whole: Array) -> list[Array]:
        parts = zip(jnp.split(whole, ends), views, strict=True)
        return [view.from_layers(part) for part, view in parts]

    return leaves(kernels), leaves(masks)
