"""Vision transformers whose heads have a matrix each, so that each can be orthogonal: DeiT III."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer, Shape
from experiments.models.block_sparse import Blocks, linear
from experiments.models.layers import at_least, logits
from experiments.models.spec import CIFAR, IMAGENET, Spec

__all__ = ["SPECS", "Deit", "HeadProjection", "Vit", "gelu"]

_NORM_EPSILON = 1e-6
_EMBEDDING = nn.initializers.normal(0.02)


def gelu(x: Array) -> Array:
    """Multiply by the normal distribution's CDF itself, not by its usual approximation."""
    return nn.gelu(x, approximate=False)


class Deit(nn.Module):
    """A vision transformer with LayerScale and a class token; dropout and its kin are left out.

    Patches are embedded by a linear map and get a position each; the class token, put before them,
    has none. A block adds attention and then a multilayer perceptron of four times the width, each
    of its normalized input and scaled by a factor for every channel. The class token's normalized
    output goes through a linear layer.

    The blocks are scanned, so their kernels are stacks (see :func:`experiments.models.layout`).
    Query, key and value have a kernel ``(width, width / heads)`` for each head, the output
    projection one ``(width / heads, width)``; those of the heads are stacked too.

    Attributes:
        depth: Number of blocks.
        width: Channels of a token, a multiple of ``heads``.
        heads: Heads of attention.
        patch: Height and width of a patch, which divide those of an image.
        num_classes: Units of the last layer.
        activation: The one within the perceptrons.
        layer_scale: The factors of LayerScale at the start.
        blocks: If given, the perceptrons' layers are block-sparse.
        kernel_init: Initializer of every linear kernel that is not, called for each head by itself.
        conv_init: Initializer of the patch embedding, which is a convolution.
        bias_init: Initializer of every bias of a linear layer or of the embedding.

    Reference:
        Touvron, Cord and Jégou, "DeiT III: Revenge of the ViT", ECCV 2022.
    """

    depth: int = 12
    width: int = 384
    heads: int = 6
    patch: int = 16
    num_classes: int = 1000
    activation: Callable[[Array], Array] = gelu
    layer_scale: float = 1e-4
    blocks: Blocks | None = None
    kernel_init: Initializer = _EMBEDDING
    conv_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    def __post_init__(self) -> None:
        at_least(1, depth=self.depth, width=self.width, heads=self.heads, patch=self.patch)
        if self.width % self.heads:
            raise ValueError(
                f"width={self.width} is outside the multiples of {self.heads} heads. "
                "Give one of them."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``."""
        del train  # there is no normalization
        *batch, height, width, _ = images.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"images of {height} x {width} pixels are outside the multiples of patch="
                f"{self.patch}. Resize or crop them."
            )
        embed = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding="VALID",
            kernel_init=self.conv_init,
            bias_init=self.bias_init,
            name="embed",
        )
        x = embed(images).reshape(*batch, -1, self.width)
        x = x + self.param("position", _EMBEDDING, x.shape[-2:])
        token = self.param("token", _EMBEDDING, (1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (*batch, 1, self.width)), x], axis=-2)
        axes: Any = {"params": 0, "pattern": 0}
        split: Any = {"params": True}
        hidden = nn.scan(_Block, variable_axes=axes, split_rngs=split, length=self.depth)
        options = (self.layer_scale, self.blocks, self.kernel_init, self.bias_init)
        x, _ = hidden(self.heads, self.activation, *options, name="hidden")(x, None)
        x = nn.LayerNorm(_NORM_EPSILON, name="norm")(x)[..., 0, :]
        return logits(self, x)


class Vit(Deit):
    """A small one for images of about 32 x 32 pixels, whose blocks count fully from the start."""

    depth: int = 4
    width: int = 256
    heads: int = 4
    patch: int = 4
    num_classes: int = 10
    layer_scale: float = 1.0


class _Block(nn.Module):
    """One scanned block: ``(x, nothing) -> (x, nothing)``."""

    heads: int
    activation: Callable[[Array], Array]
    layer_scale: float
    blocks: Blocks | None
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        width = x.shape[-1]
        scale = nn.initializers.constant(self.layer_scale)
        inits: Any = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        attend = _Attention(self.heads, self.kernel_init, self.bias_init, name="attention")
        y = attend(nn.LayerNorm(_NORM_EPSILON, name="norm1")(x))
        x = x + y * self.param("scale1", scale, (width,))
        y = nn.LayerNorm(_NORM_EPSILON, name="norm2")(x)
        y = self.activation(linear(self.blocks, 4 * width, **inits, name="mlp_in")(y))
        y = linear(self.blocks, width, **inits, name="mlp_out")(y)
        return x + y * self.param("scale2", scale, (width,)), None


class _Attention(nn.Module):
    """Every token looks at all of them."""

    heads: int
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        project = functools.partial(
            HeadProjection, self.heads, kernel_init=self.kernel_init, bias_init=self.bias_init
        )
        query, key, value = (
            project(width // self.heads, name=name)(x) for name in ("query", "key", "value")
        )
        y = nn.dot_product_attention(query, key, value)
        return project(width, merge=True, name="out")(y)


class HeadProjection(nn.Module):
    """A linear map for each head, from all channels to those of the head, or back.

    Attributes:
        heads: Number of heads.
        features: Outputs of each head's kernel.
        merge: Whether inputs are ``(..., heads, inputs)`` and outputs the heads' sum
            ``(..., features)``, or inputs ``(..., inputs)`` and outputs
            ``(..., heads, features)``.
        kernel_init: Initializer of a kernel ``(inputs, features)``.
        bias_init: Initializer of the bias ``(features,)``, or ``(heads, features)``.
    """

    heads: int
    features: int
    merge: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map the tokens."""
        shape = (self.heads, x.shape[-1], self.features)
        kernel = self.param("kernel", self._init_heads, shape)
        bias = self.param("bias", self.bias_init, shape[2:] if self.merge else shape[::2])
        equation = "...hi,hio->...o" if self.merge else "...i,hio->...ho"
        return jnp.einsum(equation, x, kernel) + bias

    def _init_heads(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        """Draw each head by itself: as one kernel, fans would count all of them."""
        keys = jax.random.split(key, shape[0])
        return jax.vmap(lambda key: self.kernel_init(key, tuple(shape[1:]), dtype))(keys)


_DEIT = Spec(
    Deit,
    {"depth": 12, "width": 384},
    IMAGENET,
    1000,
    "gelu",
    ("hidden", "attention"),
    pruned=("mlp_in", "mlp_out"),  # as in the paper
    attention=("attention",),
    kernel_init=_EMBEDDING,
)
_VIT = _DEIT._replace(
    module=Vit, sizes={"depth": 4, "width": 256}, input_shape=CIFAR, num_classes=10
)
SPECS = {"deit_s": _DEIT, "vit": _VIT}
