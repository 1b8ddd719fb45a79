"""Cache files for trees of arrays that take long to compute, shared by all runs."""

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
        like: A tree of the structure and the shapes of what ``compute`` returns, where a leaf may
            be a scalar too, as in a mask.
        compute: The computation.

    Raises:
        ValueError: If the file cannot be read or holds another tree, with its name.
    """
    if folder is None:
        return compute()
    path = folder / f"{name}.npz"
    treedef: Any
    leaves, treedef = jax.tree.flatten(like)
    if path.exists():
        try:
            with path.open("rb") as raw, np.load(raw) as file:
                found = [jnp.asarray(file[str(number)]) for number in range(len(file.files))]
            if len(found) != len(leaves) or not all(map(_fits, found, leaves)):
                raise ValueError("its arrays are not those of this network")
        except Exception as error:
            raise ValueError(f"{path} is corrupt ({error}). Remove it and run again.") from error
        return treedef.unflatten(found)
    computed = compute()
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        str(number): np.asarray(leaf) for number, leaf in enumerate(treedef.flatten_up_to(computed))
    }

    atomic_write(path, lambda file: np.savez_compressed(file, **arrays))
    return computed


def _fits(array: Any, leaf: Any) -> bool:
    return array.shape in ((), leaf.shape)
