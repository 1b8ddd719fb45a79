"""Dense networks, narrower or shallower, with as many weights as a sparse network keeps."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

from experiments import models
from experiments.config import Train
from experiments.tools.plan import plan

__all__ = ["dense_of_equal_size", "size_of"]

_FIELDS = ("depth", "width")
_TOLERANCE = 0.01


@functools.lru_cache(maxsize=1024)
def size_of(model: str, depth: int | None = None, width: int | None = None) -> int:
    """Return the number of weights of all kernels that a network's sparse versions prune.

    Args:
        model: Name of the network.
        depth: Its depth; default: the network's.
        width: Its width; default: the network's.
    """
    network = models.create(model, depth=depth, width=width)
    all_kept = plan(network, models.input_shape(model), 1.0, where=models.where(model))
    return all_kept.total("size", pruned=True)


def dense_of_equal_size(
    config: Train, field: Literal["depth", "width"], options: Sequence[int]
) -> Train:
    """Return a dense network with as many weights as a sparse one keeps, to one percent."""
    target = config.density * size_of(config.model, config.depth, config.width)

    def size(option: int) -> int:
        depth, width = (option if field == name else getattr(config, name) for name in _FIELDS)
        return size_of(config.model, depth, width)

    # Sizes grow: the closest is on either side of where the target would be.
    place = bisect.bisect_left(options, target, key=size)
    best = min(
        options[max(place - 1, 0) : place + 1], key=lambda option: abs(size(option) - target)
    )
    miss = abs(size(best) / target - 1)
    if miss > _TOLERANCE:
        raise ValueError(
            f"{field}={best}, the best of the options, has {miss:.1%} more or less weights than "
            f"density={config.density:g} keeps, and one percent is allowed. Choose another density."
        )
    dense = dataclasses.replace(config, method="dense", density=1.0)
    return dataclasses.replace(dense, **{field: best})  # type: ignore[arg-type]
