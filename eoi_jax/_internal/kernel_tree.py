"""The kernels of a parameter tree as a list, for criteria to differentiate, replace and score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks, shardings, trees
from eoi_jax.typing import Array, Params, Scores, Where

_BIAS_NAMES = ("bias", "b", "offset")


class KernelTree(NamedTuple):
    """A parameter tree taken apart."""

    treedef: Any
    paths: list[Any]
    leaves: list[Any]
    is_kernel: list[bool]

    @classmethod
    def of(cls, params: Params, where: Where) -> KernelTree:
        """Take a tree apart; ``where`` selects its kernels."""
        params = trees.arrays(params)
        paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = [path for path, _ in paths_and_leaves]
        leaves = [leaf for _, leaf in paths_and_leaves]
        return cls(treedef, paths, leaves, jax.tree.leaves(trees.kernels(params, where)))

    @property
    def kernels(self) -> list[Array]:
        """The kernels in the order of the tree."""
        pairs = zip(self.leaves, self.is_kernel, strict=True)
        return [jnp.asarray(leaf) for leaf, is_kernel in pairs if is_kernel]

    def params(self, kernels: Sequence[Array]) -> Params:
        """Build the tree with other kernels in their places."""
        rest = iter(kernels)
        pairs = zip(self.leaves, self.is_kernel, strict=True)
        leaves = [next(rest) if is_kernel else leaf for leaf, is_kernel in pairs]
        return jax.tree.unflatten(self.treedef, leaves)

    def scores(self, kernel_scores: Sequence[Array], criterion: str) -> Scores:
        """Build a tree of finite scores: ``inf`` for a leaf that is no kernel."""
        rest, leaves = iter(kernel_scores), []
        for path, leaf, is_kernel in zip(self.paths, self.leaves, self.is_kernel, strict=True):
            if not is_kernel:
                leaves.append(jnp.array(jnp.inf, jnp.float32))
                continue
            score = next(rest)
            if not checks.is_traced(score) and not jnp.isfinite(score).all():
                raise ValueError(
                    f"{criterion}'s scores of {trees.path_name(path)} are not finite. "
                    "Look for infinite or NaN weights, inputs or losses; scale the loss down if "
                    "its gradient overflows."
                )
            leaves.append(shardings.like(checks.widened(score), leaf))
        return jax.tree.unflatten(self.treedef, leaves)

    def without_biases(self) -> KernelTree:
        """Set every bias to zero."""
        pairs = zip(self.paths, self.leaves, strict=True)
        return self._replace(
            leaves=[jnp.zeros_like(leaf) if _is_bias(path, leaf) else leaf for path, leaf in pairs]
        )


def _is_bias(path: Sequence[Any], leaf: Any) -> bool:
    """Whether a leaf's name is that of a bias; ``value`` is where NNX keeps the array."""
    names = [name for name in trees.path_name(path).split("/") if name != "value"]
    return names[-1:] != [] and names[-1] in _BIAS_NAMES and hasattr(leaf, "dtype")
