"""Arguments that are trees: which leaves are kernels, and the checks of masks, densities, scores.

As in :mod:`eoi_jax._internal.checks`, a message names the argument, with the path of the leaf, its
value, the allowed range and the remedy; traced values are passed on as they are.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks, fan_axes
from eoi_jax._internal.arrays import native, nonzero
from eoi_jax.typing import Layout, Params, Where

# Three names of one thing: a layer's kernel in Flax, Equinox and Haiku.
KERNEL_NAMES = ("kernel", "weight", "w")
_OTHER_KERNEL_NAMES = (
    *("weight_ih", "weight_hh", "weight_hr", "w_i", "w_h", "recurrent_kernel"),
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("depthwise_kernel", "pointwise_kernel"),
)
# PyTorch numbers the layers of a recurrent network behind the names of their parameters.
_LAYER_OF_NAME = re.compile(r"(?<=weight_[ih][hr])_l\d+(_reverse)?$")
# Words in the names of leaves that are meant to be dense, of whatever shape.
_DENSE_WORDS = {
    *("bias", "offset", "scale", "beta", "gamma", "mean", "var", "average"),
    *("pos", "position", "positional"),
}
_NAMED = 5  # so many leaves a warning lists


def same_structure(tree: Any, other: Any, *, name: str, other_name: str) -> None:
    """Require two pytrees of one structure; the error names the first path where they differ.

    A leaf may stand for a box of one array (a variable of NNX, or what Linen wraps an annotated
    parameter in): see :func:`without_axis_names`.
    """
    if _structure(tree) != _structure(other):
        tree, other = _unboxed(tree), _unboxed(other)
    if _structure(tree) != _structure(other):
        path, problem = _first_difference(tree, other, other_name)
        raise ValueError(
            f"{name}[{path_name(path)}] {problem}. "
            f"Build {name} from the same tree that you pass as {other_name}."
        )


def _first_difference(tree: Any, other: Any, other_name: str) -> tuple[tuple[Any, ...], str]:
    """Return the first path at which two trees differ, and what to say of it."""
    (children, node), (other_children, other_node) = map(_one_level, (tree, other))
    if node == other_node:
        pairs = ((key, child, other_children[key]) for key, child in children.items())
        key, child, other_child = next(p for p in pairs if _structure(p[1]) != _structure(p[2]))
        path, problem = _first_difference(child, other_child, other_name)
        return (*key, *path), problem
    if type(tree) is type(other) and children.keys() != other_children.keys():
        for key in children:
            if key not in other_children:
                return key, f"has no counterpart in {other_name}"
        missing = next(key for key in other_children if key not in children)
        return missing, f"is missing, though {other_name} has it"
    problem = f"is {_kind(tree)}, but {other_name} has {_kind(other)} there"
    if tree is None or other is None:
        problem += ", and None is no leaf: the mask of a dense leaf is a scalar True"
    return (), problem


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def _one_level(node: Any) -> tuple[dict[Any, Any], Any]:
    """Return the children of a node by their keys, and its structure without theirs."""
    children, treedef = jax.tree_util.tree_flatten_with_path(node, lambda part: part is not node)
    return dict(children), treedef


def _kind(node: Any) -> str:
    if node is None:
        return "None"
    is_leaf = jax.tree_util.all_leaves([node])
    return "a leaf" if is_leaf else f"a node {_one_level(node)[1]}"


def boxed_as(tree: Any, params: Params) -> Any:
    """Give a tree of one leaf for each of ``params`` the structure of ``params``."""
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(tree))


def without_axis_names(tree: Any) -> Any:
    """Take scalars out of the boxes whose metadata name an axis for each of a parameter's axes.

    The scalar ``True`` of a dense leaf stands in the parameter's place, but has none of its axes:
    Flax would make a sharding of the names that does not fit.
    """

    def take_out(node: Any) -> Any:
        if not _is_box(node):
            return node
        [value] = jax.tree.leaves(node)
        return value if np.ndim(value) == 0 and _names_axes(node) else node

    return jax.tree.map(take_out, tree, is_leaf=_is_box)


def _unboxed(tree: Any) -> Any:
    return jax.tree.map(
        lambda node: jax.tree.leaves(node)[0] if _is_box(node) else node, tree, is_leaf=_is_box
    )


def _is_box(node: Any) -> bool:
    """Whether a node has one child, the array in its attribute ``value``."""
    children, _ = _one_level(node)
    if len(children) != 1:
        return False
    [(path, child)] = children.items()
    return path != () and without_value(path) == () and jax.tree_util.all_leaves([child])


def _names_axes(box: Any) -> bool:
    """Whether a box names the axes of its array: Linen's boxes do, a variable of NNX may."""
    if not hasattr(box, "get_metadata"):
        return True
    metadata = box.get_metadata()
    return any(metadata.get(name) for name in ("out_sharding", "sharding_names", "sharding"))


def path_name(path: Sequence[Any]) -> str:
    """Write a pytree path the way messages name leaves: ``layers/0/kernel``."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/") or "(root)"


def without_value(path: Sequence[Any]) -> tuple[Any, ...]:
    """Drop the attribute ``value`` in which NNX variables and Linen's boxes keep their array."""
    boxed = bool(path) and getattr(path[-1], "name", None) == "value"
    return tuple(path[:-1] if boxed else path)


def is_kernel(path: tuple[Any, ...], leaf: Any) -> bool:
    """Tell whether a leaf of a parameter tree is a kernel, by its name.

    A kernel is a floating leaf with at least two axes whose last name is one of

    * ``kernel`` (Flax, recurrent cells included), ``weight`` (Equinox, PyTorch), ``w`` (Haiku);
    * ``weight_ih``, ``weight_hh`` (recurrent cells of Equinox and PyTorch), ``weight_hr``
      (PyTorch), also with a layer after the name, as in ``weight_ih_l0_reverse`` (PyTorch);
      ``w_i``, ``w_h`` (Haiku's GRU), ``recurrent_kernel`` (Keras);
    * ``in_proj_weight``, ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight`` (attention of
      PyTorch), ``depthwise_kernel``, ``pointwise_kernel`` (separable convolutions of Keras).

    A ``.`` or ``/`` in a name separates names too, as in the flat ``"rnn.weight_hh_l0"``. The
    ``value`` attribute in which NNX variables and Linen's partitioned boxes keep their array is no
    name. Biases have other names, stacked by a scan over layers or not, and so do the tables of
    Flax's and Haiku's embeddings. Functions that make masks or starts by this rule warn about the
    matrices that stay dense.

    The rule uses only names. Equinox also calls the table of an ``Embedding`` and the scale of
    a norm ``weight``. To leave such a leaf dense, pass another ``where=`` to the function.

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
    return _is_floating(leaf, 2) and is_kernel_name(path)


def is_kernel_name(path: Sequence[Any]) -> bool:
    """Tell whether the last name of a path is that of a kernel, whatever the leaf."""
    name = _LAYER_OF_NAME.sub("", _last_name(path))
    return name in (*KERNEL_NAMES, *_OTHER_KERNEL_NAMES)


def _last_name(path: Sequence[Any]) -> str:
    """Return the last name of a path, empty where the last key is no name."""
    path = without_value(path)
    name = getattr(path[-1], "key", getattr(path[-1], "name", None)) if path else None
    return name.replace(".", "/").rsplit("/", 1)[-1] if isinstance(name, str) else ""


def _is_floating(leaf: Any, min_axes: int) -> bool:
    """Whether a leaf is a real floating array, or the shape of one, of so many axes."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return False
    return len(leaf.shape) >= min_axes and jnp.issubdtype(leaf.dtype, jnp.floating)


def mask_fits(mask: Any, tree: Any, *, name: str = "mask", tree_name: str = "params") -> None:
    """Require a mask that fits ``tree``: booleans of a leaf's own shape, or a scalar ``True``."""
    same_structure(mask, tree, name=name, other_name=tree_name)
    mask_leaves(mask, name=name)

    def check(path: Sequence[Any], leaf_mask: Any, leaf: Any) -> None:
        if np.shape(leaf_mask) not in ((), np.shape(leaf)):
            raise ValueError(
                f"{name}[{path_name(path)}] has shape {np.shape(leaf_mask)}, but must be a scalar "
                f"True or have the shape {np.shape(leaf)} of the leaf of {tree_name}. "
                "Build it with that shape; the scalar keeps the leaf dense."
            )

    jax.tree_util.tree_map_with_path(check, boxed_as(mask, tree), tree)


def mask_leaves(mask: Any, *, name: str = "mask") -> None:
    """Require boolean leaves, and ``True`` of each scalar that is not being traced."""

    def check(path: Sequence[Any], leaf: Any) -> None:
        where = f"{name}[{path_name(path)}]"
        has_values(leaf, where)
        dtype = jnp.result_type(leaf)
        if dtype != jnp.bool_:
            raise ValueError(
                f"{where} has dtype {dtype}, but a mask is boolean. "
                "Convert it with `leaf != 0`; scores become masks through masks.top_k."
            )
        if np.ndim(leaf) == 0 and not checks.is_traced(leaf) and not bool(leaf):
            raise ValueError(
                f"{where}=False is outside {{True}}: a scalar marks a leaf that stays dense. "
                "To mask every entry, give an array of False of the leaf's shape."
            )

    jax.tree_util.tree_map_with_path(check, mask)


def leaf_density(value: Any, shape: Sequence[int], *, name: str) -> Any:
    """Accept a density in [0, 1] for a leaf, or one for each slice of its leading axes."""
    axes = np.ndim(value)
    if axes > 0 and (axes >= len(shape) or np.shape(value) != tuple(shape[:axes])):
        raise ValueError(
            f"{name} has shape {np.shape(value)} for a leaf of shape {tuple(shape)}. "
            "Give one density for the leaf, or one for each slice of its leading axes."
        )
    if checks.is_traced(value):
        return value
    numbers = np.asarray(value, np.float64)
    if not np.all((numbers >= 0.0) & (numbers <= 1.0)):
        raise checks.value_error(
            name,
            numbers.tolist(),
            "is outside [0, 1]",
            "Give the fraction of weights to keep (density = 1 - sparsity).",
        )
    return numbers


def counts_at_most(counts: Any, limits: Any, size: int, *, name: str) -> None:
    """Require that no row of a leaf has more unmasked weights than its limit."""
    counts, limits = (np.ravel(array) for array in np.broadcast_arrays(counts, limits))
    over = np.flatnonzero(counts > limits)
    if over.size:
        row = over[0]
        where = name if counts.size == 1 else f"{name}[{row}]"
        raise ValueError(
            f"{where} has density {counts[row] / size:.6g}: {counts[row]} of {size} weights are "
            f"unmasked, outside [0, {limits[row]}], the count of density "
            f"{limits[row] / size:.6g}. A support cannot be trimmed without losing "
            "orthogonality: raise the density, or build the support at a lower one."
        )


def kernels(params: Params, where: Where, *, name_others: bool = True) -> Any:
    """Return a tree of bools, which leaves ``where`` selects: at least one.

    If ``where`` is the default, a warning names the matrices that it leaves dense, unless
    ``name_others`` is false.
    """
    selected = jax.tree_util.tree_map_with_path(lambda path, leaf: bool(where(path, leaf)), params)
    if not any(jax.tree.leaves(selected)):
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise checks.value_error(
            "params",
            [path_name(path) for path in paths],
            "has no leaf that where= selects; by default that is a floating leaf of 2 or more axes "
            f"named {', '.join(KERNEL_NAMES)}, or as kernels of recurrent layers and attention are",
            "Say which leaves are kernels: where=lambda path, leaf: leaf.ndim >= 2.",
        )
    if name_others and where is is_kernel:
        _warn_of_dense_matrices(params)
    return selected


def _warn_of_dense_matrices(params: Params) -> None:
    """Name the matrices that :func:`is_kernel` leaves dense and whose names do not say why."""
    names = [
        path_name(without_value(path))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if _is_matrix(leaf) and not is_kernel(path, leaf) and not _is_known_dense(_last_name(path))
    ]
    if not names:
        return
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    warnings.warn(
        f"{', '.join(names[:_NAMED])}{more}: floating arrays of 2 or more axes that stay dense, "
        "because their names are not those of kernels. If they are kernels, select them with "
        "where=lambda path, leaf: leaf.ndim >= 2, or by their names; if not, say so with "
        "where=lambda path, leaf: eoi_jax.masks.is_kernel(path, leaf).",
        stacklevel=_levels_to_caller(),
    )


def _is_matrix(leaf: Any) -> bool:
    """Whether a leaf is floating and has two axes longer than 1, which broadcast vectors do not."""
    return _is_floating(leaf, 2) and sum(size > 1 for size in leaf.shape) >= 2


def _is_known_dense(name: str) -> bool:
    """Whether a name is that of a bias, a norm, an average, an embedding or of positions."""
    words = re.findall("[a-z]+", name.lower())
    return words == ["b"] or "emb" in name.lower() or not _DENSE_WORDS.isdisjoint(words)


def _levels_to_caller() -> int:
    """Return the ``stacklevel`` at which a warning names a line outside of this package."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package + os.sep):
        frame, level = frame.f_back, level + 1
    return level


def densities(value: Any, tree: Any, *, name: str, tree_name: str) -> list[Any]:
    """Accept one density for all leaves of a tree, or a tree of densities; return one a leaf."""
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    if jax.tree_util.all_leaves([value]) and np.ndim(value) == 0:
        return [checks.density(value, name=name)] * len(paths_and_leaves)
    same_structure(value, tree, name=name, other_name=tree_name)
    return [
        leaf_density(leaf_value, leaf.shape, name=f"{name}[{path_name(path)}]")
        if np.ndim(leaf) > 0 and leaf.size > 0
        else 1.0
        for (path, leaf), leaf_value in zip(paths_and_leaves, jax.tree.leaves(value), strict=True)
    ]


def scores(value: Any, *, name: str = "scores") -> Any:
    """Accept float arrays without NaN; a leaf without axes marks a dense leaf."""
    value = arrays(value, name=name)
    dtypes = ("float16", "bfloat16", "float32", "float64")

    def check(path: Sequence[Any], leaf: Any) -> None:
        if np.ndim(leaf) == 0:
            return
        where = f"{name}[{path_name(path)}]"
        if leaf.dtype.name not in dtypes:
            raise ValueError(
                f"{where} has dtype {leaf.dtype}, but scores are {', '.join(dtypes)}. "
                "Convert the scores with `leaf.astype(jnp.float32)`."
            )
        if checks.is_traced(leaf):
            return
        with jax.ensure_compile_time_eval():  # a constant is no tracer, but its sum would be
            has_nan = bool(jnp.isnan(leaf).any())
        if has_nan:
            raise ValueError(
                f"{where} has NaN among its scores, outside [-inf, inf]. Find where the loss or "
                "its gradient is not a number, or replace NaN by -inf to drop those weights first."
            )

    jax.tree_util.tree_map_with_path(check, value)
    return value


def layout(value: Any, path: Sequence[Any], leaf: Any) -> Layout:
    """Return the layout that ``value`` gives a leaf, ``Layout()`` if it is None."""
    found = Layout() if value is None else value(tuple(path), leaf)
    where = f"layout({path_name(path)})"
    if not isinstance(found, Layout):
        raise checks.value_error(
            where, found, "is outside the layouts", "Return Layout(batch_axes=..., groups=...)."
        )
    checks.integer(found.groups, low=1, name=f"{where}.groups")
    checks.integer(
        found.batch_axes, low=0, high=max(np.ndim(leaf) - 1, 0), name=f"{where}.batch_axes"
    )
    return found


def view(layout: Layout, path: Sequence[Any], leaf: Any) -> fan_axes.View:
    """Return how the axes of a kernel are read by its layout."""
    name = f"layout({path_name(path)})"
    left = leaf.shape[layout.batch_axes :]
    if len(left) < 2:
        remedy = "Count fewer batch_axes."
        if layout.batch_axes == 0:
            remedy = "Select kernels only, or give the scalar True as the mask of this leaf."
        raise ValueError(
            f"{name} leaves axes {left} to a layer, outside (*taps, inputs, outputs). {remedy}"
        )
    names = (layout.in_axis, layout.out_axis, layout.batch_axis)
    axes = fan_axes.resolve(*names, len(left), name=f"{name}.")
    return fan_axes.View(tuple(leaf.shape), layout.batch_axes, axes)


def some_weights(params: Any, kernels: Any) -> None:
    """Require a weight that is not zero of every kernel whose values can be read."""

    def check(path: Sequence[Any], leaf: Any, kernel: bool) -> None:
        if not kernel or checks.is_traced(leaf):
            return
        where = f"params[{path_name(path)}]"
        if np.size(leaf) and not nonzero(np.asarray(leaf)).any():
            raise ValueError(
                f"{where} is zero everywhere, outside the kernels with a weight that is not. "
                "None of its weights would ever train: leave it dense with "
                "where=lambda path, leaf: ..., or draw it from an initializer."
            )

    jax.tree_util.tree_map_with_path(check, params, kernels)


def arrays(params: Params, *, name: str = "params", shapes_of: Any = None) -> Params:
    """Require values and not only shapes; return them in the byte order that JAX reads.

    Of the leaves of which ``shapes_of``, a tree of bools, is true, a shape suffices.
    """
    suffices = jax.tree.map(lambda _: False, params) if shapes_of is None else shapes_of
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(suffices), strict=True)
    for (path, leaf), is_drawn in pairs:
        if shapes_of is None:
            has_values(leaf, f"{name}[{path_name(path)}]")
        elif not is_drawn and isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{name}[{path_name(path)}] is a shape without values, and no kernel: only kernels "
                "are drawn here, all other leaves are copied. Draw them in the same program, "
                "jax.jit(lambda key: start(key, model.init(key, x)['params'], ...), "
                "out_shardings=...)(key), or give arrays in place of these shapes."
            )
    return jax.tree.map(_empty_or_native, params)


def _empty_or_native(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.size == 0:  # of which nothing is drawn
        return jnp.zeros(leaf.shape, leaf.dtype)
    return native(leaf)


def floating(path: Sequence[Any], leaf: Any, *, remedy: str) -> None:
    """Require a floating leaf: an integer one would lose what it is multiplied by."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise ValueError(
            f"params[{path_name(path)}] has dtype {leaf.dtype}, outside the floating dtypes. "
            f"{remedy}"
        )


def has_values(leaf: Any, name: str) -> None:
    """Require an array, or a number, and not its shape alone."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{name} is a shape without values, but values are needed. Draw the parameters first, "
            "or make zeros: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)."
        )
