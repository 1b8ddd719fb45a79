"""Training at the best of several learning rates: the choice of the rate, and its runs.

Each rate of the first seed, and each other seed at the rate chosen, is a separate run in a separate
folder, so that a sweep that was stopped goes on with the next of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eoi_jax._internal.files import atomic_write_text
from experiments.config import Train
from experiments.runs import Runtime, execute, processes, read_lines, write_json

__all__ = ["best", "gather", "run", "try_each", "validation_accuracy"]


def run(config: Train, folder: Path, runtime: Runtime) -> None:
    """Train a config of several learning rates, and leave metrics and results in a folder.

    A rate at which a loss or weight of the first seed is not finite is out.

    Args:
        config: With ``learning_rates``.
        folder: Results are those of the seeds at the rate chosen; each has it as
            ``learning_rate``, and under ``tried`` the validation accuracy of each rate.
        runtime: Folders and logging.

    Raises:
        FloatingPointError: If no rate is left.
    """
    first, *others = config.seeds
    tried, folders = try_each(
        config.learning_rates,
        lambda rate: execute(_single(config, first, rate), runtime),
        validation_accuracy,
        of=f" seed {first}",
    )
    rate = best(tried)
    chosen = [folders[rate], *(execute(_single(config, s, rate), runtime) for s in others)]
    if processes.is_first():
        gather(chosen, folder, rate, tried)


def try_each(
    rates: Sequence[float],
    train: Callable[[float], Path],
    score: Callable[[Path], float],
    *,
    of: str = "",
) -> tuple[dict[float, float], dict[float, Path]]:
    """Train at each rate and score what came of it.

    Args:
        rates: The rates.
        train: Trains at a rate and returns the folder of the run.
        score: Tells how good a run is; higher is better.
        of: Whose rates they are, for the message of the error.

    Returns:
        The score of each rate, NaN where a loss or weight was not finite, and the folders of the
        others.

    Raises:
        FloatingPointError: If no rate is left.
    """
    folders, tried, error = {}, {}, None
    for rate in rates:
        try:
            folders[rate] = train(rate)
        except FloatingPointError as raised:
            tried[rate], error = math.nan, raised
        else:
            tried[rate] = score(folders[rate])
    if not folders:
        raise FloatingPointError(
            f"No rate of learning_rates={tuple(rates)} trains{of}: give lower ones."
        ) from error
    return tried, folders


def gather(
    children: Sequence[Path], folder: Path, rate: float, tried: Mapping[float, float]
) -> None:
    """Leave metrics, times and results of runs at the rate chosen in a folder.

    Args:
        children: The folders of the runs.
        folder: Where to.
        rate: The rate chosen, which each row of the results has as ``learning_rate``.
        tried: The score of each rate, which each row has as ``tried``.
    """
    scores = {f"{key:g}": None if math.isnan(tried[key]) else tried[key] for key in tried}
    rows: list[dict[str, Any]] = []
    for child in children:
        found = json.loads((child / "results.json").read_bytes())
        rows += [{**row, "learning_rate": rate, "tried": scores} for row in found]
    for name in ("metrics.jsonl", "times.jsonl"):
        lines = [line for child in children for line in read_lines(child / name)]
        atomic_write_text(folder / name, "".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "results.json", rows)


def best(accuracies: dict[float, float]) -> float:
    """Return the rate with the highest accuracy, of equal ones the lowest; NaN loses.

    Example:
        >>> from experiments.training import rates
        >>> rates.best({0.01: 0.5, 0.1: 0.75, 1.0: float("nan")})
        0.1
    """
    return min(accuracies, key=lambda rate: (-_or_lowest(accuracies[rate]), rate))


def validation_accuracy(folder: Path) -> float:
    """Return the mean validation accuracy that a complete run logged in its last quarter.

    Args:
        folder: Of a run of one seed.
    """
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["split"] == "validation"]
    last = max(line["step"] for line in lines)
    late = [line["accuracy"] for line in lines if line["step"] >= 0.75 * last]
    return sum(late) / len(late)


def _or_lowest(accuracy: float) -> float:
    return -math.inf if math.isnan(accuracy) else accuracy


def _single(config: Train, seed: int, rate: float) -> Train:
    return dataclasses.replace(config, seeds=(seed,), learning_rates=(), learning_rate=rate)
