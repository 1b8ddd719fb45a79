"""One training step of any network and optimizer: loss, gradient and update under a mask.

Use it to train a sparse network with a loop of your own; :mod:`experiments.training.loops` has
loops that run on the device. All functions are pure, and may be compiled and mapped over seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eoi_jax as eoi
from eoi_jax.typing import Array, Mask, Params
from experiments import models
from experiments.data import Dataset
from experiments.training.keys import Purpose, key_of

__all__ = [
    "NEVER",
    "OptimizerOf",
    "State",
    "Sums",
    "evaluated_batch",
    "evaluation",
    "init_state",
    "is_finite",
    "sparse_optimizer",
    "train_step",
    "under_mask",
]

NEVER = int(np.iinfo(np.int32).max)
"""The number that stands for no step at all."""

DROP_AND_GROW_EVERY = 100  # steps, of SET and RigL
_DROP_FRACTION = 0.3  # of a layer's weights, at first; a cosine takes it to 0

OptimizerOf: TypeAlias = Callable[[Array, Mask, Any], optax.GradientTransformationExtraArgs]
"""``(key, mask, learning_rate) -> optimizer``, outermost the rule for the mask: the optimizer's
state holds the mask where ``optax.tree.get(state, "mask")`` finds it. The rate may be traced."""


class State(NamedTuple):
    """Everything that changes while a network trains; stacked for several seeds.

    Attributes:
        key: Integers of the seed's key, uint32.
        params: The parameters.
        others: The network's other collections, such as ``batch_stats``.
        optimizer: State of the optimizer, with the mask.
    """

    key: Array
    params: Params
    others: dict[str, Any]
    optimizer: Any


class Sums(NamedTuple):
    """Sums over some steps, for each seed; by default over no steps.

    Attributes:
        loss: Mean cross-entropies of the steps' batches, summed.
        accuracy: Fractions of their examples that were classified correctly, summed.
        bad_step: First step whose loss was not finite, :data:`NEVER` if there is none.
    """

    loss: Any = np.float32(0)
    accuracy: Any = np.float32(0)
    bad_step: Any = np.int32(NEVER)


def init_state(
    optimizer_of: OptimizerOf, key: Array, variables: dict[str, Any], mask: Mask
) -> State:
    """Return the state of one seed before its first step.

    Args:
        optimizer_of: Makes the optimizer.
        key: The seed's PRNG key; augmentation, dropout and SET draw from it.
        variables: ``params``, zero off the mask, and the network's other collections.
        mask: Which of the params may be non-zero; a scalar where a leaf is dense.
    """
    others = {name: value for name, value in variables.items() if name != "params"}
    params = variables["params"]
    optimizer = optimizer_of(key, mask, 0.0).init(params)
    return State(jax.random.key_data(key), params, others, optimizer)


def train_step(
    model: Any, dataset: Dataset, optimizer_of: OptimizerOf
) -> Callable[[State, Any, Any, Array, Array], tuple[State, Sums]]:
    """Return the function that trains one seed on one batch.

    Args:
        model: A Linen module from images to logits, called with ``train=True``.
        dataset: Normalizes the images, and changes them at random if that is part of it.
        optimizer_of: Makes the optimizer.

    Returns:
        ``(state, number, learning_rate, images, labels) -> (state, Sums)``: the step's number
        decides what is random in it; images ``(batch, height, width, channels)`` are uint8, labels
        ``(batch,)`` integers.

    Example:
        >>> import eoi_jax as eoi, jax, optax
        >>> from experiments import data, models
        >>> from experiments.training import steps
        >>> made = data.load("made")
        >>> model = models.create("mlp7", kernel_init=eoi.dense(0.1))
        >>> variables = model.init(jax.random.key(0), made.normalize(made.train.images[:1]))
        >>> mask = eoi.masks.support(variables["params"])
        >>> def optimizer_of(key, mask, learning_rate):
        ...     return eoi.static_sparse(optax.adam(learning_rate), mask)
        >>> state = steps.init_state(optimizer_of, jax.random.key(1), variables, mask)
        >>> step = jax.jit(steps.train_step(model, made, optimizer_of))
        >>> for number in range(3):
        ...     images, labels = made.train.images[:64], made.train.labels[:64]
        ...     state, sums = step(state, number, 1e-3, images, labels)
        >>> 0 < float(sums.loss) < 5
        True
    """

    def step(
        state: State, number: Any, learning_rate: Any, images: Array, labels: Array
    ) -> tuple[State, Sums]:
        seed_key = jax.random.wrap_key_data(state.key)
        key = jax.random.fold_in(key_of(seed_key, Purpose.AUGMENTATION), number)
        x = dataset.augment(key, images)

        def loss_fn(params: Params) -> Any:
            logits, others = model.apply(
                {"params": params, **state.others},
                x,
                train=True,
                mutable=list(state.others),
                rngs={"dropout": key},
            )
            loss, correct = _losses(logits, labels)
            return loss.mean(), (others, correct.mean())

        (loss, (others, accuracy)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        # SET and RigL change the mask: the one in the state counts.
        mask = optax.tree.get(state.optimizer, "mask")
        tx = optimizer_of(seed_key, mask, learning_rate)
        updates, optimizer = tx.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        bad_step = jnp.where(jnp.isfinite(loss), NEVER, number)
        return State(state.key, params, dict(others), optimizer), Sums(loss, accuracy, bad_step)

    return step


def evaluation(
    model: Any, dataset: Dataset, batch_size: int
) -> Callable[[State, Array, Array], tuple[Array, Array]]:
    """Return the function that evaluates one seed on all images of a split.

    Returns:
        ``(state, images, labels) -> (loss, accuracy)``, means over all images.
    """
    totals = evaluated_batch(model, dataset)

    def evaluate(state: State, images: Array, labels: Array) -> tuple[Array, Array]:
        def body(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            index = number * batch_size + jnp.arange(batch_size)
            # The last batch is filled up with images that do not count.
            counts, index = index < len(labels), jnp.minimum(index, len(labels) - 1)
            new = totals(state, images[index], labels[index], counts)
            return sums[0] + new[0], sums[1] + new[1]

        zero = jnp.zeros(()), jnp.zeros(())
        loss, correct = jax.lax.fori_loop(0, -(-len(labels) // batch_size), body, zero)
        return loss / len(labels), correct / len(labels)

    return evaluate


def evaluated_batch(
    model: Any, dataset: Dataset
) -> Callable[[State, Array, Array, Array], tuple[Array, Array]]:
    """Return the function that evaluates one seed on one batch.

    Returns:
        ``(state, images, labels, counts) -> (loss, correct)``: sums over the images that count.
    """

    def totals(state: State, images: Array, labels: Array, counts: Array) -> tuple[Array, Array]:
        variables = {"params": state.params, **state.others}
        logits = model.apply(variables, dataset.normalize(images))
        loss, correct = (jnp.where(counts, values, 0).sum() for values in _losses(logits, labels))
        return loss, correct

    return totals


def is_finite(state: State) -> Array:
    """Tell whether all parameters of one seed are finite."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]).all()


def sparse_optimizer(
    num_steps: int,
    *,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    dynamic: str = "static",
    density_power: float = 0.0,
) -> OptimizerOf:
    """Return how optimizers are made: SGD with Nesterov momentum, or AdamW, under a mask.

    Args:
        num_steps: Training steps in all.
        optimizer: ``"sgd"`` or ``"adamw"``.
        momentum: In [0, 1); of AdamW the decay of the mean of gradients.
        weight_decay: Weight decay of all parameters, of SGD added to the gradient; at least 0.
        dynamic: ``"static"`` for a mask that stays, ``"set"`` or ``"rigl"``.
        density_power: The updates of each sparse kernel are multiplied by
            ``density**-density_power``.

    Returns:
        ``(key, mask, learning_rate) -> optimizer``.
    """

    def optimizer_of(
        key: Array, mask: Mask, learning_rate: Any
    ) -> optax.GradientTransformationExtraArgs:
        if optimizer == "adamw":
            inner = optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay)
        else:
            inner = optax.chain(
                optax.add_decayed_weights(weight_decay),
                optax.sgd(learning_rate, momentum=momentum, nesterov=True),
            )
        if density_power:
            scaled = eoi.scale_by_density(mask, density_power, layout=models.layout)
            inner = optax.chain(inner, scaled)
        return under_mask(inner, mask, key=key, num_steps=num_steps, dynamic=dynamic)

    return optimizer_of


def under_mask(
    inner: optax.GradientTransformation,
    mask: Mask,
    *,
    key: Array,
    num_steps: int,
    dynamic: str = "static",
) -> optax.GradientTransformationExtraArgs:
    """Put an optimizer under a mask, which stays, or changes by SET or RigL.

    The latter drop weights and grow others every 100 steps during the first three quarters: 30 % of
    a layer's at first, fewer as a cosine falls.

    Args:
        inner: The optimizer.
        mask: Which of the params may be non-zero; a scalar where a leaf is dense.
        key: The seed's PRNG key.
        num_steps: Training steps in all.
        dynamic: ``"static"``, ``"set"`` or ``"rigl"``.
    """
    if dynamic == "static":
        return eoi.static_sparse(inner, mask)
    stop_step = max(1, 3 * num_steps // 4)
    options: dict[str, Any] = {
        "update_every": DROP_AND_GROW_EVERY,
        "stop_step": stop_step,
        "drop_fraction": optax.cosine_decay_schedule(_DROP_FRACTION, stop_step),
        "layout": models.layout,
    }
    if dynamic == "rigl":
        return eoi.rigl(inner, mask, **options)
    growth_key = key_of(key, Purpose.GROWTH)
    return eoi.sparse_evolutionary_training(inner, mask, key=growth_key, **options)


def _losses(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return the cross-entropy of each example, and 1 where its largest logit is the label's.

    Of an example with several labels, such as a text with one for each character, their means.
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    axes = tuple(range(1, labels.ndim))
    return loss.mean(axes), correct.mean(axes)
