"""Residual networks: for 32 x 32 images with blocks of two convolutions, for larger ones of three.

Batch normalization follows every convolution, so convolutions have no biases. A shortcut is the
identity, or a 1 x 1 convolution with batch normalization where the shape changes.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer
from experiments.models.layers import at_least, conv_norm, one_of

__all__ = ["BottleneckResNet", "ResNet"]


class ResNet(nn.Module):
    """A residual network of ``depth = 6 n + 2`` layers: ``n`` blocks of two convolutions a stage.

    A 3 x 3 convolution, then stages of 1, 2 and 4 times the width, the second and the third halving
    height and width in their first block, then the mean over all pixels and a linear layer.

    Attributes:
        depth: convolutions and linear layers on the longest path, 6 n + 2: 20, 32, 56, 110.
        width: channels of the first stage.
        num_classes: units of the last layer.
        activation: applied after every normalization, in a block's last one after the sum.
        kernel_init: initializer of the linear layer's kernel.
        conv_init: initializer of every convolution's kernel.
        bias_init: initializer of the linear layer's bias.

    Reference:
        He et al., *Deep Residual Learning for Image Recognition* (CVPR 2016), section 4.2.
    """

    depth: int = 32
    width: int = 16
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
        at_least(1, width=self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``.

        With ``train=True`` the batch is normalized by its own statistics, and the collection
        ``batch_stats`` has to be mutable; with ``train=False`` by the running ones.
        """
        x = conv_norm(images, self.width, 3, "first", train=train, conv_init=self.conv_init)
        x = self.activation(x)
        blocks = (self.depth - 2) // 6
        for stage in (1, 2, 3):
            for number in range(1, blocks + 1):
                stride = 2 if stage > 1 and number == 1 else 1
                features = self.width * 2 ** (stage - 1)
                name = f"block{stage}_{number}"
                block = _Block(features, stride, self.activation, self.conv_init, name=name)
                x = block(x, train)
        last = nn.Dense(
            self.num_classes, kernel_init=self.kernel_init, bias_init=self.bias_init, name="last"
        )
        return last(jnp.mean(x, axis=(-3, -2)))


class BottleneckResNet(nn.Module):
    """A residual network of blocks of three convolutions, for images of about 224 x 224.

    A 7 x 7 convolution of stride 2, a 3 x 3 maximum of stride 2, then four stages of 1, 2, 4 and 8
    times the width, whose blocks end in four times as many channels; all but the first stage halve
    height and width in the 3 x 3 convolution of their first block (version 1.5). Then the mean over
    all pixels and a linear layer.

    Attributes:
        depth: convolutions and linear layers on the longest path, one of 14, 26, 50, 101, 152.
        width: channels of the first convolution.
        num_classes: units of the last layer.
        activation: applied after every normalization, in a block's last one after the sum.
        kernel_init: initializer of the linear layer's kernel.
        conv_init: initializer of every convolution's kernel.
        bias_init: initializer of the linear layer's bias.

    Reference:
        He et al., *Deep Residual Learning for Image Recognition* (CVPR 2016), as
        ``torchvision.models.resnet50`` builds it.
    """

    depth: int = 50
    width: int = 64
    num_classes: int = 1000
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: Initializer = nn.initializers.he_normal()
    conv_init: Initializer = nn.initializers.he_normal()
    bias_init: Initializer = nn.initializers.zeros

    def __post_init__(self) -> None:
        one_of(tuple(_BLOCKS), depth=self.depth)
        at_least(1, width=self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``.

        With ``train=True`` the batch is normalized by its own statistics, and the collection
        ``batch_stats`` has to be mutable; with ``train=False`` by the running ones.
        """
        conv_init = self.conv_init
        x = conv_norm(images, self.width, 7, "first", train=train, conv_init=conv_init, stride=2)
        x = nn.max_pool(self.activation(x), (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(_BLOCKS[self.depth], 1):
            for number in range(1, blocks + 1):
                stride = 2 if stage > 1 and number == 1 else 1
                features = self.width * 2 ** (stage - 1)
                name = f"block{stage}_{number}"
                block = _Bottleneck(features, stride, self.activation, conv_init, name=name)
                x = block(x, train)
        last = nn.Dense(
            self.num_classes, kernel_init=self.kernel_init, bias_init=self.bias_init, name="last"
        )
        return last(jnp.mean(x, axis=(-3, -2)))


_BLOCKS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class _Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    features: int
    stride: int
    activation: Callable[[Array], Array]
    conv_init: Initializer

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def layer(name: str, x: Array, size: int, stride: int = 1) -> Array:
            init = self.conv_init
            return conv_norm(
                x, self.features, size, name, train=train, conv_init=init, stride=stride
            )

        y = self.activation(layer("conv1", x, 3, self.stride))
        y = layer("conv2", y, 3)
        if x.shape != y.shape:
            x = layer("shortcut", x, 1, self.stride)
        return self.activation(x + y)


class _Bottleneck(nn.Module):
    """Three convolutions, the last to four times as many channels, and a shortcut around them."""

    features: int
    stride: int
    activation: Callable[[Array], Array]
    conv_init: Initializer

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def layer(name: str, x: Array, features: int, size: int, stride: int = 1) -> Array:
            init = self.conv_init
            return conv_norm(x, features, size, name, train=train, conv_init=init, stride=stride)

        y = self.activation(layer("conv1", x, self.features, 1))
        y = self.activation(layer("conv2", y, self.features, 3, self.stride))
        y = layer("conv3", y, 4 * self.features, 1)
        if x.shape != y.shape:
            x = layer("shortcut", x, 4 * self.features, 1, self.stride)
        return self.activation(x + y)
