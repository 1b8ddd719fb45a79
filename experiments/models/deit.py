"""Vision transformers whose heads have a matrix each, so that each can be orthogonal: DeiT III."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer
from experiments.models.block_sparse import Blocks
from experiments.models.spec import CIFAR, IMAGENET, Spec
from experiments.models.transformer import EMBEDDING, check_sizes, gelu, predict, run_blocks

__all__ = ["SPECS", "Deit", "Vit", "VitPlain"]


class Deit(nn.Module):
    """A vision transformer with LayerScale and a class token; dropout and its kin are left out.

    Patches are embedded by a linear map and get a position each; the class token, put before them,
    has none. Then come the blocks of :mod:`experiments.models.transformer`. The class token's
    normalized output goes through a linear layer.

    Attributes:
        depth: Number of blocks.
        width: Channels of a token, a multiple of ``heads``.
        heads: Heads of attention.
        patch: Height and width of a patch, which divide those of an image.
        num_classes: Units of the last layer.
        activation: The one within the perceptrons.
        causal: Whether a patch sees itself and those before it alone.
        normalized: Whether there are layer normalizations.
        layer_scale: The factors of LayerScale at the start; None for ``(2 * depth)**-0.5``.
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
    causal: bool = False
    normalized: bool = True
    layer_scale: float | None = 1e-4
    blocks: Blocks | None = None
    kernel_init: Initializer = EMBEDDING
    conv_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    def __post_init__(self) -> None:
        check_sizes(self, patch=self.patch)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``."""
        del train  # there is no batch normalization
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
        x = x + self.param("position", EMBEDDING, x.shape[-2:])
        token = self.param("token", EMBEDDING, (1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (*batch, 1, self.width)), x], axis=-2)
        return predict(self, run_blocks(self, x)[..., 0, :])


class Vit(Deit):
    """A small one for images of about 32 x 32 pixels, whose blocks count fully from the start."""

    depth: int = 4
    width: int = 256
    heads: int = 4
    patch: int = 4
    num_classes: int = 10
    layer_scale: float | None = 1.0


class VitPlain(Vit):
    """The small one without normalization, its branches scaled by the depth."""

    normalized: bool = False
    layer_scale: float | None = None


_DEIT = Spec(
    Deit,
    {"depth": 12, "width": 384},
    IMAGENET,
    1000,
    "gelu",
    ("hidden", "attention"),
    pruned=("mlp_in", "mlp_out"),  # as in the paper
    attention=("attention",),
    kernel_init=EMBEDDING,
)
_VIT = _DEIT._replace(
    module=Vit, sizes={"depth": 4, "width": 256}, input_shape=CIFAR, num_classes=10
)
# Without normalization the signal has to keep its size: the embedding's small weights would not.
_VIT_PLAIN = _VIT._replace(module=VitPlain, kernel_init=None)
SPECS = {"deit_s": _DEIT, "vit": _VIT, "vit_plain": _VIT_PLAIN}
