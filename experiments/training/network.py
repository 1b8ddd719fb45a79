"""The network of a config, and the shape of its images.

A network is built once for equal settings, so that its programs compile once.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax

from eoi_jax.typing import Where
from experiments import data, models
from experiments.config import Start

__all__ = ["build", "image_shape", "where"]


def build(config: Start, num_classes: int) -> Any:
    """Build the network of a config.

    Args:
        config: Its model, activation, depth, width and bias_std decide; for method="blocks" its
            density, block_size and scale too.
        num_classes: Number of logits, at least 1.

    Returns:
        A Linen module, one object for equal settings; its ``init`` draws the normal weights that
        the network has by default.
    """
    sizes = (config.depth, config.width)
    blocks = None
    if config.method == "blocks":
        blocks = models.Blocks(config.density, config.block_size, config.scale)
    return _build(config.model, num_classes, config.activation, *sizes, config.bias_std, blocks)


def where(config: Start) -> Where:
    """Return which leaves of a config's network are pruned, one object for equal settings."""
    return models.where(config.model, attention=config.attention, perceptrons=config.perceptrons)


def image_shape(config: Start) -> tuple[int, ...] | None:
    """Return the shape to load a config's images in; None for a data set that has one shape."""
    return models.input_shape(config.model) if config.data in data.ANY_SHAPE else None


@functools.lru_cache(maxsize=16)
def _build(
    name: str,
    num_classes: int,
    activation: str | None,
    depth: int | None,
    width: int | None,
    bias_std: float,
    blocks: models.Blocks | None,
) -> nn.Module:
    return models.create(
        name,
        num_classes,
        activation=activation,
        depth=depth,
        width=width,
        bias_init=jax.nn.initializers.normal(bias_std) if bias_std else None,
        blocks=blocks,
    )
