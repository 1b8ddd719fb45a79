"""Trees of arrays that take long to find, kept in files and shared by the runs that need them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["kept"]


def kept(folder: Path | None, name: str, like: Any, find: Callable[[], Any]) -> Any:
    """Read a tree from a folder, or find it and write it there.

    A file appears under its name only when it is complete, also if two processes find the same
    tree at once.

    Args:
        folder: made if it is missing; with None nothing is kept.
        name: of the file, without a suffix; it must tell all that decides the tree.
        like: a tree of the structure of what ``find`` returns.
        find: the computation.

    Returns:
        The tree.

    Raises:
        ValueError: if the file is there and cannot be read, with its name.

    Example:
        >>> import pathlib, tempfile
        >>> from experiments.runs import stored
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> like = {"kernel": 0}
        >>> first = stored.kept(folder, "a", like, lambda: {"kernel": jnp.arange(3)})
        >>> stored.kept(folder, "a", like, lambda: 1 / 0)["kernel"].tolist()
        [0, 1, 2]
    """
    if folder is None:
        return find()
    path = folder / f"{name}.npz"
    treedef: Any = jax.tree.structure(like)
    if path.exists():
        try:
            with path.open("rb") as raw, np.load(raw) as file:
                leaves = [jnp.asarray(file[str(number)]) for number in range(treedef.num_leaves)]
        except Exception as error:
            raise ValueError(f"{path} is corrupt ({error}). Remove it and run again.") from error
        return treedef.unflatten(leaves)
    found = find()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.{os.getpid()}.npz"
    arrays: dict[str, Any] = {
        str(number): np.asarray(leaf) for number, leaf in enumerate(treedef.flatten_up_to(found))
    }
    np.savez_compressed(partial, **arrays)
    partial.replace(path)
    return found
