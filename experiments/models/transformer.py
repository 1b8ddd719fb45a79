"""The blocks of transformers: attention whose heads have a matrix each, and a perceptron.

A network calls :func:`run_blocks`, which builds the blocks from the network's fields. The blocks
are scanned, so their kernels are stacks (see :func:`experiments.models.layout`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer, Shape
from experiments.models.block_sparse import Blocks, linear
from experiments.models.layers import at_least, logits

__all__ = [
    "EMBEDDING",
    "HeadProjection",
    "blocks_alone",
    "check_sizes",
    "gelu",
    "predict",
    "run_blocks",
]

_NORM_EPSILON = 1e-6
EMBEDDING = nn.initializers.normal(0.02)


def gelu(x: Array) -> Array:
    """Multiply by the normal distribution's CDF itself, not by its usual approximation."""
    return nn.gelu(x, approximate=False)


def check_sizes(network: Any, **others: int) -> None:
    """Require at least one block, channel and head, and as many channels in every head.

    Args:
        network: With fields ``depth``, ``width`` and ``heads``.
        others: Further sizes that are at least 1.
    """
    at_least(1, depth=network.depth, width=network.width, heads=network.heads, **others)
    if network.width % network.heads:
        raise ValueError(
            f"width={network.width} is outside the multiples of {network.heads} heads. "
            "Give one of them."
        )


def run_blocks(network: Any, x: Array) -> Array:
    """Apply the blocks ``hidden`` of the module whose compact method calls.

    A block adds attention and then a multilayer perceptron of four times the width, each of its
    normalized input and scaled by a factor for every channel.

    Args:
        network: The module, with fields ``depth``, ``heads``, ``activation``, ``causal``,
            ``normalized``, ``layer_scale``, ``blocks``, ``kernel_init`` and ``bias_init``. If it is
            ``causal``, a token sees itself and those before it alone. A ``layer_scale`` of None
            stands for ``(2 * depth)**-0.5``, under which the sum of independent branches, each as
            large as its input, grows by a factor of ``sqrt(e)`` at most, whatever the depth.
        x: Tokens ``(..., tokens, width)``.

    Returns:
        Tokens of the same shape, not normalized.
    """
    y: Array = _hidden(network, name="hidden")(x, None)[0]
    return y


def predict(network: Any, x: Array) -> Array:
    """Apply the normalization ``norm``, if the network has any, and the linear layer ``last``.

    Args:
        network: The module whose compact method calls, with a field ``normalized`` beside those
            that :func:`experiments.models.layers.logits` takes.
        x: ``(..., width)``.

    Returns:
        Logits ``(..., num_classes)``.
    """
    return logits(network, nn.LayerNorm(_NORM_EPSILON, name="norm")(x) if network.normalized else x)


def blocks_alone(network: Any, variables: Mapping[str, Any], x: Array) -> Array:
    """Apply the blocks of a network by themselves.

    Args:
        network: The module.
        variables: Its parameters and other collections.
        x: Tokens ``(..., tokens, width)``.

    Returns:
        What the blocks make of them.

    Example:
        >>> import jax
        >>> from experiments import models
        >>> from experiments.models import transformer
        >>> model = models.create("gpt", depth=2, width=16)
        >>> shape = (1, *models.input_shape("gpt"))
        >>> variables = model.init(jax.random.key(0), jax.numpy.zeros(shape))
        >>> tokens = jax.random.normal(jax.random.key(1), (8, 16))
        >>> transformer.blocks_alone(model, variables, tokens).shape
        (8, 16)
    """
    of_blocks = {name: tree["hidden"] for name, tree in variables.items() if "hidden" in tree}
    y: Array = _hidden(network).apply(of_blocks, x, None)[0]
    return y


def _hidden(network: Any, **naming: Any) -> nn.Module:
    axes: Any = {"params": 0, "pattern": 0}
    split: Any = {"params": True}
    scanned = nn.scan(_Block, variable_axes=axes, split_rngs=split, length=network.depth)
    scale = network.layer_scale
    module: nn.Module = scanned(
        heads=network.heads,
        activation=network.activation,
        normalized=network.normalized,
        layer_scale=(2 * network.depth) ** -0.5 if scale is None else scale,
        causal=network.causal,
        blocks=network.blocks,
        kernel_init=network.kernel_init,
        bias_init=network.bias_init,
        **naming,
    )
    return module


class _Block(nn.Module):
    """One scanned block: ``(x, nothing) -> (x, nothing)``."""

    heads: int
    activation: Callable[[Array], Array]
    normalized: bool
    layer_scale: float
    causal: bool
    blocks: Blocks | None
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        width = x.shape[-1]
        scale = nn.initializers.constant(self.layer_scale)
        inits: Any = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        y = self._norm(x, "norm1")
        y = _Attention(self.heads, self.causal, **inits, name="attention")(y)
        x = x + y * self.param("scale1", scale, (width,))
        y = self._norm(x, "norm2")
        y = self.activation(linear(self.blocks, 4 * width, **inits, name="mlp_in")(y))
        y = linear(self.blocks, width, **inits, name="mlp_out")(y)
        return x + y * self.param("scale2", scale, (width,)), None

    def _norm(self, x: Array, name: str) -> Array:
        return nn.LayerNorm(_NORM_EPSILON, name=name)(x) if self.normalized else x


class _Attention(nn.Module):
    """Every token looks at all of them, or at those up to its place."""

    heads: int
    causal: bool
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
        tokens = x.shape[-2]
        mask = jnp.tri(tokens, dtype=bool) if self.causal else None
        y = nn.dot_product_attention(query, key, value, mask=mask)
        return project(width, merge=True, name="out")(y)


class HeadProjection(nn.Module):
    """A linear map for each head, from all channels to those of the head, or back.

    Query, key and value have a kernel ``(width, width / heads)`` for each head, the output
    projection one ``(width / heads, width)``; those of the heads are stacked.

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
