"""The start of training: the weights, the mask, and the network's other variables.

============ =======================================================================================
method       weights and mask
============ =======================================================================================
``dense``    all weights: orthogonal (convolutions delta-orthogonal), or the network's normal ones
``base``     the dense weights on the criterion's mask
``rescaled`` the same, each layer times the square root of its fan-in over the mask's
``ai``       the same mask, the values moved towards orthogonality
``eoi``      the layer densities of the same mask; mask and weights drawn, exactly orthogonal
``eis``      the same, with all taps unmasked wherever the center tap is not zero
``sao``      block-diagonal masks of Haar blocks; layers that are not square stay dense
``2:4``      two of each four consecutive inputs of an output, exactly orthogonal
``blocks``   layers that store only blocks, exactly orthogonal; nothing is masked
============ =======================================================================================

The methods of one seed share the dense weights and the criterion's mask. Where a layer has fewer
weights than an orthogonal kernel needs, EOI and EIS take them from the other layers. To add a
method, write a function and a line of :data:`METHODS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eoi_jax as eoi
from eoi_jax._internal import selection
from eoi_jax.typing import Array, Densities, DType, Mask, Params, Shape, Where
from experiments import config, models
from experiments.data import Dataset
from experiments.runs.cache import get_or_compute
from experiments.studies import planes
from experiments.training import criteria, network
from experiments.training.criteria import DenseNetwork
from experiments.training.keys import Purpose, key_of

__all__ = [
    "MASKLESS",
    "METHODS",
    "Start",
    "count",
    "dense",
    "full_mask",
    "make",
    "record",
    "redraw_orthogonal",
]

MASKLESS = ("dense", "blocks")
"""Methods that train all weights of their networks."""
_ANGLES = {"uniform": eoi.givens.uniform_angle, "hadamard": eoi.givens.hadamard_angle}


class Start(NamedTuple):
    """Where training starts.

    Attributes:
        variables: ``params``, exactly zero off the mask, and the network's other collections.
        mask: Which of the params may be non-zero; a scalar where a leaf is dense.
    """

    variables: dict[str, Any]
    mask: Mask


def make(config: config.Start, seed: int, dataset: Dataset, *, cache: Path | None = None) -> Start:
    """Make the start of one seed.

    Args:
        config: What to make.
        seed: One of its seeds, or any other in [0, 2**31).
        dataset: Tells the shape of images and the number of classes; SNIP and GraSP score on it.
        cache: Folder in which the masks of SNIP, GraSP and SynFlow and the values of AI are kept;
            default: nowhere.
    """
    variables = dense(config, seed, dataset)
    made = METHODS[config.method](DenseNetwork(config, seed, dataset, variables, cache))
    return Start({**variables, "params": made.params}, made.mask)


def count(start: Start) -> tuple[int, int]:
    """Count the kernels' weights that a start keeps, and all of them, without biases and norms.

    Of a block-sparse kernel those that are stored, and those that a dense one would have.
    """
    matrices = models.block_sparse.matrices(start.variables)
    counts = [models.block_sparse.sizes(matrix) for matrix in matrices.values()]
    leaves = jax.tree_util.tree_leaves_with_path(start.variables["params"])
    for (path, leaf), leaf_mask in zip(leaves, jax.tree.leaves(start.mask), strict=True):
        if eoi.masks.is_kernel(path, leaf) and models.block_sparse.module(path) not in matrices:
            counts.append((selection.count(np.broadcast_to(leaf_mask, leaf.shape)), leaf.size))
    kept, size = map(sum, zip(*counts, strict=True))
    return kept, size


def record(seed: int, start: Start) -> dict[str, Any]:
    """Return what the results of a run say of a seed's start: its density, and the two counts."""
    kept, size = count(start)
    return {"seed": seed, "density": kept / size, "kept": kept, "size": size}


def dense(config: config.Start, seed: Any, dataset: Dataset) -> dict[str, Any]:
    """Draw all weights of the network, as those of a dense one or of one with blocks.

    Args:
        config: Its network, init, scale and bias_std decide.
        seed: In [0, 2**31); it may be traced.
        dataset: Tells the shape of images and the number of classes.

    Returns:
        ``params``, and the network's other collections.
    """
    key = key_of(jax.random.key(seed), Purpose.WEIGHTS)
    model = network.build(config, dataset.num_classes)
    variables = _init(model, key, (1, *dataset.image_shape))
    if config.init == "orthogonal" and config.method != "blocks":
        pruned = network.where(config)
        params = redraw_orthogonal(key, variables["params"], config.scale, pruned)
        variables = {**variables, "params": params}
    return variables


def full_mask(method: str, params: Params, pruned: Where) -> Mask:
    """Return a mask that keeps all, of the shapes that a method's mask has.

    Args:
        method: One of :data:`METHODS`.
        params: The parameters.
        pruned: Which of the leaves the method prunes, if it masks any.
    """
    masked = method not in MASKLESS
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.ones(leaf.shape if masked and pruned(path, leaf) else (), bool),
        params,
    )


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def _init(model: Any, key: Array, shape: tuple[int, ...]) -> dict[str, Any]:
    return dict(model.init(key, jnp.zeros(shape)))


def redraw_orthogonal(key: Array, params: Params, scale: float, pruned: Where) -> Params:
    """Draw Haar matrices for linear layers, delta kernels of them for convolutions and groups.

    Args:
        key: A random key.
        params: The parameters of any network of :mod:`experiments.models`.
        scale: Gain of the kernels.
        pruned: Which of the leaves to draw anew.
    """
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


def _dense(net: DenseNetwork) -> eoi.SparseInit:
    return eoi.SparseInit(net.params, jax.tree.map(lambda leaf: jnp.array(True), net.params))


def _base(net: DenseNetwork) -> eoi.SparseInit:
    return eoi.masked(net.params, criteria.find(net))


def _rescaled(net: DenseNetwork) -> eoi.SparseInit:
    return eoi.rescaled(net.params, criteria.find(net), layout=models.layout)


def _ai(net: DenseNetwork) -> eoi.SparseInit:
    mask = criteria.find(net)

    def solve() -> Params:
        return eoi.approximate_isometry(
            net.params,
            mask,
            objective=net.config.ai_objective,
            num_steps=net.config.ai_steps,
            scale=net.config.scale,
            layout=models.layout,
        ).params

    name = criteria.part_digest(net.config, net.seed, *criteria.FIELDS, "ai_objective", "ai_steps")
    return eoi.SparseInit(get_or_compute(net.cache, name, net.params, solve), mask)


def _eoi(net: DenseNetwork) -> eoi.SparseInit:
    return _exact(
        net,
        "eoi",
        scale="he" if net.config.he_norm else net.config.scale,
        taps=net.config.taps,
        # The paper's exception is about the center tap.
        center_density=net.center_density,
        planes=planes.LAWS[net.config.planes],
    )


def _eis(net: DenseNetwork) -> eoi.SparseInit:
    return _exact(net, "eis", scale=net.config.scale)


def _exact(net: DenseNetwork, variant: Literal["eoi", "eis"], **options: Any) -> eoi.SparseInit:
    angles = net.config.angles
    return eoi.exact_orthogonal(
        net.key(Purpose.START),
        net.params,
        _densities(net),
        infeasible="redistribute",
        variant=variant,
        angles=_ANGLES[angles] if angles in _ANGLES else math.radians(float(angles)),
        where=net.where,
        layout=models.layout,
        **options,
    )


def _densities(net: DenseNetwork) -> Densities:
    """Return the layer densities of the criterion's mask."""
    return eoi.masks.densities(criteria.find(net), layout=models.layout)


def _sao(net: DenseNetwork) -> eoi.SparseInit:
    rectifies = net.build().activation is models.ACTIVATIONS["relu"]
    return eoi.sparsity_aware_orthogonal(
        net.key(Purpose.START),
        net.params,
        net.config.density,
        scale=net.config.scale,
        activation="relu" if rectifies else "tanh",
        where=net.where,
        layout=models.layout,
    )


def _two_of_four(net: DenseNetwork) -> eoi.SparseInit:
    def init(key: Array, shape: Shape, dtype: DType = jnp.float32, out_sharding: Any = None) -> Any:
        del out_sharding
        two: Any = tuple(shape)
        return eoi.n_to_m.orthogonal(key, two, 2, 4, scale=net.config.scale, dtype=dtype)

    key = net.key(Purpose.START)
    params = eoi.networks.redraw(key, net.params, init, where=net.where, layout=models.layout)
    return eoi.SparseInit(params, eoi.masks.support(params, where=net.where))


METHODS: Mapping[str, Callable[[DenseNetwork], eoi.SparseInit]] = {
    "dense": _dense,
    "base": _base,
    "rescaled": _rescaled,
    "ai": _ai,
    "eoi": _eoi,
    "eis": _eis,
    "sao": _sao,
    "2:4": _two_of_four,
    "blocks": _dense,  # of layers that have drawn their blocks themselves
}
"""Methods by name: a config's ``method``."""
