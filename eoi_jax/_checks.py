"""Every argument check of the library and its message.

A check returns the value it accepted, in the form that the caller computes with. It raises
``ValueError: name=value is outside <range>. <remedy>`` for a static value; a value that is
being traced cannot be read and is passed on as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax.typing import Layout


def is_traced(value: Any) -> bool:
    """Whether ``value`` is a tracer: a value that only the compiled program will know."""
    return isinstance(value, jax.core.Tracer)


def fail(name: str, value: Any, problem: str, remedy: str) -> ValueError:
    """Build the error; the caller raises it, so the traceback ends at the check that refused."""
    return ValueError(f"{name}={value!r} {problem}. {remedy}")


def density(value: Any, *, minimum: float = 0.0, why: str = "", name: str = "density") -> Any:
    """Accept a scalar fraction of non-zeros in (0, 1] that is at least ``minimum``.

    ``minimum`` is compared with a relative slack of 1e-6, so that ``1 / 3`` rounded to float32
    is still one third.
    """
    if is_traced(value):
        if value.ndim != 0:
            raise fail(name, value, "is not a scalar", "Use jax.vmap over an array of densities.")
        return value
    try:
        if isinstance(value, str):  # float("0.5") would pass
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise fail(
            name, value, "is not a number in (0, 1]", "Give the fraction of non-zeros as a float."
        ) from None
    if not 0.0 < number <= 1.0:
        raise fail(
            name,
            number,
            "is outside (0, 1]",
            "Give the fraction of weights to keep (density = 1 - sparsity).",
        )
    if number < minimum * (1.0 - 1e-6):
        raise fail(name, number, f"is outside [{minimum:.6g}, 1]", why)
    return number


def shape(value: Any, *, min_ndim: int = 2, name: str = "shape") -> tuple[int, ...]:
    """Accept a sequence of at least ``min_ndim`` non-negative ints."""
    try:
        dims = tuple(operator.index(dim) for dim in value)
    except TypeError:
        raise fail(
            name, value, "is not a sequence of ints", "Give a static shape such as (512, 784)."
        ) from None
    if len(dims) < min_ndim:
        raise fail(
            name,
            dims,
            f"has {len(dims)} axes, outside [{min_ndim}, ...)",
            "Orthogonality needs at least two axes: biases and scales take another initializer.",
        )
    if any(dim < 0 for dim in dims):
        raise fail(name, dims, "has an axis outside [0, ...)", "Give non-negative sizes.")
    return dims


def float_dtype(value: Any, name: str = "dtype") -> Any:
    """Accept a real floating dtype, canonicalized (float64 is float32 unless x64 is enabled)."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise fail(name, value, "is no dtype", "Use float32, bfloat16 or float16.") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise fail(
            name,
            dtype.name,
            "is outside the real floating dtypes",
            "Use float32, bfloat16, float16, or float64 with jax_enable_x64.",
        )
    return jax.dtypes.canonicalize_dtype(dtype)


def wide(dtype: Any) -> Any:
    """Name the dtype to compute in: float64 for float64, float32 for all narrower ones."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def integer(value: Any, *, low: int, name: str, high: int | None = None, remedy: str = "") -> int:
    """Accept a Python integer in [low, high]."""
    bounds = f"[{low}, {'...)' if high is None else f'{high}]'}"
    try:
        number = operator.index(value)
    except TypeError:
        problem = f"is not an integer in {bounds}"
        raise fail(name, value, problem, remedy or "Give an int.") from None
    if number < low or (high is not None and number > high):
        raise fail(name, number, f"is outside {bounds}", remedy or f"Give a value in {bounds}.")
    return number


def one_of(value: Any, options: Sequence[str], *, name: str, remedy: str) -> None:
    """Require one of the named options."""
    if value not in options:
        raise fail(name, value, f"is outside {{{', '.join(map(repr, options))}}}", remedy)


def axis(value: Any, ndim: int, name: str = "axis") -> int:
    """Accept an axis of an array of ``ndim`` axes; return it non-negative."""
    return integer(value, low=-ndim, high=ndim - 1, name=name) % ndim


def rotations(value: Any, size: int) -> None:
    """Require sequences of one length and planes of two different coordinates below ``size``."""
    i, j, _ = value
    shapes = tuple(np.shape(leaf) for leaf in value)
    if len(shapes[0]) != 1 or len(set(shapes)) != 1:
        raise ValueError(
            f"rotations has leaves of shapes {shapes}, outside (num_rotations,) for all three. "
            "Use jax.vmap over a batch of sequences."
        )
    if is_traced(i) or is_traced(j):
        return
    i, j = np.asarray(i), np.asarray(j)
    bad = np.flatnonzero((i < 0) | (i >= size) | (j < 0) | (j >= size) | (i == j))
    if bad.size:
        raise ValueError(
            f"rotations[{bad[0]}] has the plane ({i[bad[0]]}, {j[bad[0]]}), outside the pairs of "
            f"different coordinates in [0, {size}). Use as many coordinates as the planes were "
            "drawn over."
        )


def finite_scalar(value: Any, name: str) -> Any:
    """Accept a finite real scalar."""
    if is_traced(value):
        if value.ndim != 0:
            raise fail(name, value, "is not a scalar", "Use jax.vmap over an array of them.")
        return value
    try:
        if isinstance(value, str):  # float("0.5") would pass
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise fail(name, value, "is not a real number", "Give a finite float.") from None
    if not math.isfinite(number):
        raise fail(name, number, "is outside the finite numbers", "Give a finite float.")
    return number


def same_structure(tree: Any, other: Any, *, name: str, other_name: str) -> None:
    """Require two pytrees of one structure."""
    left: Any = jax.tree.structure(tree)
    right: Any = jax.tree.structure(other)
    if left != right:
        raise ValueError(
            f"{name} has the structure {left}, but {other_name} has {right}. "
            f"Build {name} from the same tree that you pass as {other_name}."
        )


def path_name(path: Sequence[Any]) -> str:
    """Write a pytree path the way messages name leaves: ``layers/0/kernel``."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/") or "(root)"


def mask_fits(mask: Any, tree: Any, *, name: str = "mask", tree_name: str = "params") -> None:
    """Require a mask tree that fits ``tree``: booleans, scalar or of the leaf's own shape."""
    same_structure(mask, tree, name=name, other_name=tree_name)

    def check(path: Sequence[Any], leaf_mask: Any, leaf: Any) -> None:
        mask_dtype, mask_shape = jnp.result_type(leaf_mask), np.shape(leaf_mask)
        where = f"{name}[{path_name(path)}]"
        if mask_dtype != jnp.bool_:
            raise ValueError(
                f"{where} has dtype {mask_dtype}, outside {{bool}}. "
                "Convert it with `leaf != 0`; scores become masks through masks.top_k."
            )
        if mask_shape not in ((), np.shape(leaf)):
            raise ValueError(
                f"{where} has shape {mask_shape}, outside {{(), {np.shape(leaf)}}}. "
                f"Use the shape of {tree_name}'s leaf, or a scalar True for a dense leaf."
            )

    jax.tree_util.tree_map_with_path(check, mask, tree)


def mask_leaves(mask: Any, *, name: str = "mask") -> None:
    """Require boolean leaves, and ``True`` of each scalar that is not being traced."""

    def check(path: Sequence[Any], leaf: Any) -> None:
        where = f"{name}[{path_name(path)}]"
        dtype = jnp.result_type(leaf)
        if dtype != jnp.bool_:
            raise ValueError(
                f"{where} has dtype {dtype}, outside {{bool}}. "
                "Convert it with `leaf != 0`; scores become masks through masks.top_k."
            )
        if np.ndim(leaf) == 0 and not is_traced(leaf) and not bool(leaf):
            raise ValueError(
                f"{where}=False is outside {{True}}: a scalar marks a leaf that stays dense. "
                "To mask every entry, give an array of False of the leaf's shape."
            )

    jax.tree_util.tree_map_with_path(check, mask)


def leaf_density(value: Any, shape: Sequence[int], *, name: str) -> Any:
    """Accept a density in [0, 1] for a leaf, or one for each slice of its first axis or axes."""
    axes = np.ndim(value)
    if axes > 0 and (axes >= len(shape) or np.shape(value) != tuple(shape[:axes])):
        raise ValueError(
            f"{name} has shape {np.shape(value)}, outside {{(), ({shape[0]},)}}. "
            "Give one density for the leaf, or one for each slice of its first axis."
        )
    if is_traced(value):
        return value
    numbers = np.asarray(value, np.float64)
    if not np.all((numbers >= 0.0) & (numbers <= 1.0)):
        raise fail(
            name,
            numbers.tolist(),
            "is outside [0, 1]",
            "Give the fraction of weights to keep (density = 1 - sparsity).",
        )
    return numbers


def budget_holds(counts: Any, budget: Any, size: int, *, name: str) -> None:
    """Require that no row of a leaf has more unmasked weights than its budget allows."""
    counts, budget = np.broadcast_arrays(counts, budget)
    over = np.flatnonzero(counts > budget)
    if over.size:
        row = over[0]
        where = name if counts.size == 1 else f"{name}[{row}]"
        raise ValueError(
            f"{where} has density {counts[row] / size:.6g}: {counts[row]} of {size} weights are "
            f"unmasked, outside [0, {budget[row]}], the budget of density "
            f"{budget[row] / size:.6g}. A support cannot be trimmed without losing "
            "orthogonality: raise the density, or build the support at a lower one."
        )


def kernels(params: Any, where: Any, *, required: bool) -> Any:
    """Return a tree of bools, which leaves ``where`` selects: at least one if it is required."""
    selected = jax.tree_util.tree_map_with_path(lambda path, leaf: bool(where(path, leaf)), params)
    if required and not any(jax.tree.leaves(selected)):
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise fail(
            "params",
            [path_name(path) for path in paths],
            "has no floating leaf of 2 or more axes named kernel, weight, w",
            "Say which leaves are kernels: where=lambda path, leaf: leaf.ndim >= 2.",
        )
    return selected


def densities(value: Any, tree: Any, *, name: str, tree_name: str) -> list[Any]:
    """Accept one density for all leaves of a tree, or a tree of densities; return one a leaf."""
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    if jax.tree_util.all_leaves([value]) and np.ndim(value) == 0:
        return [density(value, name=name)] * len(paths_and_leaves)
    same_structure(value, tree, name=name, other_name=tree_name)
    return [
        leaf_density(leaf_value, leaf.shape, name=f"{name}[{path_name(path)}]")
        if np.ndim(leaf) > 0 and leaf.size > 0
        else 1.0
        for (path, leaf), leaf_value in zip(paths_and_leaves, jax.tree.leaves(value), strict=True)
    ]


def scores(value: Any, *, name: str = "scores") -> None:
    """Require float arrays without NaN; a leaf without axes marks a dense leaf."""
    dtypes = ("float16", "bfloat16", "float32", "float64")

    def check(path: Sequence[Any], leaf: Any) -> None:
        if np.ndim(leaf) == 0:
            return
        where = f"{name}[{path_name(path)}]"
        if leaf.dtype.name not in dtypes:
            raise ValueError(
                f"{where} has dtype {leaf.dtype}, outside {{{', '.join(dtypes)}}}. "
                "Convert the scores with `leaf.astype(jnp.float32)`."
            )
        if is_traced(leaf):
            return
        with jax.ensure_compile_time_eval():  # a constant is no tracer, but its sum would be
            has_nan = bool(jnp.isnan(leaf).any())
        if has_nan:
            raise ValueError(
                f"{where} has NaN among its scores, outside [-inf, inf]. Find where the loss or "
                "its gradient is not a number, or replace NaN by -inf to drop those weights first."
            )

    jax.tree_util.tree_map_with_path(check, value)


def layout(value: Any, path: Sequence[Any], leaf: Any) -> Any:
    """Return the layout that ``value`` gives a leaf, ``Layout()`` if it is None."""
    found = Layout() if value is None else value(tuple(path), leaf)
    where = f"layout({path_name(path)})"
    integer(found.groups, low=1, name=f"{where}.groups")
    integer(found.batch_axes, low=0, high=max(len(leaf.shape) - 1, 0), name=f"{where}.batch_axes")
    return found


def micro_batch_size(value: Any, batch: Any) -> int:
    """Accept a divisor of the number of examples, which all arrays of a batch have in front."""
    size = integer(value, low=1, name="micro_batch_size")
    leading = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(leading) != 1 or leading == {()}:
        raise ValueError(
            f"batch has arrays of the leading axes {sorted(leading)}, outside one number of "
            "examples for all. Bind what is no batch to the loss, or leave micro_batch_size=None."
        )
    [(examples,)] = leading
    if examples == 0 or examples % size:
        raise fail(
            "micro_batch_size",
            size,
            f"is outside the divisors of {examples} examples",
            "Give a divisor, or drop examples.",
        )
    return size


def drop_fraction(value: Any) -> Any:
    """Accept a scalar fraction in [0, 1)."""
    if is_traced(value):
        if value.ndim != 0:
            raise fail("drop_fraction", value, "is not a scalar", "Use jax.vmap over an array.")
        return value
    remedy = "Give the fraction of a kernel's unmasked weights that one mask update exchanges."
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise fail("drop_fraction", value, "is not a number in [0, 1)", remedy) from None
    if not 0.0 <= number < 1.0:
        raise fail("drop_fraction", number, "is outside [0, 1)", remedy)
    return number


def single_key(value: Any, *, name: str = "key") -> tuple[Any, Any]:
    """Accept one random key, new style or old; return its integers and its implementation."""
    remedy = "Give one key: jax.random.key(0). Use jax.vmap over an array of keys."
    try:
        data, impl = jax.random.key_data(value), jax.random.key_impl(value)
        # A key of the implementation is one row of integers, however many keys there are.
        shape = jax.random.wrap_key_data(data, impl=impl).shape
    except TypeError:
        raise fail(name, value, "is outside the random keys", remedy) from None
    if shape != ():
        raise ValueError(f"{name} has shape {shape}, outside {{()}}. {remedy}")
    return data, impl


def some_weights(params: Any, kernels: Any) -> None:
    """Require a weight that is not zero of every kernel whose values can be read."""

    def check(path: Sequence[Any], leaf: Any, kernel: bool) -> None:
        if not kernel or is_traced(leaf):
            return
        where = f"params[{path_name(path)}]"
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{where} is a shape without values, outside the arrays. "
                "Draw the parameters first; masks.random takes shapes."
            )
        if np.size(leaf) and not np.any(np.asarray(leaf)):
            raise ValueError(
                f"{where} is zero everywhere, outside the kernels with a weight that is not. "
                "None of its weights would ever train: leave it dense with "
                "where=lambda path, leaf: ..., or draw it from an initializer."
            )

    jax.tree_util.tree_map_with_path(check, params, kernels)
