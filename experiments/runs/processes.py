"""Several processes that train one network: how they start, agree and end.

Slurm, Kubernetes or a person starts the same command in each of them, and :mod:`jax.distributed`
makes one program of it. The first process alone writes files, and what depends on files or on the
time is decided by it. A process that fails or is lost ends all others; the same command goes on.
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
    """Make one program of the processes that the environment tells of, if it tells of any.

    JAX itself finds the processes of a step of Slurm, of Open MPI, of a Cloud TPU, and, with the
    package kubernetes, of a Job or JobSet. Three variables name any others, and count first:
    ``JAX_COORDINATOR_ADDRESS``, host and port of the first process, ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``. Call it before anything is computed.

    Args:
        heartbeat: Seconds without a sign of life after which a process counts as lost; as long do
            the others wait at the end for one that is late.

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
    """Return the value that the first process gives, in every process; all have to call it.

    Args:
        value: What JSON can hold, in 4096 bytes; what other processes than the first give is not
            looked at.
    """
    if not several():
        return value
    encoded = json.dumps(value if is_first() else None).encode()
    assert len(encoded) <= _SIZE
    padded = np.frombuffer(encoded.ljust(_SIZE), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """End this process at once if anything ends what it does, so that the others end too.

    An exception that is left to Python makes JAX wait for processes that wait for this one. Where
    there is one process alone, exceptions pass as they are.
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
