"""Checkpoints of one run: each is one file, written completely or not at all; two are kept.

``<step>.safetensors`` has the leaves of a tree by their paths, a record of what else the run needs,
and a SHA-256 of everything, so that a change of any byte is detected. A run on a mesh writes
``sharded/<step>`` instead (:mod:`experiments.training.sharded`); a run resumes from the newest
checkpoint of either kind.
Use :class:`Checkpoints` in the run that trains, :func:`read` anywhere else.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from eoi_jax._internal import checks
from eoi_jax._internal.files import atomic_write
from experiments.runs import processes, remove_partial_files
from experiments.training import meshes, sharded

__all__ = ["Checkpoint", "Checkpoints", "read"]

_KEPT = 2
_SHARDED = "sharded"  # folder of the checkpoints of a mesh
_ABOUT = "checkpoint"  # safetensors writes the entries of its metadata in any order: there is one


class Checkpoint(NamedTuple):
    """The content of one file.

    Attributes:
        step: Training steps that were done.
        record: The record that the run saved, as JSON restores it.
        leaves: The arrays by their paths in the tree, such as ``params/first/kernel``; none of a
            checkpoint of a mesh until it is restored.
    """

    step: int
    record: dict[str, Any]
    leaves: dict[str, np.ndarray]

    @property
    def tree(self) -> dict[str, Any]:
        """The leaves as nested dicts, in place of the tuples and classes that were saved."""
        found: dict[str, Any] = traverse_util.unflatten_dict(self.leaves, sep="/")
        return found


class Checkpoints:
    """The checkpoints in one folder, which is made; one process at a time may use them.

    Or several processes of one program: then each calls every method.

    Args:
        folder: Where they are.
        on_mesh: Whether to save arrays that are divided among devices, each part by its process.

    Attributes:
        folder: Where they are.
    """

    def __init__(self, folder: Path, *, on_mesh: bool = False) -> None:
        self.folder = folder
        if processes.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial_files(folder)
        self._sharded = sharded.Store(folder / _SHARDED) if on_mesh else None

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return max(_steps(self.folder), default=None)

    def save(self, step: int, tree: Any, record: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint, all of it or nothing, and remove all but the last two.

        Args:
            step: Training steps that were done.
            tree: Arrays; they may be overwritten as soon as this returns.
            record: What else to remember, as JSON can hold it; that of the first process counts.

        Raises:
            OSError: If there is no space left, or the folder cannot be written to.
        """
        if self._sharded is not None:
            self._sharded.save(step, _named(tree), record or {})
        else:
            leaves = {name: np.asarray(leaf) for name, leaf in _named(tree).items()}
            about = {"step": step, "record": dict(record or {})}
            text = json.dumps({**about, "sha256": _digest(about, leaves)})
            encoded = safetensors.numpy.save(leaves, {_ABOUT: text})
            atomic_write(_path(self.folder, step), lambda file: file.write(encoded))
        self._remove_old()

    def require_finite(
        self, finite: np.ndarray, seeds: Sequence[int], what: str, remedy: str
    ) -> None:
        """Stop a run that has seeds with numbers which are not finite.

        Args:
            finite: Whether all is well, one value a seed.
            seeds: The run's.
            what: What is not finite and when: ``"A loss is not finite at step 7"``.
            remedy: What to lower.

        Raises:
            FloatingPointError: If all is not well, with the seeds and the last checkpoint.
        """
        if finite.all():
            return
        bad = [seed for seed, good in zip(seeds, finite, strict=True) if not good]
        kept = self.latest
        where = "There is no checkpoint"
        if kept is not None:
            where = f"The last checkpoint is of step {kept}"
        raise FloatingPointError(f"{what} for seeds {bad}. {where} in {self.folder}. {remedy}")

    def recover(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole.

        Newer ones that are damaged are renamed, so that nothing takes them for checkpoints again,
        and a warning names them. The arrays of one of a mesh are read when it is restored.

        Returns:
            The checkpoint; None if none is whole.
        """
        found = self._recover() if processes.is_first() else None
        step = processes.agree(None if found is None else found.step)
        if found is None and step is not None:
            found = _read(_path(self.folder, step))
        return found

    def _recover(self) -> Checkpoint | None:
        damaged: dict[Path, ValueError] = {}
        found = None
        for step in sorted(_steps(self.folder), reverse=True):
            path = _path(self.folder, step)
            try:
                found = _read(path)
                break
            except ValueError as error:
                damaged[path] = error
        goes_on = f"goes on from step {found.step}" if found else "starts again"
        for path, problem in damaged.items():
            renamed = path.with_suffix(".damaged")
            path.replace(renamed)
            warnings.warn(
                f"{problem} It is called {renamed.name} now, and the run {goes_on}.", stacklevel=3
            )
        self._remove_old()  # which a process that was killed may not have done
        return found

    def _remove_old(self) -> None:
        if processes.is_first():
            for step in sorted(_steps(self.folder))[:-_KEPT]:
                # Orbax removes those of a mesh.
                _file(self.folder, step).unlink(missing_ok=True)

    def restore(self, like: Any, checkpoint: Checkpoint | None = None) -> Any:
        """Bring a checkpoint to the device, or to the devices of a mesh.

        Args:
            like: A tree of its structure, of arrays or of :class:`jax.ShapeDtypeStruct`. Their
                shardings count if they are of a mesh.
            checkpoint: As :meth:`recover` returns it; default: the newest, read anew.

        Returns:
            A tree of the structure of ``like``, bound to the first device or divided as ``like``.

        Raises:
            ValueError: If the tree has other leaves, shapes or dtypes, or the file is damaged.
        """
        found = checkpoint or read(self.folder)
        named = _named(like)
        structure: Any = jax.tree.structure(like)
        path = _path(self.folder, found.step)
        if path.is_dir():
            leaves = sharded.restore(path, {name: _shape(leaf) for name, leaf in named.items()})
            return structure.unflatten([leaves[name] for name in named])
        shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in named.items()}
        if {name: (leaf.shape, leaf.dtype) for name, leaf in found.leaves.items()} != shapes:
            raise ValueError(
                f"{path} holds the arrays of another network or of "
                "another version of this program. Remove the run's folder and run again."
            )
        # Copies: the arrays of the file are no memory of JAX, which a step may donate.
        return structure.unflatten(
            [meshes.put(found.leaves[name], _shape(leaf).sharding) for name, leaf in named.items()]
        )


def read(folder: Path) -> Checkpoint:
    """Read the newest checkpoint of a folder; nothing in it changes, for a run may write there.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    steps = _steps(folder)
    if not steps:
        raise FileNotFoundError(f"There is no checkpoint in {folder}. Train first.")
    path = _path(folder, max(steps))
    try:
        found = _read(path)
        if path.is_dir():
            leaves = {name: np.asarray(leaf) for name, leaf in sharded.restore(path).items()}
            found = found._replace(leaves=leaves)
        return found
    except ValueError as error:
        raise ValueError(
            f"{error} Remove {folder.parent / 'done'}, if it is there, and run again: the run goes "
            "on from the checkpoint before."
        ) from error


def _path(folder: Path, step: int) -> Path:
    path = folder / _SHARDED / str(step)
    return path if path.is_dir() else _file(folder, step)


def _file(folder: Path, step: int) -> Path:
    return folder / f"{step}.safetensors"


def _steps(folder: Path) -> list[int]:
    files = (path for path in folder.glob("*.safetensors") if path.stem.isdecimal())
    return [*(int(path.stem) for path in files), *sharded.steps(folder / _SHARDED)]


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return a leaf's shape and dtype, with its sharding on a mesh or that of the first device."""
    found = getattr(leaf, "sharding", None)
    if not isinstance(found, jax.sharding.NamedSharding):
        found = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=found)


def _named(tree: Any) -> dict[str, Any]:
    """Return the leaves by their paths, in the order of :func:`jax.tree.leaves`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _digest(about: Mapping[str, Any], leaves: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of all: step, record, and the arrays' names, dtypes, shapes and bytes."""
    found = hashlib.sha256(json.dumps([about["step"], about["record"]]).encode())
    for name, leaf in sorted(leaves.items()):
        found.update(f"\n{name} {leaf.dtype.str} {leaf.shape}\n".encode())
        found.update(leaf.tobytes())
    return found.hexdigest()


def _read(path: Path) -> Checkpoint:
    """Read a file, or the record of a folder; a ``ValueError`` says what is damaged."""
    if path.is_dir():
        return Checkpoint(int(path.name), sharded.read_record(path), {})
    encoded = path.read_bytes()
    try:
        size = int.from_bytes(encoded[:8], "little")
        about = json.loads(json.loads(encoded[8 : 8 + size])["__metadata__"][_ABOUT])
        leaves = safetensors.numpy.load(encoded)
        intact = about["sha256"] == _digest(about, leaves) and about["step"] == int(path.stem)
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = checks.printable(f"{type(error).__name__}: {error}")
        raise ValueError(f"The checkpoint {path} is damaged ({reason}).") from None
    if not intact:
        raise ValueError(f"The checkpoint {path} is damaged: its SHA-256 is not the recorded one.")
    return Checkpoint(about["step"], about["record"], leaves)
