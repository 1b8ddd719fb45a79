"""The compiled functions of training: begin, order the images, advance by some steps, evaluate.

Seeds are trained at once, under :func:`jax.vmap`, if there are several. How many steps one dispatch
takes is an argument of the compiled program and no part of it, so the same numbers come out however
the steps are divided. Convolutional networks are dispatched step by step on CPUs (:func:`in_turn`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eoi_jax as eoi
from eoi_jax.dynamic import DynamicSparseState
from eoi_jax.typing import Array, Mask, Params
from experiments import config as configs
from experiments import data, models
from experiments.models.convolve import valid_convolution
from experiments.training import pruning
from experiments.training.keys import Purpose, key_of

__all__ = ["NEVER", "Programs", "State", "Sums", "compiled", "in_turn", "load"]

NEVER = int(np.iinfo(np.int32).max)
"""What stands for no step at all."""

_EXCHANGE_EVERY = 100  # steps, of SET and RigL
_EXCHANGE_FRACTION = 0.3  # of a layer's weights, at first; a cosine takes it to 0

# Fields that the functions depend on. Runs that differ in others share them.
_FIELDS = (
    *("model", "activation", "depth", "width", "data", "dynamic"),
    *("epochs", "batch_size", "momentum", "weight_decay"),
)


class State(NamedTuple):
    """All that changes while a network trains; of several seeds, stacked.

    Attributes:
        key: integers of the seed's key.
        params: the parameters.
        others: the network's other collections, as ``batch_stats``.
        optimizer: state of the optimizer, with the mask.
    """

    key: Array
    params: Params
    others: dict[str, Any]
    optimizer: Any


class Sums(NamedTuple):
    """What some steps add up to, for each seed.

    Attributes:
        loss: mean cross-entropies of the steps' batches, summed.
        accuracy: fractions of their examples that were classified rightly, summed.
        bad_step: first step whose loss was not finite, :data:`NEVER` if there is none.
    """

    loss: Array
    accuracy: Array
    bad_step: Array


class Programs(NamedTuple):
    """What :func:`compiled` returns.

    Attributes:
        begin: ``(key, variables, mask) -> State`` of one seed.
        stack: several of these in one; a single one as it is.
        order: ``(state, epoch) -> indices`` of the training images of each of its steps.
        advance: ``(state, order, first, stop, learning_rate, images, labels) -> (state, Sums)``:
            trains from step ``first`` to ``stop``, both of one epoch. The state passed is used up.
        evaluate: ``(state, images, labels) -> (loss, accuracy)``, means over all images.
        finite: ``(state) -> bool``: whether all parameters are.
        steps: training steps in all.
        steps_of_epoch: those of one epoch; what is left of the images is dropped.
    """

    begin: Callable[..., State]
    stack: Callable[[list[State]], State]
    order: Callable[..., Array]
    advance: Callable[..., tuple[State, Sums]]
    evaluate: Callable[..., tuple[Array, Array]]
    finite: Callable[[State], Array]
    steps: int
    steps_of_epoch: int


def load(
    config: configs.Train, data_dir: str | None
) -> tuple[data.Dataset, dict[str, tuple[Array, Array]]]:
    """Load the data set of a config, and bring its splits to the device; kept for the next call.

    Args:
        config: of which data and model count.
        data_dir: folder of prepared data sets.

    Returns:
        The data set, and images and labels of ``"train"``, ``"validation"`` and ``"test"``.

    Raises:
        ValueError: as :func:`experiments.data.load`.

    Example:
        >>> from experiments import config
        >>> from experiments.training import programs
        >>> _, arrays = programs.load(config.Train(data="made"), None)
        >>> arrays["test"][0].shape[1:]
        (28, 28, 1)
    """
    made = config.data in ("made", "imagenet2012")
    return _load(config.data, data_dir, models.input_shape(config.model) if made else None)


@functools.lru_cache(maxsize=1)
def _load(name: str, data_dir: str | None, shape: Any) -> Any:
    dataset = data.load(name, data_dir, image_shape=shape)
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    return dataset, {
        name: (jnp.asarray(split.images), jnp.asarray(split.labels))
        for name, split in splits.items()
    }


def compiled(config: configs.Train, data_dir: str | None) -> Programs:
    """Return the functions of a config; configs that need the same ones share them.

    Args:
        config: what to train.
        data_dir: folder of prepared data sets.

    Returns:
        The functions, each compiled at its first call.

    Raises:
        ValueError: for a batch larger than the training set, and as :func:`load`.

    Example:
        >>> from experiments import config
        >>> from experiments.training import programs
        >>> one = config.Train(data="made", epochs=3)
        >>> programs.compiled(one, None).steps == 3 * programs.compiled(one, None).steps_of_epoch
        True
    """
    own = {name: getattr(config, name) for name in _FIELDS}
    seeds = (0,) if len(config.seeds) == 1 else (0, 1)
    return _compiled(configs.Train(seeds=seeds, **own), data_dir)


@functools.lru_cache(maxsize=8)
def _compiled(config: configs.Train, data_dir: str | None) -> Programs:
    dataset, _ = load(config, data_dir)
    model = pruning.network(config, dataset.num_classes)
    # In a loop, XLA for CPUs takes tens of times as long for the gradient of a convolution.
    alone = jax.default_backend() == "cpu" and not isinstance(model, models.Mlp)
    if alone and isinstance(model, models.Cnn):
        model, alone = model.clone(convolve=valid_convolution), False
    size, batch = len(dataset.train.labels), config.batch_size
    if batch > size:
        raise ValueError(
            f"batch_size={batch} is outside [1, {size}], the training images of {config.data}. "
            "Give a smaller one."
        )
    steps_of_epoch = size // batch
    steps = max(1, round(config.epochs * steps_of_epoch))

    def begin(key: Array, variables: dict[str, Any], mask: Mask) -> State:
        others = {name: value for name, value in variables.items() if name != "params"}
        tx = _optimizer(config, steps, key, mask, 0.0)
        return State(key, variables["params"], others, tx.init(variables["params"]))

    def order(state: State, epoch: Array) -> Array:
        of_epoch = jax.random.fold_in(_key(state, Purpose.ORDER), epoch)
        whole = jax.random.permutation(of_epoch, size)[: steps_of_epoch * batch]
        return whole.reshape(steps_of_epoch, batch)

    def step_once(state: State, step: Array, rate: Array, images: Array, labels: Array) -> Any:
        """Train on one batch, a step of SGD under the mask."""
        key = jax.random.fold_in(_key(state, Purpose.AUGMENTATION), step)
        x = dataset.augment(key, images)

        def loss_fn(params: Params) -> Any:
            logits, others = model.apply(
                {"params": params, **state.others},
                x,
                train=True,
                mutable=list(state.others),
                rngs={"dropout": key},
            )
            loss, right = _losses(logits, labels)
            return loss.mean(), (others, right.mean())

        (loss, (others, accuracy)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        # The mask that counts is the one in the state.
        mask = optax.tree.get(state.optimizer, "mask")
        tx = _optimizer(config, steps, state.key, mask, rate)
        updates, optimizer = tx.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        bad = jnp.where(jnp.isfinite(loss), NEVER, step)
        return State(state.key, params, dict(others), optimizer), Sums(loss, accuracy, bad)

    factor = optax.piecewise_constant_schedule(1.0, {-(-steps * part // 4): 0.1 for part in (2, 3)})

    def advance_one(
        state: State,
        sums: Sums,
        order: Array,
        step: Array,
        learning_rate: Array,
        images: Array,
        labels: Array,
    ) -> tuple[State, Sums]:
        index, rate = order[step % steps_of_epoch], learning_rate * factor(step)
        state, own = step_once(state, step, rate, images[index], labels[index])
        bad = jnp.minimum(sums.bad_step, own.bad_step)
        return state, Sums(sums.loss + own.loss, sums.accuracy + own.accuracy, bad)

    def advance(
        state: State,
        order: Array,
        first: Array,
        stop: Array,
        learning_rate: Array,
        images: Array,
        labels: Array,
    ) -> tuple[State, Sums]:
        def body(step: Array, carry: tuple[State, Sums]) -> tuple[State, Sums]:
            return advance_one(*carry, order, step, learning_rate, images, labels)

        return jax.lax.fori_loop(first, stop, body, (state, _nothing()))

    def evaluate(state: State, images: Array, labels: Array) -> tuple[Array, Array]:
        def body(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            index = number * batch + jnp.arange(batch)
            # The last batch is filled up with images that do not count.
            counts, index = index < len(labels), jnp.minimum(index, len(labels) - 1)
            logits = model.apply(
                {"params": state.params, **state.others}, dataset.normalize(images[index])
            )
            own = _losses(logits, labels[index])
            loss, right = (sums[i] + jnp.where(counts, own[i], 0).sum() for i in (0, 1))
            return loss, right

        zero = jnp.zeros(()), jnp.zeros(())
        loss, right = jax.lax.fori_loop(0, -(-len(labels) // batch), body, zero)
        return loss / len(labels), right / len(labels)

    def finite(state: State) -> Array:
        return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]).all()

    if len(config.seeds) == 1:
        stack, one_each = _only, advance_one
    else:
        stack = _stack
        # Steps are counted once for all seeds: then SET and RigL exchange weights in a branch.
        counted = DynamicSparseState(step=None, key=0, mask=0, inner_state=0)  # type: ignore[arg-type]
        state = State(0, 0, 0, 0 if config.dynamic == "static" else counted)  # type: ignore[arg-type]
        order = jax.vmap(order, in_axes=(state, None))
        one_each = jax.vmap(advance_one, in_axes=(state, 0, 0, *[None] * 4), out_axes=(state, 0))
        advance = jax.vmap(advance, in_axes=(state, 0, *[None] * 5), out_axes=(state, 0))
        evaluate = jax.vmap(evaluate, in_axes=(state, None, None))
        finite = jax.vmap(finite, in_axes=(state,))
    return Programs(
        jax.jit(begin),
        stack,
        jax.jit(order),
        in_turn(one_each) if alone else jax.jit(advance, donate_argnums=0),
        jax.jit(evaluate),
        jax.jit(finite),
        steps,
        steps_of_epoch,
    )


def in_turn(advance_one: Callable[..., tuple[State, Sums]]) -> Callable[..., tuple[State, Sums]]:
    """Dispatch step by step, where a loop on the device would be slower.

    Args:
        advance_one: ``(state, sums, order, step, learning_rate, images, labels) -> (state, sums)``,
            of one seed or vmapped over several.

    Returns:
        ``(state, order, first, stop, learning_rate, images, labels) -> (state, sums)``: the steps
        from ``first`` up to ``stop``, the latter excluded; ``state`` is donated.

    Example:
        >>> import jax.numpy as jnp
        >>> from experiments.training.programs import Sums, in_turn
        >>> def advance_one(state, sums, order, step, *_):
        ...     return state + step, Sums(sums.loss + 1, sums.accuracy, sums.bad_step)
        >>> state, sums = in_turn(advance_one)(jnp.array(0), jnp.zeros((9, 1)), 2, 5, 0.1, 0, 0)
        >>> int(state), float(sums.loss)
        (9, 3.0)
    """
    compiled = jax.jit(advance_one, donate_argnums=0)

    def advance(
        state: State, order: Array, first: int, stop: int, *arguments: Any
    ) -> tuple[State, Sums]:
        sums = jax.tree.map(lambda zero: jnp.broadcast_to(zero, order.shape[:-2]), _nothing())
        for step in range(first, stop):
            state, sums = compiled(state, sums, order, step, *arguments)
        return state, sums

    return advance


def _nothing() -> Sums:
    return Sums(jnp.zeros(()), jnp.zeros(()), jnp.array(NEVER))


def _only(states: list[State]) -> State:
    (state,) = states
    return _committed(state)


def _stack(states: list[State]) -> State:
    whole: State = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    if isinstance(whole.optimizer, DynamicSparseState):
        shared = whole.optimizer._replace(step=states[0].optimizer.step)
        whole = whole._replace(optimizer=shared)
    return _committed(whole)


def _committed(state: State) -> State:
    """Bind a state to its device, as one is that was restored: one program serves both."""
    return jax.device_put(state, jax.local_devices()[0])


def _key(state: State, purpose: Purpose) -> Array:
    return key_of(jax.random.wrap_key_data(state.key), purpose)


def _losses(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return the cross-entropy of each example, and whether its largest logit is the right one."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return loss, (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def _optimizer(
    config: configs.Train, steps: int, key: Array, mask: Mask, rate: Any
) -> optax.GradientTransformationExtraArgs:
    """SGD as it is at one rate, outermost the rule for the mask."""
    inner = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=config.momentum, nesterov=True),
    )
    if config.dynamic == "static":
        return eoi.static_sparse(inner, mask)
    last = max(1, 3 * steps // 4)
    options: dict[str, Any] = {
        "update_every": _EXCHANGE_EVERY,
        "stop_step": last,
        "drop_fraction": optax.cosine_decay_schedule(_EXCHANGE_FRACTION, last),
        "layout": models.layout,
    }
    if config.dynamic == "rigl":
        return eoi.rigl(inner, mask, **options)
    growth = key_of(jax.random.wrap_key_data(key), Purpose.GROWTH)
    return eoi.sparse_evolutionary_training(inner, mask, key=growth, **options)
