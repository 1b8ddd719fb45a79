"""A small language model: a transformer that predicts the next character."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from eoi_jax.typing import Array, Initializer
from experiments.models.block_sparse import Blocks
from experiments.models.spec import TEXT, Spec
from experiments.models.transformer import EMBEDDING, check_sizes, gelu, predict, run_blocks

__all__ = ["SPECS", "Gpt", "GptPlain"]


class Gpt(nn.Module):
    """A decoder: characters are embedded, blocks look at those before, a linear layer predicts.

    The characters come one-hot, so that the network is a differentiable function of them. The
    embedding and the last layer do not share weights. The blocks are those of
    :mod:`experiments.models.transformer`.

    Attributes:
        depth: Number of blocks.
        width: Channels of a token, a multiple of ``heads``.
        heads: Heads of attention.
        num_classes: Number of characters.
        activation: The one within the perceptrons.
        causal: Whether a character sees itself and those before it alone.
        normalized: Whether there are layer normalizations.
        layer_scale: The factors of LayerScale at the start; None for ``(2 * depth)**-0.5``.
        blocks: If given, the perceptrons' layers are block-sparse.
        kernel_init: Initializer of every linear kernel that is not, called for each head by itself.
        bias_init: Initializer of every bias.

    Reference:
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """

    depth: int = 6
    width: int = 64
    heads: int = 4
    num_classes: int = TEXT[1]
    activation: Callable[[Array], Array] = gelu
    causal: bool = True
    normalized: bool = True
    layer_scale: float | None = 1.0
    blocks: Blocks | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    def __post_init__(self) -> None:
        check_sizes(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, text: Array, train: bool = False) -> Array:
        """Map one-hot characters ``(..., length, characters)`` to logits of those that follow."""
        del train  # there is no dropout
        # Entries of variance 1, the size that a normalization would give them.
        shape = (text.shape[-1], self.width)
        x = text @ self.param("embedding", nn.initializers.normal(1.0), shape)
        x = x + self.param("position", EMBEDDING, x.shape[-2:])
        return predict(self, run_blocks(self, x))


class GptPlain(Gpt):
    """The same without normalization, its branches scaled by the depth."""

    normalized: bool = False
    layer_scale: float | None = None


_GPT = Spec(
    Gpt,
    {"depth": 6, "width": 64},
    TEXT,
    TEXT[1],
    "gelu",
    ("hidden", "attention"),
    pruned=("mlp_in", "mlp_out"),
    attention=("attention",),
)
SPECS = {"gpt": _GPT, "gpt_plain": _GPT._replace(module=GptPlain)}
