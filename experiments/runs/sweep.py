"""Run all configs of a figure or table, one after the other or as jobs of a cluster.

Complete runs are skipped, so the same command resumes a sweep that was stopped. A run that fails
does not stop the others; it is listed at the end and tried again by the next sweep.

Example:
    python -m experiments sweep table1_mlp1000 --scale quick
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import tyro
from rich.console import Console

from experiments import models, runs
from experiments.config import digest, to_dict
from experiments.runs.slurm import Slurm, submit

__all__ = [
    "Failure",
    "Outcome",
    "Scale",
    "Sweep",
    "describe",
    "find",
    "grid_of",
    "local",
    "main",
    "names",
    "state",
]

PACKAGE = "experiments.configs"
Scale: TypeAlias = Literal["paper", "small", "quick"]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Arguments of the command."""

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """A module of experiments.configs, by its name."""
    launcher: Literal["local", "slurm"] = "local"
    """Run in this process, or submit jobs."""
    scale: Scale = "paper"
    """paper: the grid of the paper; small: for two CPU cores, if the module has such a grid; quick:
    tiny, on synthetic data."""
    limit: int | None = None
    """The largest number of runs to start."""
    show: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List the runs and their states; start none."""
    runtime: Annotated[runs.Runtime, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=runs.Runtime
    )
    slurm: Slurm = dataclasses.field(default_factory=Slurm)


class Failure(NamedTuple):
    """A run that failed, and why."""

    config: Any
    message: str


class Outcome(NamedTuple):
    """How many runs were completed now, were complete before and run elsewhere; which failed."""

    completed: int
    done: int
    elsewhere: int
    failures: tuple[Failure, ...]


def names() -> tuple[str, ...]:
    """Return the names of all config modules, sorted."""
    package = importlib.import_module(PACKAGE)
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def find(name: str) -> ModuleType:
    """Import a config module.

    Args:
        name: Of a module in ``experiments.configs``, hyphens allowed.

    Returns:
        The module: ``get_config``, ``sweep``, ``quick`` and ``report`` are its functions.
    """
    chosen = models.choose(name.replace("-", "_"), names(), "config")
    return importlib.import_module(f"{PACKAGE}.{chosen}")


def grid_of(module: ModuleType, scale: Scale) -> list[Any]:
    """Return the configs of a module at one scale, each once.

    Args:
        module: One of ``experiments.configs``.
        scale: ``"paper"`` calls its ``sweep``, ``"small"`` its ``small`` if it has one and its
            ``sweep`` if not, ``"quick"`` its ``quick``.
    """
    small = getattr(module, "small", module.sweep)
    grid = {"paper": module.sweep, "small": small, "quick": module.quick}[scale]()
    return list(dict.fromkeys(grid))


def describe(config: Any, grid: Sequence[Any]) -> str:
    """Name a config by the fields in which those of a grid differ.

    Returns:
        ``field=value`` of each, in the order of the fields; the digest if there is none.
    """
    fields = to_dict(config)
    others = [to_dict(other) for other in grid]
    varying = [key for key in fields if any(other.get(key) != fields[key] for other in others)]
    return " ".join(f"{key}={fields[key]}" for key in varying) or digest(config)


def state(config: Any, root: str | Path) -> str:
    """Return the state of a config's run.

    It is done, damaged (it was done, and its files have changed since), failed, started (and
    perhaps stopped) or open.

    Args:
        config: A frozen dataclass with a field ``experiment``.
        root: Folder of all runs.
    """
    folder = runs.folder_of(config, root)
    if runs.is_done(folder):
        return "damaged" if runs.damage(folder) else "done"
    files = {"failed": "failed.txt", "started": "config.json"}
    return next((word for word, file in files.items() if (folder / file).exists()), "open")


def local(
    grid: Sequence[Any], runtime: runs.Runtime, console: Console, limit: int | None = None
) -> Outcome:
    """Run all configs in this process, so that equal programs are compiled once.

    Args:
        grid: The configs.
        runtime: Folders and logging.
        console: Where each run's line goes.
        limit: How many runs may be started; default: all.

    Returns:
        An :class:`Outcome`. Its failures have been left in the runs' folders too.
    """
    completed, done, elsewhere = 0, 0, 0
    failures: list[Failure] = []
    for index, config in enumerate(grid, 1):
        if state(config, runtime.runs) == "done":
            done += 1
            continue
        if limit is not None and completed + len(failures) >= limit:
            continue
        begin = time.perf_counter()
        try:
            runs.execute(config, runtime)
        except runs.RunningElsewhere:
            elsewhere += 1
            result = "running elsewhere"
        except Exception as error:
            message = f"{type(error).__name__}: {runs.explain(error)}"
            failures.append(Failure(config, message))
            result = "failed"
        else:
            completed += 1
            result = "done"
        seconds = time.perf_counter() - begin
        line = f"[{index}/{len(grid)}] {describe(config, grid)}: {result}, {seconds:.1f} s"
        console.print(line)
    return Outcome(completed, done, elsewhere, tuple(failures))


def _summary(outcome: Outcome, grid: Sequence[Any], runtime: runs.Runtime) -> list[str]:
    counts = {
        "completed": outcome.completed,
        "done before": outcome.done,
        "running elsewhere": outcome.elsewhere,
        "failed": len(outcome.failures),
    }
    left = len(grid) - sum(counts.values())
    words = [f"{count} {name}" for name, count in {**counts, "not started": left}.items() if count]
    lines = [f"{len(grid)} runs: {', '.join(words) or 'nothing to do'}"]
    for failure in outcome.failures:
        lines.append(f"failed: {describe(failure.config, grid)}: {failure.message}")
        written = runs.folder_of(failure.config, runtime.runs) / "failed.txt"
        if written.exists():  # not where nothing can be written
            lines.append(f"        {written}")
    return lines


def _submit(options: Sweep, grid: Sequence[Any], states: Sequence[str]) -> list[str]:
    complete = ("done", "damaged")
    waiting = [config for config, word in zip(grid, states, strict=True) if word not in complete]
    jobs = submit(waiting[: options.limit], options.runtime, options.slurm, options.config)
    return [
        f"{len(jobs)} jobs submitted {' '.join(job.job_id for job in jobs)}".rstrip(),
        f"{states.count('done')} of {len(grid)} runs were done before; --list shows all states",
        *_damaged(grid, states, options.runtime.runs),
    ]


def _damaged(grid: Sequence[Any], states: Sequence[str], root: str) -> list[str]:
    return [
        f"damaged: {describe(config, grid)}: {runs.damage(runs.folder_of(config, root))}"
        for config, word in zip(grid, states, strict=True)
        if word == "damaged"
    ]


def _states(grid: Sequence[Any], states: Sequence[str], root: str) -> list[str]:
    lines = [
        f"{word:<8} {digest(config)}  {describe(config, grid)}"
        for config, word in zip(grid, states, strict=True)
    ]
    total = f"{len(grid)} runs, {states.count('done')} done"
    return [*lines, total, *_damaged(grid, states, root)]


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    prog = "python -m experiments sweep"
    options = tyro.cli(Sweep, args=arguments, description=__doc__, prog=prog)
    console, failed = Console(soft_wrap=True, highlight=False, markup=False), False
    try:
        if options.limit is not None and options.limit < 0:
            raise ValueError(f"limit={options.limit} is outside [0, ...). Leave it out for all.")
        module = find(options.config)
        # Equal configs are one run.
        grid = grid_of(module, options.scale)
        states = [state(config, options.runtime.runs) for config in grid]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if options.scale == "small" and not hasattr(module, "small"):
        console.print(f"{options.config} has no smaller grid: this is the paper's")
    if options.show:
        lines = _states(grid, states, options.runtime.runs)
    elif options.launcher == "slurm":
        try:
            lines = _submit(options, grid, states)
        except (RuntimeError, ImportError) as error:
            sys.exit(f"error: {error}")
    else:
        outcome = local(grid, options.runtime, console, options.limit)
        lines, failed = _summary(outcome, grid, options.runtime), bool(outcome.failures)
    for line in lines:
        console.print(line)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
