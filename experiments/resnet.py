"""Residual networks for 32 x 32 images: three stages of 16, 32 and 64 channels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer

__all__ = ["ResNet"]

_WIDTHS = (16, 32, 64)
_CONV = functools.partial(nn.Conv, use_bias=False)
_NORM = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
# Explicit, since "SAME" at stride 2 pads an even image at one side only.
_PADDING = ((1, 1), (1, 1))


class ResNet(nn.Module):
    """A residual network of ``depth = 6 n + 2`` layers: ``n`` blocks of two convolutions a stage.

    A 3 x 3 convolution, then stages of 16, 32 and 64 channels, the second and the third halving
    height and width in their first block, then the mean over all pixels and a linear layer. Batch
    normalization follows every convolution, so convolutions have no biases. A shortcut is the
    identity, or a 1 x 1 convolution with batch normalization where the shape changes.

    Attributes:
        depth: convolutions and linear layers on the longest path, 6 n + 2: 20, 32, 56, 110.
        num_classes: units of the last layer.
        activation: applied after every normalization, in a block's last one after the sum.
        kernel_init: initializer of the linear layer's kernel.
        conv_init: initializer of every convolution's kernel.
        bias_init: initializer of the linear layer's bias.

    Reference:
        He et al., *Deep Residual Learning for Image Recognition* (CVPR 2016), section 4.2.
    """

    depth: int = 32
    num_classes: int = 10
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: Initializer = nn.initializers.he_normal()
    conv_init: Initializer = nn.initializers.he_normal()
    bias_init: Initializer = nn.initializers.zeros

    def __post_init__(self) -> None:
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(
                f"depth={self.depth} is outside {{8, 14, 20, ...}}. Give 6 n + 2 for n blocks in "
                "each of three stages, such as 32, 56 or 110."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``.

        With ``train=True`` the batch is normalized by its own statistics, and the collection
        ``batch_stats`` has to be mutable; with ``train=False`` by the running ones.
        """
        conv = _CONV(_WIDTHS[0], (3, 3), padding=_PADDING, kernel_init=self.conv_init, name="first")
        norm = _NORM(use_running_average=not train, name="first_norm")
        x = self.activation(norm(conv(images)))
        for stage, features in enumerate(_WIDTHS, 1):
            for number in range(1, (self.depth - 2) // 6 + 1):
                stride = 2 if stage > 1 and number == 1 else 1
                name = f"block{stage}_{number}"
                block = _Block(features, stride, self.activation, self.conv_init, name=name)
                x = block(x, train)
        last = nn.Dense(
            self.num_classes, kernel_init=self.kernel_init, bias_init=self.bias_init, name="last"
        )
        return last(jnp.mean(x, axis=(-3, -2)))


class _Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    features: int
    stride: int
    activation: Callable[[Array], Array]
    conv_init: Initializer

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def layer(name: str, x: Array, size: int, stride: int, padding: Any) -> Array:
            conv = _CONV(
                self.features,
                (size, size),
                strides=stride,
                padding=padding,
                kernel_init=self.conv_init,
                name=name,
            )
            return _NORM(use_running_average=not train, name=f"{name}_norm")(conv(x))

        y = self.activation(layer("conv1", x, 3, self.stride, _PADDING))
        y = layer("conv2", y, 3, 1, _PADDING)
        if x.shape != y.shape:
            x = layer("shortcut", x, 1, self.stride, "VALID")
        return self.activation(x + y)
