"""The environments of gymnax for PPO: with flat observations, and episodes that restart.

gymnax is in the extra ``rl`` and is imported when an environment is loaded.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from eoi_jax.typing import Array

__all__ = ["Environment", "Transition", "load"]


class Transition(NamedTuple):
    """The result of one step of one environment.

    Attributes:
        reward: The reward, float32.
        terminated: Whether the episode ended by itself, so that nothing would follow.
        truncated: Whether it was cut at the time limit, so that more steps would follow.
        final: The observation that the step led to, also where the episode is over.
    """

    reward: Array
    terminated: Array
    truncated: Array
    final: Array


class Environment(NamedTuple):
    """The two functions of an environment, and its sizes.

    Attributes:
        reset: ``key -> (observation, state)``.
        step: ``(key, state, action) -> (observation, state, Transition)``; where the episode is
            over, observation and state are those of a new one.
        observation_size: Entries of an observation.
        num_actions: The actions are 0 to one less than this.
    """

    reset: Callable[[Array], tuple[Array, Any]]
    step: Callable[[Array, Any, Array], tuple[Array, Any, Transition]]
    observation_size: int
    num_actions: int


@functools.cache
def load(name: str) -> Environment:
    """Load an environment, one object for each name.

    Args:
        name: Its name in gymnax.

    Raises:
        ImportError: If gymnax, or a version since 1.0, is not installed.
    """
    try:
        gymnax = importlib.import_module("gymnax")
    except ImportError as error:
        raise ImportError(
            f"Environments need gymnax, which cannot be imported ({error}). "
            "pip install 'gymnax>=1.0.1' six"
        ) from error
    env, params = gymnax.make(name)
    size = math.prod(env.observation_space(params).shape)

    def reset(key: Array) -> tuple[Array, Any]:
        observation, state = env.reset(key, params)
        return _flat(observation), state

    def step(key: Array, state: Any, action: Array) -> tuple[Array, Any, Transition]:
        stepped = env.step(key, state, action, params)
        if len(stepped) != 6:
            raise ImportError(
                "Environments need gymnax 1.0 or later, which tells an episode's end from its "
                "cut. pip install 'gymnax>=1.0.1' six"
            )
        observation, state, reward, terminated, truncated, info = stepped
        final = _flat(info["final_observation"])
        reward = jnp.asarray(reward, jnp.float32)
        return _flat(observation), state, Transition(reward, terminated, truncated, final)

    return Environment(reset, step, size, int(env.num_actions))


def _flat(observation: Array) -> Array:
    return jnp.ravel(observation).astype(jnp.float32)
