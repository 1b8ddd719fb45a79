r"""Dynamic sparse training: masks that change while the network trains, as Optax transformations.

Both methods keep masked weights at exactly zero. Every ``update_every`` steps they drop a part of
each kernel's weights, those of the smallest magnitude, and grow as many others: drawn at random
(:func:`sparse_evolutionary_training`) or with the largest gradients (:func:`rigl`). The number of
unmasked weights of each kernel never changes.

Everything that changes is in the optimizer state: the step, the mask, the key. Only ``tx.update``
has to be called. ``optax.tree.get(state, "mask")`` reads the mask, and training from a state that
was saved and restored gives the same result as without the interruption.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eoi_jax import masks
from eoi_jax._internal import checks, selection, shardings, trees
from eoi_jax._internal.keys import one_key, threefry_key
from eoi_jax._internal.masked_state import is_placeholder, masked_state_resetter, zero_masked_params
from eoi_jax.optim import StaticSparseState, static_sparse
from eoi_jax.typing import Array, LayoutOf, Mask, MaskOf, Params

__all__ = ["DynamicSparseState", "reset_state", "rigl", "sparse_evolutionary_training"]

# Steps are counted in int32.
_MAX_STEP = 2**31 - 1


class DynamicSparseState(NamedTuple):
    """The state of :func:`sparse_evolutionary_training` and of :func:`rigl`.

    Attributes:
        step: The number of calls of ``update`` so far, int32.
        key: The integers of the random key (:func:`jax.random.key_data`, which can be saved where
            a typed key cannot), or None if nothing is drawn.
        mask: The mask of this step.
        inner_state: The state of the optimizer inside.
    """

    step: Array
    key: Array | None
    mask: Mask
    inner_state: optax.OptState


def sparse_evolutionary_training(
    inner: optax.GradientTransformation | optax.MultiSteps,
    mask: Mask | MaskOf,
    *,
    key: Array,
    update_every: int = 100,
    drop_fraction: float | Array | optax.Schedule = 0.3,
    stop_step: int | None = None,
    regrow_dropped: bool = True,
    layout: LayoutOf | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train with SET: drop the weights of the smallest magnitude, grow others at random.

    The steps :math:`\Delta T, 2 \Delta T, \ldots` below ``stop_step`` update the mask **instead
    of** training. In each kernel of :math:`n` weights, of which the mask :math:`M` leaves
    :math:`k`, those of the :math:`m = \min(\lfloor \alpha k \rfloor, n - k)` smallest magnitudes,
    :math:`D \subset M`, are dropped, and :math:`m` weights grow: each set of :math:`m` outside
    :math:`M \setminus D` is equally likely. Dropped weights become exactly 0, and grown
    ones start from exactly 0. The gradients of a mask update are not used. :func:`rigl` differs
    only in the set that grows.

    Magnitudes are compared without regard to sign, as in the SET baseline of Evci et al. Mocanu et
    al. rank positive and negative weights separately, and update after each epoch.

    Args:
        inner: Any Optax optimizer or chain, with its clipping, weight decay and accumulation.
        mask: The mask to start from, of the parameters' structure, or a function that makes a mask
            from the parameters, such as :func:`eoi_jax.masks.support`. Leaves with a scalar
            ``True`` stay dense.
        key: A random key. Step :math:`t` draws from ``jax.random.fold_in(key, t)``.
        update_every: The period :math:`\Delta T`, in [1, 2^31): one mask update each.
        drop_fraction: The fraction :math:`\alpha` of a kernel's unmasked weights to drop, in
            [0, 1), or a schedule ``step -> fraction``.
        stop_step: No mask is updated at or after this step, in [0, 2^31); never stop if None.
        regrow_dropped: Whether a weight that was just dropped may grow.
        layout: ``(path, leaf) -> Layout`` of the parameters: each layer of a stack is a kernel by
            itself. Without it a stack is one kernel.

    Returns:
        A transformation whose state is a :class:`DynamicSparseState`. Extra arguments of
        ``update`` reach ``inner``.

    Raises:
        ValueError: If an argument is out of range, or if ``key`` is not one random key; from
            ``init`` if the mask or the layout does not fit the parameters; from ``update`` if
            ``params`` is missing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import optax
        >>> from eoi_jax import masks
        >>> params = {"kernel": jnp.diag(jnp.arange(1.0, 11.0)), "bias": jnp.zeros(10)}
        >>> mask = masks.support(params)
        >>> tx = sparse_evolutionary_training(
        ...     optax.adam(1e-3), mask, key=jax.random.key(0), update_every=2
        ... )
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> now = optax.tree.get(state, "mask")["kernel"]
        >>> int(now.sum()), now.diagonal().tolist()[:4]
        (10, [False, False, False, True])

    Reference:
        Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
        connectivity inspired by network science", Nature Communications 9 (2018).
    """
    key = one_key(key)
    key_data, impl = jax.random.key_data(key), jax.random.key_impl(key)

    def draw(index: int, state: DynamicSparseState, gradient: Array, batch_axes: int) -> Array:
        assert state.key is not None
        run_key = threefry_key(jax.random.wrap_key_data(state.key, impl=impl))
        step_key = jax.random.fold_in(run_key, state.step)
        stack, shape = gradient.shape[:batch_axes], gradient.shape[batch_axes:]
        keys = jax.random.split(jax.random.fold_in(step_key, index), math.prod(stack))
        bits = functools.partial(jax.random.bits, shape=shape, dtype=jnp.uint32)
        return selection.over_layers(bits, batch_axes)(keys.reshape(stack))

    options = _Options(draw, update_every, drop_fraction, stop_step, regrow_dropped, layout)
    return _dynamic_sparse(inner, mask, options, key_data)


def rigl(
    inner: optax.GradientTransformation | optax.MultiSteps,
    mask: Mask | MaskOf,
    *,
    update_every: int = 100,
    drop_fraction: float | Array | optax.Schedule = 0.3,
    stop_step: int | None = None,
    regrow_dropped: bool = True,
    layout: LayoutOf | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train with RigL: drop the weights of the smallest magnitude, grow those of large gradients.

    Let :math:`t = 0, 1, \ldots` count the calls of ``update``. A call with
    :math:`t = \Delta T, 2 \Delta T, \ldots` below ``stop_step`` updates the mask **instead of**
    training. In each kernel of :math:`n` weights :math:`w`, of which the mask :math:`M` leaves
    :math:`k`,

    .. math::

        m &= \min(\lfloor \alpha(t)\, k \rfloor,\; n - k), \\
        D &= \text{the } m \text{ smallest } |w| \text{ in } M, \\
        G &= \text{the } m \text{ largest } |\partial L / \partial w|
             \text{ outside } M \setminus D, \\
        M &\leftarrow (M \setminus D) \cup G .

    Dropped weights become exactly 0, and grown ones start from exactly 0. For both, the entries of
    the inner state become those that ``inner.init`` gives to a weight of zero, for any optimizer.
    Nothing else changes: the other weights, dense leaves, and the step count of the inner
    optimizer, so its schedule counts only training steps. Every other call is a step of
    :func:`eoi_jax.optim.static_sparse` under the current mask, and gradients outside the mask
    have no influence on it.

    As in the paper, a weight that was just dropped may grow at once if its gradient is among the
    largest (its value is lost); ``regrow_dropped=False`` takes :math:`G` outside :math:`M`. The
    authors' code differs in a detail: there a weight that is dropped and grown in one update keeps
    its value and momentum.

    :math:`\lfloor \alpha k \rfloor` is the floor of the product in float32, also for the fraction
    of a schedule. Equal magnitudes or gradients are taken in order, lower indices first. A NaN
    gradient grows after all others; a NaN weight is dropped first.

    There are three limits. First, gradients must be those of the whole kernel: not masked before
    the call, and not those that a line search kept (:func:`optax.value_and_grad_from_state`), which
    are zero outside the mask and belong to the weights before the update. Second, under
    :func:`jax.vmap` over states both branches of a condition are computed, so every step has the
    cost of a mask update. Third, with ``update_every=1`` nothing trains between step 1 and
    ``stop_step``.

    Args:
        inner: Any Optax optimizer or chain, with its clipping, weight decay and accumulation.
        mask: The mask to start from, of the parameters' structure, or a function that makes a mask
            from the parameters, such as :func:`eoi_jax.masks.support`. Leaves with a scalar
            ``True`` stay dense. A kernel without a masked weight has nothing to grow and does not
            change.
        update_every: The period :math:`\Delta T`, in [1, 2^31): one mask update each.
        drop_fraction: The fraction :math:`\alpha` of a kernel's unmasked weights to drop, in
            [0, 1), or a schedule ``step -> fraction``. A schedule's value is limited by the numbers
            of weights that the kernel can drop and grow.
        stop_step: No mask is updated at or after this step, in [0, 2^31); never stop if None.
        regrow_dropped: Whether a weight that was just dropped may grow.
        layout: ``(path, leaf) -> Layout`` of the parameters: each layer of a stack is a kernel by
            itself. Without it a stack is one kernel.

    Returns:
        A transformation whose state is a :class:`DynamicSparseState`. Extra arguments of
        ``update`` reach ``inner``.

    Raises:
        ValueError: If an argument is out of range; from ``init`` if the mask or the layout does
            not fit the parameters; from ``update`` if ``params`` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from eoi_jax import masks
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [1.0, 0.0]]), "bias": jnp.zeros(2)}
        >>> tx = rigl(
        ...     optax.sgd(0.1, momentum=0.9),
        ...     masks.support(params),
        ...     update_every=2,
        ...     drop_fraction=optax.cosine_decay_schedule(0.6, 750),
        ...     stop_step=750,
        ... )
        >>> state = tx.init(params)
        >>> for _ in range(3):  # train, train, update the mask
        ...     grads = {"kernel": jnp.array([[0.0, 1.0], [0.0, 2.0]]), "bias": jnp.ones(2)}
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> optax.tree.get(state, "mask")["kernel"].tolist()
        [[True, False], [False, True]]
        >>> params["kernel"].tolist()
        [[3.0, 0.0], [0.0, 0.0]]

    Reference:
        Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets Winners",
        ICML 2020.
    """

    def largest_gradients(
        index: int, state: DynamicSparseState, gradient: Array, batch_axes: int
    ) -> Array:
        del index, state, batch_axes
        return ~selection.ordered_bits(jnp.abs(gradient))

    options = _Options(
        largest_gradients, update_every, drop_fraction, stop_step, regrow_dropped, layout
    )
    return _dynamic_sparse(inner, mask, options)


def reset_state(
    inner: optax.GradientTransformation | optax.MultiSteps,
    mask: Mask,
    params: Params,
    state: optax.OptState,
) -> optax.OptState:
    """Reset the state of an optimizer for some weights, such as their momentum.

    The entries of masked weights in the state become those that ``inner.init`` gives to a weight
    of zero, for any optimizer. Nothing else changes, also not the count of steps. Use this
    function after weights are replaced by hand, as the steps of :mod:`eoi_jax.blocks` replace
    blocks. :func:`rigl` needs no such call.

    Args:
        inner: The optimizer to which the state belongs.
        mask: Of the structure of ``params``: booleans of a leaf's shape, False where a weight is
            new, or a scalar ``True`` for a leaf that stays.
        params: The parameters.
        state: The optimizer's state for them.

    Returns:
        The state, of the same structure, shapes and dtypes.

    Raises:
        ValueError: If the mask does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> params = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
        >>> tx = optax.sgd(0.1, momentum=0.9)
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> mask = {"kernel": jnp.array([True, False, True]), "bias": jnp.array(True)}
        >>> optax.tree.get(reset_state(tx, mask, params, state), "trace")
        {'bias': Array([1., 1., 1.], dtype=float32), 'kernel': Array([1., 0., 1.], dtype=float32)}
    """
    trees.mask_fits(mask, params)
    fresh = inner.init(masks.apply(mask, params))
    return masked_state_resetter(inner.init)(mask, params, state, fresh)


class _Options(NamedTuple):
    """The arguments of :func:`rigl`, and which weights grow.

    ``growth_order(leaf index, state, gradient, batch_axes)`` gives each weight of a leaf, whose
    first ``batch_axes`` stack layers, an unsigned integer: those of the smallest grow.
    """

    growth_order: Callable[[int, DynamicSparseState, Array, int], Array]
    update_every: int
    drop_fraction: Any
    stop_step: int | None
    regrow_dropped: bool
    layout: LayoutOf | None

    def checked(self) -> _Options:
        """Check the numbers among the options."""
        every, fraction, stop = self.update_every, self.drop_fraction, self.stop_step
        every = checks.integer(every, low=1, high=_MAX_STEP, name="update_every")
        if stop is not None:
            stop = checks.integer(stop, low=0, high=_MAX_STEP, name="stop_step")
        if not callable(fraction):
            fraction = _fraction(fraction)
        return self._replace(update_every=every, drop_fraction=fraction, stop_step=stop)

    def updates_mask(self, step: Array) -> Array:
        """Tell whether a step updates the mask instead of training."""
        is_update = (step > 0) & (step % self.update_every == 0)
        return is_update if self.stop_step is None else is_update & (step < self.stop_step)

    def fraction_at(self, step: Array) -> Array:
        """Return the fraction of a kernel's unmasked weights to drop."""
        fraction = self.drop_fraction
        fraction = _fraction(fraction(step) if callable(fraction) else fraction)
        return jnp.asarray(fraction, jnp.float32)


def _dynamic_sparse(
    inner: optax.GradientTransformation | optax.MultiSteps,
    mask: Mask | MaskOf,
    options: _Options,
    key_data: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train under a mask that drops and grows weights."""
    options = options.checked()
    static = static_sparse(inner, mask)
    reset_masked_state = masked_state_resetter(inner.init)

    def init(params: Params) -> DynamicSparseState:
        static_state = static.init(params)
        if not is_placeholder(params):
            leaf_masks = jax.tree.leaves(static_state.mask)
            paths_and_leaves = jax.tree_util.tree_leaves_with_path(params)
            for (path, leaf), leaf_mask in zip(paths_and_leaves, leaf_masks, strict=True):
                if np.ndim(leaf_mask) > 0:
                    trees.layout(options.layout, path, leaf)
        # A copy: a donated state must not take the user's key along.
        key_copy = None if key_data is None else jnp.array(key_data, copy=True)
        return DynamicSparseState(jnp.zeros((), jnp.int32), key_copy, *static_state)

    def update(
        updates: optax.Updates,
        state: DynamicSparseState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DynamicSparseState]:
        def train() -> tuple[optax.Updates, StaticSparseState]:
            static_state = StaticSparseState(state.mask, state.inner_state)
            return static.update(updates, static_state, params, **extra_args)

        def update_mask() -> tuple[optax.Updates, StaticSparseState]:
            # Both return the same dtypes, and an optimizer may widen its updates or its state.
            like = jax.eval_shape(train)
            kept, new = _drop_and_grow(updates, state, params, options)
            stay = jax.tree.map(
                lambda leaf: shardings.like(jnp.zeros(leaf.shape, leaf.dtype), leaf), like[0]
            )
            fresh = inner.init(masks.apply(kept, params))
            inner_state = reset_masked_state(kept, params, state.inner_state, fresh)
            result = zero_masked_params(kept, stay, params), StaticSparseState(new, inner_state)
            return jax.tree.map(lambda leaf, to: jnp.asarray(leaf, to.dtype), result, like)

        is_update = options.updates_mask(state.step)
        if checks.is_traced(is_update):
            new_updates, static_state = jax.lax.cond(is_update, update_mask, train)
        else:  # outside of jit a condition is compiled anew at each call
            new_updates, static_state = update_mask() if is_update else train()
        step = optax.safe_increment(state.step)
        return new_updates, DynamicSparseState(step, state.key, *static_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _fraction(value: Any) -> Any:
    """Accept the fraction of a kernel's unmasked weights that a mask update drops."""
    remedy = "Give the fraction of a kernel's unmasked weights that a mask update drops."
    return checks.number(value, "drop_fraction", interval="[0, 1)", remedy=remedy)


def _drop_and_grow(
    updates: optax.Updates, state: DynamicSparseState, params: Params, options: _Options
) -> tuple[Mask, Mask]:
    """Return the mask of the weights that stay, and the next mask: those and the grown."""
    treedef: Any
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaf_masks, gradients = jax.tree.leaves(state.mask), treedef.flatten_up_to(updates)
    fraction = options.fraction_at(state.step)
    pairs: list[tuple[Any, Any]] = []
    for index, ((path, leaf), leaf_mask, gradient) in enumerate(
        zip(paths_and_leaves, leaf_masks, gradients, strict=True)
    ):
        if np.ndim(leaf_mask) == 0 or leaf_mask.size == 0:
            pairs.append((leaf_mask, leaf_mask))
            continue
        batch_axes = trees.layout(options.layout, path, leaf).batch_axes
        order = options.growth_order(index, state, gradient, batch_axes)
        arrays = leaf_mask, leaf, order, fraction
        pairs.append(_drop_and_grow_leaf(*arrays, options.regrow_dropped, batch_axes))
    mask_treedef: Any = jax.tree.structure(state.mask)
    kept, new = (mask_treedef.unflatten(leaves) for leaves in zip(*pairs, strict=True))
    return kept, new


@functools.partial(jax.jit, static_argnames=("regrow_dropped", "batch_axes"))
def _drop_and_grow_leaf(
    mask: Array,
    weights: Array,
    order: Array,
    fraction: Array,
    regrow_dropped: bool,
    batch_axes: int,
) -> tuple[Array, Array]:
    """Drop and grow in each layer of the stack that a leaf is."""

    def drop_and_grow(
        mask: Array, weights: Array, order: Array, fraction: Array
    ) -> tuple[Array, Array]:
        active = jnp.sum(mask, dtype=jnp.int32)
        wanted = jnp.floor(fraction * active.astype(jnp.float32)).astype(jnp.int32)
        count = jnp.minimum(wanted, jnp.minimum(active, mask.size - active))
        magnitude = selection.ordered_bits(jnp.abs(weights))
        kept = mask & ~selection.smallest(magnitude, mask, count)
        growable = ~kept if regrow_dropped else ~mask
        return kept, kept | selection.smallest(order, growable, count)

    layers = selection.over_layers(drop_and_grow, batch_axes)
    fractions = jnp.broadcast_to(fraction, mask.shape[:batch_axes])
    found: tuple[Array, Array] = shardings.auto(layers, out_like=(mask, mask))(
        mask, weights, order, fractions
    )
    return found
