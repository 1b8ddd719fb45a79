"""Every argument check of the library and its message.

A check returns the value it accepted, in the form that the caller computes with. It raises
``ValueError: name=value is outside <range>. <remedy>`` for a static value; a value that is
being traced cannot be read and is passed on as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal.arrays import native


def is_traced(value: Any) -> bool:
    """Whether ``value`` is a tracer: a value that only the compiled program will know."""
    return isinstance(value, jax.core.Tracer)


def value_error(name: str, value: Any, problem: str, remedy: str) -> ValueError:
    """Build the error; the caller raises it, so the traceback ends at the check that refused."""
    return ValueError(f"{name}={value!r} {problem}. {remedy}")


def printable(text: Any, limit: int = 200) -> str:
    """Return text for a message: cut, and with escapes for all characters that a terminal obeys."""
    text = str(text)
    shown = text[:limit] + (f"... ({len(text)} characters)" if len(text) > limit else "")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )


def number(
    value: Any, name: str, *, interval: str = "(-inf, inf)", remedy: str = "Give a finite float."
) -> Any:
    """Accept a real scalar in an interval, which is written as in mathematics: ``"[0, 1)"``."""
    if is_traced(value):
        if value.ndim != 0:
            raise value_error(name, value, "is not a scalar", "Use jax.vmap over an array of them.")
        return value
    try:
        if isinstance(value, str):  # float("0.5") would pass
            raise TypeError
        real = float(value)
    except (TypeError, ValueError, OverflowError):
        raise value_error(name, value, f"is not a number in {interval}", remedy) from None
    low, high = map(float, interval[1:-1].split(", "))
    is_above = real >= low if interval[0] == "[" else real > low
    is_below = real <= high if interval[-1] == "]" else real < high
    if not (is_above and is_below):  # of NaN neither is true
        raise value_error(name, real, f"is outside {interval}", remedy)
    return real


def scale(value: Any, *dtypes: Any, interval: str = "(-inf, inf)", name: str = "scale") -> Any:
    """Accept a factor that the dtypes can hold: neither infinite in them nor rounded to 0."""
    factor = number(value, name, interval=interval)
    for dtype in {} if is_traced(factor) else map(jax.dtypes.canonicalize_dtype, dtypes):
        low, high = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).max)
        if factor != 0 and not low <= abs(factor) <= high:
            problem = f"is outside the range of {dtype.name}, [{low:.3g}, {high:.3g}] but for sign"
            raise value_error(name, factor, problem, "Give another scale, or a wider dtype.")
    return factor


def density(value: Any, *, minimum: float = 0.0, why: str = "", name: str = "density") -> Any:
    """Accept a scalar fraction of non-zeros in (0, 1] that is at least ``minimum``.

    ``minimum`` is compared with a relative slack of 1e-6, so that ``1 / 3`` rounded to float32
    is still one third.
    """
    remedy = "Give the fraction of weights to keep (density = 1 - sparsity)."
    fraction = number(value, name, interval="(0, 1]", remedy=remedy)
    if not is_traced(fraction) and fraction < minimum * (1.0 - 1e-6):
        raise value_error(name, fraction, f"is outside [{minimum:.6g}, 1]", why)
    return fraction


def reachable(fraction: Any, most: int, shape: tuple[int, int], name: str = "density") -> None:
    """Require a density of at most ``most`` non-zeros in a matrix, with the same slack."""
    rows, columns = shape
    highest = most / (rows * columns)
    if not is_traced(fraction) and fraction > highest * (1.0 + 1e-6):
        problem = f"is outside [{1 / max(shape):.6g}, {highest:.6g}]"
        remedy = (
            f"The planes connect coordinates for at most {most} non-zeros of a {rows} x {columns} "
            "matrix: lower the density, or let the pattern connect more."
        )
        raise value_error(name, fraction, problem, remedy)


def shape(value: Any, *, min_ndim: int = 2, name: str = "shape") -> tuple[int, ...]:
    """Accept a sequence of at least ``min_ndim`` non-negative ints."""
    try:
        dims = tuple(operator.index(dim) for dim in value)
    except TypeError:
        raise value_error(
            name, value, "is not a sequence of ints", "Give a static shape such as (512, 784)."
        ) from None
    if len(dims) < min_ndim:
        raise value_error(
            name,
            dims,
            f"has {len(dims)} axes, outside [{min_ndim}, ...)",
            "Biases and scales take another initializer."
            if min_ndim < 3
            else "Kernels of linear layers take eoi.dense or another initializer of matrices.",
        )
    if any(dim < 0 for dim in dims):
        raise value_error(name, dims, "has an axis outside [0, ...)", "Give non-negative sizes.")
    return dims


def float_dtype(value: Any, name: str = "dtype") -> Any:
    """Accept a real floating dtype, canonicalized (float64 is float32 unless x64 is enabled)."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise value_error(name, value, "is no dtype", "Use float32, bfloat16 or float16.") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise value_error(
            name,
            dtype.name,
            "is outside the real floating dtypes",
            "Use float32, bfloat16, float16, or float64 with jax_enable_x64.",
        )
    if float(jnp.finfo(dtype).min) >= 0:
        problem = "has no negative numbers, outside the real floating dtypes"
        raise value_error(name, dtype.name, problem, "Use float32, bfloat16 or float16.")
    return jax.dtypes.canonicalize_dtype(dtype)


def compute_dtype(dtype: Any) -> Any:
    """Name the dtype to compute in: float64 for float64, float32 for all narrower ones."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def factors(x: Any, w: Any) -> tuple[int, int]:
    """Check the factors of ``x @ w``, an array and a sparse matrix; return the shape of ``w``."""
    float_dtype(x.dtype, "x.dtype")
    float_dtype(w.dtype, "w.dtype")
    if len(w.shape) != 2:
        raise value_error("w", w.shape, "is a stack of matrices", "Use jax.vmap.")
    inputs, outputs = w.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        problem = f"does not end in {inputs}, the inputs of w"
        raise value_error("x.shape", x.shape, problem, "Give such an array.")
    return inputs, outputs


def array(value: Any, name: str) -> jax.Array:
    """Accept what is an array or makes one; a shape without values does not."""
    try:
        if isinstance(value, jax.ShapeDtypeStruct):
            raise TypeError
        return jnp.asarray(native(value))
    except (TypeError, ValueError):
        found = type(value).__name__
        problem = "is outside the arrays of numbers. Give an array with values."
        raise ValueError(f"{name}={found} {problem}") from None


def widened(value: Any) -> jax.Array:
    """Convert a real array to the dtype to compute in."""
    array = jnp.asarray(native(value))
    return array.astype(compute_dtype(array.dtype))


def real_array(value: Any, name: str) -> jax.Array:
    """Accept a real array, converted to the dtype to compute in."""
    real = array(value, name)
    if jnp.issubdtype(real.dtype, jnp.complexfloating):
        raise ValueError(
            f"{name}.dtype={real.dtype.name} is outside the real dtypes. Use real arrays."
        )
    return widened(real)


def integer(value: Any, *, low: int, name: str, high: int | None = None, remedy: str = "") -> int:
    """Accept a Python integer in [low, high]."""
    bounds = f"[{low}, {'...)' if high is None else f'{high}]'}"
    try:
        number = operator.index(value)
    except TypeError:
        problem = f"is not an integer in {bounds}"
        raise value_error(name, value, problem, remedy or "Give an int.") from None
    if number < low or (high is not None and number > high):
        raise value_error(
            name, number, f"is outside {bounds}", remedy or f"Give a value in {bounds}."
        )
    return number


def balance(value: Any, planes: Any, *, optional: bool = False) -> Any:
    """Accept whether outputs are balanced, which planes inside a pattern cannot do.

    Where it is ``optional``, None leaves it to the caller, but for a pattern.
    """
    name, remedy = "balance_outputs", "Give True or False."
    if value is None and optional:
        return False if planes.is_pattern else None
    if is_traced(value):
        if value.ndim != 0 or value.dtype != jnp.bool_:
            raise value_error(name, value, "is not a scalar truth value", remedy)
    elif not isinstance(value, bool | np.bool_):
        raise value_error(name, value, "is not a truth value", remedy)
    else:
        value = bool(value)
    if value is not False and planes.is_pattern:
        remedy = "The start has non-zeros outside of a pattern: use other planes, or give False."
        raise value_error(name, value, f"does not go with planes={planes!r}", remedy)
    return value


def one_of(value: Any, options: Sequence[str], *, name: str, remedy: str) -> None:
    """Require one of the named options."""
    if not isinstance(value, str) or value not in options:
        raise value_error(name, value, f"is outside {{{', '.join(map(repr, options))}}}", remedy)


def axis(value: Any, ndim: int, name: str = "axis") -> int:
    """Accept an axis of an array of ``ndim`` axes; return it non-negative."""
    return integer(value, low=-ndim, high=ndim - 1, name=name) % ndim


def rotations(value: Any, size: int) -> tuple[Any, Any, Any]:
    """Accept planes of two different coordinates below ``size``, and an angle for each.

    They may come as any three arrays; planes are returned in int32.
    """
    remedy = "Give givens.Rotations(i, j, theta), or these three arrays."
    try:
        i, j, theta = value
    except (TypeError, ValueError):
        found = type(value).__name__
        raise ValueError(f"rotations={found} is outside (i, j, theta). {remedy}") from None
    i, j = array(i, "rotations.i"), array(j, "rotations.j")
    theta = array(theta, "rotations.theta")
    shapes = (i.shape, j.shape, theta.shape)
    if len(shapes[0]) != 1 or len(set(shapes)) != 1:
        raise ValueError(
            f"rotations has leaves of shapes {shapes}, outside (num_rotations,) for all three. "
            "Use jax.vmap over a batch of sequences."
        )
    for name, leaf in (("i", i), ("j", j)):
        if not jnp.issubdtype(leaf.dtype, jnp.integer):
            problem = "is outside the integer dtypes"
            raise value_error(f"rotations.{name}.dtype", leaf.dtype.name, problem, remedy)
    theta = theta.astype(jnp.float32) if jnp.issubdtype(theta.dtype, jnp.integer) else theta
    float_dtype(theta.dtype, "rotations.theta.dtype")
    if not (is_traced(i) or is_traced(j)):
        planes = np.stack([np.asarray(i), np.asarray(j)])
        outside = ((planes < 0) | (planes >= size)).any(0)
        bad = np.flatnonzero(outside | (planes[0] == planes[1]))
        if bad.size:
            raise ValueError(
                f"rotations[{bad[0]}] has the plane ({planes[0, bad[0]]}, {planes[1, bad[0]]}), "
                f"outside the pairs of different coordinates in [0, {size}). Use as many "
                "coordinates as the planes were drawn over."
            )
    return i.astype(jnp.int32), j.astype(jnp.int32), theta


def feature_groups(
    groups: int, outputs: int, *, name: str = "feature_group_count", outputs_name: str = "shape[-1]"
) -> None:
    """Require a number of groups that divides the output channels."""
    if outputs % groups:
        raise value_error(
            name,
            groups,
            f"is outside the divisors of {outputs_name}={outputs}",
            "Every group has the same number of outputs.",
        )
