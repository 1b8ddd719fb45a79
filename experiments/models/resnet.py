"""Residual networks: for 32 x 32 images with blocks of two convolutions, for larger ones of three.

Batch normalization follows every convolution, so convolutions have no biases. A shortcut is the
identity, or a 1 x 1 convolution with batch normalization where the shape changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer
from experiments.models.layers import at_least, conv_norm, logits, one_of
from experiments.models.spec import CIFAR, IMAGENET, Spec

__all__ = ["SPECS", "BottleneckResNet", "ResNet"]


class ResNet(nn.Module):
    """A residual network of ``depth = 6 n + 2`` layers: ``n`` blocks of two convolutions a stage.

    A 3 x 3 convolution, then stages of 1, 2 and 4 times the width, the second and the third halving
    height and width in their first block, then the mean over all pixels and a linear layer.

    Attributes:
        depth: Convolutions and linear layers on the longest path, 6 n + 2: 20, 32, 56, 110.
        width: Channels of the first stage.
        num_classes: Units of the last layer.
        activation: Applied after every normalization, in a block's last one after the sum.
        kernel_init: Initializer of the linear layer's kernel.
        conv_init: Initializer of every convolution's kernel.
        bias_init: Initializer of the linear layer's bias.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
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

        With ``train=True`` the batch is normalized by its statistics, and the collection
        ``batch_stats`` has to be mutable; with ``train=False`` by the running ones.
        """
        x = conv_norm(images, self.width, 3, "first", train=train, conv_init=self.conv_init)
        blocks = (self.depth - 2) // 6
        return _stages(self, _Block, (blocks,) * 3, self.activation(x), train)


class BottleneckResNet(nn.Module):
    """A residual network of blocks of three convolutions, for images of about 224 x 224.

    A 7 x 7 convolution of stride 2, a 3 x 3 maximum of stride 2, then four stages of 1, 2, 4 and 8
    times the width, whose blocks end in four times as many channels; all but the first stage halve
    height and width in the 3 x 3 convolution of their first block (version 1.5). Then the mean over
    all pixels and a linear layer.

    Attributes:
        depth: Convolutions and linear layers on the longest path, one of 14, 26, 50, 101, 152.
        width: Channels of the first convolution.
        num_classes: Units of the last layer.
        activation: Applied after every normalization, in a block's last one after the sum.
        kernel_init: Initializer of the linear layer's kernel.
        conv_init: Initializer of every convolution's kernel.
        bias_init: Initializer of the linear layer's bias.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, as
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

        With ``train=True`` the batch is normalized by its statistics, and the collection
        ``batch_stats`` has to be mutable; with ``train=False`` by the running ones.
        """
        conv_init = self.conv_init
        x = conv_norm(images, self.width, 7, "first", train=train, conv_init=conv_init, stride=2)
        x = nn.max_pool(self.activation(x), (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return _stages(self, _Bottleneck, _BLOCKS[self.depth], x, train)


_BLOCKS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def _stages(network: Any, block: Any, blocks: tuple[int, ...], x: Array, train: bool) -> Array:
    """Apply so many blocks a stage, the mean over all pixels and the last layer."""
    for stage, number_of_blocks in enumerate(blocks):
        for number in range(number_of_blocks):
            stride = 2 if stage > 0 and number == 0 else 1
            options = (network.width * 2**stage, stride, network.activation, network.conv_init)
            x = block(*options, name=f"block{stage + 1}_{number + 1}")(x, train)
    return logits(network, jnp.mean(x, axis=(-3, -2)))


class _Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    features: int
    stride: int
    activation: Callable[[Array], Array]
    conv_init: Initializer

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, conv_init=self.conv_init)
        y = self.activation(layer(x, self.features, 3, "conv1", stride=self.stride))
        y = layer(y, self.features, 3, "conv2")
        if x.shape != y.shape:
            x = layer(x, self.features, 1, "shortcut", stride=self.stride)
        return self.activation(x + y)


class _Bottleneck(_Block):
    """Three convolutions, the last to four times as many channels, and a shortcut around them."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, conv_init=self.conv_init)
        y = self.activation(layer(x, self.features, 1, "conv1"))
        y = self.activation(layer(y, self.features, 3, "conv2", stride=self.stride))
        y = layer(y, 4 * self.features, 1, "conv3")
        if x.shape != y.shape:
            x = layer(x, 4 * self.features, 1, "shortcut", stride=self.stride)
        return self.activation(x + y)


_RESNET = Spec(ResNet, {"depth": 32, "width": 16}, CIFAR, 10, "relu")
SPECS = {
    "resnet20": _RESNET._replace(sizes={"depth": 20, "width": 16}),
    "resnet32": _RESNET,
    "resnet56": _RESNET._replace(sizes={"depth": 56, "width": 16}),
    "resnet110": _RESNET._replace(sizes={"depth": 110, "width": 16}),
    "resnet50": Spec(BottleneckResNet, {"depth": 50, "width": 64}, IMAGENET, 1000, "relu"),
}
