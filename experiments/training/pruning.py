"""Masks by criterion: budgets, magnitude, random scores, SNIP, GraSP and SynFlow.

SNIP sees one batch of training images and GraSP whole batches of ten images for each class, drawn
uniformly from all; both with normalization by the batch's own statistics. GraSP divides the logits
by 200. SynFlow takes a hundred rounds and sees none; a network whose activation is not homogeneous
is scored with the identity in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eoi_jax as eoi
from eoi_jax.typing import Array, Mask, Params, Scores, Where
from experiments import config as configs
from experiments import data, models
from experiments.runs import stored
from experiments.training.keys import Purpose, key_of

__all__ = ["DECIDE", "digest", "find", "network", "where"]

DECIDE = (
    *("model", "activation", "depth", "width", "attention", "data", "criterion", "density"),
    *("init", "scale", "bias_std", "batch_size"),
)
"""Fields on which a mask depends. The batch size is that of the examples that are scored."""

_BUDGETS: dict[str, Callable[..., Any]] = {
    "uniform": eoi.budgets.uniform,
    "erdos_renyi": eoi.budgets.erdos_renyi,
    "erdos_renyi_kernel": eoi.budgets.erdos_renyi_kernel,
}
_HOMOGENEOUS = tuple(models.ACTIVATIONS[name] for name in ("identity", "relu", "leaky_relu"))
_ROUNDS = 100
_TEMPERATURE = 200.0
_PER_CLASS = 10


def network(config: configs.Start, num_classes: int) -> Any:
    """Build the network of a config; equal settings give one object, so programs compile once.

    Args:
        config: of which model, activation, depth, width and bias_std count.
        num_classes: number of logits.

    Returns:
        A Linen module whose ``init`` draws the network's own normal weights.

    Raises:
        ValueError: as :func:`experiments.models.create`.

    Example:
        >>> from experiments import config
        >>> from experiments.training import pruning
        >>> one = pruning.network(config.Train(method="base"), 10)
        >>> one is pruning.network(config.Train(method="eoi"), 10)
        True
    """
    sizes = (config.depth, config.width)
    return _network(config.model, num_classes, config.activation, *sizes, config.bias_std)


@functools.lru_cache(maxsize=16)
def _network(
    name: str,
    num_classes: int,
    activation: str | None,
    depth: int | None,
    width: int | None,
    bias_std: float,
) -> nn.Module:
    bias_init = jax.nn.initializers.normal(bias_std) if bias_std else None
    return models.create(
        name, num_classes, activation=activation, bias_init=bias_init, depth=depth, width=width
    )


def where(config: configs.Start) -> Where:
    """Return which leaves of ``params`` are pruned; equal settings give one object.

    Args:
        config: of which model and attention count.

    Returns:
        ``(path, leaf) -> bool``.

    Raises:
        ValueError: as :func:`experiments.models.where`.

    Example:
        >>> from experiments import config
        >>> from experiments.training import pruning
        >>> pruning.where(config.Train()) is pruning.where(config.Train(density=0.5))
        True
    """
    return _where(config.model, config.attention)


@functools.lru_cache(maxsize=16)
def _where(name: str, attention: bool) -> Where:
    return models.where(name, attention=attention)


def digest(config: configs.Start, seed: int, *fields: str) -> str:
    """Return a name that tells some fields of a config, and a seed, from all others.

    Args:
        config: the config.
        seed: the seed.
        fields: names of the fields.

    Returns:
        Twelve hexadecimal digits.

    Example:
        >>> from experiments import config
        >>> from experiments.training import pruning
        >>> one, other = config.Train(epochs=1), config.Train(epochs=2)
        >>> pruning.digest(one, 1, *pruning.DECIDE) == pruning.digest(other, 1, *pruning.DECIDE)
        True
    """
    own = dataclasses.make_dataclass("Part", [*fields, "seed"], frozen=True)
    return configs.digest(own(*(getattr(config, name) for name in fields), seed))


def find(
    config: configs.Start,
    seed: int,
    dataset: data.Dataset,
    variables: dict[str, Any],
    cache: Path | None = None,
) -> Mask:
    """Find the mask of a config's criterion for one seed.

    Args:
        config: of which the fields :data:`DECIDE` count.
        seed: of random masks, and of the examples that are scored.
        dataset: where examples come from.
        variables: the network as it starts when it is dense.
        cache: folder in which the masks of SNIP, GraSP and SynFlow are kept; default: nowhere.

    Returns:
        A mask of ``variables["params"]``, with exactly the count that the density asks for.

    Raises:
        ValueError: for a network that a criterion cannot score.

    Example:
        >>> from experiments import config, data
        >>> from experiments.training import pruning, starts
        >>> one = config.Train(criterion="uniform", init="fan_in", depth=2, width=20, density=0.5)
        >>> made = data.load("made")
        >>> mask = pruning.find(one, 1, made, starts.dense(one, 1, made))
        >>> int(mask["last"]["kernel"].sum())
        100
    """
    params, pruned = variables["params"], where(config)
    key = key_of(jax.random.key(seed), Purpose.MASK)
    if config.criterion in _BUDGETS:
        rule = _BUDGETS[config.criterion]
        densities = rule(params, config.density, where=pruned, layout=models.layout)
        return eoi.masks.random(key, params, densities, where=pruned)
    if config.criterion == "magnitude":
        return eoi.masks.top_k(eoi.criteria.magnitude(params, where=pruned), config.density)
    if config.criterion == "random":
        return eoi.masks.top_k(eoi.criteria.random(key, params, where=pruned), config.density)

    def score_and_prune() -> Mask:
        if config.criterion == "synflow":
            return _synflow(config, dataset, variables)
        model, batch = network(config, dataset.num_classes), _examples(config, seed, dataset)
        scores = _scores(model, config.criterion, config.batch_size, pruned, variables, *batch)
        return eoi.masks.top_k(scores, config.density)

    return stored.kept(cache, digest(config, seed, *DECIDE), params, score_and_prune)


def _examples(config: configs.Start, seed: int, dataset: data.Dataset) -> tuple[Array, Array]:
    """Draw whole batches of training images."""
    size = len(dataset.train.images)
    batch = min(config.batch_size, size)
    wanted = _PER_CLASS * dataset.num_classes if config.criterion == "grasp" else batch
    number = min(math.ceil(wanted / batch), size // batch) * batch
    order = np.asarray(
        jax.random.permutation(key_of(jax.random.key(seed), Purpose.EXAMPLES), size)
    )[:number]
    images = dataset.normalize(jnp.asarray(dataset.train.images[order]))
    return images, jnp.asarray(dataset.train.labels[order])


@functools.partial(jax.jit, static_argnames=("model", "criterion", "batch_size", "pruned"))
def _scores(
    model: Any,
    criterion: str,
    batch_size: int,
    pruned: Where,
    variables: dict[str, Any],
    images: Array,
    labels: Array,
) -> Scores:
    """Score by SNIP or GraSP."""
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss_fn(params: Params, images: Array, labels: Array) -> Array:
        own = {"params": params, **rest}
        logits, _ = model.apply(own, images, train=True, mutable=["batch_stats"])
        if criterion == "grasp":
            logits = logits / _TEMPERATURE
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    own = (loss_fn, variables["params"], images, labels)
    if criterion == "snip":
        return eoi.criteria.snip(*own, where=pruned)
    size = min(batch_size, len(images))
    return eoi.criteria.grasp(*own, micro_batch_size=size, where=pruned)


def _synflow(config: configs.Start, dataset: data.Dataset, variables: dict[str, Any]) -> Mask:
    """Prune in rounds: a plain network in float32, one with normalization in float64.

    The flow of a plain chain of layers is scaled as needed; that of residual branches cannot be,
    and leaves the range of float32.
    """
    model = network(config, dataset.num_classes)
    if model.activation not in _HOMOGENEOUS:
        model = network(dataclasses.replace(config, activation="identity"), dataset.num_classes)
    shape = jax.eval_shape(dataset.normalize, dataset.train.images[:1]).shape
    score = _flow(model, where(config), shape)

    def prune(variables: dict[str, Any]) -> Mask:
        mask = eoi.criteria.prune(
            score, variables, config.density, num_steps=_ROUNDS, layout=models.layout
        )
        return mask["params"]

    if set(variables) == {"params"}:
        return prune(variables)
    with jax.enable_x64(True):
        return prune(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables))


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
