"""VGG-16 for 32 x 32 images, with batch normalization."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn

from eoi_jax.typing import Array, Initializer
from experiments.models.layers import NORM, at_least, logits
from experiments.models.spec import CIFAR, Spec

__all__ = ["SPECS", "Vgg"]

# Of each stage: channels in widths, and the windows of its convolutions (configuration C).
_STAGES = ((1, (3, 3)), (2, (3, 3)), (4, (3, 3, 1)), (8, (3, 3, 1)), (8, (3, 3, 1)))


class Vgg(nn.Module):
    """VGG-16 in configuration C: 13 convolutions in five stages, then three linear layers.

    A 1 x 1 convolution closes each of the last three stages. It is padded by one pixel as every
    convolution is, so maps grow by two there, and of a 32 x 32 image 2 x 2 pixels are left. Batch
    normalization follows every layer but the last; all layers have biases.

    Attributes:
        width: Channels of the first stage; the others have 2, 4, 8 and 8 times as many, the linear
            layers 8 times.
        num_classes: Units of the last layer.
        activation: Applied after every normalization.
        kernel_init: Initializer of the linear layers' kernels.
        conv_init: Initializer of every convolution's kernel.
        bias_init: Initializer of every bias of a layer.

    Reference:
        Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
        Recognition", ICLR 2015, table 1.
    """

    width: int = 64
    num_classes: int = 10
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: Initializer = nn.initializers.he_normal()
    conv_init: Initializer = nn.initializers.he_normal()
    bias_init: Initializer = nn.initializers.zeros

    def __post_init__(self) -> None:
        at_least(1, width=self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``.

        With ``train=True`` the batch is normalized by its statistics, and the collection
        ``batch_stats`` has to be mutable; with ``train=False`` by the running ones.
        """

        def normalized(layer: nn.Module, x: Array) -> Array:
            norm = NORM(use_running_average=not train, name=f"{layer.name}_norm")
            return self.activation(norm(layer(x)))

        conv = functools.partial(
            nn.Conv,
            padding=((1, 1), (1, 1)),
            kernel_init=self.conv_init,
            bias_init=self.bias_init,
        )
        x = images
        for stage, (widths, sizes) in enumerate(_STAGES, 1):
            for number, size in enumerate(sizes, 1):
                name = f"conv{stage}_{number}"
                x = normalized(conv(widths * self.width, (size, size), name=name), x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(*x.shape[:-3], -1)
        linear = functools.partial(nn.Dense, kernel_init=self.kernel_init, bias_init=self.bias_init)
        x = normalized(linear(8 * self.width, name="linear1"), x)
        x = normalized(linear(8 * self.width, name="linear2"), x)
        return logits(self, x)


SPECS = {"vgg16": Spec(Vgg, {"width": 64}, CIFAR, 10, "relu")}
