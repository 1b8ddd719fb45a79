"""Loops over the steps of an epoch, on the device or in Python, for one seed or several at once.

The number of steps of one call is an argument of the compiled program, so the result does not
depend on how the steps are divided. Use :func:`device_loop` where XLA runs a gradient in a loop as
fast as outside of it, and :func:`python_loop` elsewhere: for convolutions on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from eoi_jax.dynamic import DynamicSparseState
from eoi_jax.typing import Array
from experiments.training.keys import Purpose, key_of
from experiments.training.steps import State, Sums

__all__ = [
    "CPU_OPTIONS",
    "Advance",
    "Epoch",
    "Step",
    "device_loop",
    "epoch_order",
    "one_by_one",
    "optimizer_axes",
    "python_loop",
    "stack",
    "stack_all",
    "state_axes",
    "step_of_epoch",
    "step_of_examples",
    "sums_of",
]

_State = TypeVar("_State")

CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""Options for :func:`jax.jit` on CPUs under which ``jax.lax.optimization_barrier`` counts there:
the pass that is left out would remove every barrier before operations are fused."""


class Epoch(NamedTuple):
    """Values shared by the steps of one epoch.

    Attributes:
        order: Indices of the images of each step, ``(steps, batch)``; of several seeds
            ``(seeds, steps, batch)``.
        learning_rate: The learning rate at the first step of the training.
        images: All training images.
        labels: Their labels.
    """

    order: Array
    learning_rate: Any
    images: Array
    labels: Array


Step: TypeAlias = Callable[[State, Sums, Any, Epoch], tuple[State, Sums]]
"""``(state, sums, number, epoch) -> (state, sums)``: one step, added to the sums."""

Advance: TypeAlias = Callable[[State, Any, Any, Epoch], tuple[State, Sums]]
"""``(state, first, stop, epoch) -> (state, sums)``: the steps from ``first`` up to ``stop``, the
latter excluded, both of one epoch. The state passed is donated."""


def epoch_order(size: int, batch_size: int) -> Callable[[State, Any], Array]:
    """Return the function that orders the training images of an epoch.

    Args:
        size: Number of training images.
        batch_size: Images of a step, at most ``size``; what is left over is dropped.

    Returns:
        ``(state, epoch) -> indices (size // batch_size, batch_size)``, of one seed.
    """
    num_steps = size // batch_size

    def order(state: State, epoch: Any) -> Array:
        key = key_of(jax.random.wrap_key_data(state.key), Purpose.ORDER)
        whole = jax.random.permutation(jax.random.fold_in(key, epoch), size)
        return whole[: num_steps * batch_size].reshape(num_steps, batch_size)

    return order


def step_of_epoch(
    train_step: Callable[[State, Any, Any, Array, Array], tuple[State, Sums]], num_steps: int
) -> Step:
    """Return a step that takes its images and its learning rate from the epoch.

    The learning rate is divided by 10 at half and at three quarters of the steps.

    Args:
        train_step: As :func:`experiments.training.steps.train_step` returns it.
        num_steps: Training steps in all.
    """
    step_of_batch = step_of_examples(train_step, num_steps)

    def step(state: State, sums: Sums, number: Any, epoch: Epoch) -> tuple[State, Sums]:
        index = epoch.order[number % len(epoch.order)]
        images, labels = epoch.images[index], epoch.labels[index]
        return step_of_batch(state, sums, number, epoch.learning_rate, images, labels)

    return step


def step_of_examples(
    train_step: Callable[[State, Any, Any, Array, Array], tuple[State, Sums]], num_steps: int
) -> Callable[[State, Sums, Any, Any, Array, Array], tuple[State, Sums]]:
    """Return a step on given examples, added to the sums, with the learning rate of its number.

    Args:
        train_step: As :func:`experiments.training.steps.train_step` returns it.
        num_steps: Training steps in all.

    Returns:
        ``(state, sums, number, learning_rate, images, labels) -> (state, sums)``, the learning rate
        that of the first step.
    """
    milestones = {-(-num_steps * quarters // 4): 0.1 for quarters in (2, 3)}
    factor = optax.piecewise_constant_schedule(1.0, milestones)

    def step(
        state: State, sums: Sums, number: Any, learning_rate: Any, images: Array, labels: Array
    ) -> tuple[State, Sums]:
        state, new = train_step(state, number, learning_rate * factor(number), images, labels)
        bad_step = jnp.minimum(sums.bad_step, new.bad_step)
        return state, Sums(sums.loss + new.loss, sums.accuracy + new.accuracy, bad_step)

    return step


def device_loop(step: Step) -> Advance:
    """Run the steps of a call as one program, a loop on the device."""

    def advance(state: State, first: Any, stop: Any, epoch: Epoch) -> tuple[State, Sums]:
        def body(number: Array, carry: tuple[State, Sums]) -> tuple[State, Sums]:
            return step(*carry, number, epoch)

        return jax.lax.fori_loop(first, stop, body, (state, sums_of(epoch)))

    return jax.jit(advance, donate_argnums=0)


def python_loop(step: Step) -> Advance:
    """Dispatch step by step, where a loop on the device would be slower.

    Of several seeds, each is dispatched by itself: XLA for CPUs takes several times as long for one
    convolution of every seed's images with its own kernels.

    Args:
        step: Of one seed, also if the state is of several.
    """
    options = CPU_OPTIONS if jax.default_backend() == "cpu" else None
    compiled = jax.jit(step, donate_argnums=0, compiler_options=options)

    def advance(state: State, first: Any, stop: Any, epoch: Epoch) -> tuple[State, Sums]:
        if epoch.order.ndim == 2:
            return advance_one(state, first, stop, epoch)
        found = [
            advance_one(_of_seed(state, seed), first, stop, epoch._replace(order=order))
            for seed, order in enumerate(epoch.order)
        ]
        states, sums = zip(*found, strict=True)
        return stack(list(states)), jax.tree.map(lambda *each: jnp.stack(each), *sums)

    def advance_one(state: State, first: Any, stop: Any, epoch: Epoch) -> tuple[State, Sums]:
        sums = sums_of(epoch)
        for number in range(first, stop):
            state, sums = compiled(state, sums, number, epoch)
        return state, sums

    return advance


def sums_of(epoch: Epoch) -> Sums:
    """Return the sums of no steps, for each seed of an epoch."""
    seeds = epoch.order.shape[:-2]
    return jax.tree.map(lambda zero: jnp.broadcast_to(zero, seeds), Sums())


def stack(states: list[State]) -> State:
    """Put the states of several seeds into one; that of a single seed stays as it is.

    Steps are counted once for all seeds: then SET and RigL drop and grow weights in a branch.

    Returns:
        The state, bound to its device as a restored one is: one program serves both.
    """
    whole = states[0]
    if len(states) > 1:
        whole = stack_all(states)
    return jax.device_put(whole, jax.local_devices()[0])


def stack_all(states: list[_State]) -> _State:
    """Put states into one along a new first axis, also if there is one only.

    Args:
        states: Of one seed each; named tuples with a field ``optimizer``.

    Returns:
        The state; steps are counted once for all seeds.
    """
    whole: Any = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    first: Any = states[0]
    if isinstance(whole.optimizer, DynamicSparseState):
        whole = whole._replace(optimizer=whole.optimizer._replace(step=first.optimizer.step))
    found: _State = whole
    return found


def one_by_one(
    evaluate: Callable[[State, Array, Array], tuple[Array, Array]],
) -> Callable[[State, Array, Array], tuple[Array, Array]]:
    """Evaluate the seeds of a state in turn, where all at once would be slower.

    Args:
        evaluate: As :func:`experiments.training.steps.evaluation` returns it, of one seed.
    """

    def in_turn(state: State, images: Array, labels: Array) -> tuple[Array, Array]:
        found: tuple[Array, Array] = jax.lax.map(
            lambda one: evaluate(one, images, labels), _uncounted(state)
        )
        return found

    return in_turn


def _of_seed(state: State, seed: int) -> State:
    """Return the state of one seed, of those that :func:`stack` put into one."""
    shared = state.optimizer
    one = jax.tree.map(lambda leaf: leaf[seed], _uncounted(state))
    if isinstance(shared, DynamicSparseState):
        # A copy, since each seed's first step is given its state to use up.
        one = one._replace(optimizer=one.optimizer._replace(step=jnp.copy(shared.step)))
    return one


def _uncounted(state: State) -> State:
    """Leave out the count of steps that all seeds share."""
    if isinstance(state.optimizer, DynamicSparseState):
        state = state._replace(optimizer=state.optimizer._replace(step=None))  # type: ignore[arg-type]
    return state


def state_axes(*, dynamic: bool) -> State:
    """Return the axes of seeds in a stacked state, as :func:`jax.vmap` takes them.

    Returns:
        0 for all leaves but the count of steps that SET and RigL keep, which has no such axis.
    """
    axes: Any = 0
    return State(axes, axes, axes, optimizer_axes(dynamic=dynamic))


def optimizer_axes(*, dynamic: bool) -> Any:
    """Return the axes of seeds in the stacked state of an optimizer, as :func:`state_axes` does."""
    if not dynamic:
        return 0
    return DynamicSparseState(step=None, key=0, mask=0, inner_state=0)  # type: ignore[arg-type]
