"""Shared by several networks: convolutions with norms, the last layer, checks of sizes."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax

from eoi_jax.typing import Array, Initializer

__all__ = ["NORM", "at_least", "conv_norm", "in_memory", "logits", "one_of"]

# PyTorch's momentum of 0.1 is Flax's of 0.9.
NORM = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


def conv_norm(
    x: Array,
    features: int,
    size: int,
    name: str,
    *,
    train: bool,
    conv_init: Initializer,
    stride: int = 1,
    groups: int = 1,
) -> Array:
    """Convolve and normalize the batch: the layers ``name`` and ``name_norm`` of the caller.

    Args:
        x: ``(..., height, width, channels)``.
        features: Channels of the output.
        size: Height and width of the window, odd.
        name: Name of the convolution in the module whose compact method calls.
        train: Whether the batch is normalized by its statistics.
        conv_init: Initializer of the kernel; there is no bias.
        stride: Step in both directions.
        groups: Groups of channels.

    Returns:
        The normalized output.
    """
    # Explicit, since "SAME" at stride 2 pads an even image at one side only.
    border = (size // 2, size // 2)
    conv = nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=(border, border),
        feature_group_count=groups,
        use_bias=False,
        kernel_init=conv_init,
        name=name,
    )
    return NORM(use_running_average=not train, name=f"{name}_norm")(conv(in_memory(x)))


def in_memory(x: Array) -> Array:
    """Have an array, and its gradient, computed once and kept, in programs for CPUs.

    XLA for CPUs computes sums, normalizations and activations anew for whatever uses them; in a
    residual network, whose sums go back to the first layer, that takes a quarter of a training
    step. The program has to be compiled with :data:`experiments.training.loops.CPU_OPTIONS`:
    otherwise XLA removes the marks first, and the program is as if they were not there.

    Args:
        x: Any array, such as the input of a convolution.

    Returns:
        ``x``.
    """
    # XLA for other devices heeds the mark without options, and would fuse less.
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


def logits(network: Any, x: Array) -> Array:
    """Apply the linear layer ``last`` that every network ends in.

    Args:
        network: The module whose compact method calls, with fields ``num_classes``,
            ``kernel_init`` and ``bias_init``.
        x: ``(..., features)``.

    Returns:
        ``(..., num_classes)``.
    """
    inits = {"kernel_init": network.kernel_init, "bias_init": network.bias_init}
    last: Array = nn.Dense(network.num_classes, **inits, name="last")(x)
    return last


def at_least(low: int, **sizes: int) -> None:
    """Require integers of at least ``low``, named as the arguments that the user gave."""
    for name, value in sizes.items():
        if value < low:
            raise ValueError(f"{name}={value} is outside [{low}, ...). Give a larger number.")


def one_of(allowed: tuple[int, ...], **sizes: int) -> None:
    """Require one of a few integers, named as the argument that the user gave."""
    for name, value in sizes.items():
        if value not in allowed:
            listed = ", ".join(map(str, allowed))
            raise ValueError(f"{name}={value} is outside {{{listed}}}. Choose one of them.")
