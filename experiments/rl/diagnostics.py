"""Measurements of actor and critic in training: dormant units, and the range of the Jacobian."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eoi_jax import spectrum
from eoi_jax.typing import Array
from experiments.rl import ppo
from experiments.rl.environments import Environment
from experiments.rl.networks import units
from experiments.rl.ppo import State

__all__ = ["DORMANT", "EXAMPLES", "Measures", "dormant_fraction", "measures", "singular_range"]

DORMANT = 0.025
"""Share of its layer's mean activation at which a unit counts as dormant."""
EXAMPLES = 2
"""Observations at which the Jacobian is taken."""
_STEPS = 64
_KEY = 110  # beside the purposes of experiments.training.keys, and PPO's


class Measures(NamedTuple):
    """The measurements at one point of training, for each seed.

    Attributes:
        dormant_actor: Fraction of the actor's hidden units that are dormant.
        dormant_critic: Fraction of the critic's.
    """

    dormant_actor: Array
    dormant_critic: Array


def dormant_fraction(layers: Sequence[Array], threshold: float = DORMANT) -> Array:
    r"""Fraction of units that are dormant, over all hidden layers of a network.

    The score of unit :math:`i` of a layer of :math:`H` units is its mean activation over the mean
    of its layer,

    .. math:: s_i = \frac{E|h_i(x)|}{\frac{1}{H} \sum_k E|h_k(x)|},

    and it is dormant if :math:`s_i \le \tau`. All units of a layer without any activation are.

    Args:
        layers: Activations, ``(batch, units)`` of each layer.
        threshold: :math:`\tau`, at least 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from experiments.rl import diagnostics
        >>> diagnostics.dormant_fraction([jnp.array([[2.0, 0.0], [-2.0, 0.0]]), jnp.ones((2, 2))])
        Array(0.25, dtype=float32)

    Reference:
        Sokar et al., "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", ICML 2023.
    """
    dormant = []
    for activations in layers:
        means = jnp.abs(activations).mean(axis=0)
        dormant.append(means <= threshold * means.mean())
    return jnp.concatenate(dormant).mean()


@functools.cache
def measures(model: Any, env: Environment) -> Callable[[State], Measures]:
    """Return the function that measures the networks of stacked seeds.

    The observations are those of 64 steps of each environment from where it stands, which change
    nothing of the training.

    Args:
        model: Actor and critic.
        env: The environment.
    """

    def of_seed(state: State) -> Measures:
        observations = _observations(model, env, state, _STEPS)
        found = units(model, _variables(state), observations)
        return Measures(dormant_fraction(found["actor"]), dormant_fraction(found["critic"]))

    return jax.jit(lambda state: jax.lax.map(of_seed, _uncounted(state)))


@functools.cache
def singular_range(model: Any, env: Environment) -> Callable[[State], tuple[Array, Array]]:
    """Return the function that takes the actor's Jacobian, of stacked seeds.

    It is that of all layers with sparse kernels, from the units of the first layer to those of the
    last hidden one.

    Args:
        model: Actor and critic.
        env: The environment.

    Returns:
        ``state -> (smallest, largest)``: the smallest and the largest singular value at any of
        :data:`EXAMPLES` observations, of each seed.
    """

    def of_seed(state: State) -> tuple[Array, Array]:
        variables = _variables(state)
        observations = _observations(model, env, state, _STEPS)
        # As far apart in time as may be.
        observations = observations[jnp.linspace(0, len(observations) - 1, EXAMPLES, dtype=int)]
        first = model.apply(variables, observations, method="actor_embed")
        hidden = functools.partial(model.apply, variables, method="actor_hidden")
        values = spectrum.singular_values(hidden, first, batch_size=1)
        return values.min(), values.max()

    return jax.jit(lambda state: jax.lax.map(of_seed, _uncounted(state)))


def _observations(model: Any, env: Environment, state: State, num_steps: int) -> Array:
    policy = functools.partial(model.apply, _variables(state), method="policy")
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), _KEY)
    begun = (state.observations, state.env)
    _, ((observations, _, _), _) = ppo.rollout(env, policy, key, begun, num_steps)
    return observations.reshape(-1, observations.shape[-1])


def _variables(state: State) -> dict[str, Any]:
    return {"params": state.params, **state.others}


def _uncounted(state: State) -> State:
    """Leave out the optimizer, whose count of steps the seeds may share."""
    return state._replace(optimizer=None)
