"""Checkpoints of a run on a mesh, by Orbax: each process writes and reads the parts it holds.

They restore on any number of devices and processes. ``sharded/<step>`` gets its name only when all
parts are written. A sum over the bits of all arrays is written too, and compared when they are
read. This sum does not depend on how the arrays are divided among devices.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from eoi_jax._internal import checks
from eoi_jax.typing import Array
from experiments.runs import processes

__all__ = ["Store", "checksum", "read_record", "restore", "steps"]

_KEPT = 2


class Store:
    """What a run on a mesh saves to; all processes make one and call it alike.

    Args:
        folder: Where the checkpoints are; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        ocp = _orbax()
        if processes.is_first():  # parts of checkpoints of which a process was lost
            for path in folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path)
        processes.agree(None)
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, step: int, leaves: Mapping[str, Array], record: Mapping[str, Any]) -> None:
        """Write a checkpoint, all of it or nothing, and remove all but the last two.

        Args:
            step: Training steps that were done.
            leaves: The arrays by their paths.
            record: What else to remember, as JSON can hold it.
        """
        ocp = _orbax()
        about = {"record": dict(record), "checksum": checksum(leaves)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_nested(leaves)), record=ocp.args.JsonSave(about)
        )
        self._manager.save(step, args=args)


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, which need not exist."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]


def read_record(path: Path) -> dict[str, Any]:
    """Read what a checkpoint remembers beside its arrays.

    Args:
        path: Its folder.

    Raises:
        ValueError: If it is damaged.
    """
    return dict(_about(path)["record"])


def restore(path: Path, like: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict[str, Array]:
    """Read the arrays of a checkpoint.

    Args:
        path: Its folder.
        like: Their shapes, dtypes and shardings by their paths; default: those in the file, each
            array whole on the first device.

    Returns:
        The arrays by their paths.

    Raises:
        ValueError: If it has other arrays, or is damaged.
    """
    checkpointer = _orbax().StandardCheckpointer()
    state = (path / "state").resolve()
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        tree = checkpointer.metadata(state).item_metadata.tree
        stored = traverse_util.flatten_dict(tree, sep="/")
        stored = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in stored.items()}
    except Exception as error:  # what Orbax raises depends on what is wrong
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    like = stored if like is None else like
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in like.items()}
    if {name: (leaf.shape, leaf.dtype) for name, leaf in stored.items()} != shapes:
        raise ValueError(
            f"{path} holds the arrays of another network or of another version of this program. "
            "Remove the run's folder and run again."
        )
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first)
        for name, leaf in like.items()
    }
    try:
        found = checkpointer.restore(state, _nested(wanted))
    except Exception as error:  # as above
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    leaves: dict[str, Array] = traverse_util.flatten_dict(found, sep="/")
    if checksum(leaves) != _about(path)["checksum"]:
        raise _damaged(path, "the bits of its arrays do not add up to the sum beside them")
    return leaves


def checksum(leaves: Mapping[str, Array]) -> int:
    """Add up the bits of arrays, each word times an odd number of its place, modulo 2^32.

    A word that changes changes the sum. Integers add up alike in any order, so it is the same for
    any division among devices, and nothing but numbers is exchanged for it.
    """
    total = np.uint64(0)
    for _, leaf in sorted(leaves.items()):
        # Times an odd number, for the place of the array.
        total = (total * np.uint64(16777619) + np.uint64(_sum_of_bits(leaf))) % np.uint64(2**32)
    return int(total)


@jax.jit
def _sum_of_bits(leaf: Array) -> Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place, stride = jnp.ones((), jnp.uint32), 2
    for axis in reversed(range(words.ndim)):
        place = place + jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(
            jnp.uint32, words.shape, axis
        )
        stride *= words.shape[axis]
    return jnp.sum(words * place, dtype=jnp.uint32)


def _about(path: Path) -> dict[str, Any]:
    try:
        # As Orbax has written it. To read it, Orbax would wait for all processes.
        about = json.loads((path / "record" / "metadata").read_bytes())
        return {"record": dict(about["record"]), "checksum": int(about["checksum"])}
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({checks.printable(reason)}). Remove it, and the same command goes on "
        "from the checkpoint before."
    )


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = traverse_util.unflatten_dict(dict(leaves), sep="/")
    return found


def _orbax() -> Any:
    """Import Orbax, which takes seconds: only runs on a mesh, and what reads them, need it."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "Checkpoints of a run on a mesh need Orbax, which is not installed. pip install "
            "orbax-checkpoint."
        ) from error
    return ocp
