"""One run: its folder, its start, its end.

======================================= ==========================================================
in ``RUNS/<experiment>/<digest>/``
======================================= ==========================================================
``config.json``                         all that decides the run's numbers
``metrics.jsonl``                       what it logged, an object a line
``results.json``                        a list of flat objects, one a seed or cell
``checkpoints/``, ``tensorboard/``      where it goes on from, what TensorBoard shows
``failed.txt``                          traceback of the last start, if it failed
``done``                                written last: the run is complete if, and only if, it exists
``.lock``                               held by the process that runs; freed when that process dies
======================================= ==========================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import filelock

from eoi_jax._internal.files import atomic_write_text
from experiments.config import digest, to_dict

__all__ = [
    "RUNNERS",
    "Row",
    "RunningElsewhere",
    "Runtime",
    "execute",
    "folder_of",
    "is_done",
    "load_curves",
    "load_rows",
    "write_json",
]

Row: TypeAlias = dict[str, Any]

# Class of a config -> module that runs it by ``run(config, folder, runtime)``, or another function
# named after a colon. Imported when a run starts: reading results needs none of them.
RUNNERS = {
    "Train": "experiments.training.train",
    "Spectrum": "experiments.studies.measure:spectrum",
    "Counts": "experiments.studies.measure:counts",
    "Times": "experiments.studies.measure:times",
    "Kernel": "experiments.studies.measure:kernel",
}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How runs are carried out. Nothing here changes the network that comes out."""

    runs: str = "runs"
    """Folder that holds the folders of all runs."""
    data_dir: str | None = None
    """Folder of prepared data sets; default: that of tensorflow-datasets."""
    progress: bool = True
    """Draw a progress bar."""
    checkpoint_every: float = 60.0
    """Seconds between two checkpoints."""
    log_every: int = 10
    """Steps between two lines of metrics; training loss and accuracy are means over them."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard."""
    wandb: bool = False
    """Also send metrics to Weights & Biases."""

    def __post_init__(self) -> None:
        if not self.checkpoint_every >= 0:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every!r} is outside [0, inf]. Give seconds, "
                "0 for a checkpoint at every occasion."
            )
        if self.log_every < 1:
            raise ValueError(
                f"log_every={self.log_every!r} is outside [1, ...). Give a larger number."
            )


class RunningElsewhere(RuntimeError):
    """Another process runs this config just now."""


def folder_of(config: Any, root: str | Path) -> Path:
    """Return where a config's run is, or would be.

    Args:
        config: A frozen dataclass with a field ``experiment``.
        root: Folder of all runs.

    Returns:
        ``root/<experiment>/<digest>``; nothing is made there.
    """
    if not re.fullmatch(r"\w[\w.-]*", config.experiment, re.ASCII):
        raise ValueError(
            f"experiment={config.experiment!r} is outside the names of letters, digits, '_', '-' "
            "and '.'. It names a folder: choose another."
        )
    return Path(root) / config.experiment / digest(config)


def is_done(folder: Path) -> bool:
    """Say whether the run of a folder is complete.

    Returns:
        Whether it holds ``done``.
    """
    return (folder / "done").exists()


def execute(config: Any, runtime: Runtime) -> Path:
    """Run a config, or go on where it was interrupted; do nothing if it is complete.

    Starting twice is harmless, also at the same time: a lock lets one process through, and the
    kernel frees it however that process ends.

    Args:
        config: A frozen dataclass whose class is in :data:`RUNNERS`.
        runtime: Folders and logging.
    """
    kind = type(config).__name__
    if kind not in RUNNERS:
        raise ValueError(
            f"config is of class {kind!r}, which is outside {{{', '.join(map(repr, RUNNERS))}}}. "
            "Name the module that runs it in experiments.runs.RUNNERS."
        )
    folder = folder_of(config, runtime.runs)
    if is_done(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not is_done(folder):  # another process may have completed it before the lock was free
            _run(config, folder, runtime)
    return folder


def _run(config: Any, folder: Path, runtime: Runtime) -> None:
    (folder / "failed.txt").unlink(missing_ok=True)
    write_json(folder / "config.json", to_dict(config))
    try:
        module, _, function = RUNNERS[type(config).__name__].partition(":")
        getattr(importlib.import_module(module), function or "run")(config, folder, runtime)
        _results(folder)  # what cannot be read back is not complete
    except Exception:
        atomic_write_text(folder / "failed.txt", traceback.format_exc())
        raise
    atomic_write_text(folder / "done", "")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunningElsewhere(f"Another process is running {folder}.") from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, all of it or nothing."""
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")


def load_rows(root: str | Path) -> list[Row]:
    """Return the results of all complete runs, each row with its config's fields.

    Returns:
        Flat dictionaries: the fields of the config with its ``kind``, ``digest``, and the fields of
        the result. A result named like a field of the config, as the density that was reached, is
        called ``measured_<name>``: the field is what rows are grouped by.
    """
    rows = []
    for folder in _complete(root):
        fields = {**_read(folder / "config.json"), "digest": folder.name}
        for result in _results(folder):
            renamed = {f"measured_{key}" if key in fields else key: result[key] for key in result}
            rows.append({**fields, **renamed})
    return rows


def load_curves(root: str | Path) -> list[Row]:
    """Return what all complete runs logged, each row with its run's ``digest``.

    Returns:
        The lines of ``metrics.jsonl``; those of one run in the order they were written.
    """
    rows = []
    for folder in _complete(root):
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows += [{"digest": folder.name, **_parse(line, path)} for line in lines]
    return rows


def _complete(root: str | Path) -> list[Path]:
    return sorted(path.parent for path in Path(root).glob("*/*/done"))


def _results(folder: Path) -> list[Row]:
    path = folder / "results.json"
    found = _read(path)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path} does not hold a list of objects. Remove its folder; run again.")
    return found


def _read(path: Path) -> Any:
    if not path.exists():
        raise ValueError(f"{path} is missing. A run leaves it; remove its folder and run again.")
    return _parse(path.read_text(encoding="utf-8"), path)


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is corrupt ({error}). Remove its folder and run again.") from None
