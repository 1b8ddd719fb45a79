"""The record of a network's properties, so that adding a network takes its file and one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from eoi_jax.typing import Initializer

__all__ = ["CIFAR", "IMAGENET", "MNIST", "TEXT", "TINY_IMAGENET", "Spec"]

MNIST, CIFAR, TINY_IMAGENET, IMAGENET = (28, 28, 1), (32, 32, 3), (64, 64, 3), (224, 224, 3)
TEXT = (64, 96)  # characters of an example, and how many there are to choose from


class Spec(NamedTuple):
    """One network of the list, as its file states it.

    Submodules are named as in ``params``. Names in ``stacked`` and ``depthwise`` count for all
    networks, since one function reads the kernels of a tree whose network it does not know: a name
    must not stand for something else in another network.

    Attributes:
        module: Its class, a Linen module with fields ``num_classes``, ``activation``,
            ``kernel_init``, ``bias_init`` and, if it has convolutions, ``conv_init``.
        sizes: Those of the fields ``depth`` and ``width`` that it has, with their values.
        input_shape: ``(height, width, channels)`` of one image, or ``(length, characters)`` of one
            text.
        num_classes: Number of logits.
        activation: Name of the default activation.
        stacked: Submodules whose kernels are stacked along one more leading axis, such as scanned
            layers or heads of attention.
        depthwise: Submodules that convolve each channel by itself.
        pruned: Submodules within which kernels are pruned; None for all kernels.
        attention: Further ones that are pruned on demand; empty for a network without attention.
        kernel_init: Default initializer of linear kernels; None for He's or LeCun's normal, as the
            activation asks.
        center_density: EOI's density of a convolution's center tap, as the paper has it for the
            network; None for the library's default.
        in_cpu_loop: Takes the module and returns one of the same parameters and outputs, with
            gradients that XLA runs fast in a loop on CPUs; None if there is none, so that steps are
            better dispatched one by one there.
    """

    module: Any
    sizes: Mapping[str, int]
    input_shape: tuple[int, ...]
    num_classes: int
    activation: str
    stacked: tuple[str, ...] = ()
    depthwise: tuple[str, ...] = ()
    pruned: tuple[str, ...] | None = None
    attention: tuple[str, ...] = ()
    kernel_init: Initializer | None = None
    center_density: Literal["density"] | None = None
    in_cpu_loop: Callable[[Any], Any] | None = None
