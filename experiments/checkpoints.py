"""Checkpoints of one run: written whole or not at all, the last two kept."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints in one folder; a context, whose end closes them.

    A checkpoint is written to another name and renamed when it is complete. Saving waits for that:
    buffers that a step donates may be overwritten at once.

    Attributes:
        folder: where they are.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from experiments.checkpoints import Checkpoints
        >>> with Checkpoints(Path(tempfile.mkdtemp())) as checkpoints:
        ...     checkpoints.save(3, {"weights": jnp.arange(2.0)})
        ...     checkpoints.restore({"weights": jnp.zeros(2)})["weights"].tolist()
        [0.0, 1.0]
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, tree: Any) -> None:
        """Write a checkpoint.

        Args:
            step: its number; one that is there already stays as it is.
            tree: a pytree of arrays.
        """
        if step != self.latest:
            self._manager.save(step, args=ocp.args.StandardSave(tree), force=True)

    def restore(self, like: Any) -> Any:
        """Read the newest checkpoint.

        Args:
            like: a tree of its structure, of arrays or of :class:`jax.ShapeDtypeStruct`.

        Returns:
            The tree.
        """
        return self._manager.restore(self.latest, args=ocp.args.StandardRestore(like))
