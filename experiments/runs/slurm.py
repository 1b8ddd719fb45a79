"""Runs as jobs of a Slurm cluster, through submitit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import runs

__all__ = ["Job", "Slurm", "submit"]

_TIMEOUTS = 1_000_000  # how often a job may meet its time limit and go on: submitit's default is 3


@dataclasses.dataclass(frozen=True)
class Slurm:
    """The resources that a job of the cluster asks for; one job is one run."""

    partition: str | None = None
    """Partition; default: the cluster's."""
    minutes: int = 240
    """Time limit. A job that reaches it is queued again and resumes."""
    cpus: int = 4
    """CPU cores."""
    gpus: int = 0
    """GPUs."""
    memory: int = 16
    """Memory in GB."""
    parallel: int = 16
    """Jobs that may run at the same time."""


class Job:
    """One run. Preempted or out of time, it is queued again and goes on from its checkpoint."""

    def __call__(self, config: Any, runtime: runs.Runtime) -> str:
        """Run a config; return its folder."""
        return str(runs.execute(config, runtime))

    def checkpoint(self, config: Any, runtime: runs.Runtime) -> Any:
        """Return the job that follows this one, when submitit must stop it."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, config, runtime)


def submit(
    grid: Sequence[Any],
    runtime: runs.Runtime,
    slurm: Slurm,
    name: str = "eoi_jax",
    *,
    cluster: str = "slurm",
) -> list[Any]:
    """Submit configs as one array of jobs, and return at once.

    Args:
        grid: The configs, each a job.
        runtime: Folders, which the nodes must share with this machine, and logging; progress bars
            are left out.
        slurm: What each job asks for.
        name: Of the jobs.
        cluster: Another of submitit's clusters: "local" for processes, "debug" for this process.

    Returns:
        The jobs of submitit: ``job.job_id``, ``job.result()``, ``job.exception()``.
    """
    import submitit

    if not grid:
        return []  # submitit refuses an empty array
    folder = Path(runtime.runs).resolve()
    silent = dataclasses.replace(runtime, runs=str(folder), progress=False)
    # No experiment's name begins with a dot.
    executor = submitit.AutoExecutor(
        folder=folder / ".submitit" / "%j", cluster=cluster, slurm_max_num_timeout=_TIMEOUTS
    )
    asked = {
        "name": name,
        "timeout_min": slurm.minutes,
        "cpus_per_task": slurm.cpus,
        "gpus_per_node": slurm.gpus or None,
        "mem_gb": slurm.memory,
        "slurm_partition": slurm.partition,
        "slurm_array_parallelism": slurm.parallel,
    }
    executor.update_parameters(**{key: value for key, value in asked.items() if value is not None})
    with executor.batch():
        return [executor.submit(Job(), config, silent) for config in grid]
