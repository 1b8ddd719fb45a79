"""A convolution whose gradient is also fast on CPUs, for networks of a thousand convolutions.

In a loop, as over the layers of a scanned network, XLA for CPUs takes about twenty times as long
for the gradient of a convolution as for the convolution itself. Here both gradients are written as
convolutions and matrix products, which are fast in a loop.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eoi_jax.typing import Array

__all__ = ["valid_convolution"]

_AXES = ("NHWC", "HWIO", "NHWC")


def valid_convolution(
    lhs: Array, rhs: Array, window_strides: tuple[int, ...], padding: Any, **options: Any
) -> Array:
    """Convolve as :func:`jax.lax.conv_general_dilated`, with other gradients at stride 1.

    With ``y[p] = Σ_t x[p + t] w[t]`` over the taps ``t`` of the window, the gradients are
    ``dx = pad(dy) * flip(w)ᵀ``, a convolution, and ``dw[t] = Σ_p x[p + t]ᵀ dy[p]``, one matrix
    product a tap. Reverse mode and what differentiates it work, forward mode alone does not: for
    Jacobians leave the default of the layer.

    Args:
        lhs: Images ``(batch, height, width, inputs)``.
        rhs: Kernel ``(height, width, inputs, outputs)``.
        window_strides: Steps in both directions.
        padding: As that of JAX; those gradients need "VALID", or none, as after circular padding.
        **options: As those of JAX.

    Returns:
        The images convolved. Where strides, padding, dilation or groups are not 1 or none, what JAX
        returns, with the gradients of JAX.

    Example:
        >>> import flax.linen as nn
        >>> from experiments.models.convolve import valid_convolution
        >>> layer = nn.Conv(8, (3, 3), padding="CIRCULAR", conv_general_dilated=valid_convolution)
    """
    whole = padding == "VALID" or all(tuple(pair) == (0, 0) for pair in padding)
    if lhs.ndim == 4 and whole and set(window_strides) == {1} and _is_plain(lhs, rhs, **options):
        return _convolve(lhs, rhs)
    return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)


def _is_plain(
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any = None,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> bool:
    """Tell whether axes are in the usual order, and nothing is dilated, grouped or asked for."""
    numbers = [
        jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, order)
        for order in (dimension_numbers, _AXES)
    ]
    dilated = {*(lhs_dilation or ()), *(rhs_dilation or ())} - {1}
    asked = [value for value in options.values() if value is not None]
    return numbers[0] == numbers[1] and not dilated and feature_group_count == 1 and not asked


def _plain(x: Array, w: Array) -> Array:
    return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=_AXES)


@jax.custom_vjp
def _convolve(x: Array, w: Array) -> Array:
    return _plain(x, w)


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _plain(x, w), (x, w)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    (rows, columns), (height, width) = w.shape[:2], dy.shape[1:3]
    border = ((0, 0), (rows - 1, rows - 1), (columns - 1, columns - 1), (0, 0))
    dx = _plain(jnp.pad(dy, border), w[::-1, ::-1].swapaxes(2, 3))
    taps = [
        jnp.einsum("nhwi,nhwo->io", x[:, i : i + height, j : j + width], dy)
        for i in range(rows)
        for j in range(columns)
    ]
    return dx, jnp.stack(taps).reshape(w.shape)


_convolve.defvjp(_forward, _backward)
