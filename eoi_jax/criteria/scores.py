"""Scores from one evaluation of the network: magnitude, random, SNIP and GraSP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import masks
from eoi_jax._internal import checks, shardings
from eoi_jax._internal.arrays import native
from eoi_jax._internal.derivatives import hessian_product
from eoi_jax._internal.kernel_tree import KernelTree
from eoi_jax._internal.keys import threefry_key
from eoi_jax.typing import Array, Params, Scores, Where

__all__ = ["grasp", "invert", "magnitude", "random", "snip"]


def magnitude(params: Params, *, where: Where = masks.is_kernel) -> Scores:
    r"""Score each weight by its size, :math:`|\theta|`.

    Args:
        params: A pytree of arrays.
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The scores.

    Raises:
        ValueError: If ``where`` selects no leaf, or if a weight is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> scores = magnitude({"kernel": jnp.array([[0.5, -2.0]]), "bias": jnp.ones(2)})
        >>> scores["kernel"].tolist(), scores["bias"].tolist()
        ([[0.5, 2.0]], inf)

    Reference:
        Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural
        Networks", NeurIPS 2015.
    """
    tree = KernelTree.of(params, where)
    return tree.scores([jnp.abs(leaf) for leaf in tree.kernels], "magnitude")


def random(key: Array, params: Params, *, where: Where = masks.is_kernel) -> Scores:
    r"""Score each weight by an independent draw, uniform in [0, 1).

    Compared across all kernels, such scores give every layer about the same density;
    :func:`eoi_jax.masks.random` gives every layer exactly the same density.

    Args:
        key: A random key.
        params: A pytree of arrays.
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The scores.

    Raises:
        ValueError: If ``where`` selects no leaf.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> random(jax.random.key(0), {"kernel": jnp.ones((3, 2))})["kernel"].shape
        (3, 2)

    Reference:
        Liu et al., "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive
        Baseline for Sparse Training", ICLR 2022.
    """
    tree = KernelTree.of(params, where)
    keys = jax.random.split(threefry_key(key), len(tree.kernels))
    pairs = zip(keys, tree.kernels, strict=True)
    draws = [jax.random.uniform(k, leaf.shape, jnp.float32) for k, leaf in pairs]
    return tree.scores(draws, "random")


def snip(
    loss_fn: Callable[..., Array], params: Params, *batch: Any, where: Where = masks.is_kernel
) -> Scores:
    r"""Score each weight by the change of the loss without it, to first order (SNIP).

    .. math:: s = \left| \theta \odot \partial L / \partial \theta \right|.

    The caller provides the loss. A cross-entropy has to apply log-softmax to the logits; released
    code that passes the logits directly to a negative log-likelihood scores another function.

    Args:
        loss_fn: ``(params, *batch) -> scalar``.
        params: A pytree of arrays.
        *batch: The other arguments of the loss.
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The scores.

    Raises:
        ValueError: If ``where`` selects no leaf, if the loss is no real scalar, or if
            a score is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda params, x: jnp.sum(x @ params["kernel"])
        >>> snip(loss_fn, {"kernel": jnp.array([[1.0], [-3.0]])}, jnp.ones((2, 2)))
        {'kernel': Array([[2.],
               [6.]], dtype=float32)}

    Reference:
        Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection
        Sensitivity", ICLR 2019.
    """
    tree, batch = KernelTree.of(params, where), jax.tree.map(native, batch)
    with shardings.explicit_mesh(tree.leaves):
        grads = jax.grad(lambda kernels: _loss(loss_fn, tree.params(kernels), batch))(tree.kernels)
    products = [jnp.abs(checks.widened(w) * g) for w, g in zip(tree.kernels, grads, strict=True)]
    return tree.scores(products, "snip")


def grasp(
    loss_fn: Callable[..., Array],
    params: Params,
    *batch: Any,
    micro_batch_size: int | None = None,
    where: Where = masks.is_kernel,
) -> Scores:
    r"""Score each weight by the gradient flow that would be lost without it (GraSP).

    .. math:: s = \theta \odot H g, \qquad g = \nabla L, \quad H = \nabla^2 L.

    To first order, removing a weight lowers :math:`g^\top g` by :math:`2 s`, so the weights with
    the largest scores are kept. The original release removes the weights with the largest
    :math:`-\theta \odot H g`, which is the same. The release of the EOI paper has the opposite sign
    and removes the weights that this function keeps. The caller provides the loss; the published
    method divides the logits by a temperature of 200 before the cross-entropy.

    Args:
        loss_fn: ``(params, *batch) -> scalar``; with ``micro_batch_size`` a mean over examples.
        params: A pytree of arrays.
        *batch: The other arguments of the loss; with ``micro_batch_size`` arrays, or pytrees of
            arrays, whose leading axis is that of the examples.
        micro_batch_size: How many examples are differentiated at a time, a divisor of their
            number; all by default. Gradient and product are averaged over micro-batches in two
            passes, so the memory is that of one micro-batch and the scores are those of the whole
            batch. (A loss that mixes examples, as batch norm in training mode does, has another
            value for each micro-batch.)
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The scores, of either sign.

    Raises:
        ValueError: If ``where`` selects no leaf, if the loss is no real scalar, if the
            micro-batches do not divide the examples, or if a score is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2) / 2
        >>> params = {"kernel": jnp.array([[1.0], [-2.0]])}
        >>> grasp(loss_fn, params, jnp.array([[2.0, 0.0], [0.0, 2.0]]), micro_batch_size=1)
        {'kernel': Array([[ 4.],
               [16.]], dtype=float32)}

    Reference:
        Wang, Zhang and Grosse, "Picking Winning Tickets Before Training by Preserving Gradient
        Flow", ICLR 2020.
    """
    tree, batch = KernelTree.of(params, where), jax.tree.map(native, batch)
    parts = None
    if micro_batch_size is not None:
        size = _micro_batch_size(micro_batch_size, batch)
        parts = jax.tree.map(functools.partial(_in_parts, size=size), batch)
    grad = jax.grad(lambda kernels, part: _loss(loss_fn, tree.params(kernels), part))

    def mean(fn: Callable[[Any], list[Array]]) -> list[Array]:
        """Average over micro-batches, in float32 or wider."""
        if parts is None:
            return fn(batch)

        def add(total: list[Array], part: Any) -> tuple[list[Array], None]:
            return [t + leaf for t, leaf in zip(total, fn(part), strict=True)], None

        zeros = [jnp.zeros_like(checks.widened(leaf)) for leaf in tree.kernels]
        total, _ = jax.lax.scan(add, zeros, parts)
        return [leaf / len(jax.tree.leaves(parts)[0]) for leaf in total]

    with shardings.explicit_mesh(tree.leaves):
        g = mean(lambda part: grad(tree.kernels, part))
        # A tangent has the dtype of its kernel.
        g = [leaf.astype(kernel.dtype) for leaf, kernel in zip(g, tree.kernels, strict=True)]
        hg = mean(lambda part: hessian_product(lambda k: grad(k, part), tree.kernels, g))
    return tree.scores(
        [checks.widened(w) * h for w, h in zip(tree.kernels, hg, strict=True)], "grasp"
    )


def invert(scores: Scores) -> Scores:
    """Reverse the order of scores, as a control: a good criterion should do worse when inverted.

    Args:
        scores: A tree of scores.

    Returns:
        The scores with their signs changed; dense leaves stay dense.

    Example:
        >>> import jax.numpy as jnp
        >>> inverted = invert({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array(jnp.inf)})
        >>> inverted["kernel"].tolist(), inverted["bias"].tolist()
        ([[-1.0, 2.0]], inf)

    Reference:
        Frankle, Dziugaite, Roy and Carbin, "Pruning Neural Networks at Initialization: Why Are We
        Missing the Mark?", ICLR 2021.
    """
    return jax.tree.map(lambda leaf: -leaf if np.ndim(leaf) else leaf, scores)


def _loss(loss_fn: Callable[..., Array], params: Params, batch: Sequence[Any]) -> Array:
    loss = loss_fn(params, *batch)
    is_array = isinstance(loss, jax.Array)
    if not (is_array and loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating)):
        found = f"shape {loss.shape}, dtype {loss.dtype}" if is_array else type(loss).__name__
        raise ValueError(
            f"loss_fn returned {found}, outside the real scalars. "
            "Return the mean over the examples alone, without auxiliary output."
        )
    return loss


def _in_parts(leaf: Any, size: int) -> Array:
    """Divide the examples of an array into micro-batches."""
    # An axis of examples that is divided among devices is none of the axes that a scan may slice.
    return jnp.reshape(shardings.unsharded(leaf), (-1, size, *np.shape(leaf)[1:]))


def _micro_batch_size(value: Any, batch: Any) -> int:
    """Accept a divisor of the number of examples, which all arrays of a batch have in front."""
    size = checks.integer(value, low=1, name="micro_batch_size")
    leading = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(leading) != 1 or leading == {()}:
        raise ValueError(
            f"batch has arrays with the leading axes {sorted(leading)}, but all need the same "
            "number of examples. Bind other arguments to the loss, or leave micro_batch_size=None."
        )
    [(examples,)] = leading
    if examples == 0 or examples % size:
        raise checks.value_error(
            "micro_batch_size",
            size,
            f"is outside the divisors of {examples} examples",
            "Give a divisor, or drop examples.",
        )
    return size
