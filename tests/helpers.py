"""What several test modules share: oracles in NumPy, and the law that every error message obeys."""

import contextlib

import jax
import numpy as np
import pytest


def gram_error(matrix, scale=1.0):
    """max |W Wᵀ / scale² − I| over the smaller side, in float64."""
    matrix = np.asarray(matrix, np.float64) / scale
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    return np.abs(matrix @ matrix.T - np.eye(len(matrix))).max(initial=0.0)


@contextlib.contextmanager
def refuses(name, *values, error=ValueError):
    """Require an error of a type that names the argument (or path) and each of the values.

    The words around them are free, but there are some: a message is a sentence or more, and says
    what to do instead.
    """
    with pytest.raises(error) as raised:
        yield raised
    message = str(raised.value)
    for part in (name, *map(str, values)):
        assert part in message, f"{part!r} is not named in: {message}"
    assert message.rstrip().endswith((".", ".)", "?")), f"no sentence: {message}"


@contextlib.contextmanager
def compilations():
    """Collect an entry for each program that XLA compiles, or reads from its cache."""
    compiled, active = [], [True]

    def listen(event, seconds, **_):
        if active[0] and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        active[0] = False  # older versions of JAX cannot unregister one listener
