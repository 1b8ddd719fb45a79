"""The mesh of devices that a network is trained on, and how its arrays are divided along it.

============= ======================================================================================
axis          divides
============= ======================================================================================
``data``      the examples of a batch
``model``     the last axis of a kernel, its outputs, where their number is a multiple of the axis
============= ======================================================================================

A mask and an optimizer's moments are divided as their kernels are. Of everything else, such as
biases and statistics of normalization, each device has a full copy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eoi_jax import masks

__all__ = ["MeshShape", "batch_sharding", "make", "parse", "put", "sharding", "shardings"]


class MeshShape(NamedTuple):
    """How many devices stand along each axis of a mesh.

    Attributes:
        data: Along the axis of examples.
        model: Along the axis of outputs.
    """

    data: int = 1
    model: int = 1

    @property
    def size(self) -> int:
        """Number of devices in all."""
        return self.data * self.model

    def __str__(self) -> str:
        """Write the shape as :func:`parse` reads it."""
        return f"data={self.data},model={self.model}"


def parse(text: str) -> MeshShape:
    """Read the shape of a mesh from the command line.

    Args:
        text: ``"data=16,model=16"``; an axis that is left out has one device.

    Returns:
        The shape.

    Raises:
        ValueError: For another axis, an axis that is named twice, or a size below 1.

    Example:
        >>> from experiments.training import meshes
        >>> meshes.parse("data=8")
        MeshShape(data=8, model=1)
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(data|model)\s*=\s*([1-9][0-9]*)\s*", part, re.ASCII)
        if found is None or found[1] in sizes:
            raise ValueError(
                f"mesh={text!r} is outside the forms data=N,model=M with N and M at least 1. Name "
                "each axis once, or leave one out: data=16,model=16."
            )
        sizes[found[1]] = int(found[2])
    return MeshShape(**sizes)


def make(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh, of axes along which the compiler decides what is divided.

    Args:
        shape: Its shape.
        devices: The devices, described or there; default: all there are, of every process.

    Returns:
        A mesh of the axes ``data`` and ``model``, in the order that suits the devices' network.

    Raises:
        ValueError: If the shape is not one of as many devices.

    Example:
        >>> import jax
        >>> from experiments.training import meshes
        >>> dict(meshes.make(meshes.MeshShape(), jax.devices()[:1]).shape)
        {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else devices
    if shape.size != len(devices):
        raise ValueError(
            f"mesh='{shape}' has {shape.size} places, and there are {len(devices)} devices. Give "
            f"sizes whose product is {len(devices)}."
        )
    return jax.make_mesh(shape, shape._fields, (AxisType.Auto,) * 2, devices=devices)


def sharding(mesh: Mesh, path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    """Return how a leaf of parameters, a mask, an optimizer's state or all of them is divided.

    Args:
        mesh: Of axes ``data`` and ``model``.
        path: The key path of the leaf, whose last name tells what is a kernel.
        leaf: The leaf, anything with a shape.

    Returns:
        The sharding of a kernel along ``model``, or of an array that is whole on every device.
    """
    # Masks are as their kernels, so the name counts and not the dtype.
    is_kernel = masks.is_kernel(path, jax.ShapeDtypeStruct(leaf.shape, "float32"))
    if is_kernel and leaf.shape[-1] % mesh.shape["model"] == 0:
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(leaf.shape) - 1), "model"))
    return NamedSharding(mesh, PartitionSpec())


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of each leaf of a tree: of parameters, or of a whole training state.

    Args:
        mesh: Of axes ``data`` and ``model``.
        tree: Any tree of arrays, or of their shapes.

    Returns:
        The same tree of shardings, as ``out_shardings`` of :func:`jax.jit` takes it.

    Example:
        >>> import jax
        >>> from experiments.training import meshes
        >>> mesh = meshes.make(meshes.MeshShape(), jax.devices()[:1])
        >>> layer = {"kernel": jax.ShapeDtypeStruct((3, 4), "float32")}
        >>> tuple(meshes.shardings(mesh, layer)["kernel"].spec)
        (None, 'model')
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: sharding(mesh, path, leaf), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return how a batch of examples is divided, whose first axis counts them.

    Args:
        mesh: Of axes ``data`` and ``model``; the number of examples is a multiple of ``data``.

    Returns:
        The sharding along ``data``.
    """
    return NamedSharding(mesh, PartitionSpec("data"))


def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Bring an array to the devices of a sharding, which may be those of several processes.

    Args:
        array: The whole array, the same in each process.
        sharding: How it is divided.

    Returns:
        The array; each process has copied the parts of its devices into new memory.
    """
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: np.array(whole[index]))
