"""Logging of a run: lines of JSON, TensorBoard, Weights & Biases, a clock and a progress bar.

A line of ``metrics.jsonl`` is one seed at one step, such as ``{"step": 10, "epoch": 0.02, "seed":
1, "split": "train", "loss": 2.1, "accuracy": 0.2}``. The lines have no times, so the file of an
interrupted run equals that of an uninterrupted one; times are in ``times.jsonl``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from eoi_jax._internal.files import atomic_write_text
from experiments.config import digest, to_dict
from experiments.runs import Runtime, read_lines

__all__ = ["Bar", "Clock", "Metrics", "Silent", "read"]

# Those of a line of a training; the loss and the accuracy may be NaN, which is a float.
_TYPES = {"step": int, "epoch": float, "seed": int, "split": str, "loss": float, "accuracy": float}


def read(
    path: Path, last_step: int | None = None, types: Mapping[str, type] = _TYPES
) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``.

    Args:
        path: The file; a missing one has no lines.
        last_step: For a run that goes on: lines of later steps are left out, as is a last line that
            the end of a process cut in two. Default: none is.
        types: Names and types of what a line holds, in their order.

    Raises:
        ValueError: If a line is damaged, with its number.
    """
    rows = read_lines(path, cut=last_step is not None)
    for number, row in enumerate(rows, 1):
        if {name: type(value) for name, value in row.items()} != types:
            raise ValueError(
                f"{path}, line {number}, is damaged: it does not hold {', '.join(types)}. Put "
                f"back a copy of the file, or remove the folder {path.parent} and run again."
            )
    return [row for row in rows if last_step is None or row["step"] <= last_step]


class Metrics:
    """Writers of one run; a context, whose end closes them.

    What a process before this one logged after ``step``, where this one goes on, is removed.

    Args:
        folder: Folder of the run.
        config: Its config.
        runtime: What else to log to.
        step: Steps that were done before.
        sha256: What :meth:`sync` returned then; default: it is not compared.
        types: Names and types of what a line holds, ``step`` and ``seed`` among them.

    Attributes:
        path: The file of lines.

    Raises:
        ValueError: If the file is damaged.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        runtime: Runtime,
        step: int,
        sha256: str | None = None,
        types: Mapping[str, type] = _TYPES,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.seeds = tuple(config.seeds)
        text = "".join(json.dumps(row) + "\n" for row in read(self.path, step, types))
        self._sha256 = hashlib.sha256(text.encode())
        if sha256 not in (None, self._sha256.hexdigest()):
            raise ValueError(
                f"{self.path} is damaged: its lines up to step {step} are not those that were "
                "there when the checkpoint of this step was written. Put back a copy of the file, "
                f"or remove the folder {folder} and run again."
            )
        self._board: Any = None
        self._wandb: Any = None
        if runtime.tensorboard:
            tensorboard = _needed("tensorboardX", "runtime.tensorboard")
            # Events of later steps are those of a process that did not reach its next checkpoint.
            where = str(folder / "tensorboard")
            self._board = tensorboard.SummaryWriter(where, purge_step=step + 1)
        if runtime.wandb:
            name = digest(config)
            self._wandb = _needed("wandb", "runtime.wandb").init(
                project="eoi_jax",
                group=config.experiment,
                name=name,
                id=name,
                resume="allow",
                config=to_dict(config),
                dir=str(folder),
            )

        atomic_write_text(self.path, text)
        self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def write(
        self, step: int, epoch: float, split: str, loss: Iterable[Any], accuracy: Iterable[Any]
    ) -> None:
        """Log one line for each seed.

        Args:
            step: Training steps so far.
            epoch: Passes over the training images so far.
            split: ``"train"``, ``"validation"`` or ``"test"``.
            loss: Mean cross-entropy of each seed, in nats.
            accuracy: Fraction of each seed's examples that are classified rightly.
        """
        for seed, *numbers in zip(self.seeds, loss, accuracy, strict=True):
            values = dict(zip(("loss", "accuracy"), map(float, numbers), strict=True))
            row = {"step": step, "epoch": round(epoch, 6), "seed": seed, "split": split, **values}
            self.write_row(row, values, prefix=f"{split}/")
        self._file.flush()

    def write_row(self, row: dict[str, Any], values: dict[str, float], prefix: str = "") -> None:
        """Log one line.

        Args:
            row: What it holds.
            values: The part of it that TensorBoard and Weights & Biases show.
            prefix: Begins the names of these.
        """
        line = json.dumps(row) + "\n"
        self._file.write(line)
        self._sha256.update(line.encode())
        step, seed = row["step"], row["seed"]
        tags = {f"{prefix}{name}/seed{seed}": number for name, number in values.items()}
        if self._board is not None:
            for tag, number in tags.items():
                self._board.add_scalar(tag, number, step)
        if self._wandb is not None:
            self._wandb.log({**tags, "step": step})

    def sync(self) -> str:
        """Bring all lines to the disk: a checkpoint must not be newer than they are.

        Returns:
            Their SHA-256.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._sha256.hexdigest()


class Clock:
    """Counts the seconds that training steps take, in ``times.jsonl``; a context, whose end closes.

    A line is ``{"step": 10, "seconds": 1.25, "seeds": [1]}``: all steps so far, of these seeds at
    once, without compilation, evaluation and checkpoints, those of earlier processes of the run
    included. If the file does not tell the latter, times are not known, and none are written. No
    other file depends on it.

    Args:
        folder: Folder of the run.
        seeds: Those of its config.
        step: Steps that were done before.
    """

    def __init__(self, folder: Path, seeds: Iterable[int], step: int) -> None:
        path = folder / "times.jsonl"
        self.seeds = list(seeds)
        rows: list[dict[str, Any]] = []
        self._seconds = None if step else 0.0
        with contextlib.suppress(ValueError, KeyError, TypeError):  # of a damaged file
            rows = [row for row in read_lines(path, cut=True) if row["step"] <= step]
            if rows and rows[-1]["step"] == step:
                self._seconds = float(rows[-1]["seconds"])
        kept = rows if self._seconds is not None else []
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block, in which the results of the steps have to arrive."""
        begin = time.perf_counter()
        yield
        if self._seconds is not None:
            self._seconds += time.perf_counter() - begin

    def write(self, step: int) -> None:
        """Log the time of all steps so far."""
        if self._seconds is not None:
            row = {"step": step, "seconds": round(self._seconds, 6), "seeds": self.seeds}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


class Bar:
    """A progress bar of steps with loss, accuracy, examples per second and the time that is left.

    Drawn on a terminal only; a context, whose end leaves the last state.

    Args:
        title: What runs.
        steps: Training steps in all.
        first: Steps that an earlier process did.
        shown: False for no bar on any terminal.
    """

    def __init__(self, title: str, steps: int, first: int, *, shown: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._progress.add_task(title, total=steps, completed=first, text="")
        self._last = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, accuracy: float, examples: int) -> None:
        """Show where the run is."""
        self.show(step, f"loss {loss:.3f} accuracy {accuracy:.1%}", examples, "examples")

    def show(self, step: int, text: str, count: int, unit: str) -> None:
        """Show where the run is in any words, and how many of a unit passed a second."""
        now = time.monotonic()
        rate = count / max(now - self._last, 1e-9)
        self._last = now
        self._progress.update(self._task, completed=step, text=f"{text} {rate:,.0f} {unit}/s")


class Silent:
    """Stands for :class:`Metrics`, :class:`Clock` and :class:`Bar` where a process writes none."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, *values: object) -> None:
        """Log nothing."""

    def update(self, *values: object) -> None:
        """Show nothing."""

    def sync(self) -> str:
        """Return the SHA-256 of no lines."""
        return hashlib.sha256().hexdigest()

    def running(self) -> contextlib.nullcontext[None]:
        """Count no time."""
        return contextlib.nullcontext()


def _needed(module: str, argument: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{argument}=True needs {module}, which is not installed. pip install {module}, or "
            "leave the option out."
        ) from error
