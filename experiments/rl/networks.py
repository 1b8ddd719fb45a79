"""Actor and critic: two networks of one shape, plain perceptrons or residual ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer
from experiments import models
from experiments.config import Ppo
from experiments.models.block_sparse import Blocks, linear

__all__ = ["ActorCritic", "Network", "build", "is_hidden_kernel", "units"]

EXPANSION = 4
"""Inner width of a residual block over that of the stream, as in SimBa."""


class Network(nn.Module):
    """A first layer, hidden ones, and a last layer.

    A plain network has ``depth`` hidden layers, the first one included. A residual one has a linear
    first layer and ``depth`` blocks ``x + W ReLU(V LayerNorm(x))`` with an inner width of four
    times ``width``, then a LayerNorm: SimBa without its running normalization of observations.
    Every layer's activations are sown as ``units`` among the intermediates.

    Attributes:
        width: Units of a hidden layer, or of the residual stream.
        depth: Hidden layers, or residual blocks.
        outputs: Units of the last layer.
        last_scale: Gain of the last layer's orthogonal kernel.
        scale: Gain of all other kernels.
        activation: Of hidden layers.
        residual: Whether the network is residual.
        blocks: If given, all kernels between the first and the last are block-sparse.

    Reference:
        Lee et al., "SimBa: Simplicity Bias for Scaling Up Parameters in Deep Reinforcement
        Learning", ICLR 2025.
    """

    width: int
    depth: int
    outputs: int
    last_scale: float
    scale: float = math.sqrt(2)
    activation: Callable[[Array], Array] = jnp.tanh
    residual: bool = False
    blocks: Blocks | None = None

    def setup(self) -> None:
        """Name the layers; those with sparse kernels are ``layers_0``, ``layers_1`` and so on."""
        init = nn.initializers.orthogonal(self.scale)
        self.first = nn.Dense(self.width, kernel_init=init)
        kind, number = (_Block, self.depth) if self.residual else (_Layer, self.depth - 1)
        inner: Any = (self.width, self.activation, init, self.blocks)
        self.layers = [kind(*inner) for _ in range(number)]
        if self.residual:
            self.norm = nn.LayerNorm()
        self.last = nn.Dense(self.outputs, kernel_init=nn.initializers.orthogonal(self.last_scale))

    def __call__(self, observations: Array) -> Array:
        """Map observations ``(..., size)`` to ``(..., outputs)``."""
        x = self.hidden(self.embed(observations))
        return self.last(self.norm(x) if self.residual else x)

    def embed(self, observations: Array) -> Array:
        """Apply the first layer."""
        x = self.first(observations)
        if self.residual:
            return x
        x = self.activation(x)
        self.sow("intermediates", "units", x)
        return x

    def hidden(self, x: Array) -> Array:
        """Apply all layers whose kernels are sparse: from ``width`` units to as many."""
        for layer in self.layers:
            x = layer(x)
        return x


class _Layer(nn.Module):
    """A hidden layer of a plain network."""

    width: int
    activation: Callable[[Array], Array]
    kernel_init: Initializer
    blocks: Blocks | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.activation(_linear(self, self.width, "linear")(x))
        self.sow("intermediates", "units", x)
        return x


class _Block(nn.Module):
    """A residual block."""

    width: int
    activation: Callable[[Array], Array]
    kernel_init: Initializer
    blocks: Blocks | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inner = _linear(self, EXPANSION * self.width, "up")(nn.LayerNorm(name="norm")(x))
        inner = self.activation(inner)
        self.sow("intermediates", "units", inner)
        return x + _linear(self, self.width, "down")(inner)


def _linear(layer: Any, features: int, name: str) -> nn.Module:
    zeros = nn.initializers.zeros
    inits: Any = {"kernel_init": layer.kernel_init, "bias_init": zeros}
    return linear(layer.blocks, features, name=name, **inits)


class ActorCritic(nn.Module):
    """A policy and a value of the same observations, which share no weights.

    Attributes:
        network: Makes either, given ``outputs``, ``last_scale`` and a name.
        num_actions: Number of logits.
    """

    network: Callable[..., Network]
    num_actions: int

    def setup(self) -> None:
        """Name the two networks ``actor`` and ``critic``."""
        self.actor = self.network(outputs=self.num_actions, last_scale=0.01)
        self.critic = self.network(outputs=1, last_scale=1.0)

    def __call__(self, observations: Array) -> tuple[Array, Array]:
        """Return logits ``(..., num_actions)`` and values ``(...)``."""
        return self.actor(observations), self.value(observations)

    def policy(self, observations: Array) -> Array:
        """Return the logits alone."""
        return self.actor(observations)

    def value(self, observations: Array) -> Array:
        """Return the values alone."""
        return self.critic(observations)[..., 0]

    def actor_embed(self, observations: Array) -> Array:
        """Apply the actor's first layer."""
        return self.actor.embed(observations)

    def actor_hidden(self, x: Array) -> Array:
        """Apply the actor's hidden layers, all those with sparse kernels."""
        return self.actor.hidden(x)


def build(config: Ppo, num_actions: int) -> ActorCritic:
    """Build actor and critic of a config, one object for equal settings.

    Args:
        config: Its network, width, depth, activation and scale decide; for method="blocks" its
            density and block_size too.
        num_actions: Number of logits.
    """
    blocks = None
    if config.method == "blocks":
        blocks = models.Blocks(config.density, config.block_size, config.scale)
    residual = config.network == "simba"
    activation = config.activation or ("relu" if residual else "tanh")
    models.choose(activation, tuple(models.ACTIVATIONS), "activation")
    sizes = (config.width, config.depth)
    return _build(*sizes, config.scale, activation, residual, blocks, num_actions)


@functools.lru_cache(maxsize=16)
def _build(
    width: int,
    depth: int,
    scale: float,
    activation: str,
    residual: bool,
    blocks: Blocks | None,
    num_actions: int,
) -> ActorCritic:
    network = functools.partial(
        Network,
        width,
        depth,
        scale=scale,
        activation=models.ACTIVATIONS[activation],
        residual=residual,
        blocks=blocks,
    )
    return ActorCritic(network, num_actions)


def is_hidden_kernel(path: tuple[Any, ...], leaf: Any) -> bool:
    """Tell which leaves are pruned: kernels between a network's first layer and its last."""
    names = [getattr(key, "key", "") for key in path]
    inside = any(name.startswith("layers_") for name in names)
    return inside and names[-1] == "kernel" and leaf.ndim == 2


def units(model: ActorCritic, variables: Any, observations: Array) -> dict[str, list[Array]]:
    """Return the hidden activations of ``"actor"`` and ``"critic"``.

    Args:
        model: The two networks.
        variables: Theirs.
        observations: ``(batch, size)``.

    Returns:
        Of each network one array ``(batch, units)`` a layer.
    """
    _, state = model.apply(variables, observations, mutable=["intermediates"])
    return {name: jax.tree.leaves(found) for name, found in state["intermediates"].items()}
