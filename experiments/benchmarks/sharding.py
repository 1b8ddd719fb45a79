"""Memory and collectives of drawing matrices that are divided among devices, as compiled.

Nothing is run: everything is counted in the compiled programs. So the devices may be simulated ones
of this CPU, or a slice of TPUs that is only described. The operations of a loop count once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

import eoi_jax as eoi
from eoi_jax._internal import checks
from eoi_jax.typing import Array, Shape
from experiments import models
from experiments.benchmarks.timing import tabulate
from experiments.tools import programs, slices
from experiments.tools.programs import Program
from experiments.tools.slices import size as written
from experiments.training import meshes

__all__ = ["Sharding", "bench_sharding", "draw"]

_WEAK, _EXAMPLES = 1024, 64  # columns of a matrix and examples of a batch, a device


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Divide matrices among devices: memory, collectives and operations of one device."""

    tpu: str | None = None
    """Version of TPUs to compile for, with slices of two axes, v5e or v6e; default: the CPU."""
    devices: tuple[int, ...] = (1, 8)
    """Numbers of devices among which each matrix is divided; the CPU has up to 8 simulated ones."""
    sizes: tuple[int, ...] = (512, 2048)
    """Rows and columns of the matrices."""
    density: float = 0.05
    """Fraction of non-zeros, in (0, 1]."""
    axis: Literal["columns", "rows"] = "columns"
    """Which axis is divided."""
    dense_size: int | None = None
    """Largest size for JAX's own initializer; default: 512 on TPUs, where it takes minutes to
    compile beyond, and none on the CPU."""
    weak: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices for the table of weak scaling, where each device has equally much."""

    def check(self) -> None:
        """Refuse settings that cannot be compiled for."""
        for name in ("devices", "sizes", "weak"):
            for number in getattr(self, name):
                checks.integer(number, low=1, name=name)
        lowest = 1 / min((*self.sizes, *([_WEAK] if self.weak else ())))
        why = "Give at least one non-zero in each row of the smallest matrix."
        checks.density(self.density, minimum=lowest, why=why)
        for number in {*self.devices, *self.weak}:
            _devices(self.tpu, number)
        for number in self.devices:
            for side in self.sizes:
                if side % number:
                    raise ValueError(
                        f"sizes={side} is outside the multiples of devices={number}. Give sizes "
                        "that can be divided equally."
                    )


def bench_sharding(options: Sharding, console: Console) -> None:
    """Print the tables of ``sharding``."""
    console.print(
        f"{options.tpu or 'CPU'}, jax {jax.__version__}. All numbers are of one device, counted "
        "by the compiler. Compile times are of one call on this machine.",
        highlight=False,
    )
    rows = []
    dense_size = math.inf if options.tpu is None else 512
    if options.dense_size is not None:
        dense_size = options.dense_size
    for side in options.sizes:
        for number in options.devices:
            mesh = _mesh(_devices(options.tpu, number))
            for name, init in _initializers(options.density).items():
                skipped = name != "eoi" and side > dense_size
                program = "not compiled" if skipped else _built(init, (side, side), mesh, options)
                rows.append([str(side), str(number), name, *_cells(program)])
                # Compilation may take minutes, so each row is told at once.
                console.print(", ".join(rows[-1]).replace("\n", "; "), highlight=False)
    heads = ("n", "devices", "initializer", "shard", "temporary", "collectives", "compile s")
    title = f"n x n matrices divided by {options.axis}; eoi: orthogonal at {options.density:g}"
    console.print(tabulate(title, heads, rows))
    if options.weak:
        console.print(_weak_scaling(options))


def _weak_scaling(options: Sharding) -> Any:
    """Count the work of one device where all have as much to hold, or as many examples."""
    rows = []
    init = _initializers(options.density)["eoi"]
    for number in options.weak:
        shape = (_WEAK, _WEAK * number)
        program = _built(
            init,
            shape,
            _mesh(_devices(options.tpu, number)),
            dataclasses.replace(options, axis="columns"),
        )
        rows.append([f"eoi {shape[0]} x {shape[1]}", str(number), *_work(program)])
    model = models.create("mlp7")
    network = slices.Network(model, models.input_shape("mlp7"), None, models.where("mlp7"))
    for number in options.weak:
        batch = _EXAMPLES * number
        mesh = meshes.make(meshes.MeshShape(data=number), _devices(options.tpu, number))
        program = slices.try_build(slices.training_step, network, mesh, batch)
        rows.append([f"step of mlp7, {batch} examples", str(number), *_work(program)])
    heads = ("program", "devices", "FLOPs", "read, written", "temporary", "collectives")
    return tabulate("Weak scaling: work of one device", heads, rows, names=1)


def draw(init: Any, shape: Shape, mesh: Mesh, axis: str = "columns") -> Program:
    """Compile an initializer in a mesh, for a matrix that is divided among its devices.

    Args:
        init: ``(key, shape) -> matrix``.
        shape: Of the matrix.
        mesh: Of one axis.
        axis: ``"columns"`` or ``"rows"``, which are divided.
    """
    [name] = mesh.axis_names
    spec = PartitionSpec(None, name) if axis == "columns" else PartitionSpec(name, None)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = programs.placed(key, NamedSharding(mesh, PartitionSpec()))
    out = NamedSharding(mesh, spec)

    def entered(key: Array) -> Array:
        # As in `jax.set_mesh`, which needs devices that are present.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return init(key, shape)

    return programs.build(entered, key, out_shardings=out)


def _built(init: Any, shape: Shape, mesh: Mesh, options: Sharding) -> Program | str:
    return slices.try_build(draw, init, shape, mesh, options.axis)


def _initializers(density: float) -> dict[str, Callable[[Array, Shape], Array]]:
    return {
        "eoi": lambda key, shape: eoi.orthogonal(key, shape, density),
        "jax.nn": jax.nn.initializers.orthogonal(),
    }


def _cells(program: Program | str) -> list[str]:
    if isinstance(program, str):
        return ["–", program, "–", "–"]
    sizes = (written(program.outputs), written(program.temporary))
    return [*sizes, _sent(program), f"{program.seconds:.0f}"]


def _work(program: Program | str) -> list[str]:
    if isinstance(program, str):
        return ["–", "–", program, "–"]
    numbers = (f"{program.flops:,.0f}", written(program.traffic), written(program.temporary))
    return [*numbers, _sent(program)]


def _sent(program: Program) -> str:
    found = program.collectives.items()
    return "\n".join(f"{n.count} {kind}, {written(n.bytes)}" for kind, n in found) or "none"


def _devices(tpu: str | None, number: int) -> Sequence[Any]:
    """Return so many of the CPU's devices, of which JAX is asked for eight, or a slice of TPUs."""
    if tpu is not None:
        rows = max(side for side in range(1, math.isqrt(number) + 1) if number % side == 0)
        return programs.tpu_devices(f"{tpu}:{rows}x{number // rows}")[:number]
    with contextlib.suppress(RuntimeError):  # where JAX has made its devices already
        jax.config.update("jax_num_cpu_devices", 8)
    devices = jax.devices("cpu")
    if number > len(devices):
        raise ValueError(
            f"devices={number} is outside [1, {len(devices)}], the devices of this CPU. Give "
            "fewer, or compile for TPUs: --tpu v5e."
        )
    return devices[:number]


def _mesh(devices: Sequence[Any]) -> Mesh:
    return Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))
