"""What a run logs: lines of JSON, TensorBoard, Weights & Biases, and a progress bar.

A line of ``metrics.jsonl`` is one seed at one step, such as ``{"step": 10, "epoch": 0.02, "seed":
1, "split": "train", "loss": 2.1, "accuracy": 0.2}``. Lines hold no times, so the file of a run that
was interrupted equals that of one that was not.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from eoi_jax._internal.files import atomic_write_text
from experiments.config import digest, to_dict
from experiments.runs import Runtime

__all__ = ["Bar", "Metrics", "read"]


def read(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``, up to one that the end of a process cut in two.

    Args:
        path: The file; a missing one has no lines.
        last_step: Lines of later steps are left out; default: none is.
    """
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if last_step is None or row["step"] <= last_step:
            rows.append(row)
    return rows


class Metrics:
    """Writers of one run; a context, whose end closes them.

    What a process before this one logged after ``step``, where this one goes on, is removed.

    Attributes:
        path: The file of lines.
    """

    def __init__(self, folder: Path, config: Any, runtime: Runtime, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.seeds = tuple(config.seeds)
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

        atomic_write_text(
            self.path, "".join(json.dumps(row) + "\n" for row in read(self.path, step))
        )
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
            self._file.write(json.dumps(row) + "\n")
            tags = {f"{split}/{name}/seed{seed}": number for name, number in values.items()}
            if self._board is not None:
                for tag, number in tags.items():
                    self._board.add_scalar(tag, number, step)
            if self._wandb is not None:
                self._wandb.log({**tags, "step": step})
        self._file.flush()

    def sync(self) -> None:
        """Bring all lines to the disk: a checkpoint must not be newer than they are."""
        os.fsync(self._file.fileno())


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
        now = time.monotonic()
        rate = examples / max(now - self._last, 1e-9)
        self._last = now
        text = f"loss {loss:.3f} accuracy {accuracy:.1%} {rate:,.0f} examples/s"
        self._progress.update(self._task, completed=step, text=text)


def _needed(module: str, argument: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{argument}=True needs {module}, which is not installed. pip install {module}, or "
            "leave the option out."
        ) from error
