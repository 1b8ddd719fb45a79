"""EfficientNet-B0."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer
from experiments.models.layers import at_least, conv_norm, logits, one_of
from experiments.models.spec import TINY_IMAGENET, Spec

__all__ = ["SPECS", "EfficientNet"]


class _Stage(NamedTuple):
    expansion: int
    size: int
    stride: int
    channels: int
    blocks: int


_FIRST = 32  # channels of the first convolution
_STAGES = (
    _Stage(1, 3, 1, 16, 1),
    _Stage(6, 3, 2, 24, 2),
    _Stage(6, 5, 2, 40, 2),
    _Stage(6, 3, 2, 80, 3),
    _Stage(6, 5, 1, 112, 3),
    _Stage(6, 5, 2, 192, 4),
    _Stage(6, 3, 1, 320, 1),
)
_DEPTH = sum(stage.blocks for stage in _STAGES)


class EfficientNet(nn.Module):
    """EfficientNet-B0: inverted residuals with depthwise convolutions, squeezed and excited.

    A block expands the channels by a 1 x 1 convolution, convolves each by itself, scales each by a
    gate that sees the mean over all pixels, and projects to its output channels; where the shape
    stays, the input is added. Batch normalization follows every convolution but the gate's, which
    have biases instead. Dropout and stochastic depth are left out.

    Attributes:
        depth: Number of blocks, 16; of a smaller network the first of these, at least 1.
        width: Channels of the first convolution; 32 are B0's. Those of the blocks are scaled with
            it and rounded to multiples of 8, as B1 to B7 do it.
        num_classes: Units of the last layer.
        activation: Applied after every normalization but a block's last, and within the gate.
        kernel_init: Initializer of the linear layer's kernel.
        conv_init: Initializer of every convolution's kernel.
        bias_init: Initializer of the biases of the linear layer and the gates.

    Reference:
        Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML
        2019, as ``torchvision.models.efficientnet_b0`` builds it.
    """

    depth: int = _DEPTH
    width: int = _FIRST
    num_classes: int = 200
    activation: Callable[[Array], Array] = nn.silu
    kernel_init: Initializer = nn.initializers.lecun_normal()
    conv_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    def __post_init__(self) -> None:
        one_of(tuple(range(1, _DEPTH + 1)), depth=self.depth)
        at_least(1, width=self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``.

        With ``train=True`` the batch is normalized by its statistics, and the collection
        ``batch_stats`` has to be mutable; with ``train=False`` by the running ones.
        """
        layer = functools.partial(conv_norm, train=train, conv_init=self.conv_init)
        x = self.activation(layer(images, self.width, 3, "first", stride=2))
        blocks = [
            (f"block{index}_{number}", stage if number == 1 else stage._replace(stride=1))
            for index, stage in enumerate(_STAGES, 1)
            for number in range(1, stage.blocks + 1)
        ]
        for name, stage in blocks[: self.depth]:
            features = self.channels(stage.channels)
            inits = (self.conv_init, self.bias_init)
            x = _Block(stage, features, self.activation, *inits, name=name)(x, train)
        x = self.activation(layer(x, 4 * self.channels(_STAGES[-1].channels), 1, "final"))
        return logits(self, jnp.mean(x, axis=(-3, -2)))

    def channels(self, channels: int) -> int:
        """Scale a stage's channels with the width, to a multiple of 8, a tenth less at the most."""
        wanted = channels * self.width / _FIRST
        rounded = max(8, int(wanted + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * wanted else rounded


class _Block(nn.Module):
    """Expand, convolve each channel, scale it by a gate, project; add the input if it fits."""

    stage: _Stage
    features: int
    activation: Callable[[Array], Array]
    conv_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, conv_init=self.conv_init)
        gate = functools.partial(
            nn.Conv, kernel_size=(1, 1), kernel_init=self.conv_init, bias_init=self.bias_init
        )
        inputs, y = x.shape[-1], x
        expanded = self.stage.expansion * inputs
        if expanded != inputs:
            y = self.activation(layer(y, expanded, 1, "expand"))
        y = layer(
            y, expanded, self.stage.size, "depthwise", stride=self.stage.stride, groups=expanded
        )
        y = self.activation(y)
        mean = jnp.mean(y, axis=(-3, -2), keepdims=True)
        squeezed = self.activation(gate(max(1, inputs // 4), name="squeeze")(mean))
        y = y * nn.sigmoid(gate(expanded, name="excite")(squeezed))
        y = layer(y, self.features, 1, "project")
        return x + y if x.shape == y.shape else y


_B0 = Spec(EfficientNet, {"depth": _DEPTH, "width": _FIRST}, TINY_IMAGENET, 200, "silu")
SPECS = {"efficientnet_b0": _B0._replace(depthwise=("depthwise",))}
