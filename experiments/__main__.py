"""The experiments: ``python -m experiments COMMAND …``."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
import threading
from types import ModuleType

__all__ = ["COMMANDS", "main"]

# Of each command the module of this package with its ``main(arguments)``, imported when it is
# called, and what it does.
COMMANDS = {
    "quickstart": ("quickstart", "train a 1000-layer network from four starts and compare them"),
    "benchmarks": (
        "benchmarks.__main__",
        "time drawing, initializing, masked training and spectra",
    ),
    "spectra": ("studies.spectra", "picture singular values through the depth of a network"),
    "universality": ("studies.universality", "compare sparse orthogonal spectra with theory"),
    "coordinate_check": (
        "studies.coordinate_check",
        "test whether one learning rate suits all densities",
    ),
    "plan": ("tools.plan", "list the layers of a sparse network: weights, FLOPs, bytes"),
    "train": ("training.train", "train one network from one kind of start"),
    "rl": ("rl.train", "train an actor and a critic by PPO from one kind of start"),
    "inspect": ("tools.show", "show how sparse and orthogonal a saved network is"),
    "sweep": ("runs.sweep", "run all configs of a figure or table, here or on a cluster"),
    "report": ("reporting.report", "turn results into CSV files, tables, figures and pages"),
}
PROG = "python -m experiments"


def usage() -> str:
    """Write the commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [--help] ...",
            "",
            *lines,
            "",
            f"Example: {PROG} plan --model resnet32 --density 0.1",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the first argument names with all others; list the commands if none.

    Args:
        arguments: default: those of the process.

    Raises:
        SystemExit: with status 2 for an unknown command, 130 for one that Ctrl-C has stopped.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else "See the list:"
        print(f"error: there is no command {name!r}. {remedy}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    try:
        _import(f"experiments.{COMMANDS[name][0]}").main(rest)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        from experiments.runs import explain

        sys.exit(f"error: {explain(error)}")


def _import(name: str) -> ModuleType:
    """Import a module; an interrupt comes after that.

    Extensions that are being loaded make other errors of it, and a callback that JAX has for the
    garbage collector loses it.
    """
    pressed: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # others may set no handler
    if in_main:
        previous = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        module = importlib.import_module(name)
    finally:
        if in_main:
            signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt
    return module


if __name__ == "__main__":
    main()
