"""Shared by all spectra: batches of examples, functions of one example, factorizations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks
from eoi_jax.typing import Array


def batch_of(x: Any) -> Array:
    """Accept a batch of examples at which a function can be differentiated."""
    x = checks.array(x, "x")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x.dtype={x.dtype.name} is outside the real floating dtypes. "
            "Convert with x.astype(jnp.float32): there is no derivative along integers."
        )
    if x.ndim == 0:
        raise ValueError(
            "x.ndim=0 is outside [1, ...). Add the batch axis: x[None] is a batch of one example."
        )
    if x.size == 0:
        raise ValueError(
            f"x.shape={x.shape} is outside the non-empty shapes. "
            "Pass at least one example with at least one entry."
        )
    return x


def batch_size(value: int | None, x: Array) -> int:
    """Accept how many examples are processed at a time, all of them by default."""
    if value is None:
        return len(x)
    return checks.integer(value, low=1, name="batch_size", remedy="Leave it out for one batch.")


def output_at(fn: Callable[[Array], Any], x: Array) -> Any:
    """Return the shapes and dtypes of what ``fn`` returns for one example of a batch.

    Where ``fn`` fails at ``x[0]`` but takes ``x`` itself, ``x`` is an example and not a batch.
    """
    try:
        return jax.eval_shape(fn, x[0])
    except Exception as error:
        try:
            jax.eval_shape(fn, x)
        except Exception:
            raise error from None  # it is not the batch axis that is wrong
        raise ValueError(
            f"x.shape={x.shape} has no leading batch axis: fn takes x, but fails at x[0], of shape "
            f"{x.shape[1:]}. Add the axis: x[None] is a batch of one example."
        ) from error


def one_output(fn: Callable[[Array], Any], x: Array) -> Any:
    """Require that ``fn`` returns one floating array for an example; return its shape and dtype."""
    output = output_at(fn, x)
    if not isinstance(output, jax.ShapeDtypeStruct):
        raise ValueError(
            f"fn returns {jax.tree.structure(output)}, outside the single arrays. "
            "Pick one array of it, as in lambda x: fn(x)['logits']."
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise ValueError(
            f"fn returns dtype {output.dtype.name}, outside the real floating dtypes. "
            "Differentiate the logits rather than a class or a mask."
        )
    if math.prod(output.shape) == 0:
        raise ValueError(
            f"fn returns shape {output.shape}, outside the non-empty shapes. "
            "Let it return at least one number."
        )
    return output


def where_finite(function: Callable[[Array], Any], matrix: Array) -> Array:
    """Return ``function(matrix)``, or NaN for all of it if the matrix is not finite.

    No factorization ever sees inf or NaN: what it would do with them differs by platform.
    """
    is_finite = jnp.isfinite(matrix).all()
    return jnp.where(is_finite, function(jnp.where(is_finite, matrix, 0)), jnp.nan)
