"""The network that training starts from: weights, mask, and whatever else the network carries.

========= ==========================================================================================
method    weights and mask
========= ==========================================================================================
``dense`` all weights: orthogonal (convolutions delta-orthogonal), or the normal ones of the network
``base``  the dense weights on the criterion's mask
``ai``    the same mask, the values moved towards orthogonality
``eoi``   the layer densities of the same mask; mask and weights drawn, exactly orthogonal
``eis``   the same, with all taps unmasked wherever the center tap is not zero
``sao``   block-diagonal masks of Haar blocks; layers that are not square stay dense
========= ==========================================================================================

The methods of one seed share the dense weights and the criterion's mask (:mod:`pruning`). Where a
layer's density is below what an orthogonal kernel needs, EOI and EIS take it from the others.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eoi_jax as eoi
from eoi_jax.typing import Array, DType, Mask, Params, Shape, Where
from experiments import config as configs
from experiments import data, models
from experiments.runs import stored
from experiments.studies import planes
from experiments.training import pruning
from experiments.training.keys import Purpose, key_of

__all__ = ["Start", "count", "dense", "make"]


class Start(NamedTuple):
    """Where training starts.

    Attributes:
        variables: ``params``, exactly zero off the mask, and the network's other collections.
        mask: which of the params may be non-zero; a scalar where a leaf is dense.
    """

    variables: dict[str, Any]
    mask: Mask


def make(
    config: configs.Start, seed: int, dataset: data.Dataset, *, cache: Path | None = None
) -> Start:
    """Make the start of one seed.

    Args:
        config: what to make.
        seed: one of its seeds, or any other in [0, 2**31).
        dataset: tells the shape of images and the number of classes; SNIP and GraSP score on it.
        cache: folder in which the masks of SNIP, GraSP and SynFlow and the values of AI are kept;
            default: nowhere.

    Returns:
        The start.

    Raises:
        ValueError: what the library refuses, as a density that the method cannot have.

    Example:
        >>> from experiments import config, data
        >>> from experiments.training import starts
        >>> one = config.Train(data="made", method="base", init="fan_in", depth=2, width=20)
        >>> starts.count(starts.make(one, 1, data.load("made")))
        (1588, 15880)
    """
    variables = dense(config, seed, dataset)
    params, pruned = variables["params"], pruning.where(config)
    key = key_of(jax.random.key(seed), Purpose.START)
    options: dict[str, Any] = {"scale": config.scale, "layout": models.layout}
    if config.method == "dense":
        own = eoi.SparseInit(params, jax.tree.map(lambda leaf: jnp.array(True), params))
    elif config.method == "sao":
        activation = pruning.network(config, dataset.num_classes).activation
        options["activation"] = "relu" if activation is models.ACTIVATIONS["relu"] else "tanh"
        own = eoi.sparsity_aware_orthogonal(key, params, config.density, where=pruned, **options)
    else:
        mask = pruning.find(config, seed, dataset, variables, cache)
        if config.method == "base":
            own = eoi.masked(params, mask)
        elif config.method == "ai":
            own = _isometry(config, seed, params, mask, options, cache)
        elif config.method == "eoi" and config.planes != "independent":
            densities = eoi.masks.densities(mask, layout=models.layout)
            own = planes.start(key, params, densities, pattern=config.planes, **options)
        else:
            own = eoi.exact_orthogonal(
                key,
                params,
                eoi.masks.densities(mask, layout=models.layout),
                center_density=_center(config),
                infeasible="redistribute",
                variant=config.method,
                angles=_angles(config.angles),
                where=pruned,
                **options,
            )
    return Start({**variables, "params": own.params}, own.mask)


def count(start: Start) -> tuple[int, int]:
    """Count the weights of the kernels that a start keeps, and all of them.

    Args:
        start: that of one seed.

    Returns:
        The two numbers; biases and norms are in neither.

    Example:
        >>> import jax.numpy as jnp
        >>> from experiments.training import starts
        >>> mask = {"kernel": jnp.eye(4, dtype=bool), "bias": jnp.array(True)}
        >>> params = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
        >>> starts.count(starts.Start({"params": params}, mask))
        (4, 16)
    """
    leaves = jax.tree_util.tree_leaves_with_path(start.variables["params"])
    kernels = [
        (own, leaf.size)
        for (path, leaf), own in zip(leaves, jax.tree.leaves(start.mask), strict=True)
        if eoi.masks.is_kernel(path, leaf)
    ]
    kept = sum(int(np.count_nonzero(own)) if own.ndim else size for own, size in kernels)
    return kept, sum(size for _, size in kernels)


def dense(config: configs.Start, seed: Any, dataset: data.Dataset) -> dict[str, Any]:
    """Draw all weights of the network, as those of a dense one.

    Args:
        config: of which the network's fields, init, scale and bias_std count.
        seed: in [0, 2**31); it may be traced.
        dataset: tells the shape of images and the number of classes.

    Returns:
        ``params``, and the network's other collections.

    Example:
        >>> from experiments import config, data
        >>> from experiments.training import starts
        >>> one = config.Train(data="made", init="fan_in", depth=2, width=20)
        >>> starts.dense(one, 1, data.load("made"))["params"]["last"]["kernel"].shape
        (20, 10)
    """
    model, key = (
        pruning.network(config, dataset.num_classes),
        key_of(jax.random.key(seed), Purpose.WEIGHTS),
    )
    shape = jax.eval_shape(dataset.normalize, dataset.train.images[:1]).shape
    variables = _init(model, key, shape)
    if config.init == "orthogonal":
        pruned = pruning.where(config)
        params = _orthogonal(key, variables["params"], config.scale, pruned)
        variables = {**variables, "params": params}
    return variables


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def _init(model: Any, key: Array, shape: tuple[int, ...]) -> dict[str, Any]:
    return dict(model.init(key, jnp.zeros(shape)))


def _orthogonal(key: Array, params: Params, scale: float, pruned: Where) -> Params:
    """Draw Haar matrices for linear layers, delta kernels of them for convolutions and groups."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for number in {models.layout(path, leaf).groups for path, leaf in leaves if pruned(path, leaf)}:

        def of_groups(path: Any, leaf: Any, number: int = number) -> bool:
            return pruned(path, leaf) and models.layout(path, leaf).groups == number

        def init(
            key: Array,
            shape: Shape,
            dtype: DType = jnp.float32,
            out_sharding: Any = None,
            number: int = number,
        ) -> Array:
            del out_sharding
            return _haar(key, scale, tuple(shape), dtype, number)

        params = eoi.networks.redraw(key, params, init, where=of_groups, layout=models.layout)
    return params


# Compiled for each shape: a whole residual network would be one long program of few shapes.
@functools.partial(jax.jit, static_argnames=("shape", "dtype", "groups"))
def _haar(key: Array, scale: float, shape: tuple[int, ...], dtype: DType, groups: int) -> Array:
    if len(shape) == 2:
        return jax.nn.initializers.orthogonal(scale)(key, shape, dtype)
    delta = eoi.initializers.delta_orthogonal(scale=scale, feature_group_count=groups)
    return delta(key, shape, dtype)


def _isometry(
    config: configs.Start,
    seed: int,
    params: Params,
    mask: Mask,
    options: dict[str, Any],
    cache: Path | None,
) -> eoi.SparseInit:
    """Move the dense weights on a mask towards isometry."""

    def solve() -> Params:
        return eoi.approximate_isometry(
            params, mask, objective=config.ai_objective, num_steps=config.ai_steps, **options
        ).params

    name = pruning.digest(config, seed, *pruning.DECIDE, "ai_objective", "ai_steps")
    return eoi.SparseInit(stored.kept(cache, name, params, solve), mask)


def _center(config: configs.Start) -> Any:
    """Return the density of center taps: in the plain deep network each layer's own."""
    return "density" if config.model == "cnn1000" and config.method == "eoi" else None


def _angles(angles: str) -> Any:
    return eoi.givens.uniform_angle if angles == "uniform" else math.radians(float(angles))
