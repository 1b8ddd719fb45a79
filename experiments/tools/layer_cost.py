"""The size and cost of one layer of a sparse network: weights, rotations, operations, bytes."""

from __future__ import annotations

import collections
import dataclasses
import math

from eoi_jax import theory
from eoi_jax._internal import conv

__all__ = ["Layer"]

WEIGHT_BYTES = 4  # float32
MASK_BYTES = 1  # a bool; bit-packed it would be an eighth
INDEX_BYTES = 4  # int32, one for each value


@dataclasses.dataclass(frozen=True)
class Layer:
    """One kernel, or a stack of kernels of one shape.

    Attributes:
        name: Path of the layer in the network.
        shape: Shape of one kernel, ``(*window, inputs / groups, outputs)``.
        groups: Into how many groups its channels are divided.
        positions: How often one example applies the kernel: 1, or the pixels of the output.
        counts: Weights that the budget gives to each layer of the stack, or all of them.
        dense: Whether the layer is not pruned: it keeps all its weights, and no rotation draws it.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    positions: int
    counts: tuple[int, ...]
    dense: bool = False

    @property
    def num_layers(self) -> int:
        """Layers in the stack, 1 for a kernel of its own."""
        return len(self.counts)

    @property
    def size(self) -> int:
        """Weights of all layers of the stack."""
        return self.num_layers * math.prod(self.shape)

    @property
    def nonzeros(self) -> int:
        """Weights that the budget gives to all layers of the stack."""
        return sum(self.counts)

    @property
    def density(self) -> float:
        """Fraction of the weights that the budget gives."""
        return self.nonzeros / self.size

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of one orthogonal matrix: the whole kernel, or a group's center tap."""
        *_, inputs, outputs = self.shape
        return inputs, outputs // self.groups

    @property
    def min_count(self) -> int:
        """Fewest non-zeros of one exactly orthogonal kernel: ``groups * min(inputs, outputs)``."""
        return self.groups * min(self.matrix)

    @property
    def min_density(self) -> float:
        """Smallest density of an exactly orthogonal kernel."""
        return self.min_count / math.prod(self.shape)

    @property
    def num_infeasible(self) -> int:
        """Layers of the stack that get fewer weights than an exactly orthogonal kernel has."""
        return sum(count < self.min_count for count in self.counts)

    @property
    def rotations(self) -> int | None:
        """Expected rotations that draw all layers of the stack; None if a layer is infeasible."""
        if self.dense:
            return 0
        if self.num_infeasible:
            return None
        size = max(self.matrix)
        return sum(
            layers * self.groups * theory.num_rotations(size, self._drawn(count))
            for count, layers in collections.Counter(self.counts).items()
        )

    def _drawn(self, count: int) -> float:
        """Density of the matrices that eoi.dense and eoi.conv draw for so many weights."""
        density = count / math.prod(self.shape)
        if len(self.shape) == 2:
            return density
        drawn: float = conv.drawn_density(density, math.prod(self.shape[:-2]), max(self.matrix))
        return drawn

    @property
    def flops(self) -> int:
        """Floating-point operations of one example, all weights: 2 for each multiply-add."""
        return 2 * self.positions * self.size

    @property
    def masked_flops(self) -> int:
        """The same of the budget's weights alone."""
        return 2 * self.positions * self.nonzeros

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights kept dense, in float32."""
        return WEIGHT_BYTES * self.size

    @property
    def mask_bytes(self) -> int:
        """Bytes of the mask, one bool for each weight of a layer that is pruned."""
        return 0 if self.dense else MASK_BYTES * self.size

    @property
    def sparse_bytes(self) -> int:
        """Bytes of the budget's weights in float32, each with an int32 index if pruned."""
        return self.weight_bytes if self.dense else (WEIGHT_BYTES + INDEX_BYTES) * self.nonzeros
