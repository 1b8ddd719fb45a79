"""One run: its folder, and how it is started, resumed and completed.

======================================= ==========================================================
in ``RUNS/<experiment>/<digest>/``
======================================= ==========================================================
``config.json``                         everything that decides the run's numbers
``start.json``                          for training: the record of the start of each seed
``metrics.jsonl``                       logged metrics, one object in each line
``times.jsonl``                         seconds of the steps so far, one object in each line
``results.json``                        a list of flat objects, one for each seed or cell
``checkpoints/``, ``tensorboard/``      checkpoints to resume from, and files for TensorBoard
``failed.txt``                          traceback of the last start, if it failed
``done``                                written last: a run is complete if, and only if, it exists;
                                        has SHA-256 of files above, for ``sha256sum --check``
``.lock``                               held by the process that runs; freed when that process dies
======================================= ==========================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib
import json
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import filelock

from eoi_jax._internal import checks
from eoi_jax._internal.files import atomic_write_text
from experiments.config import digest, digest_of, to_dict
from experiments.runs import processes

__all__ = [
    "COLUMNS",
    "RUNNERS",
    "Row",
    "RunningElsewhere",
    "Runtime",
    "damage",
    "execute",
    "explain",
    "folder_of",
    "is_done",
    "load_curves",
    "load_rows",
    "read_lines",
    "remove_partial_files",
    "write_json",
]

Row: TypeAlias = dict[str, Any]

# Class of a config -> module that runs it by ``run(config, folder, runtime)``, or another function
# named after a colon. Imported when a run starts: reading results needs none of them.
RUNNERS = {
    "Train": "experiments.training.train",
    "Ppo": "experiments.rl.train",
    "Spectrum": "experiments.studies.measure:spectrum",
    "Counts": "experiments.studies.measure:counts",
    "Times": "experiments.studies.measure:times",
    "Kernel": "experiments.studies.measure:kernel",
}

# Class of a config -> what each row of its results must have, for the run to count as complete.
COLUMNS = {
    "Train": (
        *("seed", "density", "kept", "size", "steps"),
        *(
            f"{split}_{name}"
            for split in ("train", "validation", "test")
            for name in ("loss", "accuracy")
        ),
    ),
    "Ppo": ("seed", "density", "kept", "size", "steps", "return"),
}

_SUMMED = ("config.json", "results.json", "metrics.jsonl")  # files whose SHA-256 is in ``done``


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How runs are carried out. No setting here changes the resulting network."""

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
    mesh: str | None = None
    """Devices to train on, such as data=2,model=4: examples are divided along the first axis, the
    outputs of kernels along the second. If the environment describes several processes, the mesh
    has the devices of all of them. Default: one device."""
    heartbeat: int = 30
    """Seconds after which the processes of a mesh end if one of them no longer responds."""

    def __post_init__(self) -> None:
        if not self.checkpoint_every >= 0:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every!r} is outside [0, inf]. Give seconds, "
                "0 for a checkpoint as often as possible."
            )
        if self.log_every < 1:
            raise ValueError(
                f"log_every={self.log_every!r} is outside [1, ...). Give a larger number."
            )
        if self.heartbeat < 1:
            raise ValueError(
                f"heartbeat={self.heartbeat!r} is outside [1, ...). Give seconds, such as 30."
            )


class RunningElsewhere(RuntimeError):
    """Raised if another process is running this config."""


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


def damage(folder: Path) -> str | None:
    """Say what is wrong with the files of a complete run, and what to do.

    Returns:
        Sentences that name the file; None if all is as it was when the run was completed.
    """
    try:
        _check_files(folder)
    except ValueError as error:
        return str(error)
    return None


def explain(error: BaseException) -> str:
    """Return an error's message on one line, with the remedy where the disk is full."""
    text = checks.printable(" ".join(str(error).split()), limit=2000) or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += ". Free some space on the disk; the same command goes on."
    return text


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left of the files that they were writing in a folder.

    Args:
        folder: One in which no other process writes, as the lock of a run sees to.
    """
    # Such are the names that eoi_jax._internal.files gives to files that are being written.
    for path in folder.glob(".*.tmp"):
        path.unlink()


def execute(config: Any, runtime: Runtime) -> Path:
    """Run a config, or go on where it was interrupted; do nothing if it is complete.

    Starting twice is harmless, also at the same time: a lock lets one process through, and the
    kernel frees it however that process ends. Several processes of one program
    (:mod:`experiments.runs.processes`) run a config together, each by this function, and the first
    has the lock and writes the files.

    Args:
        config: A frozen dataclass whose class is in :data:`RUNNERS`.
        runtime: Folders and logging.

    Raises:
        ValueError: If the run is complete and its files were damaged or edited since.
        RunningElsewhere: If another process runs it.
        RuntimeError: In the other processes of a program, if one of these is raised in the first.
    """
    kind = type(config).__name__
    if kind not in RUNNERS:
        raise ValueError(
            f"config is of class {kind!r}, which is outside {{{', '.join(map(repr, RUNNERS))}}}. "
            "Name the module that runs it in experiments.runs.RUNNERS."
        )
    folder = folder_of(config, runtime.runs)
    with _entered(folder) if processes.is_first() else _following() as is_open:
        if is_open:
            _run(config, folder, runtime)
            processes.agree(None)  # that all files are there
    return folder


@contextlib.contextmanager
def _entered(folder: Path) -> Iterator[bool]:
    """Hold the lock of a run; tell whether there is anything to do, the other processes too."""
    with contextlib.ExitStack() as stack:
        try:
            is_open = not is_done(folder)
            if is_open:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(folder))
                # Another process may have completed it before the lock was free.
                is_open = not is_done(folder)
            else:
                _check_files(folder)
        except Exception as error:
            processes.agree(explain(error)[:600])
            raise
        processes.agree(is_open)
        yield is_open


@contextlib.contextmanager
def _following() -> Iterator[bool]:
    """Do as the first process of the program does."""
    is_open = processes.agree(None)
    if isinstance(is_open, str):
        raise RuntimeError(is_open)
    yield is_open


def _run(config: Any, folder: Path, runtime: Runtime) -> None:
    if not processes.is_first():
        _runner(config)(config, folder, runtime)
        return
    remove_partial_files(folder)
    (folder / "failed.txt").unlink(missing_ok=True)
    write_json(folder / "config.json", to_dict(config))
    try:
        _runner(config)(config, folder, runtime)
        _check_files(folder)  # what cannot be read back is not complete
    except RunningElsewhere:  # one of the runs that it is made of
        raise
    except Exception:
        with contextlib.suppress(OSError):  # of a full disk: the error itself says more
            atomic_write_text(folder / "failed.txt", traceback.format_exc())
        raise
    files = [folder / name for name in _SUMMED if (folder / name).exists()]
    atomic_write_text(folder / "done", "".join(f"{_sha256(p)}  {p.name}\n" for p in files))


def _runner(config: Any) -> Callable[[Any, Path, Runtime], None]:
    module, _, function = RUNNERS[type(config).__name__].partition(":")
    run: Callable[[Any, Path, Runtime], None]
    run = getattr(importlib.import_module(module), function or "run")
    return run


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

    Raises:
        ValueError: If the files of a run were damaged or edited.
    """
    rows = []
    for folder in _complete(root):
        config = _config(folder)
        fields = {**config, "digest": folder.name}
        for result in _results(folder, config):
            renamed = {f"measured_{key}" if key in fields else key: result[key] for key in result}
            rows.append({**fields, **renamed})
    return rows


def load_curves(root: str | Path) -> list[Row]:
    """Return what all complete runs logged, each row with its run's ``digest``.

    Returns:
        The lines of ``metrics.jsonl``, those of one run in the order they were written; with
        ``seconds`` from ``times.jsonl``, None where the time is not known.
    """
    found = []
    for folder in _complete(root):
        times = {
            (seed, line["step"]): line["seconds"]
            for line in read_lines(folder / "times.jsonl")
            for seed in line["seeds"]
        }
        for row in read_lines(folder / "metrics.jsonl"):
            seconds = times.get((row.get("seed"), row.get("step")))
            found.append({"digest": folder.name, **row, "seconds": seconds})
    return found


def read_lines(path: Path, *, cut: bool = False) -> list[Row]:
    """Read a file of JSON objects, one a line.

    Args:
        path: The file; a missing one has no lines.
        cut: Whether a last line without its line end, which the end of a process cut in two, is
            left out; it is an error otherwise.

    Raises:
        ValueError: If a line cannot be read, with its number.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines if cut or not last else [*lines, last], 1):
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        if not isinstance(row, dict) or (number > len(lines)):
            raise ValueError(
                f"{path}, line {number}, is damaged: it is no object of JSON with a line end. Put "
                f"back a copy of the file, or remove the folder {path.parent} and run again."
            )
        rows.append(row)
    return rows


def _complete(root: str | Path) -> list[Path]:
    return sorted(path.parent for path in Path(root).glob("*/*/done"))


def _config(folder: Path) -> Row:
    """Read the config of a run; refuse one that was not what the run began with."""
    path = folder / "config.json"
    fields = _read(path)
    try:
        if not isinstance(fields, dict):
            raise ValueError("it is no object")
        found = digest_of(fields)
        if (fields.get("experiment"), found) != (folder.parent.name, folder.name):
            raise ValueError(f"its folder should be {fields.get('experiment')}/{found}")
    except ValueError as error:
        raise _damaged(path, f"is not the config of the run in {folder} ({error})") from None
    return fields


def _results(folder: Path, config: Row) -> list[Row]:
    path = folder / "results.json"
    found = _read(path)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found) or not found:
        raise _damaged(path, "does not hold a list of objects")
    seeds = config.get("seeds")
    if seeds is not None and {row.get("seed") for row in found} != set(seeds):
        raise _damaged(path, f"does not hold a row of each of the seeds {seeds}")
    for row in found:
        missing = [name for name in COLUMNS.get(config["kind"], ()) if row.get(name) is None]
        if missing:
            raise _damaged(path, f"lacks {', '.join(missing)} of seed {row.get('seed')}")
    return found


def _check_files(folder: Path) -> None:
    """Raise a ``ValueError`` that names the file that is not what the run left there."""
    _results(folder, _config(folder))
    done = folder / "done"
    # A run is checked before it is marked as well; and marks of old are empty.
    for line in done.read_bytes().splitlines() if done.exists() else []:
        found = re.fullmatch(rb"([0-9a-f]{64})  ([\w.]+)", line)
        if not found:
            raise _damaged(done, "is corrupt")
        path = folder / found[2].decode()
        if not path.exists():
            raise _damaged(path, "is missing")
        if _sha256(path) != found[1].decode():
            raise _damaged(path, "has changed since the run was completed")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path) -> Any:
    if not path.exists():
        raise _damaged(path, "is missing")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, f"is corrupt ({checks.printable(error)})") from None


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"{path} {problem}. Remove {path.parent / 'done'}, if it is there, and run again."
    )
