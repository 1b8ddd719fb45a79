"""Block-diagonal orthogonal matrices in random order, for ``sao`` and the SAO initializers.

A degree is feasible if it divides the size, and for ReLU if it is also even: see
:func:`eoi_jax.sao.orthogonal`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks
from eoi_jax._internal.haar import haar
from eoi_jax.typing import Array

Activation: TypeAlias = Literal["tanh", "relu"]
_MIN_DEGREE = {"tanh": 2, "relu": 4}
_STEP = {"tanh": 1, "relu": 2}


def check_density(density: Any) -> float:
    """Accept a static fraction of non-zeros in (0, 1]."""
    if checks.is_traced(density):
        raise checks.value_error(
            "density",
            density,
            "is traced, outside the static numbers in (0, 1]",
            "The number of non-zeros in a row is a shape: make density a static argument.",
        )
    return float(checks.density(density))


def check_activation(activation: Any) -> Activation:
    """Accept the name of an activation."""
    remedy = "'relu' pairs signals with their negatives; 'tanh' is for all other activations."
    checks.one_of(activation, tuple(_MIN_DEGREE), name="activation", remedy=remedy)
    return activation


def feasible_degree(
    value: float, size: int, activation: Activation, *, density: float | None = None
) -> int:
    """Accept a degree; one that was computed from a density may be off by rounding."""
    minimum, step = _MIN_DEGREE[activation], _STEP[activation]
    nearest = round(value)
    divides = nearest >= minimum and nearest % step == 0 and size % nearest == 0
    if divides and abs(value - nearest) <= 1e-6 * nearest:
        return nearest

    kind = f"its {'' if step == 1 else 'even '}divisors from {minimum} on"
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    divisors = sorted({*small, *(size // d for d in small)})
    degrees = [d for d in divisors if d >= minimum and d % step == 0]
    if not degrees:
        problem = f"is outside the sizes that have degrees, {kind}"
        raise checks.value_error(
            "size", size, problem, "Change the width, or keep the layer dense."
        )
    around = [d for d in degrees if d < value][-1:] + [d for d in degrees if d > value][:1]
    nearby = "The nearest is" if len(around) == 1 else "The nearest are"
    problem = f"is outside the degrees of size {size}, {kind}"
    if density is None:
        options = " and ".join(str(d) for d in around)
        raise checks.value_error("degree", nearest, problem, f"{nearby} {options}.")
    options = " and ".join(f"{d}/{size} = {d / size:.6g}" for d in around)
    raise checks.value_error(
        "density", density, f"{problem}, divided by {size}", f"{nearby} {options}."
    )


def draw(
    key: Array, size: int, degree: int, *, activation: Activation, scale: Any, dtype: Any
) -> Array:
    """Draw a matrix of a feasible degree, as :func:`eoi_jax.sao.orthogonal` describes it."""
    scale = jnp.asarray(scale, checks.compute_dtype(dtype))
    if activation == "tanh":
        return _permuted_blocks(key, scale, size=size, degree=degree).astype(dtype)
    block = _permuted_blocks(key, scale, size=size // 2, degree=degree // 2)
    return jnp.block([[block, -block], [-block, block]]).astype(dtype)


def kernel_matrix(
    key: Array,
    inputs: int,
    outputs: int,
    density: float,
    activation: Activation,
    scale: Any,
    dtype: Any,
) -> Array:
    """Draw the matrix of a layer, empty for one without channels; refuse other than square."""
    if inputs != outputs:
        raise checks.value_error(
            "shape",
            (inputs, outputs),
            "is outside the square matrices of inputs by outputs",
            "SAO leaves other layers dense: use jax.nn.initializers.orthogonal() for this one, or "
            "initializers.delta_orthogonal() if it is a convolution.",
        )
    dtype = checks.float_dtype(dtype)
    scale = checks.scale(scale, dtype)
    if inputs == 0:
        return jnp.zeros((0, 0), dtype)
    degree = feasible_degree(density * inputs, inputs, activation, density=density)
    return draw(key, inputs, degree, activation=activation, scale=scale, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("size", "degree"))
def _permuted_blocks(key: Array, scale: Array, *, size: int, degree: int) -> Array:
    """Draw Haar blocks on the diagonal, and permute rows and columns."""
    for_blocks, for_rows, for_columns = jax.random.split(key, 3)
    dtype = scale.dtype
    num_blocks = size // degree
    blocks = haar(for_blocks, (num_blocks, degree, degree), dtype)
    # Rounding may make an entry zero, and the support is the mask: a connection would be lost.
    least = jnp.finfo(dtype).eps
    blocks = jnp.where(jnp.abs(blocks) < least, jnp.copysign(least, blocks), blocks)
    rows = jax.random.permutation(for_rows, size).reshape(num_blocks, degree, 1)
    columns = jax.random.permutation(for_columns, size).reshape(num_blocks, 1, degree)
    return jnp.zeros((size, size), dtype).at[rows, columns].set(blocks * scale, unique_indices=True)
