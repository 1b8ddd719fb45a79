"""Pruning by any criterion: all at once, or in steps that score the remaining weights again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks, programs, selection, shardings, trees
from eoi_jax._internal.arrays import native
from eoi_jax.typing import Array, LayoutOf, Mask, Params, Scores

__all__ = ["prune"]


def prune(
    score_fn: Callable[[Params], Scores],
    params: Params,
    density: Any,
    *,
    num_steps: int = 1,
    layout: LayoutOf | None = None,
) -> Mask:
    r"""Keep the weights with the largest scores, scoring again as the network gets sparser.

    Step :math:`r` of :math:`T` scores the remaining weights, with all others set to zero, and keeps
    the fraction :math:`d^{r/T}` of all weights. Removed weights stay removed. One step is
    ``masks.top_k(score_fn(params), density)``. Counts and ties are those of
    :func:`eoi_jax.masks.top_k`, over all kernels together.

    All steps run in one loop, compiled once for a ``score_fn`` and a number of steps, for all
    densities and parameters. Pass the same function again in later calls: a new lambda is compiled
    again. The compiled program is kept as long as the function exists. Arrays that the function
    closes over, such as a batch, are arguments of the program.

    Args:
        score_fn: ``(params) -> Scores``, a criterion with its other arguments bound.
        params: A pytree of arrays.
        density: The fraction of all kernels' weights to keep, in (0, 1].
        num_steps: How often to score and prune, at least 1.
        layout: ``(path, leaf) -> Layout``, so that the warning can name the empty layers of a
            stack; without it a stack is one kernel.

    Returns:
        The mask. If it leaves a layer without weights, a ``UserWarning`` names the layer.

    Raises:
        ValueError: If an argument is out of range, if ``score_fn`` does not return a tree of scores
            for ``params``, or if the score of a remaining weight is not finite (for a traced mask
            this check and the warning are not possible).

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax.criteria import magnitude
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [-3.0, 2.0]]), "bias": jnp.zeros(2)}
        >>> prune(magnitude, params, 0.5, num_steps=10)["kernel"].tolist()
        [[True, False], [True, False]]

    Reference:
        The counts of the steps are those of Tanaka, Kunin, Yamins and Ganguli, "Pruning neural
        networks without any data by iteratively conserving synaptic flow", NeurIPS 2020.
    """
    density = checks.density(density)
    num_steps = checks.integer(num_steps, low=1, name="num_steps")
    treedef, rest, arrays = _split(params)
    traced = _trace(score_fn, treedef, rest, arrays)
    _check_scores(traced.shapes, params)
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(traced.shapes))  # () of a dense leaf
    size = sum(math.prod(shape) for shape in shapes if shape)
    checks.integer(size, low=0, high=selection.MAX_SIZE, name="number of scores")

    numpy: Any = jnp if checks.is_traced(density) else np
    exponents = numpy.arange(1, num_steps + 1) / num_steps
    # The last exponent is 1, so the last count is that of masks.top_k.
    counts = selection.target_count(density**exponents, size).astype(np.int32)
    program = programs.of_function(_prune_to_counts, score_fn, static_argnums=(0, 1, 2))
    mask, failed = program(treedef, rest, shapes, traced.constants, arrays, counts)
    if not checks.is_traced(failed):
        if failed:
            raise ValueError(
                f"score_fn returned scores that are not finite in step {int(failed)} of "
                f"{num_steps}. Call it outside of prune, where a criterion tells the reason."
            )
        _warn_of_empty_layers(mask, layout)
    return mask


def _split(params: Params) -> tuple[Any, tuple[Any, ...], list[Any]]:
    """Split a tree into its structure, what jit cannot take (functions, say), and its arrays."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(native, params))
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    rest = tuple(None if a else leaf for leaf, a in zip(leaves, is_array, strict=True))
    return treedef, rest, [leaf if a else None for leaf, a in zip(leaves, is_array, strict=True)]


def _join(treedef: Any, rest: Sequence[Any], arrays: Sequence[Any]) -> Params:
    """Undo :func:`_split`."""
    leaves = [r if a is None else a for r, a in zip(rest, arrays, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def _trace(
    score_fn: Callable[[Params], Scores], treedef: Any, rest: Sequence[Any], arrays: list[Any]
) -> programs.Traced:
    """Trace a score function of the arrays of a tree."""
    return programs.Traced.of(lambda arrays: score_fn(_join(treedef, rest, arrays)), arrays)


def _prune_to_counts(
    score_fn: Callable[[Params], Scores],
    treedef: Any,
    rest: tuple[Any, ...],
    shapes: tuple[tuple[int, ...], ...],
    constants: list[Any],
    arrays: list[Any],
    counts: Array,
) -> tuple[Mask, Array]:
    """Prune to each count in turn; return the mask, and the first step with a bad score or 0."""
    with warnings.catch_warnings(action="ignore"):  # those that the first trace gave already
        traced = _trace(score_fn, treedef, rest, arrays)

    def step(r: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        kept, failed = carry
        masked = [
            jnp.where(mask, leaf, 0) if shape else leaf
            for mask, leaf, shape in zip(kept, arrays, shapes, strict=True)
        ]
        scores = jax.tree.leaves(traced(constants, masked))
        finite, ranked = jnp.array(True), []
        for score, mask, shape in zip(scores, kept, shapes, strict=True):
            if shape:
                score = shardings.like(score, mask)
                finite &= jnp.all(jnp.isfinite(score) | ~mask)
                ranked.append(jnp.where(mask, score, -jnp.inf))
        chosen = iter(selection.largest(ranked, counts[r]))
        kept = [
            shardings.like(next(chosen), mask) if shape else mask
            for mask, shape in zip(kept, shapes, strict=True)
        ]
        return kept, jnp.where((failed == 0) & ~finite, r + 1, failed)

    everything = [
        shardings.like(jnp.ones(shape, bool), leaf) if shape else jnp.array(True)
        for shape, leaf in zip(shapes, arrays, strict=True)
    ]
    kept, failed = jax.lax.fori_loop(0, len(counts), step, (everything, jnp.array(0)))
    kept = [
        shardings.like(mask, leaf) if shape else mask
        for mask, leaf, shape in zip(kept, arrays, shapes, strict=True)
    ]
    return jax.tree.unflatten(treedef, kept), failed


def _check_scores(scores: Scores, params: Params) -> None:
    """Require scores that fit their parameters."""
    trees.same_structure(scores, params, name="score_fn(params)", other_name="params")

    def check(path: Sequence[Any], score: Any, leaf: Any) -> None:
        fits = score.shape in ((), np.shape(leaf)) and jnp.issubdtype(score.dtype, jnp.floating)
        if not fits:
            name = trees.path_name(path)
            raise ValueError(
                f"score_fn(params)[{name}] has dtype {score.dtype} and shape {score.shape}, but "
                f"the leaf has the shape {np.shape(leaf)}. "
                "Return floats of the kernel's shape, or a scalar inf for a dense leaf."
            )

    jax.tree_util.tree_map_with_path(check, scores, params)


def _warn_of_empty_layers(mask: Mask, layout: LayoutOf | None) -> None:
    """Name the layers of which a mask leaves nothing."""
    empty = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if leaf.ndim and leaf.size:
            batch_axes = trees.layout(layout, path, leaf).batch_axes
            alive = np.asarray(jnp.any(leaf, axis=tuple(range(batch_axes, leaf.ndim))))
            name = trees.path_name(path)
            empty += [f"{name}{index or ''}" for index in np.argwhere(~alive).tolist()]
    if empty:
        more = f" and {len(empty) - 20} more" if len(empty) > 20 else ""
        warnings.warn(
            f"prune left nothing of {len(empty)} layers: {', '.join(empty[:20])}{more}. No signal "
            "passes them: take more steps, a higher density, or a density for each layer.",
            stacklevel=3,
        )
