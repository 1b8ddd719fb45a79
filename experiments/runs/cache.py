"""Trees of arrays that take long to compute, kept in files for all runs that need them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal.files import atomic_write

__all__ = ["get_or_compute"]


def get_or_compute(folder: Path | None, name: str, like: Any, compute: Callable[[], Any]) -> Any:
    """Read a tree from a folder, or compute it and write it there.

    A file appears under its name only when it is complete, also if two processes compute the same
    tree at once.

    Args:
        folder: Made if it is missing; with None nothing is kept.
        name: Of the file, without a suffix; it must tell all that decides the tree.
        like: A tree of the structure of what ``compute`` returns.
        compute: The computation.
    """
    if folder is None:
        return compute()
    path = folder / f"{name}.npz"
    treedef: Any = jax.tree.structure(like)
    if path.exists():
        try:
            with path.open("rb") as raw, np.load(raw) as file:
                leaves = [jnp.asarray(file[str(number)]) for number in range(treedef.num_leaves)]
        except Exception as error:
            raise ValueError(f"{path} is corrupt ({error}). Remove it and run again.") from error
        return treedef.unflatten(leaves)
    found = compute()
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        str(number): np.asarray(leaf) for number, leaf in enumerate(treedef.flatten_up_to(found))
    }

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # given a name, NumPy would append .npz
            np.savez_compressed(file, **arrays)

    atomic_write(path, write)
    return found
