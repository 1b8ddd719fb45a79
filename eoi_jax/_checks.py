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
    dtype = jnp.dtype(value)
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


def axis(value: Any, ndim: int, name: str = "axis") -> int:
    """Accept an axis of an array of ``ndim`` axes; return it non-negative."""
    return integer(value, low=-ndim, high=ndim - 1, name=name) % ndim


def finite_scalar(value: Any, name: str) -> Any:
    """Accept a finite real scalar."""
    if is_traced(value):
        return value
    try:
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
    """Accept a density in [0, 1] for a leaf, or one for each slice of its first axis."""
    if np.ndim(value) != 0 and (len(shape) < 2 or np.shape(value) != (shape[0],)):
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
