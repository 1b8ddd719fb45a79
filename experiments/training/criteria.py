"""Masks by criterion: allocations, magnitude, random scores, SNIP, GraSP and SynFlow.

SNIP uses one batch of training images, and GraSP whole batches of ten images for each class, drawn
uniformly from all; both normalize by the statistics of the batch. GraSP divides the logits by 200.
SynFlow takes a hundred rounds and uses no images; a network whose activation is not homogeneous is
scored with the identity in place of the activation.

To add a criterion, write a function and a line of :data:`CRITERIA`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eoi_jax as eoi
from eoi_jax.typing import Array, Mask, Params, Scores, Where
from experiments import models
from experiments.config import Start, digest_of, to_dict
from experiments.data import Dataset
from experiments.runs.cache import get_or_compute
from experiments.training import network
from experiments.training.keys import Purpose, key_of

__all__ = ["CRITERIA", "FIELDS", "DenseNetwork", "find", "part_digest"]

FIELDS = (
    *("model", "activation", "depth", "width", "attention", "perceptrons"),
    *("data", "criterion", "density", "init", "scale", "bias_std", "batch_size"),
)
"""Fields on which a mask depends. The batch size is that of the examples that are scored."""

_HOMOGENEOUS = tuple(models.ACTIVATIONS[name] for name in ("identity", "relu", "leaky_relu"))
_ROUNDS = 100
_TEMPERATURE = 200.0
_PER_CLASS = 10


class DenseNetwork(NamedTuple):
    """The dense network of one seed, from which sparse ones are made.

    Attributes:
        config: What is made of it.
        seed: Decides random masks, and the examples that are scored.
        dataset: Where examples come from.
        variables: ``params`` with all weights, and the network's other collections.
        cache: Folder in which what takes long is kept; None for nowhere.
    """

    config: Start
    seed: int
    dataset: Dataset
    variables: dict[str, Any]
    cache: Path | None = None

    @property
    def params(self) -> Params:
        """All weights."""
        return self.variables["params"]

    @property
    def where(self) -> Where:
        """Which of the params are pruned; equal settings give one object."""
        return network.where(self.config)

    @property
    def center_density(self) -> Literal["density"] | None:
        """EOI's density of a convolution's center tap; None for the library's default."""
        return models.SPECS[self.config.model].center_density

    def build(self) -> Any:
        """Return the Linen module."""
        return network.build(self.config, self.dataset.num_classes)

    def key(self, purpose: Purpose) -> Array:
        """Return the seed's key for one purpose."""
        return key_of(jax.random.key(self.seed), purpose)


def part_digest(config: Start, seed: int, *fields: str) -> str:
    """Return a name that tells some fields of a config, and a seed, from all others.

    As in :func:`experiments.config.to_dict`, fields that were added later count only if they are
    not at their defaults.
    """
    counted = {name: value for name, value in to_dict(config).items() if name in fields}
    return digest_of({"kind": "Part", **counted, "seed": seed})


def find(net: DenseNetwork) -> Mask:
    """Find the mask of a config's criterion for one seed.

    Args:
        net: The network; of its config the fields :data:`FIELDS` decide.
    """
    return CRITERIA[net.config.criterion](net)


def _cached(find: Callable[[DenseNetwork], Mask]) -> Callable[[DenseNetwork], Mask]:
    """Keep the masks of a criterion that takes long in the network's folder."""

    def find_once(net: DenseNetwork) -> Mask:
        name = part_digest(net.config, net.seed, *FIELDS)
        return get_or_compute(net.cache, name, net.params, lambda: find(net))

    return find_once


def _allocated(rule: Callable[..., Any], net: DenseNetwork) -> Mask:
    """Draw a mask with the layer densities of a rule."""
    density = net.config.density
    densities = rule(net.params, density, where=net.where, layout=models.layout)
    return eoi.masks.random(net.key(Purpose.MASK), net.params, densities, where=net.where)


def _magnitude(net: DenseNetwork) -> Mask:
    scores = eoi.criteria.magnitude(net.params, where=net.where)
    return eoi.masks.top_k(scores, net.config.density)


def _random(net: DenseNetwork) -> Mask:
    scores = eoi.criteria.random(net.key(Purpose.MASK), net.params, where=net.where)
    return eoi.masks.top_k(scores, net.config.density)


def _snip(net: DenseNetwork) -> Mask:
    examples = _examples(net, 1)
    scores = _snip_scores(net.build(), net.where, net.variables, *examples)
    return eoi.masks.top_k(scores, net.config.density)


def _grasp(net: DenseNetwork) -> Mask:
    images, labels = _examples(net, _PER_CLASS * net.dataset.num_classes)
    size = min(net.config.batch_size, len(images))
    scores = _grasp_scores(net.build(), net.where, size, net.variables, images, labels)
    return eoi.masks.top_k(scores, net.config.density)


def _synflow(net: DenseNetwork) -> Mask:
    """Prune in rounds: a plain network in float32, one with normalization in float64.

    The flow of a plain chain of layers is scaled as needed; that of residual branches cannot be,
    and leaves the range of float32.
    """
    if net.build().activation not in _HOMOGENEOUS:
        net = net._replace(config=dataclasses.replace(net.config, activation="identity"))
    score = _flow(net.build(), net.where, (1, *net.dataset.image_shape))

    def prune(variables: dict[str, Any]) -> Mask:
        density = net.config.density
        mask = eoi.criteria.prune(
            score, variables, density, num_steps=_ROUNDS, layout=models.layout
        )
        return mask["params"]

    if set(net.variables) == {"params"}:
        return prune(net.variables)
    with jax.enable_x64(True):
        return prune(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), net.variables))


CRITERIA: Mapping[str, Callable[[DenseNetwork], Mask]] = {
    **{name: functools.partial(_allocated, rule) for name, rule in eoi.budgets.RULES.items()},
    "magnitude": _magnitude,
    "random": _random,
    "snip": _cached(_snip),
    "grasp": _cached(_grasp),
    "synflow": _cached(_synflow),
}
"""Criteria by name: a config's ``criterion``."""


def _examples(net: DenseNetwork, at_least: int) -> tuple[Array, Array]:
    """Draw whole batches of training images: so many images or more, if there are as many."""
    train = net.dataset.train
    size = len(train.images)
    batch = min(net.config.batch_size, size)
    number = min(math.ceil(at_least / batch), size // batch) * batch
    order = np.asarray(jax.random.permutation(net.key(Purpose.EXAMPLES), size))[:number]
    images = net.dataset.normalize(jnp.asarray(train.images[order]))
    return images, jnp.asarray(train.labels[order])


@functools.partial(jax.jit, static_argnames=("model", "where"))
def _snip_scores(
    model: Any, where: Where, variables: dict[str, Any], images: Array, labels: Array
) -> Scores:
    loss_fn = _loss_fn(model, variables)
    return eoi.criteria.snip(loss_fn, variables["params"], images, labels, where=where)


@functools.partial(jax.jit, static_argnames=("model", "where", "size"))
def _grasp_scores(
    model: Any, where: Where, size: int, variables: dict[str, Any], images: Array, labels: Array
) -> Scores:
    loss_fn = _loss_fn(model, variables, _TEMPERATURE)
    return eoi.criteria.grasp(
        loss_fn, variables["params"], images, labels, micro_batch_size=size, where=where
    )


def _loss_fn(
    model: Any, variables: dict[str, Any], temperature: float = 1.0
) -> Callable[[Params, Array, Array], Array]:
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss_fn(params: Params, images: Array, labels: Array) -> Array:
        whole = {"params": params, **rest}
        logits, _ = model.apply(whole, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits / temperature, labels)
        return losses.mean()

    return loss_fn


@functools.lru_cache(maxsize=4)
def _flow(model: Any, pruned: Where, shape: tuple[int, ...]) -> Callable[[Any], Scores]:
    """Return the score function of a network: one object, for its loop is compiled with it."""

    def score(variables: Any) -> Scores:
        return eoi.criteria.synflow(
            model.apply,
            variables,
            jax.ShapeDtypeStruct(shape, jnp.result_type(float)),
            where=lambda path, leaf: path[0].key == "params" and pruned(path[1:], leaf),
        )

    return score
