"""Compile a network's start and training step for a slice of TPUs, to see whether they fit.

Both are divided among the devices in the same way as in training on a mesh. Nothing is run, so no
TPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.box import SIMPLE
from rich.table import Table

import eoi_jax as eoi
from eoi_jax.typing import Array, Params, Shape, Where
from experiments import data, models
from experiments.data import augment
from experiments.tools import programs
from experiments.tools.programs import Program, TooLarge
from experiments.training import meshes, steps

__all__ = [
    "Network",
    "check_batch",
    "initialization",
    "size",
    "table",
    "training_step",
    "try_build",
]


class Network(NamedTuple):
    """A sparse network to compile for.

    Attributes:
        model: A Linen module.
        input_shape: Shape of one example, as the module takes it.
        densities: The tree of its layers' densities.
        where: Which leaves are pruned.
    """

    model: Any
    input_shape: Shape
    densities: Any
    where: Where


def initialization(network: Network, mesh: Mesh) -> Program:
    """Compile ``eoi.exact_orthogonal`` of a whole network for the devices of a mesh."""
    variables = _variables(network)
    params = variables["params"]

    def start(key: Array, params: Params) -> eoi.SparseInit:
        return eoi.exact_orthogonal(
            key,
            params,
            network.densities,
            infeasible="redistribute",
            where=network.where,
            layout=models.layout,
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    whole = NamedSharding(mesh, PartitionSpec())
    divided = programs.placed(params, meshes.shardings(mesh, params))
    out = meshes.shardings(mesh, jax.eval_shape(start, key, params))
    return programs.build(start, programs.placed(key, whole), divided, out_shardings=out)


def training_step(network: Network, mesh: Mesh, batch_size: int) -> Program:
    """Compile one step of training with SGD under the mask for the devices of a mesh.

    Args:
        network: What is trained.
        mesh: Of axes ``data`` and ``model``.
        batch_size: Examples of a step, on all devices together.

    Raises:
        ValueError: If the examples cannot be divided equally along ``data``.
        TooLarge: If a device has not enough memory for it.
    """
    check_batch(batch_size, mesh)
    optimizer_of, variables = steps.sparse_optimizer(1000), _variables(network)

    def begin(key: Array, variables: Any) -> steps.State:
        mask = jax.tree_util.tree_map_with_path(
            lambda path, leaf: np.ones(leaf.shape if network.where(path, leaf) else (), bool),
            variables["params"],
        )
        return steps.init_state(optimizer_of, key, variables, mask)

    state = jax.eval_shape(begin, jax.eval_shape(lambda: jax.random.key(0)), variables)
    of_state = meshes.shardings(mesh, state)
    whole, of_batch = NamedSharding(mesh, PartitionSpec()), meshes.batch_sharding(mesh)
    dataset = _dataset(network)
    images = jax.ShapeDtypeStruct((batch_size, *dataset.train.images.shape[1:]), np.uint8)
    labels = jax.ShapeDtypeStruct((batch_size, *dataset.train.labels.shape[1:]), np.int32)
    return programs.build(
        steps.train_step(network.model, dataset, optimizer_of),
        programs.placed(state, of_state),
        programs.placed(jax.ShapeDtypeStruct((), np.int32), whole),
        programs.placed(jax.ShapeDtypeStruct((), np.float32), whole),
        *programs.placed((images, labels), of_batch),
        out_shardings=(of_state, whole),
        donate=0,
    )


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Require that each device along ``data`` gets as many examples."""
    if batch_size < 1 or batch_size % mesh.shape["data"]:
        raise ValueError(
            f"batch_size={batch_size} is outside the positive multiples of data="
            f"{mesh.shape['data']}. Give one, so that each device has as many examples."
        )


def _variables(network: Network) -> Any:
    example = jax.ShapeDtypeStruct((1, *network.input_shape), np.float32)
    return dict(jax.eval_shape(network.model.init, jax.random.key(0), example))


def _dataset(network: Network) -> data.Dataset:
    """Return a set without examples, of the shapes that the network takes."""
    is_text = len(network.input_shape) == 2
    shape = network.input_shape[:1] if is_text else network.input_shape
    labels = np.zeros((0, *(shape if is_text else ())), np.int32)
    split = data.Split(np.zeros((0, *shape), np.uint8), labels)
    kind = data.Text if is_text else data.Dataset
    statistics = {"scale": 255, "mean": (0.5,), "std": (0.5,)}
    return kind(
        "none",
        *(split,) * 3,
        num_classes=network.input_shape[-1] if is_text else network.model.num_classes,
        change=augment.unchanged,
        **statistics,  # type: ignore[arg-type]
    )


def try_build(function: Callable[..., Program], *args: Any) -> Program | str:
    """Return a program, or in the compiler's words why a device has no memory for it."""
    try:
        return function(*args)
    except TooLarge as error:
        return str(error)


def table(built: dict[str, Program | str], kind: str, title: str) -> Table:
    """Tabulate programs by name: what one device needs, what all send, and whether it fits.

    Args:
        built: What :func:`try_build` returned.
        kind: The devices' kind, as JAX calls it.
        title: Above the table.
    """
    limit = programs.HBM.get(kind)
    memory = "?" if limit is None else f"{limit / 2**30:g} GiB"
    out = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for head in ("program", "arguments", "outputs", "temporary", "code"):
        out.add_column(head, justify="left" if head == "program" else "right", no_wrap=True)
    out.add_column(f"fits {memory}", justify="right")
    out.add_column("collectives")
    out.add_column("compiled", justify="right", no_wrap=True)
    for name, program in built.items():
        if isinstance(program, str):
            out.add_row(name, *["–"] * 4, f"no: {program}", "–", "–", style="red")
            continue
        sizes = (program.arguments, program.outputs, program.temporary, program.code)
        fits = "?" if limit is None else "yes" if program.memory <= limit else "no"
        sent = [
            f"{found.count} {name}, {size(found.bytes)}"
            for name, found in program.collectives.items()
        ]
        out.add_row(
            name, *map(size, sizes), fits, "\n".join(sent) or "none", f"{program.seconds:.0f} s"
        )
    return out


def size(number: float) -> str:
    """Write bytes in binary units: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
