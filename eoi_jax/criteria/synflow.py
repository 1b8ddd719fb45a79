"""The score of SynFlow: the flow through each weight of a network of non-negative weights.

Sums and products of non-negative numbers never cancel, so nothing here loses precision. But the
product over a thousand layers is far outside the range of any dtype. In a chain of layers, a factor
on one kernel multiplies the flow, and the score of each weight, by that factor. So the kernels of a
chain are scaled until the flow is about 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import masks
from eoi_jax._internal import checks, programs, shardings
from eoi_jax._internal.arrays import native
from eoi_jax._internal.kernel_tree import KernelTree
from eoi_jax.typing import Array, Params, Scores, Where

__all__ = ["synflow"]

_Total: TypeAlias = Callable[[list[Array], Array], Array]


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
    positively homogeneous networks, whose output doubles with their input: linear layers, ReLU,
    pooling, batch norm with fresh statistics in evaluation mode. Others are refused. Score a tanh
    network by the same network with identity activations, since the input of ones saturates tanh
    and layers collapse. Networks with SiLU, GELU, softmax or layer norm are refused too. Let
    ``apply_fn`` return logits, not log-probabilities.

    In a chain of layers, a factor on one kernel multiplies all scores by that factor. So where
    :math:`R` leaves the range of its dtype, kernels are scaled until it is about 1: a thousand
    layers are scored in float32, up to one factor common to all scores. A network with residual
    branches is no chain. There such scaling would change the scores, and a network that
    overflows float32 is refused: enable ``jax_enable_x64`` and pass float64 parameters.

    Call it through ``prune(lambda p: synflow(apply_fn, p, x), params, density, num_steps=100)``: in
    a single step, global scores of a deep network would leave some layers without weights.

    Args:
        apply_fn: ``(params, x) -> logits``.
        params: A pytree of arrays.
        x: An array or a :class:`jax.ShapeDtypeStruct`, of which only the shape and the floating
            dtype are used, for the input of ones; one example is enough.
        where: ``(path, leaf) -> bool``, which leaves are kernels.

    Returns:
        The scores, none negative. All are zero if no path of non-zero weights leads from input to
        output.

    Raises:
        ValueError: If ``where`` selects no leaf, if ``x`` is not floating, if the
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
    tree = KernelTree.of(params, where)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise checks.value_error(
            "x.dtype", x.dtype.name, "is outside the floating dtypes", "Give an input of floats."
        )
    ones = shardings.like(jnp.ones(x.shape, native(x).dtype), x)
    sizes = [checks.widened(jnp.abs(leaf)) for leaf in tree.kernels]
    unbiased = tree.without_biases()

    def total(kernels: list[Array], inputs: Array) -> Array:
        # The products are sums of non-negative terms; only coarse inputs would harm them.
        with jax.default_matmul_precision("highest"):
            return checks.widened(jnp.sum(apply_fn(unbiased.params(kernels), inputs)))

    return tree.scores(_carried_by_weights(total, sizes, ones), "synflow")


def _carried_by_weights(total: _Total, kernels: list[Array], ones: Array) -> list[Array]:
    """Return ``w * dR/dw`` of the flow ``R = total(kernels, ones)``, up to one common factor.

    ``kernels`` are non-negative, and ``total`` returns a float32 or wider scalar. A flow that
    cannot be used is an error, or NaN if it is being traced.
    """
    # One program: there are several hundred small operations around those of the network.
    traced = programs.Traced.of(functools.partial(_carried, total), kernels, ones)
    program = jax.jit(lambda *args: traced(*args))
    products, in_range, is_homogeneous, degree = program(traced.constants, kernels, ones)
    if not checks.is_traced(in_range):
        if not in_range:
            raise ValueError(
                f"apply_fn has a flow R outside the range of {products[0].dtype}, and is no chain "
                "of layers that could be scaled. Enable jax_enable_x64 and pass float64 params "
                "and x."
            )
        if not is_homogeneous:
            raise ValueError(
                f"apply_fn is not positively homogeneous: <x, dR/dx> / R = {float(degree):.4g} is "
                "not 1. Score the network with identity or ReLU activations, without softmax or "
                "layer norm, and with batch norm in evaluation mode."
            )
    return products


def _carried(
    total: _Total, kernels: list[Array], ones: Array
) -> tuple[list[Array], Array, Array, Array]:
    """Return what weights carry, whether it can be used in two respects, and the input's degree."""
    ones = shardings.replicated(ones, kernels)
    scales, is_scaled = _log2_scales(total, kernels, ones)
    kernels = _scale(kernels, scales)
    flow, (grads, input_grad) = jax.value_and_grad(total, (0, 1))(kernels, ones)
    # Nobody carries any of a flow of zero, though a gradient may overflow behind the gap.
    pairs = zip(kernels, grads, strict=True)
    products = [jnp.where(flow == 0, 0, jnp.abs(w * g)) for w, g in pairs]

    def degree(product: Array) -> Array:
        # Euler: a flow that is homogeneous of degree p in w has <w, dR/dw> = p R.
        return jnp.where(flow == 0, 1, jnp.sum(product.astype(flow.dtype)) / flow)

    tolerance = max(1e-3, 16 * float(jnp.finfo(ones.dtype).eps))
    input_degree = degree(ones * input_grad)
    is_homogeneous = jnp.abs(input_degree - 1) <= tolerance
    # Scaling is common to all weights in a chain alone: degree 1 for a kernel, L for a stack of
    # L layers. Of a residual branch it is the fraction of the flow that takes the branch.
    is_chain = jnp.array(True)
    for product in products:
        layers = np.cumprod([1, *product.shape[:-2]], dtype=np.float64).astype(flow.dtype)
        is_chain &= jnp.any(jnp.abs(degree(product) / layers - 1) <= tolerance)
    in_range = jnp.isfinite(flow) & (~is_scaled | is_chain)
    valid = in_range & is_homogeneous
    products = [jnp.where(valid, leaf, jnp.nan) for leaf in products]
    return products, in_range, is_homogeneous, input_degree


def _scale(kernels: Sequence[Array], log2_scales: Sequence[Array]) -> list[Array]:
    pairs = zip(kernels, log2_scales, strict=True)
    return [kernel * jnp.exp2(scale).astype(kernel.dtype) for kernel, scale in pairs]


def _log2_scales(total: _Total, kernels: list[Array], ones: Array) -> tuple[list[Array], Array]:
    """Find factors that bring the flow into range, and say whether it was out of range.

    Each kernel is divided by the growth it would have if its weights were all equal. What is left
    is one factor for all of them, found by bisection: pruned layers grow more than their mean
    weight tells. All layers of a chain exceed it by about the same, so with the flow, what flows
    from layer to layer comes into range. A stack shares one scale, which is why it is a real
    number: a power of two would move the flow of 1000 layers by 1000 bits.
    """
    scales = []
    for leaf in kernels:
        growth = jnp.mean(leaf) * math.sqrt(math.prod(leaf.shape[-2:]))
        scales.append(jnp.where(growth > 0, -jnp.log2(growth), 0.0))
    flow = total(kernels, ones)
    # A fifth of the exponents is left for what flows inside.
    limit = 2.0 ** (0.8 * jnp.finfo(flow.dtype).maxexp)
    is_out = ~((flow > 1 / limit) & (flow < limit))

    def scaled_flow(common: Array) -> Array:
        return total(_scale(kernels, [scale + common for scale in scales]), ones)

    def unfinished(state: tuple[Array, ...]) -> Array:
        _, _, _, step, found, tries = state
        return ~found & (step < 64) & (tries < 40)

    def bisect(state: tuple[Array, ...]) -> tuple[Array, ...]:
        common, low, high, step, _, tries = state
        # In reverse mode, which every network has whose scores can be taken.
        flow, slope = jax.value_and_grad(scaled_flow)(common)
        found = (flow > 1 / limit) & (flow < limit)
        is_high = ~(flow < limit)  # NaN too: it is infinity times zero
        low, high = jnp.where(is_high, low, common), jnp.where(is_high, common, high)
        is_between = jnp.isfinite(high - low)
        outward = common + jnp.where(is_high, -step, step)
        # Newton's step on the logarithm of the flow, which is linear, makes the flow 1.
        inside = common - jnp.log(flow) * flow / slope
        common = jnp.where(found, inside, jnp.where(is_between, (low + high) / 2, outward))
        return common, low, high, jnp.where(is_between, step, 2 * step), found, tries + 1

    def search() -> list[Array]:
        zero = jnp.zeros((), flow.dtype)
        start: Any = (zero, zero - jnp.inf, zero + jnp.inf, zero + 0.125, zero > 0, jnp.array(0))
        common, low, _, _, found, _ = jax.lax.while_loop(unfinished, bisect, start)
        # No factor helps a flow of zero, but at the lower end it is zero and not NaN.
        common = jnp.where(found, common, jnp.where(jnp.isfinite(low), low, 0))
        return [(scale + common).astype(flow.dtype) for scale in scales]

    def leave() -> list[Array]:
        return [jnp.zeros((), flow.dtype) for _ in scales]

    return jax.lax.cond(is_out, search, leave), is_out
