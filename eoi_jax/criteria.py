r"""Criteria: how much each weight of a parameter tree matters before any training.

A tree of **scores** has the structure of the parameters that it judges. For a kernel it holds an
array of the kernel's shape, and **larger means keep**; every other leaf (biases, norms, statistics)
has the scalar ``inf``: it stays dense. Scores become a mask by :func:`eoi_jax.masks.top_k`, or by
:func:`prune`, which scores again as the network gets sparser.

A network is a function and a pytree, whatever wrote it. Only kernels are differentiated; all other
leaves reach the function as they are, so a Linen dictionary with its batch statistics is scored
whole. Scores are float32 or wider. They may be computed inside :func:`jax.jit`, once compiled for
many batches; where they can be read, scores that are not finite are an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import _checks, _flow, _pruning, _tree_checks, masks
from eoi_jax.typing import Array, LayoutOf, Mask, Params, Scores, Where

__all__ = ["grasp", "invert", "magnitude", "prune", "random", "snip", "synflow"]

_BIAS_NAMES = ("bias", "b", "offset")


def magnitude(params: Params, *, where: Where = masks.is_kernel) -> Scores:
    r"""Score each weight by its size, :math:`|\theta|`.

    Args:
        params: A pytree of arrays.
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The scores.

    Raises:
        ValueError: If the default ``where`` selects no leaf, or if a weight is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> scores = magnitude({"kernel": jnp.array([[0.5, -2.0]]), "bias": jnp.ones(2)})
        >>> scores["kernel"].tolist(), scores["bias"].tolist()
        ([[0.5, 2.0]], inf)
    """
    tree = _Kernels(params, where)
    return tree.scores([jnp.abs(leaf) for leaf in tree.kernels], "magnitude")


def random(key: Array, params: Params, *, where: Where = masks.is_kernel) -> Scores:
    r"""Score each weight by an independent draw, uniform in [0, 1).

    Kept across all kernels, such scores give every layer about the same density;
    :func:`eoi_jax.masks.random` gives it exactly.

    Args:
        key: A random key.
        params: A pytree of arrays.
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The scores.

    Raises:
        ValueError: If the default ``where`` selects no leaf.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> random(jax.random.key(0), {"kernel": jnp.ones((3, 2))})["kernel"].shape
        (3, 2)
    """
    tree = _Kernels(params, where)
    keys = jax.random.split(key, len(tree.kernels))
    pairs = zip(keys, tree.kernels, strict=True)
    draws = [jax.random.uniform(k, leaf.shape, jnp.float32) for k, leaf in pairs]
    return tree.scores(draws, "random")


def snip(
    loss_fn: Callable[..., Array], params: Params, *batch: Any, where: Where = masks.is_kernel
) -> Scores:
    r"""Score each weight by what the loss would change without it, to first order (SNIP).

    .. math:: s = \left| \theta \odot \partial L / \partial \theta \right|.

    The loss is the caller's: a cross-entropy takes log-softmax of the logits first. Released code
    that gives bare logits to a negative log-likelihood scores another function.

    Args:
        loss_fn: ``(params, *batch) -> scalar``.
        params: A pytree of arrays.
        *batch: What the loss takes beside the parameters.
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The scores.

    Raises:
        ValueError: If the default ``where`` selects no leaf, if the loss is no real scalar, or if
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
    tree = _Kernels(params, where)
    grads = jax.grad(lambda kernels: _loss(loss_fn, tree.params(kernels), batch))(tree.kernels)
    products = [jnp.abs(_wide(w) * g) for w, g in zip(tree.kernels, grads, strict=True)]
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

    To first order, removing a weight lowers :math:`g^\top g` by :math:`2 s`, so the largest are
    kept: the original release removes the top of :math:`-\theta \odot H g`, which is the same. The
    release of the EOI paper has the sign flipped and removes what this keeps. The loss is the
    caller's; the method divides the logits by a temperature of 200 before the cross-entropy.

    Args:
        loss_fn: ``(params, *batch) -> scalar``; with ``micro_batch_size`` a mean over examples.
        params: A pytree of arrays.
        *batch: What the loss takes beside the parameters; with ``micro_batch_size`` arrays, or
            pytrees of them, whose leading axes number the examples.
        micro_batch_size: How many examples are differentiated at a time, a divisor of their
            number; all by default. Gradient and product are averaged over micro-batches in two
            passes, so the memory is that of one micro-batch and the scores are those of the whole
            batch. (A loss that mixes examples, as batch norm in training mode does, has another
            value for each micro-batch.)
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The scores, of either sign.

    Raises:
        ValueError: If the default ``where`` selects no leaf, if the loss is no real scalar, if the
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
    tree = _Kernels(params, where)
    parts = None
    if micro_batch_size is not None:
        size = _tree_checks.micro_batch_size(micro_batch_size, batch)
        parts = jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, size, *leaf.shape[1:])), batch)
    grad = jax.grad(lambda kernels, part: _loss(loss_fn, tree.params(kernels), part))

    def mean(fn: Callable[[Any], list[Array]]) -> list[Array]:
        """Average over micro-batches, in float32 or wider."""
        if parts is None:
            return fn(batch)

        def add(total: list[Array], part: Any) -> tuple[list[Array], None]:
            return [t + leaf for t, leaf in zip(total, fn(part), strict=True)], None

        zeros = [jnp.zeros_like(_wide(leaf)) for leaf in tree.kernels]
        total, _ = jax.lax.scan(add, zeros, parts)
        return [leaf / len(jax.tree.leaves(parts)[0]) for leaf in total]

    g = mean(lambda part: grad(tree.kernels, part))
    # A tangent has the dtype of its kernel.
    g = [leaf.astype(kernel.dtype) for leaf, kernel in zip(g, tree.kernels, strict=True)]
    hg = mean(lambda part: jax.jvp(lambda k: grad(k, part), (tree.kernels,), (g,))[1])
    return tree.scores([_wide(w) * h for w, h in zip(tree.kernels, hg, strict=True)], "grasp")


def synflow(
    apply_fn: Callable[[Params, Array], Array],
    params: Params,
    x: Any,
    *,
    where: Where = masks.is_kernel,
) -> Scores:
    r"""Score each weight by the flow through it, without data (SynFlow).

    .. math:: s = \left|\theta \odot \frac{\partial R}{\partial |\theta|}\right|, \qquad
        R = \sum_k f(\mathbf{1};\, |\theta|)_k,

    with biases (leaves named ``bias``, ``b`` or ``offset``) set to zero. The method is defined for
    networks whose output doubles with their input: linear layers, ReLU, pooling, batch norm with
    fresh statistics in evaluation mode. Others are refused. Score a tanh network by the same
    network with identity activations, for the input of ones saturates tanh and layers collapse;
    SiLU, GELU, softmax and layer norm do not qualify either. Sum logits, not log-probabilities.

    In a chain of layers, a factor on one kernel multiplies all scores by that factor. So where
    :math:`R` leaves the range of its dtype, kernels are scaled until it is about 1: a thousand
    layers are scored in float32, up to one factor common to all scores. A network with residual
    branches is no chain. There such scaling would change the scores, and a network that
    overflows float32 is refused: enable ``jax_enable_x64`` and pass float64 parameters.

    Run it by ``prune(lambda p: synflow(apply_fn, p, x), params, density, num_steps=100)``: all
    at once, global scores of a deep network empty layers.

    Args:
        apply_fn: ``(params, x) -> logits``.
        params: A pytree of arrays.
        x: The input whose shape and floating dtype the ones take, an array or a
            :class:`jax.ShapeDtypeStruct`; one example is enough.
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The scores, none negative. All are zero if no path of non-zero weights leads from input to
        output.

    Raises:
        ValueError: If the default ``where`` selects no leaf, if ``x`` is not floating, if the
            network is not positively homogeneous, or if a network that is no chain leaves the
            range of its dtype. Where values are being traced, scores are NaN instead.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": {"kernel": jnp.array([[1.0, -2.0]])}, "b": {"kernel": jnp.ones((2, 1))}}
        >>> apply_fn = lambda params, x: x @ params["a"]["kernel"] @ params["b"]["kernel"]
        >>> synflow(apply_fn, params, jnp.ones((1, 1)))["b"]["kernel"].tolist()
        [[1.0], [2.0]]

    Reference:
        Tanaka, Kunin, Yamins and Ganguli, "Pruning neural networks without any data by
        iteratively conserving synaptic flow", NeurIPS 2020.
    """
    tree = _Kernels(params, where)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise _checks.fail(
            "x.dtype", x.dtype.name, "is outside the floating dtypes", "Give an input of floats."
        )
    ones = jnp.ones(x.shape, x.dtype)
    sizes = [jnp.abs(_wide(leaf)) for leaf in tree.kernels]
    unbiased = tree.without_biases()

    def total(kernels: list[Array], inputs: Array) -> Array:
        # The products are sums of non-negative terms; only coarse inputs would harm them.
        with jax.default_matmul_precision("highest"):
            return _wide(jnp.sum(apply_fn(unbiased.params(kernels), inputs)))

    return tree.scores(_flow.carried(total, sizes, ones), "synflow")


def invert(scores: Scores) -> Scores:
    """Reverse the order of scores, a sanity control: a good criterion inverted should do harm.

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


def prune(
    score_fn: Callable[[Params], Scores],
    params: Params,
    density: Any,
    *,
    num_steps: int = 1,
    layout: LayoutOf | None = None,
) -> Mask:
    r"""Keep the weights of the largest scores, scoring again as the network gets sparser.

    Step :math:`r` of :math:`T` scores the weights that are left, all others being zero, and keeps
    the fraction :math:`d^{r/T}` of all weights; what was removed stays removed. One step is
    ``masks.top_k(score_fn(params), density)``. Counts and ties are those of
    :func:`eoi_jax.masks.top_k`, over all kernels together.

    All steps run in one loop, compiled once for a ``score_fn`` and a number of steps, whatever the
    density or the parameters: keep the function if you call again, a new lambda compiles anew.

    Args:
        score_fn: ``(params) -> Scores``, a criterion with its other arguments bound.
        params: A pytree of arrays.
        density: The fraction of all kernels' weights to keep, in (0, 1].
        num_steps: How often to score and prune, at least 1.
        layout: ``(path, leaf) -> Layout``, to name the layers of a stack that became empty;
            without it a stack is one kernel.

    Returns:
        The mask. If it leaves a layer without weights, a ``UserWarning`` names the layer.

    Raises:
        ValueError: If an argument is out of range, if ``score_fn`` returns no tree of scores of
            ``params``, or if a score of a weight that is left is not finite (of a traced mask
            neither this nor the warning can be told).

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [-3.0, 2.0]]), "bias": jnp.zeros(2)}
        >>> prune(magnitude, params, 0.5, num_steps=10)["kernel"].tolist()
        [[True, False], [True, False]]

    Reference:
        The schedule is that of Tanaka et al., NeurIPS 2020 (see :func:`synflow`).
    """
    return _pruning.prune(score_fn, params, density, num_steps, layout)


class _Kernels:
    """The kernels of a parameter tree, and the tree with other arrays in their place."""

    def __init__(self, params: Params, where: Where) -> None:
        paths_and_leaves, self.treedef = jax.tree_util.tree_flatten_with_path(params)
        self.paths = [path for path, _ in paths_and_leaves]
        self.leaves = [leaf for _, leaf in paths_and_leaves]
        found = _tree_checks.kernels(params, where, required=where is masks.is_kernel)
        self.index = [i for i, is_kernel in enumerate(jax.tree.leaves(found)) if is_kernel]
        self.kernels = [jnp.asarray(self.leaves[i]) for i in self.index]

    def params(self, kernels: Sequence[Array]) -> Params:
        """Put kernels in the places of those of the tree."""
        leaves = list(self.leaves)
        for i, kernel in zip(self.index, kernels, strict=True):
            leaves[i] = kernel
        return jax.tree.unflatten(self.treedef, leaves)

    def scores(self, scores: Sequence[Array], criterion: str) -> Scores:
        """Build a tree of scores: ``inf`` for a leaf that is no kernel."""
        leaves = [jnp.array(jnp.inf, jnp.float32) for _ in self.leaves]
        for i, score in zip(self.index, scores, strict=True):
            if not _checks.is_traced(score) and not bool(jnp.all(jnp.isfinite(score))):
                name = _tree_checks.path_name(self.paths[i])
                raise ValueError(
                    f"{criterion}'s scores of {name} are not finite. "
                    "Look for infinite or NaN weights, inputs or losses; scale the loss down if "
                    "its gradient overflows."
                )
            leaves[i] = _wide(score)
        return jax.tree.unflatten(self.treedef, leaves)

    def without_biases(self) -> _Kernels:
        """Copy with every bias set to zero."""
        other = copy.copy(self)
        other.leaves = [
            jnp.zeros_like(leaf) if _is_bias(path, leaf) else leaf
            for path, leaf in zip(self.paths, self.leaves, strict=True)
        ]
        return other


def _is_bias(path: Sequence[Any], leaf: Any) -> bool:
    """Whether a leaf's name is that of a bias; ``value`` is where NNX keeps the array."""
    names = [name for name in _tree_checks.path_name(path).split("/") if name != "value"]
    return names[-1:] != [] and names[-1] in _BIAS_NAMES and hasattr(leaf, "dtype")


def _wide(values: Any) -> Array:
    """Convert to float32, wider floats stay."""
    return jnp.asarray(values, jnp.promote_types(jnp.result_type(values), jnp.float32))


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
