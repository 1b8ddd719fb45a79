"""Programs compiled ahead of time, for devices of this machine or for described ones.

The TPU compiler needs no TPU: with the extra ``tpu-aot``, a slice of any size is described by its
topology, and programs for it are compiled on any machine. The memory, operations and collectives of
a compiled program are counted by the compiler, not measured.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from experiments.tools.collectives import Collective, collectives

__all__ = ["HBM", "Program", "TooLarge", "build", "placed", "tpu_devices"]

_GIB = 2**30

# Sizes as Google Cloud's pages on TPU versions state them. A chip of v2, v3, v4 and 7x is described
# as two devices, each with half of its memory.
HBM = {
    "TPU v2": 8 * _GIB,
    "TPU v3": 16 * _GIB,
    "TPU v4": 16 * _GIB,
    "TPU v5 lite": 16 * _GIB,
    "TPU v5": 95 * _GIB,
    "TPU v6 lite": 32 * _GIB,
    "TPU7x": 96 * _GIB,
}
"""Bytes of memory of a device, by the name that JAX has for its kind."""


class TooLarge(Exception):
    """Raised if a program needs more memory than its device has, with the compiler's message."""


class Program(NamedTuple):
    """The properties of a compiled program for one device, in bytes unless noted.

    Attributes:
        arguments: Its arguments.
        outputs: Its results, without those that take the place of arguments.
        temporary: Its temporary memory.
        code: Its instructions.
        collectives: What devices send each other, by kind.
        flops: Operations on numbers; those of a loop count once.
        traffic: Reads and writes; those of a loop count once.
        seconds: Time of the compiler.
        text: The program, as XLA writes it.
    """

    arguments: int
    outputs: int
    temporary: int
    code: int
    collectives: dict[str, Collective]
    flops: float
    traffic: float
    seconds: float
    text: str

    @property
    def memory(self) -> int:
        """Bytes that the device has to have."""
        return self.arguments + self.outputs + self.temporary + self.code


def tpu_devices(topology: str) -> list[Any]:
    """Describe the devices of a slice of TPUs, which need not be there.

    Args:
        topology: Version and shape: ``"v5e:16x16"``, ``"v4:4x4x8"``; ``"v5e:1x1"`` is one chip.

    Returns:
        Its devices, for which programs can be compiled and not run.

    Raises:
        ImportError: Without the TPU compiler.
        ValueError: For a topology that the compiler does not know.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "The TPU compiler is missing. It needs no TPU: pip install '.[tpu-aot]', in a checkout."
        )
    # Where there is no TPU, libtpu would ask the network for it; and as no TPU is used, several
    # processes may describe one at a time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    version, _, shape = topology.partition(":")
    is_single = set(shape.split("x")) == {"1"}
    # The smallest slice has four chips, of which one may be used alone.
    name = f"{version}:2x2{shape[3:]}" if is_single else topology
    try:
        if name:  # or libtpu would choose one
            described = topologies.get_topology_desc(platform="tpu", topology_name=name)
            found: list[Any] = list(described.devices)
            return [one for one in found if not is_single or one.coords == found[0].coords]
        reason = "it is empty"
    except RuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0].removesuffix(".")
    raise ValueError(
        f"topology={topology!r} is outside the slices that the compiler knows ({reason}). Give "
        "version and shape: v5e:2x2, v5e:16x16, v4:2x2x4, v5p:4x4x4 or v6e:8x8, for example."
    )


def placed(tree: Any, shardings: Any) -> Any:
    """Return the shapes of a tree of arrays, divided by shardings.

    Args:
        tree: Arrays or their shapes.
        shardings: One for all leaves, or a tree of the same structure.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def build(
    function: Callable[..., Any], *args: Any, out_shardings: Any = None, donate: Any = ()
) -> Program:
    """Compile a function for the devices that its arguments are placed on.

    Args:
        function: Anything that :func:`jax.jit` takes.
        *args: Trees of shapes with shardings, as :func:`placed` returns them.
        out_shardings: Of the results; default: the compiler decides.
        donate: Which of the arguments are used up, whose memory the results may take.

    Returns:
        What the program says of itself.

    Raises:
        TooLarge: If a TPU has not enough memory for it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from experiments.tools import programs
        >>> here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        >>> x = programs.placed(jnp.ones((8, 4)), here)
        >>> program = programs.build(lambda x: x @ x.T, x)
        >>> program.arguments, program.outputs, program.collectives
        (128, 256, {})
    """
    options = {} if out_shardings is None else {"out_shardings": out_shardings}
    devices = [leaf.sharding.device_set for leaf in jax.tree.leaves(args) if leaf.sharding]
    platform = next(iter(devices[0])).platform
    with _uncached():
        start = time.perf_counter()
        traced = jax.jit(function, donate_argnums=donate, **options).trace(*args)
        try:
            compiled = traced.lower(lowering_platforms=(platform,)).compile()
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"Used [\d.]+\w? of [\d.]+\w? hbm", str(error))
            raise TooLarge(used[0] if used else str(error).splitlines()[0]) from None
        seconds = time.perf_counter() - start
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    return Program(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        collectives(text),
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        seconds,
        text,
    )


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Leave the cache of compiled programs out: from it none of a described device is read back."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or JAX would not look at its setting again
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
