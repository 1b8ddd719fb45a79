"""Deep networks without residuals and without normalization: linear layers, or convolutions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer
from experiments.models.block_sparse import Blocks, linear
from experiments.models.convolve import valid_convolution
from experiments.models.layers import at_least, logits
from experiments.models.spec import CIFAR, MNIST, Spec

__all__ = ["SPECS", "Cnn", "Mlp"]


class Mlp(nn.Module):
    """A plain deep network: ``depth`` linear layers, no residuals, no normalization.

    The layers between the first and the last are scanned, so compile time does not grow with depth;
    their kernels are stacked in one ``(depth - 2, width, width)`` leaf (see
    :func:`experiments.models.layout`).

    Attributes:
        depth: Number of linear layers, at least 2.
        width: Units of every layer but the last.
        num_classes: Units of the last layer.
        activation: Applied after every layer but the last.
        kernel_init: Initializer of every kernel that is not block-sparse.
        bias_init: Initializer of every bias.
        blocks: If given, the layers between the first and the last are block-sparse.
    """

    depth: int
    width: int
    num_classes: int
    activation: Callable[[Array], Array] = jnp.tanh
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        at_least(2, depth=self.depth)
        at_least(1, width=self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``."""
        del train  # there is no normalization
        x = images.reshape(*images.shape[:-3], -1)
        inits: Any = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        x = self.activation(nn.Dense(self.width, **inits, name="first")(x))
        hidden = functools.partial(linear, self.blocks, self.width, **inits, name="linear")
        x = _scanned(x, hidden, self.activation, self.depth - 2)
        return logits(self, x)


class Cnn(nn.Module):
    """A plain deep convolutional network: no residuals, no normalization, circular padding.

    A 3 x 3 convolution, two of stride 2, ``depth - 4`` more of one size, the mean over windows of
    2 x 2, and a linear layer over all that is left: of a 32 x 32 image, 4 x 4 pixels. The
    convolutions after the strided ones are scanned, as the layers of :class:`Mlp` are.

    Attributes:
        depth: Convolutions and the linear layer, at least 4. The paper's network of 1000 layers
            has 994 convolutions of one size: 998 layers that have weights.
        width: Channels of every convolution.
        num_classes: Units of the last layer.
        activation: Applied after every convolution.
        kernel_init: Initializer of the linear layer's kernel.
        conv_init: Initializer of every convolution's kernel.
        bias_init: Initializer of every bias.
        convolve: What convolves, with the signature of :func:`jax.lax.conv_general_dilated`.

    Reference:
        Xiao et al., "Dynamical Isometry and a Mean Field Theory of CNNs", ICML 2018.
    """

    depth: int
    width: int
    num_classes: int
    activation: Callable[[Array], Array] = jnp.tanh
    kernel_init: Initializer = nn.initializers.lecun_normal()
    conv_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    convolve: Callable[..., Array] = jax.lax.conv_general_dilated

    def __post_init__(self) -> None:
        at_least(4, depth=self.depth)
        at_least(1, width=self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``."""
        del train  # there is no normalization
        conv = functools.partial(
            nn.Conv,
            self.width,
            (3, 3),
            padding="CIRCULAR",
            kernel_init=self.conv_init,
            bias_init=self.bias_init,
            conv_general_dilated=self.convolve,
        )
        x = self.activation(conv(name="first")(images))
        x = self.activation(conv(strides=2, name="strided1")(x))
        x = self.activation(conv(strides=2, name="strided2")(x))
        x = _scanned(x, functools.partial(conv, name="conv"), self.activation, self.depth - 4)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(*x.shape[:-3], -1)
        return logits(self, x)


def _scanned(
    x: Array, layer: Callable[[], Any], activation: Callable[[Array], Array], length: int
) -> Array:
    """Apply layers of one shape, each followed by the activation, as one scan."""
    if length == 0:
        return x
    axes: Any = {"params": 0, "pattern": 0}
    hidden = nn.scan(_Hidden, variable_axes=axes, split_rngs={"params": True}, length=length)
    x, _ = hidden(layer, activation, name="hidden")(x, None)
    return x


class _Hidden(nn.Module):
    """One scanned layer: ``(x, nothing) -> (x, nothing)``."""

    layer: Callable[[], Any]
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        return self.activation(self.layer()(x)), None


_STACK = ("hidden",)
_MLP = Spec(Mlp, {"depth": 7, "width": 100}, MNIST, 10, "tanh", _STACK, in_cpu_loop=lambda mlp: mlp)
_CNN = Spec(Cnn, {"depth": 998, "width": 128}, CIFAR, 10, "tanh", _STACK, center_density="density")
_WIDE = _MLP._replace(pruned=_STACK, kernel_init=nn.initializers.orthogonal())
SPECS = {
    "mlp7": _MLP,
    "mlp1000": _MLP._replace(sizes={"depth": 1000, "width": 128}),
    "mlp7_wide": _WIDE._replace(sizes={"depth": 7, "width": 2048}),
    "mlp1000_wide": _WIDE._replace(sizes={"depth": 1000, "width": 512}),
    "cnn1000": _CNN._replace(in_cpu_loop=lambda cnn: cnn.clone(convolve=valid_convolution)),
}
