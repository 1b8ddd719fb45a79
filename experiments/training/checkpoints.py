"""Checkpoints of one run, written whole or not at all; the last two are kept.

Use :class:`Checkpoints` in the run that trains, :func:`read` anywhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

__all__ = ["Checkpoints", "read"]


class Checkpoints:
    """The checkpoints in one folder; a context, whose end closes them.

    A checkpoint is written to another name and renamed when it is complete. Saving waits for that:
    buffers that a step donates may be overwritten at once.

    Attributes:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        # Orbax takes absolute paths only.
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, tree: Any) -> None:
        """Write a checkpoint."""
        if step != self.latest:
            self._manager.save(step, args=ocp.args.StandardSave(tree), force=True)

    def restore(self, like: Any) -> Any:
        """Read the newest checkpoint.

        Args:
            like: A tree of its structure, of arrays or of :class:`jax.ShapeDtypeStruct`.
        """
        return self._manager.restore(self.latest, args=ocp.args.StandardRestore(like))


def read(folder: Path) -> tuple[int, Any]:
    """Read the newest checkpoint of a folder, whatever its structure.

    Nothing in the folder changes, where :class:`Checkpoints` would clean up: a run may be writing
    there.

    Returns:
        The step, and the tree on this machine's device: nested dicts and lists in place of the
        tuples and classes that were saved.
    """
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    if not steps:
        raise FileNotFoundError(f"There is no checkpoint in {folder}. Train first.")
    path = folder.resolve() / str(max(steps)) / "default"
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    handler = ocp.StandardCheckpointHandler()
    # Without shapes Orbax asks for the devices that the checkpoint was written on.
    saved: Any = handler.metadata(path)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        getattr(saved, "tree", saved),
    )
    return max(steps), handler.restore(path, args=ocp.args.StandardRestore(like))
