"""The networks of the experiments, in Flax Linen. All return logits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer

__all__ = ["Mlp"]


class Mlp(nn.Module):
    """A plain deep network: ``depth`` linear layers, no residuals, no normalization.

    The layers between the first and the last are scanned, so compile time does not grow with depth;
    their kernels are stacked in one ``(depth - 2, width, width)`` leaf.

    Attributes:
        depth: number of linear layers, at least 2.
        width: units of every layer but the last.
        num_classes: units of the last layer.
        activation: applied after every layer but the last.
        kernel_init: initializer of every kernel.
        bias_init: initializer of every bias.
    """

    depth: int
    width: int
    num_classes: int
    activation: Callable[[Array], Array] = jnp.tanh
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``."""
        x = images.reshape(*images.shape[:-3], -1)
        layer = functools.partial(nn.Dense, kernel_init=self.kernel_init, bias_init=self.bias_init)
        x = self.activation(layer(self.width, name="first")(x))
        if self.depth > 2:
            hidden = nn.scan(
                _Hidden,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth - 2,
            )
            x, _ = hidden(layer, self.width, self.activation, name="hidden")(x, None)
        return layer(self.num_classes, name="last")(x)


class _Hidden(nn.Module):
    """One scanned layer: ``(x, nothing) -> (x, nothing)``."""

    layer: Callable[..., nn.Module]
    width: int
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        return self.activation(self.layer(self.width, name="linear")(x)), None
