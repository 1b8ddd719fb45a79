"""The starts of PPO's networks, by the registry of :mod:`experiments.training.starts`."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from eoi_jax.typing import Array, Where
from experiments import config
from experiments.config import Ppo
from experiments.rl.networks import ActorCritic, is_hidden_kernel
from experiments.training import starts
from experiments.training.criteria import DenseNetwork
from experiments.training.keys import Purpose, key_of
from experiments.training.starts import Start

__all__ = ["dense", "make"]


class _Networks(DenseNetwork):
    """Actor and critic in place of a network of images: methods take its hidden kernels alone."""

    __slots__ = ()

    @property
    def where(self) -> Where:
        return is_hidden_kernel

    @property
    def center_density(self) -> None:
        return None


def make(config: Ppo, model: ActorCritic, observation_size: int, seed: int) -> Start:
    """Make the start of one seed; its methods share the dense weights and the mask.

    Args:
        config: What to make.
        model: Its networks.
        observation_size: Entries of an observation.
        seed: In [0, 2**31).
    """
    variables = dense(model, observation_size, seed)
    no_images = cast(Any, None)  # allocations and EOI see none
    networks = _Networks(_start(config), seed, no_images, variables)
    made = starts.METHODS[config.method](networks)
    return Start({**variables, "params": made.params}, made.mask)


def dense(model: ActorCritic, observation_size: int, seed: Any) -> dict[str, Any]:
    """Draw all weights of actor and critic, as those of dense networks or of ones with blocks.

    Args:
        model: The two networks.
        observation_size: Entries of an observation.
        seed: In [0, 2**31); it may be traced.
    """
    return _init(model, key_of(jax.random.key(seed), Purpose.WEIGHTS), observation_size)


@functools.partial(jax.jit, static_argnames=("model", "size"))
def _init(model: ActorCritic, key: Array, size: int) -> dict[str, Any]:
    return dict(model.init(key, jnp.zeros((1, size))))


def _start(ppo: Ppo) -> config.Start:
    """Return the config of a start of the same method, for the registry."""
    names = ("method", "criterion", "density", "block_size", "planes", "scale")
    return config.Start(**{name: getattr(ppo, name) for name in names})
