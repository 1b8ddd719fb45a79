"""Dynamic sparse training on blocks: SET and RigL, which drop blocks and grow others.

A step changes the pattern of a matrix but no shape, so one compiled program trains under all
patterns. In this example a layer of Linen trains with RigL. The gradients with respect to all
blocks, also missing ones, come from the same layer, applied to :func:`all_blocks` at the steps that
change the pattern. :func:`eoi_jax.dynamic.reset_state` resets the optimizer's state of new blocks:

    >>> import jax, jax.numpy as jnp, optax
    >>> import eoi_jax as eoi
    >>> from eoi_jax.linen import BlockSparseDense
    >>> layer = BlockSparseDense(32, density=1 / 4, block_size=2)
    >>> x = jax.random.normal(jax.random.key(0), (64, 32))
    >>> variables = layer.init(jax.random.key(1), x)
    >>> w = eoi.blocks.BlockSparse(variables["params"]["kernel"], **variables["pattern"])
    >>> w = eoi.blocks.growable(w)  # once, before training
    >>> params, pattern = variables["params"], {"rows": w.rows, "slots": w.slots}
    >>> tx = optax.adam(1e-2)
    >>> @jax.jit
    ... def loss(params, pattern):
    ...     y = layer.apply({"params": params, "pattern": pattern}, x)
    ...     return ((y - jnp.roll(x, 5, axis=1)) ** 2).mean()
    >>> @jax.jit
    ... def train(params, pattern, state):
    ...     updates, state = tx.update(jax.grad(loss)(params, pattern), state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> @jax.jit
    ... def move(params, pattern, state, drop_fraction):
    ...     w = eoi.blocks.BlockSparse(params["kernel"], **pattern)
    ...     full = eoi.blocks.all_blocks(w)
    ...     every = {"rows": full.rows, "slots": full.slots}
    ...     grads = jax.grad(loss)({**params, "kernel": full.values}, every)
    ...     norms = jnp.linalg.norm(grads["kernel"], axis=(-2, -1))
    ...     w, kept = eoi.blocks.rigl_step(w, norms, drop_fraction)
    ...     params = {**params, "kernel": w.values}
    ...     mask = {"kernel": kept, "bias": jnp.array(True)}
    ...     state = eoi.dynamic.reset_state(tx, mask, params, state)
    ...     return params, {"rows": w.rows, "slots": w.slots}, state
    >>> drop_fraction = optax.cosine_decay_schedule(0.6, 100)
    >>> state = tx.init(params)
    >>> for step in range(120):
    ...     if step % 10 == 0 and 0 < step < 100:
    ...         params, pattern, state = move(params, pattern, state, drop_fraction(step))
    ...     params, state = train(params, pattern, state)
    >>> bool(loss(params, pattern) < 0.5)  # 0.70 under the pattern of the start
    True
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks, selection
from eoi_jax._internal.keys import threefry_key
from eoi_jax.blocks.format import BlockSparse, _check_shape, _invert
from eoi_jax.blocks.product import _check_type
from eoi_jax.typing import Array

__all__ = ["Rewired", "all_blocks", "gradient_norms", "growable", "rigl_step", "set_step"]


class Rewired(NamedTuple):
    """A matrix after a step of :func:`set_step` or :func:`rigl_step`.

    Attributes:
        matrix: The new matrix. Kept blocks do not change their places in its arrays. A grown
            block, all zeros, takes the place of a dropped one, so ``rows`` need not increase.
        kept: Booleans of the shape of its ``values``: False in new blocks. Pass it as the mask of
            :func:`eoi_jax.dynamic.reset_state`, to reset the optimizer's state of these blocks.
    """

    matrix: BlockSparse
    kept: Array


def set_step(key: Array, w: BlockSparse, drop_fraction: float | Array = 0.3) -> Rewired:
    r"""Drop the blocks of the smallest norms, and grow as many others at random (SET).

    The step is that of :func:`rigl_step`, except that the pairs of a row and a column are gone
    through in random order, with all orders equally likely.

    Args:
        key: A random key.
        w: One matrix; of a stack, use :func:`jax.vmap`.
        drop_fraction: The fraction :math:`\alpha` of each row's blocks to drop, in [0, 1). It may
            be traced.

    Returns:
        A :class:`Rewired`: the matrix, and which of its values were kept.

    Raises:
        ValueError: If the fraction is out of range, ``w`` is a stack or not :func:`growable`, or
            ``key`` is not one random key.

    Example:
        >>> import jax
        >>> import eoi_jax as eoi
        >>> w = eoi.blocks.orthogonal(jax.random.key(0), (64, 64), 1 / 4, block_size=4)
        >>> step = eoi.blocks.set_step(jax.random.key(1), eoi.blocks.growable(w), 0.5)
        >>> step.matrix.density, float(step.kept.mean())
        (0.25, 0.5)

    Reference:
        Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
        connectivity inspired by network science", Nature Communications 9 (2018), for weights.
    """
    key = threefry_key(key)
    _check_growable(w)
    order = jax.random.bits(key, (w.rows.shape[0], w.slots.shape[0]), jnp.uint32)
    return _rewire(w, order, _fraction(drop_fraction))


def rigl_step(w: BlockSparse, gradient_norms: Array, drop_fraction: float | Array = 0.3) -> Rewired:
    r"""Drop the blocks of the smallest norms, and grow those of the largest gradients (RigL).

    A row of blocks is one block of outputs, and has :math:`n` of :math:`P` possible blocks. In each
    row the :math:`m = \min(\lfloor \alpha n \rfloor, P - n)` blocks of the smallest Frobenius norms
    are dropped, and as many grow, which start from zeros. So the number of blocks of each row does
    not change, and neither does the shape of any array.

    A column has the blocks of one block of inputs. It has room for as many blocks as ``w.slots``
    is wide. All pairs of a row and a column are gone through in the order of their gradient
    norms, the largest first. A block grows where its row still lacks a block and its column has
    room. Blocks that were just dropped come after all others, and grow again, as zeros, only if
    nothing else is left for their row. The width that :func:`growable` provides always suffices.

    Equal norms are taken in order, lower indices first. A block with a NaN gradient grows last, and
    a block with a NaN is dropped first. The step is compiled once for all patterns.

    Args:
        w: One matrix; of a stack, use :func:`jax.vmap`.
        gradient_norms: ``(R, P)`` floating: for each block of outputs and each block of inputs the
            norm of the loss's gradient with respect to that block, also for missing blocks, from
            :func:`gradient_norms` or :func:`all_blocks`.
        drop_fraction: The fraction :math:`\alpha` of each row's blocks to drop, in [0, 1). It may
            be traced. Below :math:`1 / n` nothing changes.

    Returns:
        A :class:`Rewired`: the matrix, and which of its values were kept.

    Raises:
        ValueError: If the fraction is out of range, ``gradient_norms`` has another shape or is not
            floating, or ``w`` is a stack or not :func:`growable`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> blocks = jnp.kron(jnp.array([[3.0, 0, 0], [1, 0, 2], [0, 1, 1]]), jnp.ones((2, 2)))
        >>> w = eoi.blocks.growable(eoi.blocks.from_dense(blocks, 2))
        >>> norms = jnp.array([[9.0, 9, 1], [5, 7, 9], [4, 0, 0]])
        >>> eoi.blocks.rigl_step(w, norms, 0.5).matrix.to_dense()[::2, ::2]
        Array([[3., 0., 0.],
               [0., 0., 2.],
               [0., 1., 0.]], dtype=float32)
        >>> eoi.blocks.rigl_step(w, norms, 0.5).matrix.mask()[::2, ::2]
        Array([[ True, False,  True],
               [False, False,  True],
               [ True,  True, False]], dtype=bool)

    Reference:
        Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets Winners",
        ICML 2020, for weights.
    """
    _check_growable(w)
    norms = checks.array(gradient_norms, "gradient_norms")
    checks.float_dtype(norms.dtype, "gradient_norms.dtype")
    expected = (w.rows.shape[0], w.slots.shape[0])
    if norms.shape != expected:
        problem = f"is not {expected}, the blocks of outputs and of inputs of w"
        remedy = "Give one norm for each pair of them, missing blocks included."
        raise checks.value_error("gradient_norms.shape", norms.shape, problem, remedy)
    return _rewire(w, ~selection.ordered_bits(norms), _fraction(drop_fraction))


def gradient_norms(
    x: Array, dy: Array, block_shape: tuple[int, int], *, precision: Any = None
) -> Array:
    r"""Return the norms of a dense gradient's blocks, without storing the gradient.

    The gradient of the loss with respect to a kernel is :math:`x^\top \partial L / \partial y` with
    :math:`y = x W`. Only one block of outputs of it is in memory at a time, ``inputs · c`` numbers.
    The time is that of a dense layer's gradient.

    Args:
        x: ``(..., inputs)`` floating: the inputs of the layer.
        dy: ``(..., outputs)`` floating, with the same leading axes: the loss's gradient with
            respect to the products, before a bias or an activation.
        block_shape: ``(b, c)``, inputs and outputs of a block: ``w.block_shape``.
        precision: As that of :func:`jax.numpy.matmul`.

    Returns:
        ``(outputs / c, inputs / b)`` Frobenius norms, in float32 or wider.

    Raises:
        ValueError: If the leading axes differ, the blocks do not divide the last ones, or an
            array is not floating.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> x, dy = jnp.eye(4)[:2], jnp.array([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
        >>> eoi.blocks.gradient_norms(x, dy, (2, 2))
        Array([[5., 0.],
               [1., 0.]], dtype=float32)

    Reference:
        Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets Winners",
        ICML 2020, for the growth by gradients.
    """
    x, dy = checks.array(x, "x"), checks.array(dy, "dy")
    for name, array in (("x", x), ("dy", dy)):
        checks.float_dtype(array.dtype, f"{name}.dtype")
        if array.ndim == 0:
            raise checks.value_error(f"{name}.shape", (), "has no features", "Give a batch.")
    if x.shape[:-1] != dy.shape[:-1]:
        problem = f"has not the leading axes of x, {x.shape[:-1]}"
        raise checks.value_error("dy.shape", dy.shape, problem, "Give both of one batch.")
    inputs, outputs = _check_shape((x.shape[-1], dy.shape[-1]), *block_shape)
    high, wide = block_shape
    dtype = jnp.promote_types(x.dtype, dy.dtype)
    by_batch = x.astype(dtype).reshape(-1, inputs * high)
    by_block = dy.astype(dtype).reshape(-1, outputs, wide).swapaxes(0, 1)
    sum_dtype = checks.compute_dtype(dtype)

    def norms(dy: Array) -> Array:
        numbers = (((0,), (0,)), ((), ()))
        gradient = jax.lax.dot_general(
            by_batch, dy, numbers, precision, preferred_element_type=sum_dtype
        )
        return jnp.sqrt(jnp.sum(gradient.reshape(inputs, -1) ** 2, axis=1))

    found: Array = jax.lax.map(norms, by_block)
    return found


def all_blocks(w: BlockSparse) -> BlockSparse:
    """Return the same matrix with every block stored, missing ones as zeros.

    The gradient with respect to its values is the gradient with respect to all blocks, so
    ``jnp.linalg.norm(gradient, axis=(-2, -1))`` can be passed to :func:`rigl_step`. It needs the
    memory of a dense gradient, but only at the steps that change the pattern.
    :func:`gradient_norms` does not need this memory.

    Args:
        w: A matrix, or a stack of matrices.

    Returns:
        The matrix with ``(..., R, P, b, c)`` values, with the ``P`` blocks of inputs in order.

    Raises:
        ValueError: If ``w`` is no :class:`BlockSparse`.

    Example:
        >>> import jax
        >>> import eoi_jax as eoi
        >>> w = eoi.blocks.orthogonal(jax.random.key(0), (64, 64), 1 / 4, block_size=16)
        >>> full = eoi.blocks.all_blocks(w)
        >>> full.density, bool((full.to_dense() == w.to_dense()).all())
        (1.0, True)
    """
    _check_type(w)
    if w.values.ndim > 4:
        return jax.vmap(all_blocks)(w)
    inputs, outputs = w.slots.shape[0], w.rows.shape[0]
    values = jnp.zeros((outputs, inputs, *w.block_shape), w.dtype)
    values = values.at[jnp.arange(outputs)[:, None], w.rows].add(w.values, mode="drop")
    places = jnp.arange(outputs * inputs, dtype=jnp.int32).reshape(outputs, inputs)
    return BlockSparse(values, places % inputs, places.T)


def growable(w: BlockSparse) -> BlockSparse:
    r"""Widen ``slots`` so that every row always finds blocks to grow. Call it before training.

    Let there be :math:`R` rows of at most :math:`k` blocks, and :math:`P` columns with room for
    :math:`k'` blocks each. A row that lacks a block has at most :math:`k - 1` others. If all
    columns without a block of this row were full, there would be at least :math:`k' (P - k + 1)`
    blocks. But all rows together have less than :math:`R k`. So :math:`k' \geq R k / (P - k + 1)`
    suffices, which is a little more than the :math:`R k / P` of equal columns. (:math:`k' = R`
    suffices too.) The gradient with respect to the inputs reads :math:`k'` blocks for each block of
    inputs, so a large :math:`k'` costs time for empty blocks.

    Args:
        w: A matrix, or a stack of matrices.

    Returns:
        The same matrix with wider ``slots``; ``w`` itself if its ``slots`` are wide enough.

    Raises:
        ValueError: If ``w`` is no :class:`BlockSparse`.

    Example:
        >>> import jax
        >>> import eoi_jax as eoi
        >>> w = eoi.blocks.orthogonal(jax.random.key(0), (256, 256), 1 / 8, block_size=8)
        >>> w.slots.shape, eoi.blocks.growable(w).slots.shape
        ((32, 2), (32, 3))
    """
    _check_type(w)
    lacking = _needed_width(w) - w.slots.shape[-1]
    if lacking <= 0:
        return w
    pad = ((0, 0),) * (w.slots.ndim - 1) + ((0, lacking),)
    none = w.rows.shape[-2] * w.rows.shape[-1]
    return dataclasses.replace(w, slots=jnp.pad(w.slots, pad, constant_values=none))


def _needed_width(w: BlockSparse) -> int:
    (outputs, most), inputs = w.rows.shape[-2:], w.slots.shape[-2]
    return min(outputs, -(-outputs * most // (inputs - most + 1)))


def _check_growable(w: Any) -> None:
    _check_type(w)
    if w.values.ndim != 4:
        raise checks.value_error("w", w.shape, "is a stack of matrices", "Use jax.vmap.")
    width, needed = w.slots.shape[1], _needed_width(w)
    if width < needed:
        problem = f"leaves no room to grow: it is less than {needed} wide"
        remedy = "Start from eoi_jax.blocks.growable(w)."
        raise checks.value_error("w.slots.shape", w.slots.shape, problem, remedy)


def _fraction(drop_fraction: Any) -> Array:
    remedy = "Give the fraction of a row's blocks to drop."
    fraction = checks.number(drop_fraction, "drop_fraction", interval="[0, 1)", remedy=remedy)
    return jnp.asarray(fraction, jnp.float32)


@jax.jit
def _rewire(w: BlockSparse, order: Array, fraction: Array) -> Rewired:
    """Drop blocks, and grow those of the smallest ``order``, ``(R, P)`` unsigned integers."""
    (outputs, most), (inputs, width) = w.rows.shape, w.slots.shape
    present = w.rows < inputs
    number = jnp.sum(present, axis=1, dtype=jnp.int32)
    wanted = jnp.floor(fraction * number.astype(jnp.float32))
    count = jnp.minimum(wanted.astype(jnp.int32), inputs - number)
    squares = jnp.sum(checks.widened(w.values) ** 2, axis=(2, 3))
    dropped = jax.vmap(selection.smallest)(selection.ordered_bits(squares), present, count)

    def places(chosen: Array) -> Array:
        """Mark blocks of inputs, ``(R, P)``."""
        marks = jnp.zeros((outputs, inputs), bool)
        index = jnp.where(chosen, w.rows, inputs)
        return marks.at[jnp.arange(outputs)[:, None], index].set(True, mode="drop")

    stay = places(present & ~dropped)
    rank = _ranks(order)
    rank = jnp.where(places(dropped), rank + order.size, rank)
    room = width - jnp.sum(stay, axis=0, dtype=jnp.int32)
    grown = _grow(rank, ~stay, count, room)
    # The j-th dropped block of a row makes place for the j-th grown one.
    found = jnp.argsort(~grown, axis=1, stable=True)[:, :most].astype(jnp.int32)
    turn = jnp.maximum(jnp.cumsum(dropped, axis=1, dtype=jnp.int32) - 1, 0)
    rows = jnp.where(dropped, jnp.take_along_axis(found, turn, axis=1), w.rows)
    kept = jnp.broadcast_to(~dropped[..., None, None], w.values.shape)
    values = jnp.where(kept, w.values, jnp.zeros((), w.dtype))
    return Rewired(BlockSparse(values, rows, _invert(rows, inputs, width)), kept)


def _ranks(order: Array) -> Array:
    """Number the entries from the smallest on, equal ones by their index."""
    sorting = jnp.argsort(order.reshape(-1), stable=True)
    ranks = (
        jnp.zeros(order.size, jnp.int32).at[sorting].set(jnp.arange(order.size, dtype=jnp.int32))
    )
    return ranks.reshape(order.shape)


def _grow(rank: Array, candidates: Array, lacking: Array, room: Array) -> Array:
    """Choose candidates in the order of their ranks, while rows lack and columns have room.

    It is deferred acceptance (Gale and Shapley): each row proposes its best candidates, each column
    refuses all but its best proposals, and rows go on to the next until nothing is refused. Since
    rows and columns rank alike, it ends with the choice of one pair after the other.
    """

    def best(allowed: Array, counts: Array, axis: int) -> Array:
        place = jnp.argsort(jnp.where(allowed, rank, 2 * rank.size), axis=axis)
        place = jnp.argsort(place, axis=axis).astype(jnp.int32)
        return allowed & (place < jnp.expand_dims(counts, axis))

    def next_round(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        left, _, _ = state
        proposed = best(left, lacking, 1)
        accepted = best(proposed, room, 0)
        refused = proposed & ~accepted
        return left & ~refused, accepted, jnp.any(refused)

    start = next_round((candidates, candidates, jnp.array(True)))
    _, accepted, _ = jax.lax.while_loop(lambda state: state[2], next_round, start)
    return accepted
