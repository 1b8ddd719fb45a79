"""Several processes that train one network: how they start, agree and end.

Slurm, Kubernetes or a person starts the same command in each process, and :mod:`jax.distributed`
connects the processes to one program. Only the first process writes files, and it makes all
decisions that depend on files or on the time. If a process fails or is lost, all others end; the
same command resumes the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["agree", "ending_together", "initialize", "is_first", "several"]

_SIZE = 4096  # bytes of what processes agree on


def initialize(heartbeat: int) -> None:
    """Connect the processes that the environment describes to one program, if there are any.

    JAX itself finds the processes of a step of Slurm, of Open MPI, of a Cloud TPU, and, with the
    package kubernetes, of a Job or JobSet. For any others set three variables, which have
    precedence: ``JAX_COORDINATOR_ADDRESS``, host and port of the first process,
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``. Call it before anything is computed.

    Args:
        heartbeat: Seconds without a response after which a process counts as lost. At the end, the
            processes wait equally long for one that is late.

    Raises:
        ValueError: If only some of the variables are set, or one is no number.
        RuntimeError: If the processes do not find each other.
    """
    if jax.distributed.is_initialized():
        return
    # For CPUs; GPUs and TPUs bring their collectives with them.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    number, index = _integer("JAX_NUM_PROCESSES"), _integer("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=number,
            process_id=index,
            cluster_detection_method=None if number is None else "deactivate",
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        # So it says where it finds neither a cluster nor variables: then this process is alone.
        is_alone = "coordinator_address" in str(error) and number is None and index is None
        if not is_alone:
            raise ValueError(
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do not describe the "
                f"processes ({error}). Set all three, or none where JAX knows the cluster."
            ) from None


def several() -> bool:
    """Say whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Say whether this process writes: the first of several, and one that is alone."""
    return not several() or jax.process_index() == 0


def agree(value: Any) -> Any:
    """Return the value of the first process in every process; all processes have to call it.

    Args:
        value: A value that JSON can hold, in at most 4096 bytes. Only that of the first process is
            used.
    """
    if not several():
        return value
    encoded = json.dumps(value if is_first() else None).encode()
    assert len(encoded) <= _SIZE
    padded = np.frombuffer(encoded.ljust(_SIZE), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """End this process at once if its work ends with an exception, so that the others end too.

    If Python handled the exception, JAX would wait for processes that wait for this one. With only
    one process, exceptions pass unchanged.
    """
    try:
        yield
    except BaseException as error:
        if not several():
            raise
        _end(error)


def _end(error: BaseException) -> None:
    name = f"process {jax.process_index()} of {jax.process_count()}"
    status: Any = 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        told = str(error.code)
    elif isinstance(error, KeyboardInterrupt):
        status, told = 130, str(error)
    else:
        traceback.print_exception(error)
        told = f"{type(error).__name__}"
    if status:
        print(
            f"{name} ended: {told}\nIf another process was lost, the same command goes on from the "
            "last checkpoint, with any number of processes.",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} is outside the whole numbers. Set it to one.")
    return int(text)
