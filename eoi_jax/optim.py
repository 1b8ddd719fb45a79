r"""Optax transformations that keep masked weights at exactly zero while a network trains.

Masking gradients is not enough: weight decay, momentum from before a mask changed, and optimizers
that mix the entries of a kernel (Muon) or average weights (schedule-free) change a weight whose
gradient is zero. So wrap the whole optimizer, outermost, in :func:`static_sparse`.
:func:`mask_updates` only multiplies updates by the mask, for a chain that you write.

Both keep the mask in their state. The mask is saved and restored with the rest of the optimizer,
``optax.tree.get(state, "mask")`` reads it, ``optax.tree.set(state, mask=mask)`` replaces it, and
one compiled step serves every mask of the same shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eoi_jax import masks
from eoi_jax._internal import checks, trees
from eoi_jax._internal.masked_state import (
    is_placeholder,
    is_probe,
    mask_copies,
    masked_state_resetter,
    with_masked_arguments,
    zero_masked_params,
)
from eoi_jax.typing import Array, LayoutOf, Mask, MaskOf, Params

__all__ = [
    "MaskUpdatesState",
    "ScaleByDensityState",
    "StaticSparseState",
    "mask_updates",
    "scale_by_density",
    "static_sparse",
]


class MaskUpdatesState(NamedTuple):
    """The state of :func:`mask_updates`.

    Attributes:
        mask: The mask, of the structure of the parameters.
    """

    mask: Mask


class StaticSparseState(NamedTuple):
    """The state of :func:`static_sparse`.

    Attributes:
        mask: The mask, of the structure of the parameters.
        inner_state: The state of the optimizer inside.
    """

    mask: Mask
    inner_state: optax.OptState


class ScaleByDensityState(NamedTuple):
    """The state of :func:`scale_by_density`.

    Attributes:
        factors: The factor of each leaf, in a tree of the structure of the parameters.
    """

    factors: Params


def mask_updates(mask: Mask | MaskOf) -> optax.GradientTransformation:
    r"""Set the updates of masked weights to zero, element by element.

    :math:`u \leftarrow M \odot u`; an infinite or NaN update of a masked weight becomes 0 as well.
    (:func:`optax.masked` takes one boolean for each leaf, so it cannot mask single weights.) A
    masked weight that is not zero does not change: use :func:`static_sparse` to guarantee that
    masked weights are zero.

    Args:
        mask: A mask of the parameters' structure, or a function that makes a mask from the
            parameters, such as :func:`eoi_jax.masks.support`: ``init`` calls it.

    Returns:
        A transformation whose state is a :class:`MaskUpdatesState`.

    Raises:
        ValueError: From ``init`` if the mask does not fit the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> params = {"kernel": jnp.array([[0.0, 2.0]])}
        >>> tx = optax.chain(optax.sgd(0.5), mask_updates({"kernel": params["kernel"] != 0}))
        >>> updates, _ = tx.update({"kernel": jnp.array([[4.0, 4.0]])}, tx.init(params))
        >>> updates["kernel"].tolist()
        [[0.0, -2.0]]
    """

    def init(params: Params) -> MaskUpdatesState:
        return MaskUpdatesState(_mask_of(mask, params))

    def update(
        updates: optax.Updates, state: MaskUpdatesState, params: Params | None = None
    ) -> tuple[optax.Updates, MaskUpdatesState]:
        del params
        return masks.apply(state.mask, updates), state

    return optax.GradientTransformation(init, update)


def static_sparse(
    inner: optax.GradientTransformation | optax.MultiSteps, mask: Mask | MaskOf
) -> optax.GradientTransformationExtraArgs:
    r"""Keep masked weights at exactly 0, with any optimizer inside.

    With :math:`M` the mask, :math:`w` the weights, :math:`g` their gradients and :math:`s` the
    inner state, a step is

    .. math::

        u, s \leftarrow \mathrm{inner}(M \odot g,\; P(s),\; M \odot w), \qquad
        s \leftarrow P(s), \qquad
        u \leftarrow M \odot u - (1 - M) \odot w .

    So :math:`w + u` is 0 outside the mask after each step, even if something else made :math:`w`
    non-zero there (an old checkpoint, an average of weights). Values outside the mask, in weights,
    gradients or state, have no influence on the weights that are trained.

    :math:`P` works on every copy of the parameters' tree in the inner state, such as momentum,
    second moments, accumulated gradients, or the iterates of schedule-free. The copies are found by
    their structure, not by the type of the optimizer. The masked entries of a copy get the value
    that ``inner.init`` gives to a weight of zero. This value is 0, except for optimizers that start
    from a floor (Adagrad, Yogi). A leaf may hold several copies along further leading axes (the
    memory of L-BFGS). An array whose axes are not those of its parameter does not change: counters,
    the factored moments of Adafactor, the accumulators of SM3, the projections of GaLore and the
    moments within them, even if such an array happens to have the kernel's shape. (To find these
    arrays, ``inner.init`` is evaluated on shapes only, for kernels of other shapes.)

    A function that is passed through ``update`` (``value_fn`` of a line search, ``grad_fn`` of
    opaque SAM, ``obj_fn`` of Sophia) gets masked parameters. Gradients that it returns are masked,
    and so are gradients that are passed directly.

    There are three limits. First, moments of the kernel's whole shape in a rotated basis, as in
    SOAP, cannot be distinguished from moments of the weights (Optax has no such optimizer). Second,
    adding an update cannot set a masked weight to zero if it is infinite or NaN: see
    :func:`eoi_jax.masks.apply`. Third, an optimizer that divides 0 by 0 for a weight and gradient
    of zero (``eps=0``) and then takes a norm over its updates spreads the NaN, as it does for any
    dense weight without a gradient.

    Args:
        inner: Any Optax optimizer or chain, with its clipping, weight decay and accumulation.
            Place nothing after it that changes weights.
        mask: A mask of the parameters' structure, or a function that makes a mask from the
            parameters, such as :func:`eoi_jax.masks.support`: ``init`` calls it, so that optimizer
            and parameters may be made in any order. From then on the mask is in the state.

    Returns:
        A transformation whose state is a :class:`StaticSparseState`. Extra arguments of
        ``update`` reach ``inner``. An update has the dtype that ``inner`` gives it, except that
        a sparse kernel's is never narrower than its parameter's, in which :math:`-w` is exact.

    Raises:
        ValueError: From ``init`` if the mask does not fit the parameters, from ``update`` if
            ``params`` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from eoi_jax import masks
        >>> params = {"kernel": jnp.array([[0.0, 2.0], [1.0, 0.0]]), "bias": jnp.zeros(2)}
        >>> tx = static_sparse(optax.contrib.muon(0.1), masks.support(params))
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     grads = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> (params["kernel"] != 0).tolist()
        [[False, True], [True, False]]
        >>> masks.density(optax.tree.get(state, "mask"))
        0.5
    """
    if not callable(getattr(inner, "update", None)):
        raise checks.value_error(
            "inner",
            type(inner).__name__,
            "is outside the Optax transformations",
            "The optimizer comes first: static_sparse(optax.adam(1e-3), mask).",
        )
    if isinstance(inner, optax.MultiSteps):
        # ``inner.gradient_transformation()`` would drop the extra arguments of ``update``.
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    inner = optax.with_extra_args_support(inner)
    reset_masked_state = masked_state_resetter(inner.init)

    def init(params: Params) -> StaticSparseState:
        state_mask = _mask_of(mask, params)
        masked_params = params if is_placeholder(params) else masks.apply(state_mask, params)
        return StaticSparseState(state_mask, inner.init(masked_params))

    def update(
        updates: optax.Updates,
        state: StaticSparseState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StaticSparseState]:
        if params is None:
            raise checks.value_error(
                "params",
                None,
                "is outside the trees of parameters",
                "The update sets masked weights to zero, for which it needs the weights: call "
                "tx.update(grads, state, params).",
            )
        mask = state.mask
        masked_params = masks.apply(mask, params)
        extra_args = {
            name: with_masked_arguments(mask, params, value)
            if _is_function(value)
            else mask_copies(mask, params, value)
            for name, value in extra_args.items()
        }
        # The compiler keeps the constants of this and drops the rest.
        fresh = inner.init(masked_params)
        inner_updates, inner_state = inner.update(
            masks.apply(mask, updates),
            # Before the step too: the mask may have been replaced since the last one.
            reset_masked_state(mask, params, state.inner_state, fresh),
            masked_params,
            **extra_args,
        )
        inner_state = reset_masked_state(mask, params, inner_state, fresh)
        new_updates = zero_masked_params(mask, inner_updates, params)
        return new_updates, StaticSparseState(mask, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_density(
    mask: Mask | MaskOf, power: float = 1.0, *, layout: LayoutOf | None = None
) -> optax.GradientTransformation:
    r"""Multiply the updates of each sparse kernel by a power of its density.

    :math:`u \leftarrow d^{-p} u` for a kernel of density :math:`d`; dense leaves, whose mask is a
    scalar, do not change. A unit sums the changes of :math:`d n` weights, so steps of the same size
    change it by :math:`d` times as much as in a dense kernel. For Adam and other optimizers that
    normalize the gradient, :math:`p = 1` corrects this. Together with starts of variance
    :math:`1 / (d n)`, as those of :func:`eoi_jax.networks.rescaled` and
    :func:`eoi_jax.networks.exact_orthogonal`, this is the parametrization SμPar, in which one
    learning rate suits all densities.

    The transformation scales and does not mask: place it last in the chain inside
    :func:`static_sparse`, after both the learning rate and weight decay.

    Args:
        mask: A mask of the parameters' structure, or a function that makes a mask from the
            parameters, such as :func:`eoi_jax.masks.support`. If the mask changes in training, its
            counts do not, so the factors of the start remain right.
        power: The exponent :math:`p`, finite.
        layout: ``(path, leaf) -> Layout``: each layer of a stack has a density of its own.

    Returns:
        A transformation whose state is a :class:`ScaleByDensityState`.

    Raises:
        ValueError: For a power that is not finite; from ``init`` if the mask or the layout does
            not fit the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from eoi_jax import masks
        >>> params = {"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]]), "bias": jnp.zeros(2)}
        >>> inner = optax.chain(optax.sgd(0.5), scale_by_density(masks.support))
        >>> tx = static_sparse(inner, masks.support)
        >>> grads = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> float(updates["kernel"][0, 1]), updates["bias"].tolist()
        (-2.0, [-0.5, -0.5])

    Reference:
        Dey, Bergsma and Hestness, "Sparse maximal update parameterization: A holistic approach to
        sparse training dynamics", NeurIPS 2024.
    """
    power = checks.number(power, "power")

    def init(params: Params) -> ScaleByDensityState:
        if is_placeholder(params):
            return ScaleByDensityState(params)

        def factor(path: Any, leaf_mask: Any, leaf: Any) -> Array:
            if np.ndim(leaf_mask) == 0:
                return jnp.ones((), jnp.float32)
            like = jax.ShapeDtypeStruct(np.shape(leaf_mask), jnp.result_type(leaf))
            axes = tuple(range(trees.layout(layout, path, like).batch_axes, np.ndim(leaf_mask)))
            density = jnp.mean(leaf_mask, axis=axes, keepdims=True, dtype=jnp.float32)
            return jnp.where(density > 0, density, 1) ** -jnp.float32(power)

        boxed = trees.boxed_as(_mask_of(mask, params), params)
        factors = jax.tree_util.tree_map_with_path(factor, boxed, params)
        return ScaleByDensityState(trees.without_axis_names(factors))

    def update(
        updates: optax.Updates, state: ScaleByDensityState, params: Params | None = None
    ) -> tuple[optax.Updates, ScaleByDensityState]:
        del params
        factors = trees.boxed_as(state.factors, updates)

        def scale(update: Any, factor: Array) -> Any:
            if jnp.result_type(update) == jax.dtypes.float0:  # the gradient of integers
                return update
            return update * factor.astype(jnp.result_type(update))

        return jax.tree.map(scale, updates, factors), state

    return optax.GradientTransformation(init, update)


def _mask_of(mask: Mask | MaskOf, params: Params) -> Mask:
    """Return the mask that the state of an optimizer holds.

    A function makes it of the parameters. It is a copy, since a donated state must not take the
    user's mask along, and has no names of axes where it has no axes.
    """
    if is_placeholder(params):
        if _is_function(mask):
            return params  # the structure of the mask is not known before the parameters
        trees.mask_leaves(mask)
    else:
        if _is_function(mask):
            mask = mask(params)
        if not is_probe():
            trees.mask_fits(mask, params)
    copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), mask)
    return trees.without_axis_names(copy)


def _is_function(value: Any) -> bool:
    """Whether a value is a function and no tree: modules of Equinox are trees with a call."""
    return callable(value) and jax.tree_util.all_leaves([value])
