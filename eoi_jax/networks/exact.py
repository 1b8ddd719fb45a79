"""A start that draws mask and weights together, with every layer exactly orthogonal (EOI)."""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from eoi_jax import givens
from eoi_jax._internal import (
    checks,
    drawing,
    fan_axes,
    layouts,
    programs,
    selection,
    shardings,
    trees,
)
from eoi_jax._internal.arrays import nonzero
from eoi_jax._internal.conv import Taps, center_density, check_strides, check_taps, place
from eoi_jax._internal.keys import threefry_key, words, wrapped
from eoi_jax._internal.vmap import map_on_cpu
from eoi_jax.givens import AngleLaw
from eoi_jax.networks.base import SparseInit
from eoi_jax.planes import PlaneLaw, check, independent
from eoi_jax.typing import Array, Densities, LayoutOf, Params, Shape, Where

__all__ = ["exact_orthogonal"]

# Smaller matrices are drawn in this shape: padding costs them microseconds, and a program a second.
_SMALL = 64
# So many weights are drawn by one program at most, or one kernel: a batch is held as a whole.
_TOGETHER = 2**24
_TOGETHER_IN_SHARDS = 2**20
# So many zeros are added at most to matrices of one shape, or to masks of one size, that share the
# program of another. They cost 20 ms at most in matrices, 0.1 s in masks; a program costs seconds.
_PADDING = 2**22

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
    r"""Draw mask and weights of a network together, every layer exactly orthogonal (EOI).

    A layer of :math:`s` weights and density :math:`d` has the budget
    :math:`b = \lfloor d s + 1/2 \rfloor`, and its mask unmasks exactly :math:`b` weights.

    * A linear layer is the matrix of :func:`eoi_jax.sparse_orthogonal.orthogonal`, stopped before
      the first rotation that would exceed the budget. Then further weights, zero at the start, are
      unmasked uniformly at random until the budget is reached.
    * A convolution of :math:`k` taps has such a matrix of density
      :math:`d_H = \min(d k, \sqrt{d}, 1)`, each entry at one tap (``taps``), and zeros elsewhere.
      Random further weights of the whole kernel are unmasked until the budget is reached. Each
      group has a matrix of its own.

    So the weights are orthogonal with the densities of any method, and the mask has exactly as many
    weights as that method's mask.

    Args:
        key: A random key.
        params: A pytree of arrays. Only the shapes and dtypes of the kernels are used, so a
            :class:`jax.ShapeDtypeStruct` is enough for them; all other leaves need values. A kernel
            is drawn into the shards of its sharding.
        densities: A number for every kernel, or a tree of the structure of ``params``: the
            densities of any method's mask (:func:`eoi_jax.masks.densities`, with ``layout=`` for
            stacks) or of :mod:`eoi_jax.budgets`. A single number for a stack of layers is shared
            among them evenly. Static: budgets are computed on the host.
        scale: The singular value of every layer. Or ``"he"``, for layers before a normalization:
            each kernel's :math:`\lVert W \rVert_F^2` is :math:`2 d\, c_\text{out}`, as for masked
            He weights. (A normalization makes the effective learning rate inversely proportional to
            this norm.) Or a function ``(path, kernel shape, density) -> number``. It is called on
            the host for each layer of each kernel, with the shape of one layer,
            ``(*taps, inputs, outputs)`` with each fan in one axis, and the density of its mask.
        taps: The taps of the entries of a convolution's matrix: ``"center"`` (the paper's),
            ``"spread"`` or ``"spread_both"``. All are exactly isometric under circular padding;
            with zeros around 32 x 32 pixels a 3 x 3 layer with spread taps loses about 4 % of the
            energy. See :func:`eoi_jax.initializers.conv`.
        strides: ``(path, leaf) -> int or one for each axis of the window``, the strides of a
            convolution, and 1 for all other kernels. A strided kernel is then an exact isometry or
            co-isometry from all pixels: each group has one matrix whose rows are its inputs in all
            phases, and :math:`k` is the number of taps for each phase. Without ``strides`` such a
            layer subsamples: at stride 2, if it does not reduce the channels, it keeps a quarter
            of the energy of white noise.
        balance_outputs: Whether, in layers with more outputs than inputs, each output has a norm
            of at least half of the root mean square, so that no filter before a normalization is
            dead; see :func:`eoi_jax.initializers.conv`. Default: True in convolutions with spread
            taps whose budget (and ``center_density``, if given) allows a non-zero for each output.
            With ``True`` every layer with more outputs than inputs, also a linear one, needs such a
            budget; a layer with less is ``infeasible``. ``False`` reproduces the paper.
        center_density: Density of a convolution's center tap, in [1/max(inputs, outputs), 1]; or
            ``"density"``, the density of each layer, which is the paper's choice for its network of
            1000 layers. Default: the rule above. If it exceeds a layer's budget, the layer gets
            what the budget allows.
        infeasible: What to do where a budget is below the :math:`\min(n, m)` non-zeros that each
            matrix of a layer needs. ``"raise"`` raises an error. ``"redistribute"`` gives such
            layers what they need, and takes it from the others, in proportion to what each has
            above its need. The count of the whole network stays the same.
        variant: ``"eoi"``, or ``"eis"``, a variant of the authors: :math:`d_H = d`, and all taps
            are unmasked wherever :math:`H` is not zero (the few weights that are then left of the
            budget are unmasked anywhere). It needs :math:`k` times the non-zeros.
        angles: Law of the rotation angles.
        planes: Law of the rotations' planes, of :mod:`eoi_jax.planes`; for layers of several sizes
            :func:`eoi_jax.planes.within` takes a function of the size.
        permute: Permute channels at random and draw signs.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or grouped, and which
            axes are inputs and outputs. Default: :func:`eoi_jax.layouts.by_name`, which recognizes
            the attention of Flax, Equinox and GPT-2: each kernel is one isometry, or one for each
            of q, k and v where they are fused.

    Returns:
        The parameters, and a mask whose count is exactly the sum of the budgets.

    Raises:
        ValueError: If ``where`` selects no leaf, if a density is out of range, above that of
            ``planes`` or traced, if a layout does not fit its leaf, if ``planes`` is no law of
            planes or a law of another size, if strides do not fit a kernel's window, if budgets
            are below what orthogonal matrices or ``balance_outputs=True`` need (the message lists
            the layers), or if a leaf that is no kernel is a shape without values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> params = {"kernel": jnp.zeros((40, 100)), "bias": jnp.zeros(100)}
        >>> start = eoi.exact_orthogonal(jax.random.key(0), params, 0.1)
        >>> int(start.mask["kernel"].sum())
        400
        >>> bool(eoi.spectrum.orthogonality_error(start.params["kernel"]) < 1e-5)
        True

        Parameters drawn into their shards on several devices; the model itself draws biases and
        norms, in the same program. ``None`` lets the compiler choose the shardings of the masks,
        which it divides as their kernels or further; pass shardings in its place to set them:

        >>> import flax.linen as nn
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((jax.device_count(),), ("model",), (jax.sharding.AxisType.Auto,))
        >>> model, x = nn.Dense(32), jnp.ones((1, 16))
        >>> specs = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")}
        >>> shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        >>> def draw(key):
        ...     return eoi.exact_orthogonal(key, model.init(key, x)["params"], 0.2)
        >>> out_shardings = eoi.networks.SparseInit(shardings, None)
        >>> with jax.set_mesh(mesh):
        ...     start = jax.jit(draw, out_shardings=out_shardings)(jax.random.key(0))
        >>> sharding = start.params["kernel"].sharding
        >>> start.mask["kernel"].sharding.is_equivalent_to(sharding, ndim=2)
        True

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, section 4. Spread taps and the
        scale ``"he"`` are of this library.
    """
    key = threefry_key(key)
    check_taps(taps)
    check(planes)
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
    keeps_density = isinstance(center_density, str) and center_density == "density"
    if center_density is not None and not keeps_density:
        center_density = checks.density(center_density, name="center_density")
    balance_outputs = checks.balance(balance_outputs, planes, optional=True)
    static = {"center_density": center_density, "balance_outputs": balance_outputs}
    for name, value in static.items():
        if checks.is_traced(value):
            remedy = "Counts are computed on the host: give a static value."
            raise checks.value_error(name, value, "is traced", remedy)
    if strides is not None and variant == "eis":
        remedy = "That variant is defined for one tap: leave strides out."
        raise checks.value_error("strides", strides, 'does not go with variant="eis"', remedy)
    angles = drawing.check_angles(angles)
    rule = _CenterRule(center_density, variant == "eis", balance_outputs, taps)
    treedef: Any
    selected = trees.kernels(params, where)
    params = trees.arrays(params, shapes_of=selected)
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    kernels = layouts.kernels(params, densities, selected, layout)
    if strides is not None:
        kernels = _strided(strides, paths_and_leaves, kernels)
    kernels = layouts.feasible(
        kernels,
        rule.needs,
        redistribute=infeasible == "redistribute",
        what="orthogonal matrices" + " with balanced outputs" * (balance_outputs is True),
    )
    leaves = [leaf for _, leaf in paths_and_leaves]
    scales = _scales(scale, paths_and_leaves, kernels)
    groups = _group(words(key), leaves, kernels, rule, scales, planes)
    for group in groups:
        _check_reachable(group, kernels, planes)
    if planes is independent and not permute:
        groups = _padded(groups)
    padded = _padded_sizes(groups)
    masks: list[Any] = [jnp.array(True) for _ in leaves]
    for group, matrices in zip(groups, _draw(groups, angles, planes, permute), strict=True):
        form = _Form(
            group.geometry,
            group.views,
            tuple(jax.dtypes.canonicalize_dtype(leaves[i].dtype) for i in group.indices),
            permute and group.is_small,
            rule.every_tap,
            taps if group.geometry.taps else "center",
        )
        made: tuple[Sequence[Any], Sequence[Any]]
        if matrices is None:
            law = _law(group.shape, angles, planes, permute=permute)
            made = _draw_into_shards(group, law, form)
        elif checks.is_traced(matrices.stack) or group.out is not None:
            made = _placed_into_shards(group, matrices, form)
        else:
            made = _placed_by_leaf(group, matrices, form, padded[group.geometry.size])
        for index, kernel, mask in zip(group.indices, *made, strict=True):
            leaves[index], masks[index] = kernel, mask
    # Only now, when every program runs: these wait for their results.
    for group in groups:
        density = float(group.counts.max()) / group.geometry.size
        for index in group.indices:
            drawing.check_reached(leaves[index], density, planes)
    masks = [mask.unflattened() if isinstance(mask, _FlatMask) else mask for mask in masks]
    mask_tree = treedef.unflatten(masks)
    return SparseInit(*layouts.place(treedef.unflatten(leaves), mask_tree, params))


def _scales(
    scale: Any, paths_and_leaves: Sequence[Any], kernels: Sequence[layouts.Kernel | None]
) -> list[Any]:
    """Return the factor of each layer of each kernel; None for dense leaves."""
    if not callable(scale) and not (isinstance(scale, str) and scale == "he"):
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
            if any(map(checks.is_traced, values)):
                remedy = "The function is called on the host: let it return a Python number."
                raise checks.value_error(name, values[0], "is being traced", remedy)
        elif isinstance(scale, str):
            # At scale 1 the squared norm is the number of rows or columns that are orthonormal.
            values = np.sqrt(2 * densities * geometry.shape[-1] / geometry.minimum)
        values = [checks.scale(value, leaf.dtype, name=name) for value in values]
        dtype = checks.compute_dtype(jax.dtypes.canonicalize_dtype(leaf.dtype))
        if checks.is_traced(scale):
            found.append(jnp.broadcast_to(jnp.asarray(scale, dtype), (layers,)))
        else:
            found.append(np.array(values, dtype))
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
    """The kernels of one geometry: they are drawn by one program, perhaps with others.

    Keys are given as their words, and are of NumPy as all numbers, unless they are traced.
    """

    geometry: layouts.Geometry
    dtype: Any
    shape: tuple[int, int]  # of each matrix as it is drawn, tall or square
    out: Any  # the sharding that every leaf asks for, or None
    indices: list[int]  # among the leaves of the tree
    views: tuple[fan_axes.View, ...]  # of these leaves
    counts: layouts.Counts  # of unmasked weights, one for each layer
    matrix_counts: layouts.Counts  # of non-zeros, one for each matrix
    balanced: NDArray[np.bool_]  # whether each matrix has outputs of balanced norms
    keys: Any  # one for each matrix
    mask_keys: Any  # one for each layer
    scales: Any  # one for each layer

    @property
    def is_small(self) -> bool:
        """Whether the matrices are drawn by the program of all small ones."""
        return self.shape == (_SMALL, _SMALL)


def _group(
    key: Array,
    leaves: Sequence[Any],
    kernels: Sequence[layouts.Kernel | None],
    rule: _CenterRule,
    scales: Sequence[Any],
    planes: PlaneLaw,
) -> list[_Group]:
    """Put the kernels of one geometry, dtype and sharding together, as far as memory goes."""
    alike: dict[tuple[layouts.Geometry, Any, Any], list[int]] = {}
    for index, kernel in enumerate(kernels):
        if kernel is not None:
            leaf = leaves[index]
            dtype = checks.compute_dtype(jax.dtypes.canonicalize_dtype(leaf.dtype))
            alike.setdefault((kernel.geometry, dtype, shardings.asked(leaf)), []).append(index)
            rule.check(kernel)
    keys = _keys(key, kernels)
    groups = []
    for (geometry, dtype, out), together in alike.items():
        shape = geometry.tall
        if planes.of_size(shape[0]).size is None and 1 < shape[0] <= _SMALL:
            shape = (_SMALL, _SMALL)
        most = _TOGETHER if out is None else _TOGETHER_IN_SHARDS
        largest = max(math.prod(leaves[index].shape) for index in together)
        number = len(together) if shape == (_SMALL, _SMALL) else max(most // largest, 1)
        for first in range(0, len(together), number):
            indices = together[first : first + number]
            present = [kernel for i in indices if (kernel := kernels[i]) is not None]
            counts = np.concatenate([kernel.counts for kernel in present])
            per_matrix, is_balanced = rule.counts(geometry, counts)
            groups.append(
                _Group(
                    geometry,
                    dtype,
                    shape,
                    out,
                    indices,
                    tuple(kernel.view for kernel in present),
                    counts,
                    np.repeat(per_matrix, geometry.groups),
                    np.repeat(is_balanced, geometry.groups),
                    _concatenated([keys[index][0] for index in indices]),
                    _concatenated([keys[index][1] for index in indices]),
                    _concatenated([scales[index] for index in indices]),
                )
            )
    return groups


def _padded(groups: Sequence[_Group]) -> list[_Group]:
    """Let matrices be drawn in the corner of a larger shape that others have, by one program."""
    alike: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        size = math.prod(group.shape) * len(group.matrix_counts)
        if group.out is None and not checks.is_traced(group.keys) and size <= _TOGETHER // 2:
            is_balanced = bool(group.balanced.any())
            alike.setdefault((group.shape, group.dtype, is_balanced), []).append(index)
    found = list(groups)
    numbers: dict[Any, int] = {}  # of matrices in each program, the largest matrices first
    for program, indices in sorted(alike.items(), key=lambda item: -math.prod(item[0][0])):
        number = sum(len(groups[index].matrix_counts) for index in indices)
        for larger, its_number in numbers.items():
            is_alike = program[1:] == larger[1:] and (np.less_equal(program[0], larger[0])).all()
            size, padded_size = math.prod(program[0]), math.prod(larger[0])
            is_cheap = number * (padded_size - size) <= _PADDING
            # As without padding, no group has more than half of what is drawn together.
            is_light = number * padded_size <= _TOGETHER // 2
            is_light &= (number + its_number) * padded_size <= _TOGETHER
            if is_alike and is_cheap and is_light:
                program = larger  # the last one, whose matrices are the smallest
        numbers[program] = numbers.get(program, 0) + number
        for index in indices:
            found[index] = found[index]._replace(shape=program[0])
    return found


def _padded_sizes(groups: Sequence[_Group]) -> dict[int, int]:
    """Choose for each size of a layer one of a few to which its mask is padded.

    Layers of a smaller size are padded to that of larger ones where this adds few entries.
    """
    padded = {group.geometry.size: selection.padded_size(group.geometry.size) for group in groups}
    numbers: collections.Counter[int] = collections.Counter()
    for group in groups:
        numbers[padded[group.geometry.size]] += len(group.counts)
    for size, larger in itertools.pairwise(sorted(numbers)):
        if numbers[size] * (larger - size) <= _PADDING:
            numbers[larger] += numbers[size]
            padded = {key: larger if it == size else it for key, it in padded.items()}
    return padded


def _concatenated(arrays: Sequence[Any]) -> Any:
    return (jnp if any(map(checks.is_traced, arrays)) else np).concatenate(arrays)


def _keys(key: Array, kernels: Sequence[layouts.Kernel | None]) -> dict[int, tuple[Any, Any]]:
    """Return the words of a key for each matrix of each kernel, and of one for each layer's mask.

    The network's key has a child for each leaf, and that one for each layer. Of its two children
    the first is for the weights, and has a child for each group; the second is for the mask.
    """
    paths: list[Any] = []
    for index, kernel in enumerate(kernels):
        if kernel is not None:
            layers = np.arange(len(kernel.counts))
            layer, group = np.indices((len(layers), kernel.geometry.groups)).reshape(2, -1)
            paths.append(np.stack(np.broadcast_arrays(index, layer, 0, group)))
            paths.append(np.stack(np.broadcast_arrays(index, layers, 1, -1)))
    if not paths:
        return {}
    table = np.concatenate(paths, axis=1).astype(np.int32)
    # A power of two of them, so that networks share the program.
    more = (1 << (table.shape[1] - 1).bit_length()) - table.shape[1]
    found = _descendants(key, np.pad(table, ((0, 0), (0, more))))
    if not checks.is_traced(found):
        found = np.asarray(found)
    ends = np.cumsum([path.shape[1] for path in paths])
    parts = [found[end - path.shape[1] : end] for path, end in zip(paths, ends, strict=True)]
    indices = [index for index, kernel in enumerate(kernels) if kernel is not None]
    return dict(zip(indices, zip(parts[::2], parts[1::2], strict=True), strict=True))


@jax.jit
def _descendants(key: Array, paths: Array) -> Array:
    """Follow paths of numbers from a key to one of its children and on; a number of -1 stays.

    With JAX's default ``jax_threefry_partitionable``, the children are those of
    :func:`jax.random.split`, which are the same for any number of them.
    """

    def to_children(keys: Array, numbers: Array) -> tuple[Array, None]:
        children = jax.vmap(jax.random.fold_in)(wrapped(keys), numbers)
        return jnp.where(numbers[:, None] < 0, keys, words(children)), None

    start = jnp.broadcast_to(key, (paths.shape[1], *key.shape))
    return jax.lax.scan(to_children, start, paths)[0]


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


def _law(shape: tuple[int, int], angles: AngleLaw, planes: PlaneLaw, *, permute: bool) -> Any:
    """Return the law of matrices that are drawn in a shape, or in its corner."""
    of_size, is_small = planes.of_size(shape[0]), shape == (_SMALL, _SMALL)
    # The segment is the same for all densities, so that they share a program.
    segment = 2 * max(shape[0], 32)
    rounds = 0 if is_small else drawing.rounds_at_once(shape, of_size)
    permute = permute and not is_small
    return drawing.Law(shape, segment, angles, True, permute, of_size, rounds)


class _Matrices(NamedTuple):
    """Some of a stack of matrices, in the corners of zeros."""

    stack: Array
    first: int


def _draw(
    groups: Sequence[_Group], angles: AngleLaw, planes: PlaneLaw, permute: bool
) -> list[_Matrices | None]:
    """Draw the matrices of each group, those of one shape by one program.

    None for large ones that are to be drawn into shards.
    """
    together: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        if group.is_small or group.out is None:
            # What is too large for one group is not put together here either.
            is_large = math.prod(group.shape) * len(group.keys) > _TOGETHER // 2
            together.setdefault((group.shape, group.dtype, index if is_large else None), []).append(
                index
            )
    drawn: list[_Matrices | None] = [None] * len(groups)
    for (shape, dtype, _), indices in together.items():
        stacks = [groups[index] for index in indices]
        lengths = [len(group.matrix_counts) for group in stacks]
        keys = _concatenated([group.keys for group in stacks])
        numbers = np.concatenate([_numbers(group) for group in stacks], axis=1)
        if shape == (_SMALL, _SMALL):
            # A power of two of them, so that networks share programs; those of 1 x 1 cost nothing.
            more = (1 << (len(keys) - 1).bit_length()) - len(keys)
            keys = keys[np.minimum(np.arange(len(keys) + more), len(keys) - 1)]
            numbers = np.pad(numbers, ((0, 0), (0, more)), constant_values=1)
        law = _law(shape, angles, planes, permute=permute)
        # Where they are of both kinds, one is as good as the other.
        is_transposed = stacks[0].geometry.rows < stacks[0].geometry.outputs
        axes = shardings.axes_of_columns(keys, is_transposed=is_transposed)
        law = law._replace(axes=axes)
        flags = numbers[3] > 0 if any(group.balanced.any() for group in stacks) else None
        counts, rows, columns, _ = numbers
        matrices = drawing.draw_padded(keys, counts, rows, columns, law, dtype, flags)
        ends = np.cumsum(lengths)
        for index, end, length in zip(indices, ends, lengths, strict=True):
            drawn[index] = _Matrices(matrices, int(end - length))
    return drawn


def _numbers(group: _Group) -> NDArray[np.int32]:
    """Return the count, rows and columns of each matrix, and whether it is balanced."""
    rows, columns = np.repeat([group.geometry.tall], len(group.matrix_counts), axis=0).T
    return np.stack([group.matrix_counts, rows, columns, group.balanced]).astype(np.int32)


class _Form(NamedTuple):
    """What is fixed when the program that makes kernels from matrices is compiled."""

    geometry: layouts.Geometry
    views: tuple[fan_axes.View, ...]  # of the leaves
    dtypes: tuple[Any, ...]
    permute: bool
    every_tap: bool
    taps: Taps


def _draw_into_shards(group: _Group, law: Any, form: _Form) -> tuple[list[Array], list[Array]]:
    """Draw the leaves of a group and their masks, on a mesh each device its part."""
    flags = group.balanced if group.balanced.any() else None
    numbers = (group.keys, *_numbers(group)[:3], flags, *_of_layers(group))
    static = (law._replace(angles=None), group.dtype, form, group.out)
    program = programs.of_function(_draw_and_place, law.angles, static_argnums=(0, 1, 2, 3))
    if checks.is_traced(group.keys):
        return _halves(_draw_and_place(law.angles, *static, *numbers))
    with shardings.entered([group.out]):
        return _halves(program(*static, *numbers))


def _draw_and_place(
    angles: AngleLaw, law: Any, dtype: Any, form: _Form, out: Any, *numbers: Any
) -> list[Array]:
    def draw(
        keys: Array, counts: Array, rows: Array, columns: Array, flags: Any, *of_layers: Array
    ) -> list[Array]:
        is_transposed = form.geometry.rows < form.geometry.outputs
        axes = shardings.axes_of_columns(keys, is_transposed=is_transposed)
        drawing_law = law._replace(angles=angles, axes=axes)
        matrices = drawing.draw_padded(keys, counts, rows, columns, drawing_law, dtype, flags)
        return _leaves_and_masks(keys, matrices, *of_layers, form=form)

    return shardings.draw_into(draw, [out] * (2 * len(form.views)))(*numbers)


def _placed_into_shards(
    group: _Group, matrices: _Matrices, form: _Form
) -> tuple[list[Array], list[Array]]:
    """Make the leaves of a group and their masks from matrices, also while a program is traced."""
    of_group = _slice(matrices, group)
    numbers = (group.keys, of_group, *_of_layers(group))
    if checks.is_traced(of_group):
        return _halves(_place_into(form, group.out, *numbers))
    with shardings.entered([group.out]):
        return _halves(_place_into_program(form, group.out, *numbers))


def _place_into(form: _Form, out: Any, *numbers: Any) -> list[Array]:
    place_in = functools.partial(_leaves_and_masks, form=form)
    return shardings.draw_into(place_in, [out] * (2 * len(form.views)))(*numbers)


_place_into_program = jax.jit(_place_into, static_argnums=(0, 1))


def _slice(matrices: _Matrices, group: _Group) -> Array:
    first, number = matrices.first, len(group.matrix_counts)
    rows, columns = group.geometry.tall
    return matrices.stack[first : first + number, :rows, :columns]


def _of_layers(group: _Group) -> tuple[Any, ...]:
    return group.scales, group.mask_keys, group.counts.astype(np.int32)


def _halves(made: list[Array]) -> tuple[list[Array], list[Array]]:
    return made[: len(made) // 2], made[len(made) // 2 :]


@functools.partial(jax.jit, static_argnames="form")
def _leaves_and_masks(
    keys: Array, matrices: Array, scales: Array, mask_keys: Array, counts: Array, *, form: _Form
) -> list[Array]:
    """Make the leaves of one geometry, and then their masks."""
    kernels, support = _place(wrapped(keys), matrices, scales, form)
    masks = selection.unmask_layers(wrapped(mask_keys), support, counts)
    leaves = zip(_leaves(kernels, form), form.dtypes, strict=True)
    return [*(leaf.astype(dtype) for leaf, dtype in leaves), *_leaves(masks, form)]


class _FlatMask(NamedTuple):
    """The mask of a leaf as its layers, each flat and padded."""

    layers: Array
    size: int  # of a layer without the padding
    view: fan_axes.View

    def unflattened(self) -> Array:
        """Return the mask of the leaf. The host does it: a program would take longer to compile."""
        return jnp.array(self.view.from_layers(np.asarray(self.layers)[:, : self.size]))


def _placed_by_leaf(
    group: _Group, matrices: _Matrices, form: _Form, padded: int
) -> tuple[list[Array], list[_FlatMask]]:
    """Make the leaves of a group and their masks one by one, by programs that most of them share.

    Their compilation takes far longer than their run. Masks are made of layers that are flat and
    padded, whose random bits are those of the layers themselves.
    """
    leaves, masks = [], []
    size, groups = group.geometry.size, group.geometry.groups
    counts, first = group.counts.astype(np.int32), 0
    for view, dtype in zip(form.views, form.dtypes, strict=True):
        of_leaf = form._replace(views=(view,), dtypes=(dtype,))
        end = first + math.prod(view.stack)
        keys, scales = group.keys[first * groups : end * groups], group.scales[first:end]
        place = np.int32(matrices.first + first * groups)
        leaf, support = _leaf_and_support(
            keys, matrices.stack, scales, place, form=of_leaf, padded=padded
        )
        mask = selection.unmask_flat(
            group.mask_keys[first:end], support, counts[first:end], np.int32(size)
        )
        leaves.append(leaf)
        masks.append(_FlatMask(mask, size, view))
        first = end
    return leaves, masks


@functools.partial(jax.jit, static_argnames=("form", "padded"))
def _leaf_and_support(
    keys: Array, stack: Array, scales: Array, first: Array, *, form: _Form, padded: int
) -> tuple[Array, Array]:
    """Make the only leaf of a form, and the support of its layers, each flat and padded."""
    rows, columns = form.geometry.tall
    matrices = jax.lax.dynamic_slice_in_dim(stack, first, len(keys))[:, :rows, :columns]
    kernels, support = _place(wrapped(keys), matrices, scales, form)
    [leaf], [dtype] = _leaves(kernels, form), form.dtypes
    flat = support.reshape(len(support), -1)
    return leaf.astype(dtype), jnp.pad(flat, ((0, 0), (0, padded - form.geometry.size)))


def _leaves(layers: Array, form: _Form) -> list[Array]:
    """Divide a stack of all layers among the leaves."""
    ends = np.cumsum([math.prod(view.stack) for view in form.views])[:-1]
    parts = zip(jnp.split(layers, ends), form.views, strict=True)
    return [view.from_layers(part) for part, view in parts]


def _place(keys: Array, matrices: Array, scales: Array, form: _Form) -> tuple[Array, Array]:
    """Return the kernels of all layers, of one geometry, and what of them may be non-zero."""
    geometry = form.geometry
    window, inputs, outputs, groups, _, strides = geometry
    layers = len(scales)
    if form.permute:
        permuted = map_on_cpu(drawing.permuted)
        matrices = jax.vmap(permuted)(keys, matrices)
    if geometry.rows < outputs:
        matrices = matrices.swapaxes(1, 2)
    matrices = matrices.reshape(layers, groups, geometry.rows, outputs)
    if form.taps == "center" and strides is None:
        tap = jnp.moveaxis(matrices, 1, 2).reshape(layers, inputs, groups * outputs)
        kernels = jnp.zeros((layers, *geometry.shape), tap.dtype).at[:, *geometry.center].set(tap)
    else:
        shape = (*window, inputs, outputs)
        of_group = functools.partial(place, shape=shape, taps=form.taps, strides=strides)
        group_keys = keys.reshape(layers, groups, *keys.shape[1:])
        placed = jax.vmap(jax.vmap(of_group))(group_keys, matrices)
        kernels = jnp.moveaxis(placed, 1, -2).reshape(layers, *geometry.shape)
    # The support of what is drawn: a scale or a cast to fewer bits may round entries to zero.
    support = nonzero(kernels)
    factors = scales.reshape(layers, *(1 for _ in geometry.shape))
    kernels = jnp.where(support, kernels * factors, jnp.zeros((), kernels.dtype))
    if form.every_tap:
        window_axes = tuple(range(1, len(window) + 1))
        support = jnp.broadcast_to(support.any(window_axes, keepdims=True), kernels.shape)
    return kernels, support
